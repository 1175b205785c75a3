"""Checkpointing: one consistent moment of a running machine, while it stands still for as short as can be."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from cowstore.errors import GuestError, MachineError, StoreError

from .agent import Agent
from .host import Host
from .hypervisor import Running
from .pages import PAGE_SIZE, Capture, own_pages
from .registry import Machine
from .stores import Checkpoint, Pending, Progress
from .template import Template, check_room
from .templates import NAME

_log = logging.getLogger("cowstore.machines")
_FREEZE_SECONDS = 20.0


@dataclass
class Moment:
    """What a checkpoint of a running machine came to.

    Attributes:
        checkpoint: The checkpoint.
        pause: Seconds for which the machine stood still.
        pages: How many pages were its own.
        frozen: Whether its file systems were frozen.
    """

    checkpoint: Checkpoint
    pause: float
    pages: int
    frozen: bool


@dataclass
class _Stillness:
    """A machine that stands still.

    Attributes:
        frozen: Whether its file systems are frozen.
        agent: Whether its guest has an agent.
        seconds: For how long it did, in the end.
    """

    frozen: bool = False
    agent: bool = False
    seconds: float = field(default=0.0)


def take(
    host: Host, machine: Machine, name: str, *, automatic: bool, freezing: bool, progress: Progress
) -> Moment:
    """Takes a checkpoint of a machine, which nobody else is at work on. What fails leaves it running.

    Args:
        host: Where.
        machine: The machine.
        name: The checkpoint's name.
        automatic: Whether it goes when no machine needs it.
        freezing: Whether file systems are frozen first, where the guest has an agent.
        progress: Told ("memory", bytes done, bytes in all).

    Raises:
        MachineError: It cannot be done.
        ExistsError: The name is taken.
    """
    host.store.checkpoints.check_free(name)
    running = host.running(machine)
    if (status := running.status()) != "running":
        raise MachineError(f"machine {machine.name} is {status}, and not running")
    address, size = host.address(machine), machine.configuration.memory
    capture = Capture(NAME, machine.pid, address, size)
    pending = None
    try:
        check_room(len(own_pages(machine.pid, address, size)) * PAGE_SIZE, f"a checkpoint of {machine.name}")
        capture.prepare()
        with _standing_still(host, machine, running, freezing=freezing) as still:
            for disk in machine.configuration.disks:
                host.disks.flush(disk)
            pending = host.store.checkpoints.begin(machine.configuration.disks)
            state = running.save_state()
            capture.take()
        _take_in(pending, capture, state, machine.moment, progress)
        checkpoint = pending.publish(name, facts(host, machine, still), automatic=automatic)
        moment = Moment(checkpoint, still.seconds, len(capture.pages), still.frozen)
        if not machine.moment:  # all of its memory is its own, so what was captured is all there is
            host.templates.put(checkpoint.number, Template.seal(capture.detach(), size))
        return moment
    finally:
        if pending is not None:
            pending.close()
        capture.close()


def _take_in(pending: Pending, capture: Capture, state: bytes, since: int, progress: Progress) -> None:
    """Takes everything in, side by side: what each of them waits for is the disk, and they go there together."""
    with ThreadPoolExecutor(3, "cowstore-checkpoint") as pool:
        work = [
            pool.submit(pending.take_memory, capture, since=since or None, progress=progress),
            pool.submit(pending.take_state, state),
            pool.submit(pending.settle_disks),
        ]
    for one in work:
        one.result()


def facts(host: Host, machine: Machine, still: _Stillness) -> dict[str, object]:
    """What has to be known of a machine to load its state into another one."""
    nic = machine.nic
    return {
        "hypervisor": host.hypervisor.version(),
        "machine": machine.configuration.facts(),
        "generation": machine.generation,
        "nic": None if nic is None else {"model": nic.model, "port": nic.port, "mac": nic.mac},
        "frozen": still.frozen,
        "agent": still.agent,
        "from": machine.name,
    }


@contextmanager
def _standing_still(host: Host, machine: Machine, running: Running, *, freezing: bool) -> Iterator[_Stillness]:
    """Freezes the guest's file systems where it has an agent, and stops the machine; undoes both in any case.

    The record says so first: whoever finds it after a death in between has the machine go on.
    """
    still = _Stillness(agent=running.has_agent())
    host.registry.change(machine, held=True)
    try:
        still.frozen = freezing and still.agent and freeze(host, machine)
        begun = time.monotonic()
        try:
            running.stop()
            yield still
        finally:
            running.resume()
            still.seconds = time.monotonic() - begun
    finally:
        if still.frozen:
            thaw(host, machine)
        host.registry.change(machine, held=False)


def freeze(host: Host, machine: Machine) -> bool:
    """Freezes the guest's file systems; whether it could.

    Without, the disks are as after a power cut, and as good as any for whoever goes on with the memory.
    """
    try:
        host.agent(machine).ask("fsfreeze-freeze", _FREEZE_SECONDS)
        return True
    except GuestError as error:
        _log.warning("the file systems of %s are not frozen: %s", machine.name, error)
        thaw(host, machine)
        return False


def thaw(host: Host, machine: Machine) -> None:
    """Thaws the guest's file systems; one that does not answer is left as it is, and said so."""
    try:
        thaw_by(host.agent(machine))
    except GuestError as error:
        _log.error("the file systems of %s may still be frozen: %s", machine.name, error)


def thaw_by(agent: Agent) -> None:
    """Thaws the file systems of an agent's guest."""
    agent.ask("fsfreeze-thaw", _FREEZE_SECONDS)


def let_go(host: Host, machine: Machine) -> None:
    """Has a machine go on that was left standing still by a process that died."""
    with suppress(StoreError):
        running = host.running(machine)
        if running.status() == "paused":
            running.resume()
        if running.has_agent():
            thaw(host, machine)
        host.registry.change(machine, held=False)
