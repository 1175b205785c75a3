"""Checkpointing: one consistent moment of a running machine, while it stands still for as short as can be."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from cowstore.errors import GuestError, MachineError, StoreError

from .agent import Agent
from .configuration import processor
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


class Stillness:
    """A running machine that is made to stand still for a while, its file systems frozen where it has an agent.

    The record says so first: whoever finds it after a death in between has the machine go on.

    Args:
        host: Where.
        machine: The machine.
        running: Its process.

    Attributes:
        version: What the process is, for example ``QEMU 7.2``: the program on the disk may be a newer one by now.
        agent: Whether the guest has an agent.
        frozen: Whether its file systems are frozen, or were.
        seconds: For how long it stood still; so far, where it still does.
    """

    def __init__(self, host: Host, machine: Machine, running: Running) -> None:
        self.version = running.version()
        self.agent = running.has_agent()
        self.frozen = False
        self._host = host
        self._machine = machine
        self._running = running
        self._begun = 0.0
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """See Stillness."""
        return self._seconds or time.monotonic() - self._begun

    def begin(self, *, freezing: bool) -> None:
        """Freezes the file systems, where that is wanted and can be, and stops the machine."""
        self._host.registry.change(self._machine, held=True)
        self._begun = time.monotonic()
        self.frozen = freezing and self.agent and freeze(self._host, self._machine)
        self._begun = time.monotonic()
        self._running.stop()

    def end(self) -> None:
        """Has the machine go on; harmless when it never stood still, or does no more."""
        if not self._begun or self._seconds:
            return
        try:
            self._running.resume()  # where that fails it may be tried again, now or by the next manager
            self._seconds = time.monotonic() - self._begun
        finally:
            if self.frozen:  # whether it was stopped or not: it may run with its file systems frozen
                thaw(self._host, self._machine)
        self._host.registry.change(self._machine, held=False)


def take(
    host: Host, machine: Machine, name: str, *, automatic: bool = False, freezing: bool = True,
    last: bool = False, progress: Progress,
) -> Moment:  # fmt: skip
    """Takes a checkpoint of a machine, which nobody else is at work on. What fails leaves it running.

    Args:
        host: Where.
        machine: The machine.
        name: The checkpoint's name.
        automatic: Whether it goes when no machine needs it.
        freezing: Whether file systems are frozen first, where the guest has an agent.
        last: Whether the machine is to stand still for good, when all went well.
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
    still, pending = Stillness(host, machine, running), None
    try:
        check_room(len(own_pages(machine.pid, address, size)) * PAGE_SIZE, f"a checkpoint of {machine.name}")
        capture.prepare()
        _flush(host, machine)  # so that little is left for when it stands still
        still.begin(freezing=freezing)
        _flush(host, machine)
        pending = host.store.checkpoints.begin(machine.exports)
        state = running.save_state()
        capture.take()
        if not last:
            still.end()
        _take_in(pending, capture, state, machine.checkpoint_number, progress)
        checkpoint = pending.publish(name, facts(host, machine, still), automatic=automatic)
        moment = Moment(checkpoint, still.seconds, len(capture.pages), still.frozen)
        if not machine.checkpoint_number:  # all of its memory is its own, so what was captured is all there is
            host.templates.put(checkpoint.number, Template.seal(capture.detach(), size))
        return moment
    except BaseException:
        with suppress(StoreError):  # what went wrong first counts
            still.end()
        raise
    finally:
        if pending is not None:
            pending.close()
        capture.close()


def _flush(host: Host, machine: Machine) -> None:
    """Makes durable what the machine's disks were told so far."""
    for disk in machine.exports:
        host.disks.flush(disk)


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


def facts(host: Host, machine: Machine, still: Stillness) -> dict[str, object]:
    """What has to be known of a machine to load its state into another one."""
    nic, configuration = machine.nic, machine.configuration
    return {
        "hypervisor": still.version,
        "processor": processor() if configuration.cpu == "host" else "",
        "machine": configuration.facts(),
        "generation": machine.generation,
        "nic": None if nic is None else {"model": nic.model, "port": nic.port, "mac": nic.mac},
        "frozen": still.frozen,
        "agent": still.agent,
        "from": machine.name,
        "place": str(host.registry.place),
    }


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
    """Has a machine go on that was left standing still by a process that died.

    Its file systems are thawed in a thread: an agent that does not answer keeps nobody else waiting.
    """
    with suppress(StoreError, OSError):
        running = host.running(machine)
        if running.status() == "paused":
            running.resume()
        threading.Thread(target=_thaw_left, args=(host, machine), name="cowstore-thaw", daemon=True).start()


def _thaw_left(host: Host, machine: Machine) -> None:
    with suppress(StoreError, OSError), host.alone(machine.name, machine.key):
        if host.running(machine).has_agent():
            thaw(host, machine)
        host.registry.change(machine, held=False)
