"""Forking: children of a checkpoint, started side by side."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from cowstore.errors import GuestError, InvalidError, MachineError, NotFoundError, StoreError

from . import identity as identities
from .checkpointing import thaw_by
from .configuration import Configuration, processor
from .host import Host
from .hypervisor import Launch, Nic, Running
from .identity import Identity, fresh_mac
from .registry import Machine
from .stores import Checkpoint, Progress
from .template import check_room

_AT_ONCE = 8  # children that are started at the same time; more of them wait for each other's processors anyway
_CHILD_BYTES = 64 << 20  # what a child takes of the host before it has written anything: the hypervisor itself
_UNPLUG_SECONDS = 20.0


@dataclass(frozen=True)
class Wish:
    """How children are to be.

    Attributes:
        identity: Whether each gets its own.
        hook: A script for the guest's shell, run in the end; empty for none.
    """

    identity: bool = True
    hook: bytes = b""


@dataclass(frozen=True)
class Child:
    """What became of one child.

    Attributes:
        name: Its name.
        running: Seconds from the call until it ran.
        ready: Seconds until it could be handed out.
        error: Why it cannot be, and is gone; empty otherwise.
    """

    name: str
    running: float
    ready: float
    error: str = ""


@dataclass(frozen=True)
class Parent:
    """What children are made of.

    Attributes:
        checkpoint: The checkpoint.
        configuration: What they are like, but for the names of their disks.
        generation: The GUID of the machine that it was taken from.
        nic: The network card in the saved state.
        frozen: Whether file systems are frozen in it.
        agent: Whether there is an agent in it.
    """

    checkpoint: Checkpoint
    configuration: Configuration
    generation: str
    nic: Nic | None
    frozen: bool
    agent: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Parent:
        """What a checkpoint says of itself. Raises InvalidError where it is not a machine's."""
        facts: dict[str, Any] = checkpoint.configuration
        try:
            nic = Nic(**facts["nic"]) if facts["nic"] else None
            configuration = Configuration.read(facts["machine"])
            return cls(checkpoint, configuration, facts["generation"], nic, facts["frozen"], facts["agent"])
        except (KeyError, TypeError) as error:
            raise InvalidError(
                f"checkpoint {checkpoint.name!r} is not that of a machine: {error}",
                hint="a program has made it, which knows what to do with it",
            ) from error

    def check(self, host: Host, wish: Wish, count: int) -> None:
        """Refuses what cannot be forked here, before anything is made.

        Raises:
            MachineError: The hypervisor is another one, or there is no memory left.
            GuestError: The guest has no agent, and is to get an identity.
        """
        made_by, here = self.checkpoint.configuration["hypervisor"], host.hypervisor.version()
        if made_by != here:
            raise MachineError(
                f"checkpoint {self.checkpoint.name} was taken by {made_by}, and here is {here}",
                hint="fork it where that is installed, or start a new parent here",
            )
        self.configuration.check()
        if self.checkpoint.memory_size != self.configuration.memory:
            raise MachineError(
                f"checkpoint {self.checkpoint.name} has {self.checkpoint.memory_size} bytes of memory, "
                f"and its machine {self.configuration.memory}"
            )
        if (taken_on := self.checkpoint.configuration["processor"]) and taken_on != processor():
            raise MachineError(
                f"checkpoint {self.checkpoint.name} was taken on {taken_on}, and its machines have that processor",
                hint="fork it on such a host, or give a new parent a model of its own: --cpu",
            )
        if host.hypervisor.settled(self.configuration) != self.configuration:
            raise MachineError(
                f"machine type {self.configuration.machine} of checkpoint {self.checkpoint.name} is none here",
                hint="fork it where it was taken",
            )
        lacking = "" if self.agent else "it had no agent when the checkpoint was taken"
        check_wish(self.checkpoint.name, wish, count, lacking)


def check_wish(source: str, wish: Wish, count: int, lacking: str) -> None:
    """Refuses what cannot be had of a machine or checkpoint, whatever else it is like.

    Args:
        source: Its name.
        wish: How its children are to be.
        count: How many.
        lacking: Why it has no agent; empty where it has one.

    Raises:
        GuestError: Its guest has no agent, and its children are to get an identity or a hook.
        MachineError: There is no memory left for so many.
    """
    if (wish.identity or wish.hook) and lacking:
        raise GuestError(
            source, "identity", lacking,
            hint="install qemu-guest-agent in it, or fork with --identity none and without a hook",
        )  # fmt: skip
    check_room(count * _CHILD_BYTES, f"{count} children of {source}")


def disk_names(machine: str, count: int) -> tuple[str, ...]:
    """The names of a child's clones: its own, and with numbers where there are more."""
    return tuple(machine if number == 0 else f"{machine}.{number}" for number in range(count))


def fork(
    host: Host, parent: Parent, machines: Sequence[Machine], wish: Wish, begun: float, progress: Progress
) -> list[Child]:
    """Starts children that are on record. Those that fail are gone; the others are there.

    Args:
        host: Where.
        parent: What they are made of.
        machines: Their records.
        wish: How they are to be.
        begun: When the call began, by the monotonic clock.
        progress: Told ("fork", children done, children in all).

    Raises:
        StoreError: None of them can be made; nothing is left.
    """
    checkpoint = parent.checkpoint
    done: list[Child] = []
    try:
        give_disks(host, checkpoint, machines)
        state = host.store.checkpoints.state(checkpoint.name)
        with host.templates.held(checkpoint, progress) as template:
            birth = Birth(host, parent, wish, template.path, state, begun)
            for child in birth.of(machines):
                done.append(child)
                progress("fork", len(done), len(machines))
    finally:
        for machine in machines[len(done) :]:
            with suppress(StoreError, OSError):  # what cannot be removed now is tried again
                give_up(host, machine)
    return done


def give_disks(host: Host, checkpoint: Checkpoint, machines: Sequence[Machine]) -> None:
    """Makes the clones of children that are on record, for all of them or none."""
    clones = host.store.checkpoints.clone_disks(checkpoint.name, [one.configuration.disks for one in machines])
    for position, machine in enumerate(machines):
        host.registry.change(machine, disks=tuple(clone.number for clone in clones[position :: len(machines)]))


def give_up(host: Host, machine: Machine) -> None:
    """Removes a child that came to nothing, unless somebody else has, and another one has its name."""
    with suppress(NotFoundError):
        found = host.registry.get(machine.name)
        if found.key == machine.key:
            host.retire(found)


def register(host: Host, parent: Parent, names: Sequence[str], source: str, wish: Wish) -> list[Machine]:
    """Puts children on record, all or none.

    Raises:
        ExistsError: A name is taken.
    """
    machines: list[Machine] = []
    try:
        for name in names:
            machines.append(host.registry.add(_child(host, parent, name, source, wish)))  # noqa: PERF401 - one may fail
    except BaseException:
        for machine in machines:
            host.registry.remove(machine)
        raise
    return machines


def _child(host: Host, parent: Parent, name: str, source: str, wish: Wish) -> Machine:
    disks = disk_names(name, len(parent.configuration.disks))
    mac = fresh_mac(host.registry.macs()) if parent.nic else ""
    identity = Identity.make(name, mac) if wish.identity else None
    return Machine(
        "", name, parent.configuration.with_disks(disks), time.time(), (), source, parent.checkpoint.name,
        parent.checkpoint.number, disposable=True, identity=identity, nic=parent.nic,
        generation=identity.generation if identity else parent.generation,
    )  # fmt: skip


@dataclass(frozen=True)
class Birth:
    """How children come to run.

    Attributes:
        host: Where.
        parent: What they are made of.
        wish: How they are to be.
        template: The path of their memory.
        state: The state of their devices.
        begun: When the call began, by the monotonic clock.
        ran: Seconds from then on until each child ran, by its name.
    """

    host: Host
    parent: Parent
    wish: Wish
    template: str
    state: bytes
    begun: float
    ran: dict[str, float] = field(default_factory=dict)

    def of(self, machines: Sequence[Machine]) -> Iterator[Child]:
        """Brings up machines that are on record and whose disks are there; those that fail are removed.

        All are loaded before the first one runs: a running guest would take the processors from those that are
        still being loaded. For the same reason those whose guests have something to do before they are handed out
        run a few at a time, and the others all at once. One alone is brought up in this thread, which may be alone
        with it already.
        """
        if len(machines) == 1:
            yield self._bring_up(machines[0], self._load(machines[0]))
            return
        with ThreadPoolExecutor(_AT_ONCE, "cowstore-fork") as pool:
            faults = list(pool.map(self._load, machines))
            if not (self.wish.identity or self.wish.hook):
                faults = list(pool.map(self._resume, machines, faults))
            yield from pool.map(self._bring_up, machines, faults)

    def _load(self, machine: Machine) -> Exception | None:
        """Starts a child's process and loads its state; what went wrong."""
        try:
            with self.host.alone(machine.name, machine.key) as machine:
                running = self._started(machine)
                self.host.agent(machine)  # it is to find somebody there when it wakes up
                self._give_nic(self.host.registry.get(machine.name), running)
        except Exception as error:  # noqa: BLE001 - whatever one child's guest brings about, the others go on
            return error
        return None

    def _resume(self, machine: Machine, fault: Exception | None) -> Exception | None:
        """Has a loaded child run; what went wrong, now or before."""
        if fault is None:
            try:
                self.host.running(self.host.registry.get(machine.name)).resume()
                self.ran[machine.name] = time.monotonic() - self.begun
            except (StoreError, OSError) as error:
                return error
        return fault

    def _bring_up(self, machine: Machine, fault: Exception | None) -> Child:
        """Makes a child ready to be handed out, which runs from now on at the latest."""
        name = machine.name
        try:
            with self.host.alone(name, machine.key) as loaded:
                if name not in self.ran:
                    fault = self._resume(loaded, fault)
                if fault is not None:
                    raise fault
                self._make_ready(loaded, self.host.running(loaded))
                self.host.registry.change(loaded, ready=True)
                return Child(name, self.ran[name], time.monotonic() - self.begun)
        except Exception as error:  # noqa: BLE001 - as above
            with suppress(StoreError, OSError):  # what cannot be removed now stays on record, and is removed later
                give_up(self.host, machine)
            hint = f" ({error.hint})" if isinstance(error, StoreError) and error.hint else ""
            return Child(name, self.ran.get(name, 0.0), 0.0, f"{error}{hint}")

    def _started(self, machine: Machine) -> Running:
        """The child's process, with its state loaded, standing still."""
        directory = self.host.registry.directory(machine)
        launch = Launch(
            machine.name, machine.configuration, directory, self.host.disks.place, machine.exports,
            machine.generation, machine.nic, self.template, self.state,
        )  # fmt: skip
        running = self.host.hypervisor.start(launch)
        self.host.started(machine, running)
        return running

    def _give_nic(self, machine: Machine, running: Running) -> None:
        """Plugs the child's own card beside the parent's, which is cut off."""
        if machine.identity is None or machine.nic is None:
            return
        new = Nic(machine.nic.model, 1 - machine.nic.port, machine.identity.mac)
        running.replace_nic(machine.nic, new)
        self.host.registry.change(machine, nic=new)

    def _make_ready(self, machine: Machine, running: Running) -> None:
        """What takes a running guest: thaw, unplug the parent's card, identity, hook."""
        parent, wish = self.parent, self.wish
        if machine.identity is not None and parent.nic is not None:
            running.remove_nic(parent.nic, _UNPLUG_SECONDS)
        if not (parent.frozen or machine.identity or wish.hook):
            return
        agent = self.host.agent(machine)
        if parent.frozen:
            thaw_by(agent)
        if machine.identity is not None:
            identities.apply(agent, machine.name, machine.identity, parent.nic.mac if parent.nic else "")
        if wish.hook:
            identity = machine.identity or Identity("", "", machine.generation)
            identities.run_hook(agent, machine.name, wish.hook, identity, machine.parent)


def origin(host: Host, machine: Machine, wish: Wish) -> Parent:
    """What a child can be started anew from.

    Raises:
        StoreError: It cannot be, and goes on as it is.
    """
    try:
        checkpoint = host.store.checkpoints.info(machine.checkpoint)
    except NotFoundError as error:
        raise MachineError(f"checkpoint {machine.checkpoint} of {machine.name} is gone") from error
    if checkpoint.number != machine.checkpoint_number:
        raise MachineError(f"checkpoint {machine.checkpoint} of {machine.name} was replaced by another")
    parent = Parent.of(checkpoint)
    parent.check(host, wish, 1)
    return parent


def revive(host: Host, machine: Machine, parent: Parent, wish: Wish) -> Child:
    """Starts a child anew whose process has ended, with the identity that it has."""
    begun, checkpoint = time.monotonic(), parent.checkpoint
    host.delete_disks(machine)
    identity, generation = machine.identity, parent.generation
    if identity is not None:  # a guest that wakes up from the same moment again has to be told so
        generation = str(uuid.uuid4())
        identity = replace(identity, generation=generation)
    machine = host.registry.change(
        machine, pid=0, started=0, address=0, disks=(), nic=parent.nic, ready=False, identity=identity,
        generation=generation,
    )  # fmt: skip
    give_disks(host, checkpoint, [machine])
    machine = host.registry.get(machine.name)
    state = host.store.checkpoints.state(checkpoint.name)
    with host.templates.held(checkpoint) as template:
        (child,) = Birth(host, parent, wish, template.path, state, begun).of([machine])
        return child
