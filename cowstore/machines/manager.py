"""The fork manager: machines of one store on this host, started, forked, kept and stopped by name."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cowstore.errors import (
    ExistsError,
    GuestError,
    InUseError,
    InvalidError,
    MachineError,
    NotFoundError,
    StoreError,
)

from . import checkpointing, forking, qemu
from .agent import Outcome
from .checkpointing import Moment
from .configuration import Configuration
from .forking import Child, Parent, Wish
from .host import Host, wait_ended
from .hypervisor import CONSOLE, CONSOLE_LOG, LOG, QMP, Hypervisor, Launch, Nic
from .identity import fresh_mac
from .keeper import Keeper
from .pages import PAGE_SIZE, own_pages
from .processes import kill
from .registry import Machine
from .stores import Checkpoint, Disks, Progress, Store, no_progress
from .template import check_room

_log = logging.getLogger("cowstore.machines")
_EXEC_SECONDS = 60.0
_AGENT_SECONDS = 10.0  # after which a guest that its agent cannot shut down has its power button pressed
_LAST_BYTES = 500  # of what a machine said that has ended by itself
_AUTOMATIC = 100  # letters of a machine's name in the name of a checkpoint that a fork makes
_LOG_BYTES = 1 << 20  # of a console; as many are kept in a second file, both in memory where the directory is


@dataclass(frozen=True)
class MachineInfo:
    """What people and programs want to know of a machine.

    Attributes:
        name: Its name.
        state: ``running``, ``paused``, ``starting``, or what else the hypervisor calls it.
        pid: Its process; 0 while it is being started.
        parent: The machine or checkpoint that it was forked from; None where it was started.
        checkpoint: The checkpoint whose memory it shares; None where it was started.
        created: Seconds since 1970.
        disposable: Whether its disks go with it.
        memory: ``size`` and ``private_bytes``, of its memory what no other machine shares.
        disks: Of each disk ``name`` and ``own_bytes``.
        identity: Its hostname, machine_id, generation and mac; None where it has its parent's.
        configuration: What it is like.
        console_log: Everything that it has written to its console.
        console_socket: Where one can talk to its console.
        qmp_socket: A monitor of QEMU's for whoever wants one.
    """

    name: str
    state: str
    pid: int
    parent: str | None
    checkpoint: str | None
    created: float
    disposable: bool
    memory: dict[str, int]
    disks: list[dict[str, Any]]
    identity: dict[str, Any] | None
    configuration: dict[str, Any]
    console_log: str
    console_socket: str
    qmp_socket: str


class Manager:
    """The machines of one store on this host. They go on when it is closed; the next one finds them again.

    Any number of threads may use it; work on one machine waits for other work on the same one.

    Args:
        store: The store.
        disks: The NBD server of the store's devices.
        directory: Where sockets, logs and records go: private, on this host, with a short path.
        hypervisor: What machines run in; QEMU where it is not given.
    """

    def __init__(self, store: Store, disks: Disks, directory: Path, hypervisor: Hypervisor | None = None) -> None:
        self._host = Host(store, disks, hypervisor or qemu.Qemu(), directory)
        self._naming = threading.Lock()  # held while names are looked at and put on record
        self._keeper = Keeper(self._has_ended, self._look_around)
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    # What an earlier manager has left.

    def _recover(self) -> None:
        registry = self._host.registry
        for found in list(registry.load()):
            if isinstance(found, Path):
                self._sweep(found)
                shutil.rmtree(found, ignore_errors=True)
            elif found.is_alive and found.ready:
                if found.held:
                    checkpointing.let_go(self._host, found)
                self._keeper.watch(found.pid, found.name)
            else:
                self._sweep(registry.directory(found))
                self._retire(found)
        self._host.drop_unneeded()

    def _sweep(self, directory: Path) -> None:
        """Ends processes that were being started when their manager died."""
        for pid in self._host.hypervisor.find(directory):
            kill(pid)

    def _retire(self, machine: Machine) -> None:
        try:
            self._host.retire(machine)
        except StoreError as error:
            _log.error("what machine %s leaves cannot be removed now: %s", machine.name, error)

    def _has_ended(self, name: str) -> None:
        """A machine's process has ended, by itself or by somebody else's hand."""
        try:
            with self._host.alone(name) as machine:
                if machine.over or (machine.pid and not machine.is_alive):
                    self._note_last_words(machine)
                    self._retire(machine)
        except NotFoundError:
            pass  # it was stopped, and everything is gone already

    def _note_last_words(self, machine: Machine) -> None:
        """Says in the log what a machine said before it ended by itself: its own logs go with it."""
        for name in (LOG, CONSOLE_LOG):
            with suppress(OSError):
                said = (self._host.registry.directory(machine) / name).read_bytes()[-_LAST_BYTES:]
                text = "".join(letter if letter.isprintable() else " " for letter in said.decode(errors="replace"))
                if text.strip():
                    _log.warning("machine %s has ended; its %s ends with: %s", machine.name, name, text.strip())

    def _look_around(self) -> None:
        """Now and then: removes what could not be removed before, and cuts logs."""
        for machine in self._host.registry.all():
            if machine.over or (machine.ready and not machine.is_alive):
                self._has_ended(machine.name)
        self._cut_logs()

    def _cut_logs(self) -> None:
        """Sets the console logs aside that have become too long: what a guest says must not fill the host."""
        for machine in self._host.registry.all():
            for name in (CONSOLE_LOG, LOG):
                log = self._host.registry.directory(machine) / name
                with suppress(OSError):  # it may have just ended
                    if log.stat().st_size > _LOG_BYTES:
                        shutil.copyfile(log, log.with_suffix(".old"))
                        os.truncate(log, 0)

    # Machines.

    def start(self, name: str, configuration: Configuration) -> MachineInfo:
        """Boots a machine on clones that are there.

        Raises:
            InvalidError: The configuration cannot be.
            NotFoundError: A disk, a file or the hypervisor is missing.
            ExistsError: The name is taken.
            MachineError: It did not start; nothing is left.
        """
        host = self._host
        configuration = host.hypervisor.settled(configuration)
        configuration.check()
        check_room(configuration.memory, f"machine {name}")
        nic = Nic(configuration.nic, 0, fresh_mac(host.registry.macs())) if configuration.nic else None
        with self._naming:
            numbers = self._check_disks(configuration.disks)
            self._check_name(name)
            machine = host.registry.add(
                Machine("", name, configuration, time.time(), numbers, nic=nic, generation=str(uuid.uuid4()))
            )
        try:
            directory = host.registry.directory(machine)
            launch = Launch(
                name, configuration, directory, host.disks.place, machine.exports, machine.generation, nic
            )
            running = host.hypervisor.start(launch)
            host.started(machine, running, ready=True)
        except BaseException:
            host.registry.remove(machine)
            raise
        self._keeper.watch(running.pid, name)
        return self.info(name)

    def _check_disks(self, disks: Sequence[str]) -> tuple[int, ...]:
        """The numbers of clones that a machine can have: they are clones, and no other machine's."""
        found = [self._host.store.info(disk) for disk in disks]
        for device in found:
            if device.kind != "clone":
                raise InvalidError(
                    f"{device.name!r} is an image, which no machine can write", hint="clone it first"
                )
            for machine in self._host.registry.all():
                if device.number in machine.disks:
                    raise InUseError(f"clone {device.name!r}", machine.pid, hint=f"it is a disk of {machine.name}")
        return tuple(device.number for device in found)

    def _check_name(self, name: str) -> None:
        """A name is a machine's or a checkpoint's, so that `fork` knows what is meant."""
        self._host.store.checkpoints.check_free(name)

    def fork(
        self, source: str, count: int = 1, *, prefix: str = "", wish: Wish | None = None,
        progress: Progress = no_progress,
    ) -> list[Child]:  # fmt: skip
        """Children of a checkpoint, or of a running machine, of which one is taken first.

        Args:
            source: The machine or the checkpoint.
            count: How many.
            prefix: What their names begin with, before a number that is free; the source's name and a hyphen
                where it is not given.
            wish: How they are to be; each with an identity of its own where it is not given.
            progress: Told ("memory", bytes done, bytes in all) of a checkpoint that is taken, ("template", ...) of
                a template that is built, and ("fork", children done, children in all).

        Returns:
            What became of each; those with an error are gone.

        Raises:
            StoreError: None could be made.
        """
        begun = time.monotonic()
        if count < 1:
            raise InvalidError(f"{count} children cannot be forked", hint="at least one")
        wish, prefix = wish or Wish(), prefix or f"{source}-"
        of_machine = self._host.registry.has(source)
        name = f"{source[:_AUTOMATIC]}.{time.time_ns():x}" if of_machine else source
        with self._host.keeping(name):
            checkpoint = (
                self._taken(source, name, wish, count, progress)
                if of_machine
                else self._host.store.checkpoints.info(name)
            )
            parent = Parent.of(checkpoint)
            parent.check(self._host, wish, count)
            with self._naming:
                machines = forking.register(self._host, parent, self._free_names(prefix, count), source, wish)
            children = forking.fork(self._host, parent, machines, wish, begun, progress)
        for child in children:
            self._watch(child)
        return children

    def _watch(self, child: Child) -> None:
        """Has a child's end noticed from now on; it may have been stopped already."""
        if not child.error:
            with suppress(NotFoundError):
                self._keeper.watch(self._host.registry.get(child.name).pid, child.name)

    def _taken(self, source: str, name: str, wish: Wish, count: int, progress: Progress) -> Checkpoint:
        with self._host.alone(source) as machine:
            lacking = "" if self._host.running(machine).has_agent() else "it has no agent"
            forking.check_wish(source, wish, count, lacking)
            # Its disks are never without its memory, so their file systems need not be frozen, and thawed in each
            # child.
            return checkpointing.take(
                self._host, machine, name, automatic=True, freezing=False, progress=progress
            ).checkpoint

    def _free_names(self, prefix: str, count: int) -> list[str]:
        taken = {machine.name for machine in self._host.registry.all()}
        taken |= {one.name for one in self._host.store.checkpoints.all()}
        names: list[str] = []
        number = 0
        while len(names) < count:
            number += 1
            name = f"{prefix}{number}"
            if name not in taken and not self._is_device(name):
                names.append(name)
        return names

    def _is_device(self, name: str) -> bool:
        try:
            self._host.store.info(name)
        except NotFoundError:
            return False
        return True

    def checkpoint(
        self, name: str, checkpoint: str, progress: Progress = no_progress, *, freezing: bool = True
    ) -> Moment:
        """Takes a checkpoint of a machine, which goes on.

        Args:
            name: The machine.
            checkpoint: The checkpoint's name.
            progress: Told ("memory", bytes done, bytes in all).
            freezing: Whether file systems are frozen first, where the guest has an agent. It takes the guest a
                while, and is of use to those only who read the disks without the memory.
        """
        if self._host.registry.has(checkpoint):
            raise ExistsError("machine", checkpoint, hint="choose another name")
        with self._host.alone(name) as machine:
            return checkpointing.take(self._host, machine, checkpoint, freezing=freezing, progress=progress)

    def keep(self, name: str, checkpoint: str = "", progress: Progress = no_progress) -> Moment:
        """Turns a machine into a checkpoint, of its own name where no other is given."""
        with self._host.alone(name) as machine:
            moment = checkpointing.take(self._host, machine, checkpoint or name, last=True, progress=progress)
            self._end(machine, gently=not machine.disposable)
            return moment

    def refresh(self, name: str, wish: Wish | None = None) -> Child:
        """Puts a child back to its parent's moment, with the name and the identity that it has."""
        with self._host.alone(name) as machine:
            if not machine.checkpoint:
                raise InvalidError(
                    f"machine {name!r} was started and not forked", hint="stop it and start it again"
                )
            wish = replace(wish or Wish(), identity=machine.identity is not None)
            parent = forking.origin(self._host, machine, wish)
            self._host.end(machine)
            try:
                child = forking.revive(self._host, machine, parent, wish)
            except BaseException:
                forking.give_up(self._host, machine)
                raise
        self._watch(child)
        return child

    def stop(self, name: str, *, seconds: float = 0.0) -> None:
        """Ends a machine; a disposable one's disks go with it.

        Args:
            name: The machine.
            seconds: How long its guest may take to shut down; it is not asked where that is 0, and what it has
                not synced is lost.

        Raises:
            MachineError: The guest did not shut down in time; it goes on.
        """
        machine = self._host.registry.get(name)
        if not seconds or machine.disposable:
            self._host.kill(machine)  # whoever is at work on it need not go on
        with suppress(NotFoundError), self._host.alone(name, machine.key) as machine:  # or it is gone by now
            shutting = seconds and machine.is_alive and not machine.disposable
            if shutting and not self._shut_down(machine, seconds):
                raise MachineError(
                    f"the guest of {name} has not shut down within {seconds:g} s", hint="stop it with --now"
                )
            self._end(machine, gently=not machine.disposable)

    def resume(self, name: str) -> None:
        """Has a machine go on that stands still, for example because the store had no room for what it wrote.

        Raises:
            MachineError: It does not.
        """
        with self._host.alone(name) as machine:
            running = self._host.running(machine)
            running.resume()
            if (status := running.status()) != "running":
                raise MachineError(f"machine {name} is {status} still")

    def _shut_down(self, machine: Machine, seconds: float) -> bool:
        """Has the guest shut down, by its agent where there is one, and by the button; whether it has, in time."""
        running, deadline = self._host.running(machine), time.monotonic() + seconds
        if running.has_agent():
            with suppress(GuestError):
                self._host.agent(machine).tell("shutdown")
                if wait_ended(machine, min(seconds, _AGENT_SECONDS)):
                    return True
        with suppress(MachineError):  # it may be down by now
            running.power_down()
        return wait_ended(machine, deadline - time.monotonic())

    def _end(self, machine: Machine, *, gently: bool) -> None:
        self._host.end(machine, gently=gently)
        self._host.retire(machine)

    def run(self, name: str, words: Sequence[str], data: bytes = b"", seconds: float = _EXEC_SECONDS) -> Outcome:
        """Runs a program in a machine's guest, by its agent."""
        agent = self._host.agent(self._host.registry.get(name))
        return agent.run(words, data=data, seconds=seconds)

    # What is there.

    def machines(self) -> list[MachineInfo]:
        """All machines, sorted by name."""
        own = self._host.store.own_bytes()
        return [self._describe(machine, own) for machine in self._host.registry.all()]

    def info(self, name: str) -> MachineInfo:
        """One machine."""
        return self._describe(self._host.registry.get(name), self._host.store.own_bytes())

    def _describe(self, machine: Machine, own: dict[str, int]) -> MachineInfo:
        directory, one = self._host.registry.directory(machine), machine.configuration
        identity = machine.identity
        return MachineInfo(
            machine.name, self._state(machine), machine.pid, machine.parent or None, machine.checkpoint or None,
            machine.created, machine.disposable,
            {"size": one.memory, "private_bytes": self._private_bytes(machine)},
            [{"name": disk, "own_bytes": own.get(disk, 0)} for disk in one.disks],
            None if identity is None else identity.facts(), one.facts(), str(directory / CONSOLE_LOG),
            str(directory / CONSOLE), str(directory / QMP),
        )  # fmt: skip

    def _state(self, machine: Machine) -> str:
        if not machine.ready:
            return "starting"
        try:
            return self._host.running(machine).status()
        except MachineError:
            return "ended"

    def _private_bytes(self, machine: Machine) -> int:
        try:
            address = self._host.address(machine)
            return len(own_pages(machine.pid, address, machine.configuration.memory)) * PAGE_SIZE
        except (MachineError, NotFoundError):
            return 0

    def checkpoints(self) -> Sequence[Checkpoint]:
        """All checkpoints of the store."""
        return self._host.store.checkpoints.all()

    def delete_checkpoints(self, *names: str) -> None:
        """Deletes checkpoints that no machine has been forked from, all or none.

        Raises:
            InUseError: One has, or is about to be.
        """
        self._host.delete_checkpoints([self._host.store.checkpoints.info(name) for name in names])

    @property
    def idle(self) -> bool:
        """Whether there is no machine."""
        return not self._host.registry.all()

    def close(self) -> None:
        """Lets go of all machines; they go on."""
        self._keeper.close()
        self._host.close()
