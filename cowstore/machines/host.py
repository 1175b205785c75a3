"""The host: what all work on machines has in common. Machines by name, one piece of work on each at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from cowstore.errors import InUseError, MachineError, NotFoundError, StoreError

from .agent import Agent
from .hypervisor import AGENT, Hypervisor, Running
from .processes import boot_id, kill, process_start, reap
from .registry import Machine, Registry
from .stores import Checkpoint, Disks, Store
from .templates import Templates

_log = logging.getLogger("cowstore.machines")
_RELEASE_SECONDS = 20.0  # for a server to let go of a disk whose machine has ended
_END_SECONDS = 20.0


class Host:
    """A store's machines on this host.

    Args:
        store: The store.
        disks: The server of its disks.
        hypervisor: Starts machines.
        directory: Where the registry is.

    Attributes:
        store: See above.
        disks: See above.
        hypervisor: See above.
        registry: Which machines there are.
        templates: The memory of checkpoints.
    """

    def __init__(self, store: Store, disks: Disks, hypervisor: Hypervisor, directory: Path) -> None:
        self.store = store
        self.disks = disks
        self.hypervisor = hypervisor
        self.registry = Registry(directory)
        self.templates = Templates(store.checkpoints, self._children_of)
        self._lock = threading.Lock()
        self._busy: dict[str, threading.RLock] = {}
        self._attaching: dict[str, threading.Lock] = {}
        self._running: dict[str, Running] = {}
        self._agents: dict[str, Agent] = {}
        self._kept: list[str] = []
        self._keeping = threading.Lock()  # held while a checkpoint is deleted, or a fork of one begins

    @contextmanager
    def keeping(self, checkpoint: str) -> Iterator[None]:
        """Keeps a checkpoint that a fork has made, or is about to make, while no machine needs it yet."""
        with self._keeping:
            self._kept.append(checkpoint)
        try:
            yield
        finally:
            with self._keeping:
                self._kept.remove(checkpoint)
            self.drop_unneeded()

    def _children_of(self, number: int) -> list[int]:
        return [one.pid for one in self.registry.all() if one.checkpoint_number == number and one.is_alive]

    @contextmanager
    def alone(self, name: str, key: str = "") -> Iterator[Machine]:
        """A machine by name, with nobody else at work on it.

        Args:
            name: Its name.
            key: Its key, where it has to be one that is known already.

        Raises:
            NotFoundError: There is none.
        """
        key = key or self.registry.get(name).key
        with self._lock:
            busy = self._busy.setdefault(key, threading.RLock())
        with busy:
            machine = self.registry.get(name)
            if machine.key != key:
                raise NotFoundError("machine", name, hint="it has just ended, and there is another one")
            yield machine

    def running(self, machine: Machine) -> Running:
        """A machine's process.

        Raises:
            MachineError: It has ended.
        """
        with self._lock:
            attaching = self._attaching.setdefault(machine.key, threading.Lock())
        with attaching:  # a monitor talks to one at a time, and a second one would wait for it in vain
            with self._lock:
                found = self._running.get(machine.key)
            if found is not None and found.lost:
                found.close()
                found = None
            if found is None:
                if not machine.is_alive:
                    raise MachineError(f"machine {machine.name} has ended")
                found = self.hypervisor.attach(machine.pid, self.registry.directory(machine))
                self.adopt(machine, found)
            return found

    def adopt(self, machine: Machine, running: Running) -> Running:
        """Keeps the connection to a machine's process."""
        with self._lock:
            self._running[machine.key] = running
        return running

    def started(self, machine: Machine, running: Running, *, ready: bool = False) -> Machine:
        """Puts a machine's process on record. One that cannot be is ended: nobody would find it again."""
        pid, began = running.pid, process_start(running.pid)
        self.adopt(machine, running)
        try:
            return self.registry.change(machine, pid=pid, started=began, boot=boot_id(), ready=ready)
        except BaseException:
            self.end(replace(machine, pid=pid, started=began, boot=boot_id()))
            raise

    def address(self, machine: Machine) -> int:
        """Where a machine's memory begins in its process."""
        if not machine.address:
            address = self.running(machine).address()
            machine = self.registry.change(machine, address=address)
        return machine.address

    def agent(self, machine: Machine) -> Agent:
        """The line to a machine's agent, kept open; for whoever is alone with the machine.

        Raises:
            GuestError: It has ended.
        """
        with self._lock:
            attaching = self._attaching.setdefault(machine.key, threading.Lock())
        with attaching:
            agent = self._agents.get(machine.key)
            if agent is None:
                agent = Agent(machine.name, self.registry.directory(machine) / AGENT)
                self._agents[machine.key] = agent
        return agent

    def end(self, machine: Machine, *, gently: bool = False) -> None:
        """Ends a machine's process, at once or after what it holds for its disks was sent; waits for that."""
        with self._lock:
            agent = self._agents.pop(machine.key, None)
        if agent is not None:
            agent.close()  # whoever still waits for the guest need not
        if machine.is_alive:
            if gently:
                with suppress(MachineError):  # one that does not answer is not asked twice
                    self.running(machine).quit()
                    wait_ended(machine, _END_SECONDS)
            if machine.is_alive:
                kill(machine.pid)
                wait_ended(machine, _END_SECONDS)
        if machine.pid:
            reap(machine.pid)
        with self._lock:
            running = self._running.pop(machine.key, None)
        if running is not None:
            running.close()

    def kill(self, machine: Machine) -> None:
        """Ends a machine's process, whoever is at work on it."""
        if machine.is_alive:
            kill(machine.pid)

    def retire(self, machine: Machine) -> None:
        """Removes what a machine that has ended leaves: its record, and its disks where they go with it.

        Raises:
            StoreError: Its disks cannot be deleted now; it stays on record until they can be.
        """
        self.end(machine)
        if machine.disposable:
            try:
                self.delete_disks(machine)
            except StoreError:
                self.registry.change(machine, over=True)
                raise
        self.registry.remove(machine)
        with self._lock:
            self._busy.pop(machine.key, None)
            self._attaching.pop(machine.key, None)
        self.drop_unneeded()

    def delete_disks(self, machine: Machine) -> None:
        """Deletes a child's clones, as soon as the server has let go of them."""
        deadline = time.monotonic() + _RELEASE_SECONDS
        for name in machine.exports or self._unrecorded(machine):
            while True:
                try:
                    self.store.delete(name)
                    break
                except NotFoundError:
                    break
                except InUseError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.005)

    def _unrecorded(self, machine: Machine) -> list[str]:
        """The clones of a child whose manager died before their numbers were on record.

        A device that has the name of one and is not made of the checkpoint is somebody else's.
        """
        try:
            images = self.store.checkpoints.info(machine.checkpoint).images
        except NotFoundError:
            return []
        found = []
        for name in machine.configuration.disks:
            with suppress(NotFoundError):
                device = self.store.info(name)
                if device.ephemeral and device.parent_number in images:
                    found.append(f"#{device.number}")
        return found

    def drop_unneeded(self) -> None:
        """Deletes the checkpoints that forks have made and no machine needs any more."""
        if self.registry.unread:
            return  # who knows what those need
        for checkpoint in self.store.checkpoints.all():
            if checkpoint.automatic and checkpoint.configuration.get("place") == str(self.registry.place):
                try:
                    self.delete_checkpoints([checkpoint])
                except (InUseError, NotFoundError):
                    continue  # it is needed, or somebody else has deleted it
                except StoreError as error:
                    _log.error("checkpoint %s cannot be deleted now: %s", checkpoint.name, error)

    def delete_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Deletes checkpoints, all or none; nobody begins to fork one of them meanwhile.

        Raises:
            InUseError: One is being forked, or its children run.
        """
        with self._keeping:
            for checkpoint in checkpoints:
                self._check_unneeded(checkpoint.name)
            self.store.checkpoints.delete(*(checkpoint.name for checkpoint in checkpoints))
        for checkpoint in checkpoints:
            self.templates.forget(checkpoint.number)

    def _check_unneeded(self, name: str) -> None:
        what = f"checkpoint {name!r}"
        if name in self._kept:
            raise InUseError(what, hint="it is being forked: wait until that is done")
        children = [one.name for one in self.registry.all() if one.checkpoint == name]
        if children:
            raise InUseError(what, hint=f"stop its children first: {', '.join(children[:5])}")

    def close(self) -> None:
        """Lets go of everything; machines go on."""
        with self._lock:
            left: list[Running | Agent] = [*self._agents.values(), *self._running.values()]
            self._agents, self._running = {}, {}
        for one in left:
            one.close()
        self.registry.close()
        self.templates.close()


def wait_ended(machine: Machine, seconds: float) -> bool:
    """Waits until a machine's process has ended; whether it has."""
    deadline = time.monotonic() + seconds
    while machine.is_alive:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True
