"""What a person at a terminal sees: tables, trees and bars, and none of their codes where nobody looks."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.sample import MIB

CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def screen(run, stocked):
    """Run the command on a terminal of 80 columns; returns all that was sent to it, codes included."""

    def screen(*words: str, code: int = 0) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        command = [sys.executable, "-m", "cowstore_cli", "-s", str(stocked), *words]
        environment = os.environ | {"TERM": "xterm-256color"}
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            shown = b""
            try:
                while part := os.read(ours, 65536):
                    shown += part
            except OSError:  # how Linux says that the other side is closed
                pass
        os.close(ours)
        assert process.returncode == code, shown.decode()
        return shown.decode().replace("\r\n", "\n")

    return screen


def lines(shown: str) -> list[str]:
    """What can be read, without codes, trailing blanks and empty lines."""
    return [line.rstrip() for line in CODES.sub("", shown).split("\n") if line.strip()]


def test_tables_have_a_rule(screen):
    head, rule, row = lines(screen("ls"))
    assert head.split() == ["NAME", "KIND", "SIZE", "PARENT", "CREATED"]
    assert set(rule.strip()) == {"─"}
    assert row.split()[:4] == ["debian", "image", "20KiB", "-"]


def test_tree_is_drawn(screen, run):
    run("clone", "debian", "desk-1", "desk-2")
    run("fork", "desk-2", "desk-2a")
    titles = [line.partition(" clone,")[0].partition(" image,")[0] for line in lines(screen("tree"))]
    assert titles == ["debian", "├── desk-1", "└── desk-2", "    └── desk-2a"]


def test_deep_lineage_keeps_its_names(screen, run):
    run("clone", "debian", "desk-0")
    for number in range(60):
        run("fork", f"desk-{number}", f"desk-{number + 1}")
    assert [f"desk-{number} " in line for number, line in enumerate(lines(screen("tree"))[1:])] == [True] * 61


def test_nothing_to_list_is_said(screen, run):
    run("clone", "debian", "desk-1")
    assert lines(screen("diff", "debian", "desk-1")) == ["debian and desk-1 do not differ"]
    run("rm", "debian", "desk-1")
    for words in (["ls"], ["tree"]):
        assert lines(screen(*words)) == ["no devices yet: `cowstore import` and `cowstore create` make some"]


@pytest.mark.parametrize(
    ("step", "words"),
    [("import", ["import", "big.raw", "big"]), ("export", ["export", "debian", "out.raw"]), ("mark", ["gc"]),
     ("backup", ["backup", "copy"]), ("usage", ["du"])],
)  # fmt: skip
def test_long_work_shows_a_bar_that_vanishes(screen, step, words):
    Path("big.raw").write_bytes(os.urandom(8 * MIB))
    shown = screen(*words)
    assert re.search(rf"{step} .*%", CODES.sub("", shown))
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0  # the cursor is back
    assert "━" not in shown.rpartition("\x1b[2K")[2]  # the bar is not


def test_bar_tells_how_far_it_is(screen):
    Path("big.raw").write_bytes(os.urandom(8 * MIB))
    assert "8MiB of 8MiB" in CODES.sub("", screen("import", "big.raw", "big"))


def test_no_bar_for_a_pipe(run, stocked):
    for words in (["export", "debian", "out.raw"], ["gc"], ["du"], ["backup", "copy"]):
        assert run(*words).stderr == ""


def test_json_is_json_on_a_terminal_too(screen):
    assert screen("ls", "--json").startswith("[\n")


def test_a_disk_is_not_shown(screen):
    for words in (["export", "debian", "-"], ["read", "debian"]):
        assert "redirect standard output" in screen(*words, code=2)


def test_errors_are_the_same_line(screen):
    assert lines(screen("show", "nobody", code=3)) == [
        "cowstore: no device named 'nobody' (`cowstore ls` shows all names)"
    ]


def test_summaries_fit_a_terminal(screen):
    commands = screen("--help").partition("Commands:")[2]
    assert commands
    assert "..." not in commands
