"""The catalog's LMDB environment: opened with care, read in snapshots, changed one transaction at a time.

LMDB gives atomic, durable transactions and readers that never wait, but no page checksums and a write lock
without a timeout. So every record carries a checksum, the state record carries the count and the sum of all
of them, both meta pages are vetted before LMDB maps the file, and a lock with a timeout stands before every
write transaction. LMDB allows one handle a process and file: handles are shared and counted here.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import lmdb

from . import layout, vetting
from .errors import CatalogCorruptError, ClosedError, InUseError, NoSpaceError, PoisonedError, ReadOnlyError
from .files import Disk, File
from .gate import WriteGate
from .layout import State

STATE, NAMES, DEVICES, SEGMENTS, SLOTS, LEASES, CHECKPOINTS = TABLES = (
    b"state", b"names", b"devices", b"segments", b"slots", b"leases", b"checkpoints",
)  # fmt: skip
_LATER = frozenset((CHECKPOINTS,))  # tables that a catalog gets with the first writer that knows them
_STATE_KEY = b"state"
_MAP_SIZE = 1 << 40  # bytes; only address space, and never grown while open
_FULL = 1 << 20  # bytes; a disk with less room is called full

Transaction = Any  # lmdb.Transaction is generic in its stubs only


class Snapshot:
    """A read transaction: one consistent moment of the catalog, and a pin.

    While it lasts, nothing that was doomed after it began is erased.
    """

    def __init__(self, environment: Environment, txn: Transaction) -> None:
        self._environment = environment
        self._txn = txn
        self._state: State | None = None
        environment.snapshots.add(self)

    @property
    def state(self) -> State:
        """The catalog's state record."""
        if self._state is None:
            payload = self.get(STATE, _STATE_KEY)
            if payload is None:
                raise CatalogCorruptError(str(self._environment.path), "the state record is missing")
            self._state = self._decode(State.decode, payload)
        return self._state

    @property
    def txnid(self) -> int:
        """LMDB's number for this moment."""
        return int(self._txn.id())

    def get(self, table: bytes, key: bytes) -> bytes | None:
        """The payload of one record, verified."""
        handle = self._environment.table(table)
        if handle is None:
            return None
        try:
            value = self._txn.get(key, db=handle)
        except lmdb.Error as error:
            raise self._corrupt(str(error)) from error
        return None if value is None else self._open(table, key, value)[0]

    def items(self, table: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Key and payload of every record from the start key on, in the order of the keys."""
        for key, value in self._entries(table, start):
            yield key, self._open(table, key, value)[0]

    def _entries(self, table: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Keys and values as they are stored; LMDB finds some of the damage to its pages by itself."""
        handle = self._environment.table(table)
        if handle is None:
            return
        try:
            with self._txn.cursor(db=handle) as cursor:
                if cursor.set_range(start) if start else cursor.first():
                    yield from cursor.iternext()
        except lmdb.Error as error:
            raise self._corrupt(str(error)) from error

    def verify(self) -> None:
        """Every record against its checksum, all of them against the state's count and sum."""
        records = total = 0
        for table in TABLES:
            for key, value in self._entries(table):
                check = self._open(table, key, value)[1]
                if table is not STATE:
                    records, total = records + 1, total + check
        if (records, total & (1 << 64) - 1) != (self.state.records, self.state.total):
            raise CatalogCorruptError(str(self._environment.path), "records are missing or were put back")

    def _open(self, table: bytes, key: bytes, value: bytes) -> tuple[bytes, int]:
        try:
            return layout.open_record(table, key, value)
        except ValueError as error:
            raise self._corrupt(f"{table.decode()} {key.hex()}: {error}") from error

    def _decode(self, decoder: Any, payload: bytes) -> Any:
        try:
            return decoder(payload)
        except ValueError as error:
            raise self._corrupt(str(error)) from error

    def _corrupt(self, reason: str) -> CatalogCorruptError:
        return CatalogCorruptError(str(self._environment.path), reason)

    def close(self) -> None:
        """Ends the pin; harmless when done twice."""
        txn, self._txn = self._txn, None
        if txn is not None:
            txn.abort()

    def check_open(self) -> None:
        """Raises ClosedError once the pin has ended, or in a child made by os.fork()."""
        if self._txn is None:
            raise ClosedError("this moment of the store is closed", hint="open the store again")

    def abandon(self) -> None:
        """In a child made by os.fork(): an abort here would end the parent's pin, in the table that both see."""
        self._txn = None

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Writer(Snapshot):
    """A write transaction: a snapshot that can change records. The state is mutable and saved at the end.

    Attributes:
        put_bytes: How much was put, keys included.
    """

    put_bytes = 0

    def __init__(self, environment: Environment, txn: Transaction) -> None:
        super().__init__(environment, txn)
        self._on_failure: list[Callable[[], None]] = []

    def put(self, table: bytes, key: bytes, payload: bytes) -> None:
        """Adds or replaces a record."""
        self._forget(table, key)
        value, check = layout.seal_record(table, key, payload)
        self._txn.put(key, value, db=self._environment.table(table))
        self.put_bytes += len(key) + len(value)
        self.state.records += 1
        self.state.total = (self.state.total + check) & (1 << 64) - 1

    def delete(self, table: bytes, key: bytes) -> None:
        """Removes a record; harmless when there is none."""
        if self._forget(table, key):
            self._txn.delete(key, db=self._environment.table(table))

    def _forget(self, table: bytes, key: bytes) -> bool:
        value = self._txn.get(key, db=self._environment.table(table))
        if value is None:
            return False
        self.state.records -= 1
        self.state.total = (self.state.total - self._open(table, key, value)[1]) & (1 << 64) - 1
        return True

    def on_failure(self, action: Callable[[], None]) -> None:
        """Has something done if the transaction is not committed after all."""
        self._on_failure.append(action)

    def commit(self) -> None:
        """Makes it durable."""
        txn, self._txn = self._txn, None
        txn.commit()

    def undo(self) -> None:
        """Gives it up, and whatever goes with it."""
        self.close()
        for action in self._on_failure:
            action()

    def number(self) -> int:
        """A fresh number, never used before or again in this store."""
        number = self.state.next_number
        self.state.next_number += 1
        return number

    def save_state(self) -> None:
        """Writes the state record; the last thing before the commit."""
        self.state.revision += 1
        value, _ = layout.seal_record(STATE, _STATE_KEY, self.state.encode())
        self._txn.put(_STATE_KEY, value, db=self._environment.table(STATE))

    def start_state(self) -> None:
        """The state of an empty catalog."""
        self._state = State()


class Environment:
    """A process's handle on one catalog directory, shared by every store opened on it."""

    _shared: ClassVar[dict[tuple[int, int], Environment]] = {}
    _shared_lock = threading.Lock()

    def __init__(self, path: Path, gate: WriteGate, *, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self.poisoned = ""
        self.snapshots: weakref.WeakSet[Snapshot] = weakref.WeakSet()
        self._gate = gate
        self._users = 1
        self._key = (0, 0)
        self._pid = os.getpid()
        try:
            # No spare transaction: a child made by os.fork() could not let go of it without ending a pin of ours.
            self._env: Any = lmdb.open(
                str(path), map_size=_MAP_SIZE, max_dbs=16, max_readers=vetting.MAX_READERS, max_spare_txns=0,
                mode=0o600, readonly=readonly, create=not readonly, lib_version=0,
            )  # fmt: skip
            self._tables = _open_tables(self._env, create=not readonly)
        except lmdb.Error as error:
            raise self._translated(error) from error

    @classmethod
    def forget_lock(cls) -> None:
        """In a child made by os.fork(): a thread that is not here may have held it."""
        cls._shared_lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, disk: Disk, gate_path: Path) -> None:
        """Makes an empty catalog, durably."""
        disk.make_directory(path)
        vetting.make_room_for_readers(path, disk)
        environment = cls(path, WriteGate(disk, gate_path), readonly=False)
        try:
            with environment.write(fresh=True):
                pass
            disk.sync_directory(path)
        finally:
            environment._shut()

    @classmethod
    def open(cls, path: Path, disk: Disk, gate_path: Path, *, readonly: bool) -> Environment:
        """The process's handle on a catalog, vetted and verified when it is first opened.

        Raises:
            CatalogCorruptError: It does not verify.
        """
        with cls._shared_lock:
            key = _identity(path)
            found = cls._shared.get(key)
            if found is not None and found._pid == os.getpid() and (readonly or not found.readonly):
                found._users += 1
                return found
            if found is not None and found._pid == os.getpid():
                raise InUseError(
                    f"catalog {path}", os.getpid(), hint="this process has it open read-only; close that first"
                )
            vetting.vet(path)
            vetting.make_room_for_readers(path, disk)
            environment = cls(path, WriteGate(disk, gate_path), readonly=readonly)
            try:
                environment._check()
            except BaseException:
                environment._shut()
                raise
            cls._shared[key], environment._key = environment, key
            return environment

    def _check(self) -> None:
        if not self.readonly:
            self._env.reader_check()
        with self.read() as snapshot:
            snapshot.verify()

    def table(self, name: bytes) -> Any:
        """LMDB's handle of a table; None where the catalog has none yet."""
        return self._tables[name]

    def read(self) -> Snapshot:
        """A snapshot of this moment, to be closed soon: it is a pin."""
        if self._pid != os.getpid():
            raise ClosedError("a store must not be used by a process forked from the one that opened it")
        try:
            return Snapshot(self, self._env.begin())
        except lmdb.Error as error:
            raise self._translated(error) from error

    @contextmanager
    def write(self, *, fresh: bool = False) -> Iterator[Writer]:
        """One write transaction: committed and durable when the block ends, undone when it raises.

        Raises:
            InUseError: Somebody holds the write lock for too long.
            NoSpaceError: The file system is full; nothing has changed.
            PoisonedError: Whether it is durable is not known; the store must be opened anew.
        """
        if self.readonly:
            raise ReadOnlyError(f"store {self.path.parent}", hint="it was opened read-only")
        if self._pid != os.getpid():
            raise ClosedError("a store must not be used by a process forked from the one that opened it")
        with self._gate.held():
            if self.poisoned:
                raise PoisonedError(self.poisoned)
            writer = Writer(self, self._begin())
            try:
                if fresh:
                    writer.start_state()
                yield writer
                writer.save_state()
                self._make_room(writer.put_bytes)
                self._commit(writer)
            except lmdb.Error as error:
                writer.undo()
                raise self._translated(error) from error
            except BaseException:
                writer.undo()
                raise

    def _begin(self) -> Transaction:
        try:
            return self._env.begin(write=True)
        except lmdb.Error as error:
            raise self._translated(error) from error

    def _commit(self, writer: Writer) -> None:
        try:
            writer.commit()
        except lmdb.Error as error:
            translated = self._translated(error)
            if not isinstance(translated, NoSpaceError):
                if self._was_cut_short(error):
                    raise NoSpaceError(str(self.path)) from error
                self.poisoned = str(error)
                translated = PoisonedError(self.poisoned)
            raise translated from error

    def _was_cut_short(self, error: lmdb.Error) -> bool:
        """Whether a commit failed because the disk became full within a write, which LMDB calls an I/O error.

        Nothing is published then: the meta page comes last, and after a failure there LMDB begins no transaction.
        """
        if os.strerror(errno.EIO) not in str(error):
            return False
        try:
            self._env.begin(write=True).abort()
        except lmdb.Error:
            return False
        room = os.statvfs(self.path)
        return room.f_bavail * room.f_frsize < _FULL

    def _make_room(self, put_bytes: int) -> None:
        """Makes data.mdb longer than a commit of so many bytes put can need, so that vet() can be strict.

        LMDB leaves its last pages unwritten where nothing uses them, and a crash may follow any commit: so the
        length comes first, and LMDB's own sync takes it along. Bytes never written take no space.
        """
        data, page = self.path / "data.mdb", vetting.page_size()
        needed = 2 * self._env.info()["last_pgno"] + put_bytes // 1024 + 64  # pages
        with suppress(OSError):
            if os.stat(data).st_size < needed * page:
                os.truncate(data, (needed + 64) * page)

    def _translated(self, error: lmdb.Error) -> Exception:
        text = str(error)
        if isinstance(error, lmdb.MapFullError) or os.strerror(errno.ENOSPC) in text:
            return NoSpaceError(str(self.path))
        if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.NotFoundError)):
            return CatalogCorruptError(str(self.path), text)
        if os.strerror(errno.EACCES) in text or os.strerror(errno.EROFS) in text:
            return ReadOnlyError(f"store {self.path.parent}", hint="open it read-only, or mend its permissions")
        return PoisonedError(text)

    def pins(self) -> list[tuple[int, int]]:
        """Process id and LMDB's transaction number of every pin on the host; the dead are forgotten first."""
        self._env.reader_check()
        pins = []
        for line in self._env.readers().splitlines()[1:]:
            pid, _, txnid = line.split()
            if txnid != "-":
                pins.append((int(pid), int(txnid)))
        return pins

    def copy(self, file: File) -> None:
        """Writes a compact copy of the catalog into an empty file, with LMDB's own means."""
        try:
            self._env.copyfd(file.fd, compact=True)
        except lmdb.Error as error:
            raise self._translated(error) from error

    def size(self) -> int:
        """Bytes that the catalog takes."""
        return os.stat(self.path / "data.mdb").st_blocks * 512

    def close(self) -> None:
        """Gives the handle up; the last user closes the environment."""
        with self._shared_lock:
            self._users -= 1
            if self._users:
                return
            self._shared.pop(self._key, None)  # not by its path: the store may have been moved
            self._shut()

    def abandon(self) -> None:
        """In a child made by os.fork(): all is the parent's, and LMDB's handles are let go, not closed.

        Once nothing refers to them, the child may open the catalog anew.
        """
        self._gate.close()
        for snapshot in list(self.snapshots):
            snapshot.abandon()
        self._env, self._tables = None, {}

    def _shut(self) -> None:
        self._gate.close()
        if self._pid == os.getpid():
            self._env.close()


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path / "data.mdb")
    except FileNotFoundError:
        raise CatalogCorruptError(str(path), "data.mdb is missing") from None
    return status.st_dev, status.st_ino


def _open_tables(env: Any, *, create: bool) -> dict[bytes, Any]:
    """LMDB's handle of each table; None where no writer has made the table yet."""
    tables = {}
    for name in TABLES:
        try:
            tables[name] = env.open_db(name, create=create)
        except lmdb.NotFoundError:
            if name not in _LATER:
                raise
            tables[name] = None
    return tables


def verify_copy(path: Path, disk: Disk) -> None:
    """Opens a copy of a catalog by itself, checks all of it and makes it durable.

    Raises:
        CatalogCorruptError: It does not verify.
    """
    vetting.vet(path)
    env: Any = lmdb.open(str(path), map_size=_MAP_SIZE, max_dbs=16, readonly=True, lock=False, lib_version=0)
    try:
        copy = Environment.__new__(Environment)
        copy.path, copy.snapshots = path, weakref.WeakSet()
        copy._env = env
        copy._tables = _open_tables(env, create=False)
        with Snapshot(copy, env.begin()) as snapshot:
            snapshot.verify()
    finally:
        env.close()
    data = disk.open(path / "data.mdb", write=True)
    try:
        data.sync()
    finally:
        data.close()
    disk.sync_directory(path)
