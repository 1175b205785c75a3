"""What the command does when something is wrong, and how it behaves as a process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import cowstore
from cowstore_cli import exits
from cowstore_cli.main import cli
from tests.sample import MIB


def program(*words: str, **options) -> subprocess.CompletedProcess[bytes]:
    """Run the command as a process of its own."""
    command = [sys.executable, "-m", "cowstore_cli", *words]
    return subprocess.run(command, capture_output=True, check=False, **options)


# ------------------------------------------------------------------------------------- what goes wrong


def test_errors_are_one_line_and_leave_stdout_alone(run, stocked):
    result = run("show", "nobody", code=3)
    assert result.stdout == ""
    assert result.stderr.startswith("cowstore: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ls", "--store", "nowhere"], 3),
        (["show", "nobody"], 3),
        (["rm", "nobody"], 3),
        (["clone", "nobody", "a"], 3),
        (["clone", "debian", "debian"], 4),
        (["clone", "debian", ".hidden"], 2),
        (["clone", "debian", "a/b"], 2),
        (["import", "nofile", "a"], 10),
        (["import", ".", "a"], 10),
        (["export", "debian", "."], 2),
        (["export", "debian", "nowhere/out.raw"], 3),
        (["create", "a", "20GB"], 2),
        (["create", "a", "many"], 2),
        (["seal", "debian"], 2),
        (["frobnicate"], 2),
        (["ls", "--frobnicate"], 2),
    ],
)
def test_exit_codes(run, stocked, words, code):
    assert run(*words, code=code).stderr.startswith("cowstore: ")


def test_a_directory_that_is_no_store(run, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "file").touch()
    assert run("ls", code=9).stderr.startswith("cowstore: ")


def test_no_store_named(run):
    result = CliRunner().invoke(cli, ["ls"], env={"COWSTORE": None})
    assert result.exit_code == 2
    assert "COWSTORE" in result.stderr


def test_device_in_use(run, stocked):
    run("clone", "debian", "desk-1")
    hold = (
        "import sys, cowstore\n"
        "store = cowstore.open(sys.argv[1])\n"
        "device = store.device('desk-1')\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
        "device.close()\n"
        "store.close()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(stocked)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        for words in (["write", "desk-1"], ["rm", "desk-1"], ["reset", "desk-1"], ["resize", "desk-1", "1M"]):
            assert f"process {holder.pid}" in run(*words, stdin=b"x", code=5).stderr
        run("read", "desk-1")
        run("fork", "desk-1", "child")
        holder.communicate()
    run("rm", "desk-1")


def test_every_error_of_the_library_has_a_code():
    distinct = {code for _, code, _ in exits.CODES}
    assert len(distinct) == len(exits.CODES)
    assert exits.code_of(cowstore.errors.BlockCorruptError(1, "bad")) == 6
    assert exits.code_of(cowstore.errors.RangeError("a", 0, 1, 0)) == 2
    assert exits.code_of(cowstore.errors.ClosedError("closed")) == 1
    assert exits.code_of(OSError(errno.ENOSPC, "No space left on device")) == 7
    assert exits.code_of(RuntimeError()) == 1


def test_lines_end_with_the_hint():
    assert exits.line_of(cowstore.errors.NoSpaceError("f", hint="free\nsome")) == (
        "cowstore: no space left for f (free some)"
    )
    assert exits.line_of(OSError(errno.EIO, "Input/output error", "f")) == "cowstore: f: Input/output error"
    assert "--debug" in exits.line_of(ZeroDivisionError("division by zero"))


def test_traceback_only_with_debug(run, stocked):
    assert "Traceback" not in run("show", "nobody", code=3).stderr
    for words in (["--debug", "show", "nobody"], ["show", "nobody", "--debug"]):
        assert "Traceback" in run(*words, code=3).stderr


def test_without_a_command_the_help_is_shown(run):
    assert "Commands:" in run(code=2).stderr


# ---------------------------------------------------------------------------------------- as a process


def test_reader_that_goes_away_is_not_an_error(run, stocked):
    run("clone", "debian", "--count", "5000")
    command = [sys.executable, "-m", "cowstore_cli", "-s", str(stocked), "ls"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt(run, stocked, number):
    run("create", "scratch", "64M")
    command = [sys.executable, "-m", "cowstore_cli", "-s", str(stocked), "write", "scratch"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(b"x" * 8 * MIB)  # more than a pipe holds: when this returns, it is reading
        process.stdin.flush()
        process.send_signal(number)
        process.wait(20)
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 128 + number
    assert not any(run("read", "scratch", "--length", "8M").stdout_bytes)


@pytest.mark.parametrize(
    "words",
    [
        ["ls"],
        ["ls", "--json"],
        ["clone", "debian", "other"],
        ["fork", "desk-1", "other"],
        ["seal", "desk-1", "other"],
        ["reset", "desk-1"],
        ["rename", "debian", "other"],
        ["rm", "desk-1"],
        ["init", "other"],
        ["--version"],
        ["--help"],
    ],
)
def test_light_commands_import_nothing_heavy(run, stocked, words):
    run("clone", "debian", "desk-1")
    script = (
        "import sys\n"
        "from cowstore_cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as done:\n"
        "    assert not done.code, done.code\n"
        "    sys.exit(', '.join({'numpy', 'rich', 'click.testing'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "-s", str(stocked), *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_whole_output_arrives_unbuffered(run, stocked):
    """With PYTHONUNBUFFERED a write to stdout may take a part only; the disk must arrive whole all the same."""
    Path("big.raw").write_bytes(os.urandom(3 * MIB))
    run("import", "big.raw", "big")
    done = program("-s", str(stocked), "export", "big", "-", env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert done.stdout == Path("big.raw").read_bytes()


# ------------------------------------------------------------------------------------ shell completion


def complete(line: str, store: Path) -> list[str]:
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_COWSTORE_COMPLETE": "bash_complete"}
    done = subprocess.run(
        [sys.executable, "-c", "from cowstore_cli.main import main; main()"],
        env=os.environ | variables | {"COWSTORE": str(store)},
        capture_output=True,
        text=True,
        check=True,
    )
    return [one.partition(",")[2] for one in done.stdout.split()]


def test_completion_knows_commands_and_devices(run, stocked):
    run("clone", "debian", "desk-1", "desk-2")
    assert complete("cowstore se", stocked) == ["seal", "serve"]
    assert complete("cowstore show de", stocked) == ["debian", "desk-1", "desk-2"]
    assert complete("cowstore seal d", stocked) == ["desk-1", "desk-2"]
    assert complete("cowstore rm desk-1 desk-", stocked) == ["desk-1", "desk-2"]
    assert complete("cowstore show --j", stocked) == ["--json"]
    assert complete("cowstore show d", stocked / "nowhere") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(run, shell):
    assert "_COWSTORE_COMPLETE" in run("completion", shell).stdout


def test_completion_guesses_the_shell(run, monkeypatch):
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert run("completion").stdout == run("completion", "fish").stdout
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    run("completion", code=2)
