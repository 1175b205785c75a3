"""Which accelerator a machine gets. KVM is not run here: emulation and scripts stand in for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cowstore.errors import InvalidError
from cowstore.machines import accelerators
from cowstore.machines.accelerators import Accelerators, flat_guest, guest_runs, probe_guest

QEMU = "qemu-system-x86_64"
WORKS, FAILS = 85, 1  # how QEMU ends after the guest's report, and where it has no KVM
PATIENCE = 10.0  # seconds

# Guests that never report, or report something else.
HALTS = bytes.fromhex("fa f4")  # cli; hlt
SPINS = bytes.fromhex("eb fe")  # jmp to itself
FAULTS = bytes.fromhex("0f 0b")  # ud2, without a gate: a reset
REPORTS_OTHER = bytes.fromhex("b0 2b e6 f4")  # mov al, 0x2b; out 0xf4, al


class Host:
    """A host with a device, and a program in QEMU's place that counts its runs."""

    def __init__(self, folder: Path) -> None:
        self.device, self.qemu = folder / "kvm", folder / "qemu"
        self.remembered, self.boot = folder / "state" / "accelerator.json", folder / "boot_id"
        self._runs = folder / "runs"
        self.device.touch()
        self.boot.write_text("first\n")
        self.end_with(WORKS)

    def end_with(self, status: int) -> None:
        self.say(f"echo run >> {self._runs}\nexit {status}")

    def say(self, script: str) -> None:
        self.qemu.write_text(f"#!/bin/sh\n{script}\n")
        self.qemu.chmod(0o755)

    @property
    def run_count(self) -> int:
        return len(self._runs.read_text().splitlines()) if self._runs.exists() else 0

    def choose(self, wanted: str = "auto") -> str:
        """Asked anew, as another process would."""
        return Accelerators(self.remembered, qemu=str(self.qemu), device=self.device).choose(wanted)


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = Host(tmp_path)
    monkeypatch.setattr(accelerators, "_BOOT_ID", host.boot)
    return host


def wait_for(path: Path) -> list[int]:
    """The process ids that a script writes, once they are there."""
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"no {path} after {PATIENCE} s"
        time.sleep(0.01)
    return [int(word) for word in path.read_text().split()]


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def end_soon(pids: list[int]) -> bool:
    end = time.monotonic() + PATIENCE
    while any(map(lives, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(map(lives, pids))


# -------------------------------------------------------------------------------------------- the guest


@pytest.mark.program(QEMU)
def test_guest_is_sound():
    """Emulation is what a guest runs under everywhere: what it cannot do there is the guest's fault."""
    assert guest_runs(QEMU, "tcg", 60)


@pytest.mark.program(QEMU)
@pytest.mark.parametrize("code", [HALTS, SPINS], ids=["halts", "spins"])
def test_guest_that_hangs_is_a_no_in_time(code):
    start = time.monotonic()
    assert not guest_runs(QEMU, "tcg", 0.5, flat_guest(code))
    assert 0.5 <= time.monotonic() - start < 3


@pytest.mark.program(QEMU)
@pytest.mark.parametrize("code", [FAULTS, REPORTS_OTHER], ids=["faults", "reports another number"])
def test_guest_that_ends_otherwise_is_a_no_at_once(code):
    start = time.monotonic()
    assert not guest_runs(QEMU, "tcg", 60, flat_guest(code))
    assert time.monotonic() - start < 30


@pytest.mark.program(QEMU)
def test_timer_that_never_comes_is_a_no():
    """The guest has masked it here, which is all the same to what waits for it."""
    masked = probe_guest().replace(bytes.fromhex("b0fee621"), bytes.fromhex("b0ffe621"))
    assert masked != probe_guest()
    assert not guest_runs(QEMU, "tcg", 1, masked)


def test_code_lies_where_it_says():
    """The interrupt's gate leads to `inc ebx`, the jump into long mode to `mov eax, 0x10`."""
    image, start = probe_guest(), accelerators._LOAD
    assert image[accelerators._TICK - start :].startswith(bytes.fromhex("ffc3"))
    assert image[accelerators._LONG_MODE - start :].startswith(bytes.fromhex("b810000000"))
    assert len(image) == accelerators._END - start


# ------------------------------------------------------------------------------------- what is left behind


def test_probe_leaves_no_process(host, tmp_path):
    pids = tmp_path / "pids"
    host.say(f"sleep 60 &\necho $$ $! > {pids}.new\nmv {pids}.new {pids}\nwait")
    assert not guest_runs(str(host.qemu), "kvm", 0.5)
    assert end_soon(wait_for(pids))


def test_child_of_a_qemu_that_ended_goes_too(host, tmp_path):
    pids = tmp_path / "pids"
    host.say(f"sleep 60 &\necho $! > {pids}\nexit {WORKS}")
    assert guest_runs(str(host.qemu), "kvm", PATIENCE)
    assert end_soon(wait_for(pids))


def test_probe_dies_with_its_process(host, tmp_path):
    """Even a SIGKILL leaves no QEMU, and no child of it."""
    pids = tmp_path / "pids"
    host.say(f"sleep 60 &\necho $$ $! > {pids}.new\nmv {pids}.new {pids}\nwait")
    program = "import sys; from cowstore.machines.accelerators import *; guest_runs(sys.argv[1], 'kvm', 60)"
    with subprocess.Popen([sys.executable, "-c", program, str(host.qemu)]) as asking:
        started = wait_for(pids)
        assert all(map(lives, started))
        asking.kill()
    assert end_soon(started)


def test_interrupt_leaves_no_process(host, tmp_path, monkeypatch):
    pids = tmp_path / "pids"

    def interrupted(*_):
        wait_for(pids)
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerators, "_wait", interrupted)
    host.say(f"echo $$ > {pids}.new\nmv {pids}.new {pids}\nsleep 60")
    with pytest.raises(KeyboardInterrupt):
        guest_runs(str(host.qemu), "kvm", PATIENCE)
    assert end_soon(wait_for(pids))


@pytest.mark.parametrize("name", ["qemu", "missing"])
def test_probe_leaves_nothing_open(host, name):
    before = os.listdir("/proc/self/fd")
    with suppress(FileNotFoundError):
        guest_runs(str(host.qemu.with_name(name)), "kvm", PATIENCE)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_probe_leaves_no_file_but_the_answer(host):
    host.choose()
    assert os.listdir(host.remembered.parent) == [host.remembered.name]


# --------------------------------------------------------------------------------------------- auto


@pytest.mark.parametrize(("status", "answer"), [(WORKS, "kvm"), (FAILS, "tcg"), (0, "tcg")])
def test_auto_asks_once(host, status, answer):
    host.end_with(status)
    assert [host.choose() for _ in range(3)] == [answer] * 3
    assert host.run_count == 1


def test_answer_is_private(host):
    host.choose()
    assert host.remembered.stat().st_mode & 0o777 == 0o600
    assert host.remembered.parent.stat().st_mode & 0o777 == 0o700


def test_another_boot_asks_again(host):
    assert host.choose() == "kvm"
    host.boot.write_text("second\n")
    host.choose()
    assert host.run_count == 2


def test_another_qemu_asks_again(host):
    assert host.choose() == "kvm"
    host.end_with(FAILS)
    os.utime(host.qemu, ns=(0, 0))
    assert host.choose() == "tcg"
    assert host.run_count == 2


DAMAGED = {
    "empty": b"",
    "no text": b"\xff\xfe",
    "cut": b'{"asked": {',
    "a list": b"[]",
    "nothing in it": b"{}",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_answer_is_asked_again(host, damage):
    host.choose()
    host.remembered.write_bytes(damage)
    assert [host.choose(), host.choose()] == ["kvm", "kvm"]
    assert host.run_count == 2


@pytest.mark.parametrize("answer", ["xen", 1, None, ["kvm"]])
def test_unknown_answer_is_asked_again(host, answer):
    host.choose()
    known = json.loads(host.remembered.read_text())
    host.remembered.write_text(json.dumps(known | {"answer": answer}))
    assert host.choose() == "kvm"
    assert host.run_count == 2


def test_answer_that_cannot_be_kept_is_given(host):
    host.remembered.mkdir(parents=True)
    assert [host.choose(), host.choose()] == ["kvm", "kvm"]
    assert host.run_count == 2
    assert os.listdir(host.remembered.parent) == [host.remembered.name]


def test_auto_without_a_device_is_emulation_for_now(host):
    """It is not remembered: the module may be loaded the next minute."""
    host.device.unlink()
    assert host.choose() == "tcg"
    host.device.touch()
    assert host.choose() == "kvm"


def test_auto_without_qemu_is_emulation_for_now(host):
    host.qemu.unlink()
    assert host.choose() == "tcg"
    host.end_with(WORKS)
    assert host.choose() == "kvm"


def test_auto_with_a_qemu_that_cannot_be_run_is_emulation(host):
    host.qemu.write_bytes(b"\x7fELF, but not really")
    assert host.choose() == "tcg"
    assert not host.remembered.exists()


# ------------------------------------------------------------------------------------------- by name


def test_name_is_taken_without_a_probe(host):
    assert [host.choose("kvm"), host.choose("tcg")] == ["kvm", "tcg"]
    assert host.run_count == 0


def test_kvm_without_a_device_is_refused(host):
    host.device.unlink()
    with pytest.raises(InvalidError, match="kvm is missing") as caught:
        host.choose("kvm")
    assert "take tcg" in caught.value.hint
    assert host.choose("tcg") == "tcg"


def test_kvm_without_permission_is_refused(host, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may open everything
    with pytest.raises(InvalidError, match="no permission") as caught:
        host.choose("kvm")
    assert "join the group" in caught.value.hint


@pytest.mark.parametrize("word", ["", "KVM", "hvf"])
def test_unknown_word_is_refused(host, word):
    with pytest.raises(InvalidError) as caught:
        host.choose(word)
    assert caught.value.hint == "one of auto, kvm, tcg"
    assert host.run_count == 0
