"""The registry: which machines there are on this host, in files that outlive every process of ours.

A machine has a directory with its sockets, its logs and its record. The record is replaced as a whole. A machine
that is on record as being started is known to nobody yet; whoever finds one after its manager's death removes it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from cowstore.errors import ExistsError, InUseError, InvalidError, MachineError, NotFoundError, StoreError

from .configuration import Configuration
from .hypervisor import Nic
from .identity import Identity
from .processes import boot_id, process_start

_log = logging.getLogger("cowstore.machines")
_RECORD, _LOCK = "machine.json", "lock"
_PATH_BYTES = 80  # of a Unix socket's 107; the rest is for a machine's own folder and the socket's name


@dataclass(frozen=True)
class Machine:
    """A machine as the registry keeps it.

    Attributes:
        key: The name of its directory, never that of another machine.
        name: Its name.
        configuration: What it is like.
        disks: The numbers of its clones, whatever they are called by now; empty until they are there.
        created: When it was asked for, seconds since 1970.
        parent: The machine or checkpoint that it was forked from; empty where it was started.
        checkpoint: The checkpoint whose memory it maps; empty where it was started.
        checkpoint_number: That checkpoint's number, 0 for none.
        disposable: Whether its disks go with it.
        identity: What it was made to be; None where it was left as its parent.
        generation: The GUID by which its guest is told of forks.
        nic: The network card that it has.
        ready: Whether it was handed out; one that was not when its manager died is removed by the next.
        over: Whether it is to be removed, and could not be yet.
        held: Whether it stands still, or its file systems do, for a checkpoint that is being taken.
        pid: Its process; 0 while it is being started.
        started: When that process began, by the kernel's count: pids are used again.
        boot: During which boot of the host.
        address: Where its memory begins in its process.
    """

    key: str
    name: str
    configuration: Configuration
    created: float
    disks: tuple[int, ...] = ()
    parent: str = ""
    checkpoint: str = ""
    checkpoint_number: int = 0
    disposable: bool = False
    identity: Identity | None = None
    generation: str = ""
    nic: Nic | None = None
    ready: bool = False
    over: bool = False
    held: bool = False
    pid: int = 0
    started: int = 0
    boot: str = ""
    address: int = 0

    @classmethod
    def read(cls, text: str) -> Self:
        """The inverse of write(). Raises ValueError."""
        try:
            known = {field.name for field in fields(cls)}  # another version may have written more
            facts: dict[str, Any] = {key: value for key, value in json.loads(text).items() if key in known}
            facts["configuration"] = Configuration.read(facts["configuration"])
            facts["identity"] = Identity(**facts["identity"]) if facts["identity"] else None
            facts["nic"] = Nic(**facts["nic"]) if facts["nic"] else None
            facts["disks"] = tuple(facts["disks"])
            return cls(**facts)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"a machine's record makes no sense: {error}") from error

    def write(self) -> str:
        """The text of its record."""
        return json.dumps(asdict(self), indent=2)

    @property
    def exports(self) -> tuple[str, ...]:
        """What its disks go by at the server and in the store, whoever gives them other names."""
        return tuple(f"#{number}" for number in self.disks)

    @property
    def is_alive(self) -> bool:
        """Whether its process still runs."""
        return self.pid != 0 and self.boot == boot_id() and 0 <= process_start(self.pid) == self.started


class Registry:
    """The machines of one store on this host.

    Args:
        directory: Where they are; private.

    Attributes:
        place: That directory.
        unread: Where machines are whose records cannot be read.

    Raises:
        InvalidError: Its path is too long for sockets.
        InUseError: Another process has the machines there.
        StoreError: It is not private.
    """

    def __init__(self, directory: Path) -> None:
        if len(os.fsencode(directory)) > _PATH_BYTES:
            raise InvalidError(f"{directory} is too long for sockets", hint=f"at most {_PATH_BYTES} bytes")
        self._lock = threading.Lock()
        self._machines: dict[str, Machine] = {}
        self.unread: list[Path] = []
        directory.mkdir(mode=0o700, exist_ok=True)
        self.place = directory = _private(directory)
        self._turn = (directory / _LOCK).open("a+")
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._turn.close()
            raise InUseError(f"the machines in {directory}", hint="one manager is enough: ask that one") from None

    def load(self) -> Iterator[Machine | Path]:
        """Every machine that is on record; a directory without a record is given as it is.

        One whose record cannot be read is left alone: another version may have written it, and its machine runs.
        """
        for place in sorted(one for one in self.place.iterdir() if one.is_dir()):
            try:
                machine = Machine.read((place / _RECORD).read_text())
            except FileNotFoundError:
                yield place
                continue
            except (OSError, ValueError) as error:
                _log.error("the record of a machine in %s cannot be read, and it is left alone: %s", place, error)
                self.unread.append(place)
                continue
            with self._lock:
                self._machines[machine.name] = machine
            yield machine

    def close(self) -> None:
        """Lets another process have the machines."""
        self._turn.close()

    def all(self) -> list[Machine]:
        """All of them, sorted by name."""
        with self._lock:
            return sorted(self._machines.values(), key=lambda machine: machine.name)

    def get(self, name: str) -> Machine:
        """The machine of that name; NotFoundError where there is none."""
        with self._lock:
            found = self._machines.get(name)
        if found is None:
            raise NotFoundError("machine", name, hint="`cowstore vm ls` shows all that run")
        return found

    def macs(self) -> set[str]:
        """The addresses of all machines."""
        given = [one.identity.mac for one in self.all() if one.identity]
        return {*given, *(one.nic.mac for one in self.all() if one.nic)}

    def has(self, name: str) -> bool:
        """Whether there is a machine of that name."""
        with self._lock:
            return name in self._machines

    def add(self, machine: Machine) -> Machine:
        """Puts a machine on record that is about to be started, with a directory of its own.

        Raises:
            ExistsError: The name is taken.
            MachineError: There are machines of which nobody here knows what they have.
        """
        if self.unread:
            raise MachineError(
                f"the record of a machine in {self.unread[0]} cannot be read",
                hint="use the version of cowstore that has made it, or end its process and remove that directory",
            )
        machine = replace(machine, key=os.urandom(4).hex())
        with self._lock:
            if machine.name in self._machines:
                raise ExistsError("machine", machine.name, hint="choose another name, or stop it first")
            self._machines[machine.name] = machine
        try:
            self.directory(machine).mkdir(mode=0o700)
            return self.change(machine)
        except BaseException:
            self.remove(machine)
            raise

    def change(self, machine: Machine, **changes: Any) -> Machine:
        """Changes a machine's record, whoever else changes other fields of it at this time.

        Raises:
            NotFoundError: It is gone.
            OSError: The record cannot be written, and stays as it was.
        """
        path = self.directory(machine) / _RECORD
        aside = path.with_suffix(".tmp")
        with self._lock:
            found = self._machines.get(machine.name)
            if found is None or found.key != machine.key:
                raise NotFoundError("machine", machine.name, hint="it has ended meanwhile")
            changed = replace(found, **changes)
            aside.write_text(changed.write())
            aside.replace(path)
            self._machines[machine.name] = changed
        return changed

    def remove(self, machine: Machine) -> None:
        """Forgets a machine, and removes its directory; harmless when done twice."""
        shutil.rmtree(self.directory(machine), ignore_errors=True)
        with self._lock:
            found = self._machines.get(machine.name)
            if found is not None and found.key == machine.key:
                del self._machines[machine.name]

    def directory(self, machine: Machine) -> Path:
        """Where a machine's sockets and logs are."""
        return self.place / machine.key


def _private(directory: Path) -> Path:
    """The directory as others will find it, too; refused where somebody else may have prepared it."""
    found = os.stat(directory, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StoreError(f"{directory} is not private to this user", hint="remove it, or name another place")
    return directory.resolve()
