"""`cowstore vm`, in processes of its own: a life of machines, and what outlives their server.

The tests follow each other: one boot serves all of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowstore

from .channel import Channel
from .commands import Commands, commands
from .desk import processes
from .guestkit import Parts
from .tracing import START, Trace, check_forked, check_unbroken, parsed

pytestmark = pytest.mark.program("qemu-system-x86_64", "mke2fs", "e2fsck")


@pytest.fixture(scope="module")
def shell(machine_parts: Parts) -> Iterator[Commands]:
    with commands() as made:
        made.run("import", str(machine_parts.disk), "disk")
        made.run("clone", "disk", "spare")
        made.start(machine_parts, "parent")
        made.said("parent", START)
        yield made


@pytest.fixture(autouse=True)
def _parent_only(shell: Commands) -> Iterator[None]:
    """One test that fails does not have the next ones fail."""
    yield
    if others := [name for name in shell.machines() if name != "parent"]:
        shell.run("vm", "stop", *others)


def trace(shell: Commands, name: str) -> Trace:
    found = parsed(shell.said(name, "cat /run/trace") + "\n")
    check_unbroken(found)
    return found


def test_what_show_and_ls_tell(shell):
    one = shell.json("vm", "show", "parent")
    (listed,) = shell.json("vm", "ls")
    moving = {"memory", "disks"}
    assert {key: listed[key] for key in listed.keys() - moving} == {key: one[key] for key in one.keys() - moving}
    assert one["state"] == "running"
    assert Path(f"/proc/{one['pid']}/comm").read_text().strip() == "cowstore-vm"
    assert (one["parent"], one["checkpoint"], one["identity"]) == (None, None, None)
    assert one["memory"]["size"] == 160 << 20
    assert 20 << 20 < one["memory"]["private_bytes"] <= 160 << 20
    assert [disk["name"] for disk in one["disks"]] == ["parent"]
    assert Path(one["qmp_socket"]).is_socket()
    said = Path(one["console_log"]).read_text()
    assert "guest is up" in said
    assert shell.json("vm", "console", "parent") == {
        "name": "parent",
        "console_log": one["console_log"],
        "text": said,
    }
    assert "guest is up" in shell.run("vm", "console", "parent", "--log")
    table = shell.run("vm", "ls").splitlines()
    assert table[0].split() == ["NAME", "STATE", "PARENT", "AGE", "MEMORY", "DISK"]
    assert table[1].split()[:3] == ["parent", "running", "-"]
    assert "qmp socket" in shell.run("vm", "show", "parent")


def test_exec_is_as_the_program_is(shell):
    done = shell.ended(
        "vm", "exec", "parent", "--stdin", "--", "/bin/sh", "-c", "cat; echo no >&2; exit 7", stdin=b"in\0\xff"
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, b"in\0\xff", b"no\n")
    assert shell.json("vm", "exec", "parent", "/bin/echo", "-n", "x") == {"status": 0, "output": "x", "errors": ""}
    assert "not ended within 0.3 s" in shell.refused(
        "vm", "exec", "parent", "--timeout", "0.3", "--", "/bin/sleep", "3", code=12
    )
    assert "/bin/nothing" in shell.refused("vm", "exec", "parent", "/bin/nothing", code=12)
    signalled = ("vm", "exec", "parent", "--", "/bin/sh", "-c", "kill -9 $$")
    assert shell.ended(*signalled).returncode == 128 + 9


def test_the_console_talks(shell):
    words = [sys.executable, "-m", "cowstore_cli", "vm", "console", "parent"]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, env=shell.environment) as talking:
        assert talking.stdin is not None
        assert talking.stdout is not None
        talking.stdin.write(b"echo $((6 * 7))\r")
        talking.stdin.flush()
        said = b""
        while b"42" not in said:
            piece = os.read(talking.stdout.fileno(), 1024)
            assert piece, said
            said += piece
        talking.stdin.write(b"\x1d")
        talking.stdin.flush()
        assert talking.wait(20) == 0


def test_a_life_of_machines(shell):
    children = shell.json("vm", "fork", "parent", "-n", "2", "--prefix", "desk-")
    assert [one["name"] for one in children] == ["desk-1", "desk-2"]
    assert all(0 < one["running"] < one["ready"] and not one["error"] for one in children)
    assert shell.machines() == ["desk-1", "desk-2", "parent"]
    (automatic,) = shell.json("vm", "checkpoints")
    assert automatic["automatic"]
    assert f"({automatic['name']})" in shell.run("vm", "checkpoints")
    one = shell.json("vm", "show", "desk-1")
    assert (one["parent"], one["checkpoint"], one["disposable"]) == ("parent", automatic["name"], True)
    assert one["identity"]["hostname"] == shell.said("desk-1", "hostname") == "desk-1"
    assert one["identity"]["mac"] == shell.said("desk-1", "cat /sys/class/net/e*/address")
    check_forked([trace(shell, name) for name in ("parent", "desk-1", "desk-2")])

    shell.said("desk-1", "echo gone >/data/gone; sync")
    assert shell.json("vm", "refresh", "desk-1")[0]["name"] == "desk-1"
    assert shell.said("desk-1", "hostname; ls /data/gone 2>/dev/null || echo fresh").split() == ["desk-1", "fresh"]

    shell.said("desk-1", "echo kept >/run/kept")
    moment = shell.json("vm", "checkpoint", "desk-1", "moment")
    assert moment["frozen"]
    assert 0 < moment["pause"] < 20
    assert "kept desk-1 as checkpoint kept-desk" in shell.run("vm", "keep", "desk-1", "kept-desk")
    assert shell.json("vm", "stop", "desk-2") == ["desk-2"]
    assert shell.machines() == ["parent"]
    assert [one["name"] for one in shell.json("vm", "checkpoints")] == ["kept-desk", "moment"]
    table = shell.run("vm", "fork", "kept-desk")
    assert table.split()[:4] == ["NAME", "RUNNING", "READY", "kept-desk-1"]
    assert shell.said("kept-desk-1", "cat /run/kept") == "kept"
    assert "stop its children first: kept-desk-1" in shell.refused("vm", "rm", "kept-desk", code=5)
    assert "stopped kept-desk-1" in shell.run("vm", "stop", "kept-desk-1")
    assert shell.json("vm", "rm", "kept-desk") == ["kept-desk"]
    assert [one["name"] for one in shell.json("ls") if one["kind"] == "clone"] == ["parent", "spare"]


def test_who_holds_a_checkpoint_is_not_this_process(shell):
    shell.json("vm", "fork", "moment")
    assert "this process" not in shell.refused("vm", "rm", "moment", code=5)


def test_a_hook_that_fails(shell, tmp_path):
    hook = tmp_path / "hook"
    hook.write_text("case $COWSTORE_NAME in *-1) echo no such user >&2; exit 4;; esac")
    children = shell.json("vm", "fork", "moment", "-n", "2", "--hook", str(hook), code=12)
    assert [bool(one["error"]) for one in children] == [True, False]
    assert (
        "moment-1 was stopped: the guest of moment-1: hook: it ended with status 4: no such user" in shell.errors
    )
    assert shell.machines() == ["moment-2", "parent"]
    assert shell.json("vm", "refresh", "moment-2", "--hook", str(hook))[0]["error"] == ""
    shell.run("vm", "stop", "moment-2")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("fork", "nobody"), 3, "nobody"),
        (("show", "nobody"), 3, "no machine named 'nobody' (`cowstore vm ls` shows all that run)"),
        (("stop", "parent", "nobody"), 3, "nobody"),
        (("exec", "nobody", "true"), 3, "nobody"),
        (("console", "nobody"), 3, "nobody"),
        (("refresh", "parent"), 2, "was started and not forked"),
        (("checkpoint", "nobody", "x"), 3, "nobody"),
        (("checkpoint", "parent", "moment"), 4, "exists already"),
        (("checkpoint", "parent", "parent"), 4, "exists already"),
        (("keep", "nobody"), 3, "nobody"),
        (("rm", "nobody"), 3, "nobody"),
        (("start", "parent", "--disk", "spare", "--accel", "tcg"), 4, "machine 'parent' exists already"),
        (("start", "moment", "--disk", "spare", "--accel", "tcg"), 4, "exists already"),
        (("start", "x", "--disk", "parent", "--accel", "tcg"), 5, "it is a disk of parent"),
        (("start", "x", "--disk", "nothing", "--accel", "tcg"), 3, "nothing"),
        (("start", "x", "--disk", "disk", "--accel", "tcg"), 2, "'disk' is an image"),
        (("start", "x", "--accel", "tcg"), 2, "nothing to boot from"),
        (("start", "x", "--disk", "spare", "--accel", "tcg", "--machine", "pc"), 2, "machine type 'pc'"),
        (("start", "x", "--disk", "spare", "--accel", "tcg", "--memory", "1M"), 2, "no memory for a machine"),
        (("start", "x", "--disk", "spare", "--accel", "tcg", "--kernel", "/none"), 3, "no file named '/none'"),
        (("start", "x", "--disk", "spare", "--accel", "tcg", "--cpu", "no-such"), 12, "no-such"),
        (
            ("start", "x", "--disk", "spare", "--accel", "tcg", "--extra", "-device virtio-balloon-pci"),
            2, "gives memory back",
        ),
        (
            ("start", "x", "--disk", "spare", "--accel", "tcg", "--extra", "-object memory-backend-ram,id=x"),
            2, "is not allowed here",
        ),
        (
            ("start", "x", "--disk", "spare", "--accel", "tcg", "--extra", "-device virtio-mem-pci,memdev=x"),
            2, "gives memory back",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_error_and_leaves_nothing(shell, words, code, said):
    before = everything(shell)
    assert said in shell.refused("vm", *words, code=code)
    assert everything(shell) == before


def everything(shell: Commands) -> dict[str, object]:
    """What machines make."""
    return {
        "processes": processes(shell.folder),
        "folders": sorted(path.name for path in (shell.place / "m").glob("*/")),
        "devices": [one["name"] for one in shell.json("ls")],
        "checkpoints": [one["name"] for one in shell.json("vm", "checkpoints")],
    }


def test_machines_outlive_their_server_and_are_found_again(shell):
    """After kill -9 of all of ours guests wait for their disks; the next command brings these back."""
    (child,) = (one["name"] for one in shell.json("vm", "fork", "parent"))
    (doomed,) = (one["name"] for one in shell.json("vm", "fork", "parent", "--prefix", "doomed-"))
    pids = {name: shell.json("vm", "show", name)["pid"] for name in ("parent", child, doomed)}
    monitor = Channel.monitor(Path(shell.json("vm", "show", child)["qmp_socket"]))
    shell.kill_server()
    os.kill(pids[doomed], signal.SIGKILL)
    halves = plant_half_started(shell)
    assert all(Path(f"/proc/{pids[name]}").exists() for name in ("parent", child))
    assert monitor.run("query-status")["running"]
    monitor.close()

    assert shell.machines() == ["parent", child], "those that still run, and no others"
    assert {name: shell.json("vm", "show", name)["pid"] for name in ("parent", child)} == {
        name: pids[name] for name in ("parent", child)
    }
    with halves:
        assert halves.wait(10) == -signal.SIGKILL, "what was half started is ended"
    names = [one["name"] for one in shell.json("ls") if one["kind"] == "clone"]
    assert sorted(names) == sorted(["parent", child, "spare"])
    assert len(list((shell.place / "m").glob("*/"))) == 2
    for name in ("parent", child):
        shell.said(name, "echo later >/data/later; sync; cat /data/later")
        trace(shell, name)
    check_forked([trace(shell, name) for name in ("parent", child)])
    shell.said(child, "echo outlived >/run/outlived")
    (grandchild,) = (one["name"] for one in shell.json("vm", "fork", child))
    assert shell.said(grandchild, "cat /run/outlived; hostname").split() == ["outlived", grandchild]
    shell.run("vm", "stop", child, grandchild)


def plant_half_started(shell: Commands) -> subprocess.Popen[bytes]:
    """What a server leaves that dies while it starts a machine: a record without a pid, a clone, the process."""
    records = [json.loads(path.read_text()) for path in (shell.place / "m").glob("*/machine.json")]
    (facts,) = (record for record in records if record["name"] == "parent")
    with cowstore.open(shell.store) as store:
        store.clone("disk", "half", ephemeral=True).close()
        number = store.info("half").number
    half = shell.place / "m" / "00000000"
    half.mkdir(mode=0o700)
    facts |= {"key": half.name, "name": "half", "disks": [number], "disposable": True, "ready": False}
    facts |= {"pid": 0, "started": 0}
    facts["configuration"]["disks"] = ["half"]
    (half / "machine.json").write_text(json.dumps(facts))
    words = ["qemu-of-a-test", f"socket,id=qmp,path={half / 'qmp.sock'},server=on"]
    return subprocess.Popen(["/bin/sh", "-c", "read -r _", *words], stdin=subprocess.PIPE)


DIES = """
import os, signal, sys
from cowstore.machines.{module} import {kind}
from cowstore_cli.main import main
{kind}.{method} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ["cowstore", "serve", "--json"]
main()
"""


def test_a_server_that_dies_in_a_checkpoint_and_one_that_dies_in_a_fork(shell):
    """The machine stands still, its file systems are frozen: the next command has it go on."""
    before = everything(shell)
    with dying(shell, module="pages", kind="Capture", method="take"):
        assert "has gone" in shell.refused("vm", "checkpoint", "parent", "half", code=12)
    monitor = Channel.monitor(folder_of(shell, "parent") / "qmp.sock")
    assert not monitor.run("query-status")["running"], "it is left as the dead have left it"
    monitor.close()
    with dying(shell, module="qemu", kind="RunningQemu", method="replace_nic"):
        assert shell.json("vm", "show", "parent")["state"] == "running"
        assert "has gone" in shell.refused("vm", "fork", "parent", "-n", "2", code=12)
    assert len(processes(shell.folder)) > 1, "children that nobody was given"
    assert shell.machines() == ["parent"]
    assert everything(shell) == before
    assert shell.said("parent", "echo on >/data/on; sync; cat /data/on") == "on"
    trace(shell, "parent")


def folder_of(shell: Commands, name: str) -> Path:
    """A machine's folder, when there is no server to ask."""
    records = (shell.place / "m").glob("*/machine.json")
    (found,) = (path.parent for path in records if json.loads(path.read_text())["name"] == name)
    return found


@contextmanager
def dying(shell: Commands, **what: str) -> Iterator[None]:
    """A server that ends at once when it calls that; it has done so when the block ends."""
    shell.kill_server()
    words = [sys.executable, "-c", DIES.format(**what)]
    with subprocess.Popen(
        words, env=shell.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        yield
        assert server.wait(20) == -signal.SIGKILL


def test_a_checkpoint_is_forked_after_everything_was_stopped(shell):
    (child,) = (one["name"] for one in shell.json("vm", "fork", "parent"))
    shell.said(child, "echo memory >/run/deep; echo disk >/data/deep")
    before = trace(shell, child)
    shell.run("vm", "checkpoint", child, "deep")
    shell.run("vm", "stop", child)
    # As at the end of a day: the parent shuts down, and its disk is sound.
    shell.run("vm", "stop", "parent")
    assert shell.machines() == []
    shell.kill_server()
    children = [one["name"] for one in shell.json("vm", "fork", "deep", "-n", "2")]
    for name in children:
        assert shell.said(name, "cat /run/deep /data/deep; hostname").split() == ["memory", "disk", name]
    traces = [trace(shell, name) for name in children]
    assert check_forked(traces) >= len(before)
    assert all(one[: len(before)] == before for one in traces)
    shell.run("vm", "stop", *children)


def test_a_started_machine_was_shut_down_and_its_disk_is_sound(shell, tmp_path):
    disk = tmp_path / "disk"
    shell.run("export", "parent", str(disk))
    checked = subprocess.run(["e2fsck", "-fn", str(disk)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
