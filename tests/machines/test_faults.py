"""What goes wrong while a machine is forked or checkpointed: one clear error, the parent runs, nothing is left."""

from __future__ import annotations

import errno
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cowstore import nbd
from cowstore.checkpoints import Checkpoints, Pending
from cowstore.errors import (
    ExistsError,
    GuestError,
    InUseError,
    InvalidError,
    MachineError,
    NoSpaceError,
    NotFoundError,
)
from cowstore.machines import Wish, processes, qemu
from cowstore.machines import identity as identity_module
from cowstore.machines.agent import Agent
from cowstore.machines.pages import Capture
from cowstore.machines.qemu import Qemu, RunningQemu
from cowstore.machines.registry import Machine, Registry

from .desk import SAME, Desk, configuration, desk, errors_of, wait
from .guestkit import Parts

pytestmark = pytest.mark.program("qemu-system-x86_64", "mke2fs")


@pytest.fixture(scope="module")
def place(machine_parts: Parts) -> Iterator[Desk]:
    with desk() as made:
        made.boot(machine_parts)
        made.said("parent", "echo base >/run/base")
        made.manager.checkpoint("parent", "base")
        # A template that is kept may be kept: what is compared is what comes on top of it.
        with made.forked("base", wish=SAME):
            yield made


@pytest.fixture(autouse=True)
def _nothing_left(place: Desk) -> Iterator[None]:
    with place.nothing_left():
        yield
    check_goes_on(place)


def check_goes_on(place: Desk) -> None:
    """The parent runs, is not thought to stand still, and can write to its disk."""
    assert place.manager.info("parent").state == "running"
    assert not place.manager._host.registry.get("parent").held
    assert place.said("parent", "cat /run/base; echo on >/data/on; sync; cat /data/on") == "base\non"


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


# Checkpoints.

STEPS = {
    "flush": (nbd.Server, "flush"),
    "begin": (Checkpoints, "begin"),
    "stop": (RunningQemu, "stop"),
    "save": (RunningQemu, "save_state"),
    "prepare": (Capture, "prepare"),
    "take": (Capture, "take"),
    "memory": (Pending, "take_memory"),
    "state": (Pending, "take_state"),
    "disks": (Pending, "settle_disks"),
    "publish": (Pending, "publish"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_of_a_checkpoint_fails(place, monkeypatch, step):
    monkeypatch.setattr(*STEPS[step], failing(MachineError(f"planted in {step}")))
    with pytest.raises(MachineError, match=f"planted in {step}"):
        place.manager.checkpoint("parent", "half")


@pytest.mark.parametrize("step", ["flush", "take", "publish"])
def test_a_step_of_a_forks_checkpoint_fails(place, monkeypatch, step):
    monkeypatch.setattr(*STEPS[step], failing(MachineError(f"planted in {step}")))
    with pytest.raises(MachineError, match=f"planted in {step}"):
        place.manager.fork("parent", 2)


def test_a_full_disk_while_the_memory_is_taken_in(place, monkeypatch):
    real, told = Capture.pieces, []

    def pieces(self: Capture) -> Iterator[tuple[int, memoryview]]:
        for number, piece in enumerate(real(self)):
            if number == 2:
                told.append(number)
                raise NoSpaceError("planted")
            yield piece

    monkeypatch.setattr(Capture, "pieces", pieces)
    with pytest.raises(NoSpaceError, match="planted"):
        place.manager.checkpoint("parent", "half")
    assert told


def test_a_keep_that_fails_keeps_the_machine(place, monkeypatch):
    with place.forked("base") as (child,):
        with monkeypatch.context() as patch:
            patch.setattr(Pending, "publish", failing(MachineError("planted")))
            with pytest.raises(MachineError, match="planted"):
                place.manager.keep(child, "half")
        assert place.said(child, "cat /run/base") == "base"


def refuse(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """Agents refuse a command."""
    real = Agent.ask

    def ask(self: Agent, asked: str, *arguments: Any, **named: Any) -> Any:
        if asked == command:
            raise GuestError("x", asked, "planted")
        return real(self, asked, *arguments, **named)

    monkeypatch.setattr(Agent, "ask", ask)


def test_a_guest_that_does_not_freeze_is_checkpointed_as_it_is(place, monkeypatch):
    with monkeypatch.context() as patch:
        refuse(patch, "fsfreeze-freeze")
        assert not place.manager.checkpoint("parent", "unfrozen").frozen
    with place.forked("unfrozen") as (child,):
        assert place.said(child, "cat /run/base; echo x >/data/x; sync; cat /data/x") == "base\nx"
    place.manager.delete_checkpoints("unfrozen")


def test_a_name_that_is_taken_meanwhile(place, monkeypatch):
    real = Pending.take_state

    def take_state(self: Pending, state: bytes) -> None:
        monkeypatch.undo()
        place.manager.checkpoint("base-1", "raced")
        real(self, state)

    monkeypatch.setattr(Pending, "take_state", take_state)
    with pytest.raises(ExistsError, match="raced"):
        place.manager.checkpoint("parent", "raced")
    place.manager.delete_checkpoints("raced")


# Children.


@pytest.mark.parametrize("action", [("fork", "base", 2), ("fork", "parent"), ("checkpoint", "parent", "half")])
def test_no_memory_is_left(place, monkeypatch, action):
    monkeypatch.setattr("cowstore.machines.template.available", lambda: 70 << 20)
    verb, *arguments = action
    with pytest.raises(MachineError, match="no memory left") as refused:
        getattr(place.manager, verb)(*arguments)
    assert "stop some machines" in refused.value.hint


def test_a_refresh_that_cannot_be_leaves_the_child(place, monkeypatch):
    child = place.fork("base")[0]
    try:
        monkeypatch.setattr("cowstore.machines.template.available", lambda: 70 << 20)
        with pytest.raises(MachineError, match="no memory left"):
            place.manager.refresh(child)
        monkeypatch.undo()
        assert place.said(child, "cat /run/base") == "base"
    finally:
        if place.manager._host.registry.has(child):
            place.manager.stop(child)


def altered(monkeypatch: pytest.MonkeyPatch, place: Desk, **facts: Any) -> None:
    """What the record of the checkpoint says is another thing; `machine` is merged."""
    real = place.store.checkpoints.info("base")
    machine = real.configuration["machine"] | facts.pop("machine", {})
    changed = replace(real, configuration=real.configuration | facts | {"machine": machine})
    monkeypatch.setattr(Checkpoints, "info", lambda *_: changed)


@pytest.mark.parametrize(
    ("facts", "kind", "said"),
    [
        ({"hypervisor": "QEMU 5.1"}, MachineError, "was taken by QEMU 5.1, and here is QEMU"),
        ({"machine": {"memory": 1 << 30}}, MachineError, "bytes of memory, and its machine 1073741824"),
        ({"machine": {"machine": "pc-q35-99.0"}}, InvalidError, "pc-q35-99.0"),
        ({"machine": {"kernel": "/no/kernel"}}, NotFoundError, "/no/kernel"),
        ({"machine": {"extra": ("-device", "virtio-balloon-pci")}}, InvalidError, "gives memory back"),
        ({"machine": {"extra": ("-device", "virtio-mem-pci,memdev=x")}}, InvalidError, "gives memory back"),
        ({"machine": {"disks": ()}}, InvalidError, "has 1 disks"),
        ({"machine": {"colour": "red"}}, InvalidError, "makes no sense"),
        ({"nic": {"model": "e1000"}}, InvalidError, "is not that of a machine"),
        ({"agent": False}, GuestError, "no agent"),
    ],
)
def test_a_record_that_does_not_match(place, monkeypatch, facts, kind, said):
    altered(monkeypatch, place, **facts)
    with pytest.raises(kind, match=said):
        place.manager.fork("base", 2)


@pytest.mark.parametrize(
    "facts",
    [
        {"nic": None},
        {"nic": {"model": "e1000e", "port": 0, "mac": "52:54:00:00:00:01"}},
        {"machine": {"cpus": 2}},
    ],
    ids=["no card", "another card", "a processor more"],
)
def test_a_state_of_another_device_tree_is_refused(place, monkeypatch, facts):
    altered(monkeypatch, place, **facts)
    children = place.manager.fork("base", 2, wish=SAME)
    assert len(errors_of(children)) == 2
    assert all("load of migration failed" in error for error in errors_of(children)), errors_of(children)


@pytest.mark.parametrize(
    "damage",
    [lambda state: b"", lambda state: state[: len(state) // 2], lambda state: b"\xff" * len(state),
     lambda state: state[:100] + bytes(64) + state[164:]],
    ids=["empty", "half", "garbage", "a hole"],
)  # fmt: skip
def test_a_damaged_state_is_refused(place, monkeypatch, damage):
    real = Checkpoints.state
    monkeypatch.setattr(Checkpoints, "state", lambda *arguments: damage(real(*arguments)))
    children = place.manager.fork("base", 2, wish=SAME)
    assert len(errors_of(children)) == 2
    for error in errors_of(children):
        assert "is no state of a machine's devices" in error or "load of migration failed" in error


PRETENDERS = {
    "exits": "echo broken by a test >&2; exit 1",
    "is killed": "echo broken by a test >&2; kill -9 $$",
    "hangs": "echo broken by a test >&2; exec sleep 1000",
}


@pytest.fixture
def pretender(place: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in QEMU's place that tells the same version, and runs nothing."""

    def pretend(script: str) -> None:
        program = tmp_path / "qemu"
        real = shutil.which(qemu.PROGRAM)
        program.write_text(f'#!/bin/sh\ncase "$*" in --version|*help) exec {real} "$@" ;; esac\n{script}\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(place.manager._host, "hypervisor", Qemu(str(program)))
        monkeypatch.setattr(qemu, "_START_SECONDS", 1.0)

    return pretend


@pytest.mark.parametrize("script", PRETENDERS.values(), ids=PRETENDERS)
def test_a_qemu_that_does_not_come_up(place, pretender, machine_parts, script):
    pretender(script)
    errors = errors_of(place.manager.fork("base", 2))
    assert len(errors) == 2
    assert all("broken by a test" in error for error in errors), errors
    place.store.clone("disk", "spare").close()
    try:
        with pytest.raises(MachineError, match="broken by a test"):
            place.manager.start("new", configuration(machine_parts, "spare"))
    finally:
        place.store.delete("spare")


def test_without_qemu(place, monkeypatch, machine_parts):
    monkeypatch.setattr(place.manager._host, "hypervisor", Qemu("no-such-qemu"))
    with pytest.raises(NotFoundError, match="no program named 'no-such-qemu'") as refused:
        place.manager.fork("base", 2)
    assert "apt install" in refused.value.hint
    with pytest.raises(NotFoundError, match="no-such-qemu"):
        place.manager.start("new", configuration(machine_parts, "parent"))


@pytest.mark.parametrize("way", ["fork", "start"])
def test_a_process_that_cannot_be_put_on_record(place, monkeypatch, machine_parts, way):
    real = Registry.change

    def change(self: Registry, machine: Machine, **fields: Any) -> Machine:
        if fields.get("pid"):
            raise OSError(errno.ENOSPC, "planted")
        return real(self, machine, **fields)

    place.store.clone("disk", "spare").close()
    monkeypatch.setattr(Registry, "change", change)
    if way == "fork":
        (error,) = errors_of(place.manager.fork("base"))
        assert "planted" in error
    else:
        with pytest.raises(OSError, match="planted"):
            place.manager.start("new", configuration(machine_parts, "spare"))
    wait(lambda: is_deleted(place, "spare"), "the server lets go of it")


def is_deleted(place: Desk, name: str) -> bool:
    try:
        place.store.delete(name)
    except InUseError:
        return False
    return True


def test_disks_that_cannot_be_cloned(place, monkeypatch):
    monkeypatch.setattr(Checkpoints, "clone_disks", failing(NoSpaceError("planted")))
    with pytest.raises(NoSpaceError, match="planted"):
        place.manager.fork("base", 2)


def test_a_child_that_does_not_take_its_identity(place, monkeypatch):
    def apply(agent: Agent, machine: str, *_: object) -> None:
        if machine == "base-3":
            raise GuestError(machine, "identity", "planted")

    monkeypatch.setattr(identity_module, "apply", apply)
    children = place.manager.fork("base", 2)
    assert [(child.name, child.error) for child in children] == [
        ("base-2", ""),
        ("base-3", "the guest of base-3: identity: planted"),
    ]
    assert "base-2" in [one.name for one in place.manager.machines()]
    place.manager.stop("base-2")


def test_a_child_whose_qemu_dies_in_its_hook(place, monkeypatch):
    def run_hook(agent: Agent, machine: str, *_: object) -> None:
        processes.kill(place.manager._host.registry.get(machine).pid)
        agent.ask("ping")

    monkeypatch.setattr(identity_module, "run_hook", run_hook)
    (error,) = errors_of(place.manager.fork("base", wish=Wish(identity=False, hook=b"true")))
    assert "the guest of base-2: ping: " in error


def test_a_guest_without_an_agent_can_only_be_copied(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunningQemu, "has_agent", lambda _: False)
        moment = place.manager.checkpoint("parent", "mute")
        assert not moment.frozen
    with pytest.raises(GuestError, match="no agent") as refused:
        place.manager.fork("mute")
    assert "--identity none" in refused.value.hint
    with place.forked("mute", wish=SAME) as (child,):
        assert place.said(child, "cat /run/base") == "base"
    place.manager.delete_checkpoints("mute")
