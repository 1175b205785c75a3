"""A Disk that notes every call which changes something, so that a crash after any of them can be played back.

The log speaks of numbered files and directories rather than of paths, because a name and what it leads to are
made durable by different syncs. A call is noted when it is done. What a sync covers is what was noted when it
began: a write beside it, by another thread, may or may not have been taken along.

LMDB writes its own file. Its commits are noted through the environment, as the file's new content, durable at
once: a crash inside of one leaves the content before or after it. The index is a mapping that nobody syncs;
it is kept apart, in `hints`.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from cowstore.environment import Environment, Writer
from cowstore.errors import NoSpaceError
from cowstore.files import Disk, File

HINTS_EVERY = 8  # commits
TOP = 0  # the number of the directory in which all happens


@dataclass(frozen=True, slots=True)
class Linked:
    """A name for a new file or directory."""

    directory: int
    name: str
    node: int
    is_folder: bool = False


@dataclass(frozen=True, slots=True)
class Unlinked:
    """A name removed."""

    directory: int
    name: str


@dataclass(frozen=True, slots=True)
class Renamed:
    """A name moved within a directory, over whatever stood there."""

    directory: int
    old: str
    name: str
    node: int


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes of a file."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Sized:
    """A file's new length in bytes."""

    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Punched:
    """A range of a file that became a hole."""

    file: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Synced:
    """A file, as far as the first so many notes say, is durable; lost where the sync failed."""

    file: int
    covers: int
    lost: bool = False


@dataclass(frozen=True, slots=True)
class DirectorySynced:
    """The names in a directory, as far as the first so many notes say, are durable."""

    directory: int
    covers: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The content of LMDB's file after a commit, durable; it ends in zeros."""

    file: int
    data: bytes
    size: int


Operation = Linked | Unlinked | Renamed | Written | Sized | Punched | Synced | DirectorySynced | Committed
Change = Written | Sized | Punched  # of a file's bytes
Naming = Linked | Unlinked | Renamed  # of a directory's names


@dataclass
class Fault:
    """Calls that fail: the n-th of some kinds, once or from then on.

    Attributes:
        kinds: Of `write`, `sync`, `allocate`, `punch`, `create`, `rename`,
            `directory sync`, `commit`, `committed`, which fails although it was done.
        nth: Counted from 1.
        code: The error number.
        lasting: Whether it fails for ever after, until mend().
        hits: How often it has failed.
    """

    kinds: frozenset[str]
    nth: int
    code: int
    lasting: bool = False
    hits: int = 0
    seen: int = 0

    def strikes(self, kind: str) -> bool:
        if kind not in self.kinds:
            return False
        self.seen += 1
        if self.seen < self.nth or (self.hits and not self.lasting):
            return False
        self.hits += 1
        return True

    def mend(self) -> None:
        """The disk works again."""
        self.kinds = frozenset()


@dataclass
class Folder:
    """A directory as it stands now."""

    number: int
    entries: dict[str, Folder | int] = field(default_factory=dict)  # a file is its number


class Recorder:
    """The log of everything below one directory.

    Attributes:
        log: What was done, in order.
        hints: Contents of the index, each with the length of the log at its time.
        counts: How many calls there were of each kind.
        fault: What is to fail.
    """

    def __init__(self, top: Path) -> None:
        self.top = top
        self.log: list[Operation] = []
        self.hints: list[tuple[int, bytes]] = []
        self.counts: Counter[str] = Counter()
        self.fault: Fault | None = None
        self.hold: Callable[[File], None] | None = None  # called before every sync
        self._numbers = itertools.count(TOP + 1)
        self._root = Folder(TOP)
        self._lock = threading.RLock()
        self._commits = 0

    def note(self, kind: str, operation: Operation) -> None:
        with self._lock:
            self.counts[kind] += 1
            self.log.append(operation)

    def check(self, kind: str, path: Path) -> None:
        """Fails here where a fault is due."""
        with self._lock:
            strikes = self.fault is not None and self.fault.strikes(kind)
        if strikes and self.fault is not None:
            raise failure(self.fault.code, path)

    def place(self, path: Path) -> tuple[Folder, str]:
        """The directory of a path, and the name in it."""
        *parents, name = path.relative_to(self.top).parts
        folder = self._root
        for part in parents:
            below = folder.entries[part]
            assert isinstance(below, Folder), path
            folder = below
        return folder, name

    def folder(self, path: Path) -> Folder:
        if path == self.top:
            return self._root
        parent, name = self.place(path)
        found = parent.entries[name]
        assert isinstance(found, Folder), path
        return found

    def opened(self, path: Path, *, new: bool) -> int:
        """The number of a file that was opened."""
        with self._lock:
            folder, name = self.place(path)
            known = folder.entries.get(name)
            if isinstance(known, int) and not new:
                return known
            number = folder.entries[name] = next(self._numbers)
            self.note("create", Linked(folder.number, name, number))
            if not new:  # somebody else made it, LMDB for example: nothing of it is known to be durable
                self.note("adopt", Sized(number, path.stat().st_size))
                for offset, data in stored_ranges(path):
                    self.note("adopt", Written(number, offset, data))
            return number

    def made(self, path: Path) -> None:
        with self._lock:
            folder, name = self.place(path)
            made = folder.entries[name] = Folder(next(self._numbers))
            self.note("directory", Linked(folder.number, name, made.number, is_folder=True))

    def renamed(self, old: Path, new: Path) -> None:
        with self._lock:
            folder, name = self.place(old)
            target, new_name = self.place(new)
            assert folder is target, "renames stay within a directory"
            moved = folder.entries[new_name] = folder.entries.pop(name)
            number = moved.number if isinstance(moved, Folder) else moved
            self.note("rename", Renamed(folder.number, name, new_name, number))

    def unlinked(self, path: Path) -> None:
        with self._lock:
            folder, name = self.place(path)
            folder.entries.pop(name, None)
            self.note("unlink", Unlinked(folder.number, name))

    def committed(self, catalog: Path) -> None:
        """A commit of LMDB's is done, and nothing else yet."""
        with self._lock:
            number = self._catalog_file(catalog)
            data = (catalog / "data.mdb").read_bytes()
            self.note("commit", Committed(number, data.rstrip(b"\0"), len(data)))
            self._commits += 1
            table = catalog.parent / "index" / "table"
            if self._commits % HINTS_EVERY == 0 and table.exists():
                self.hints.append((len(self.log), table.read_bytes()))

    def lengthened(self, catalog: Path, size: int) -> None:
        with self._lock:
            self.note("lengthen", Sized(self._catalog_file(catalog), size))

    def _catalog_file(self, catalog: Path) -> int:
        folder = self.folder(catalog)
        if "data.mdb" not in folder.entries:
            made = folder.entries["data.mdb"] = next(self._numbers)
            self.note("create", Linked(folder.number, "data.mdb", made))
        number = folder.entries["data.mdb"]
        assert isinstance(number, int)
        return number

    def adopt(self) -> None:
        """Takes in what stands below the top, as durable: the state from which a recording goes on."""
        for parent, folders, files in os.walk(self.top):
            here = Path(parent)
            for name in sorted(folders):
                self.made(here / name)
            for name in sorted(files):
                if here.name != "index" and name != "lock.mdb":
                    number = self.opened(here / name, new=False)
                    self.note("sync", Synced(number, len(self.log)))
            self.note("sync", DirectorySynced(self.folder(here).number, len(self.log)))
        self.counts.clear()


class RecordingFile(File):
    """A file whose changes are noted; those of the index are not, they are none of the disk's business."""

    recorder: Recorder
    number = -1
    untouched = False  # made, and nothing noted of it yet

    def write_at(self, data: Any, offset: int) -> None:
        self._check("write", data, offset)
        super().write_at(data, offset)
        self._note("write", Written(self.number, offset, bytes(data)))

    def write_many(self, buffers: Sequence[Any], offset: int) -> None:
        joined = b"".join(buffers)
        self._check("write", joined, offset)
        super().write_many(buffers, offset)
        self._note("write", Written(self.number, offset, joined))

    def truncate(self, size: int) -> None:
        self._check("write")
        super().truncate(size)
        self._note("truncate", Sized(self.number, size))

    def allocate(self, size: int) -> None:
        self._check("allocate")
        super().allocate(size)
        self._note("allocate", Sized(self.number, max(size, self.size())))

    def punch(self, offset: int, length: int) -> None:
        self._check("punch")
        super().punch(offset, length)
        self._note("punch", Punched(self.number, offset, length))

    def sync(self) -> None:
        covers = len(self.recorder.log)
        if self.recorder.hold is not None:
            self.recorder.hold(self)
        try:
            self._check("sync")
        except OSError:
            self._note("sync", Synced(self.number, covers, lost=True))
            raise
        super().sync()
        self._note("sync", Synced(self.number, covers))

    def _check(self, kind: str, data: Any = b"", offset: int = 0) -> None:
        """Fails where a fault is due; half of a write is done even so."""
        if self.number < 0:
            return
        try:
            self.recorder.check(kind, self.path)
        except (OSError, NoSpaceError):
            half = bytes(data)[: len(data) // 2]
            super().write_at(half, offset)
            self._note("write", Written(self.number, offset, half))
            raise

    def _note(self, kind: str, operation: Operation) -> None:
        self.untouched = False
        if self.number >= 0:
            self.recorder.note(kind, operation)

    def close(self) -> None:
        if self.untouched and self.fd >= 0:  # LMDB writes its copies through the bare descriptor
            for offset, data in stored_ranges(self.path):
                self._note("adopt", Written(self.number, offset, data))
        super().close()


class RecordingDisk(Disk):
    """Notes what is done to the names; the files that it opens note the rest."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def open(self, path: Path, *, write: bool = False, create: bool = False, exclusive: bool = False) -> File:
        new = (create or exclusive) and not path.exists()
        if new and not is_hint(path):
            self.recorder.check("create", path)
        file = super().open(path, write=write, create=create, exclusive=exclusive)
        assert isinstance(file, RecordingFile)
        if not is_hint(path):
            file.number = self.recorder.opened(path, new=new)
            file.untouched = new
        return file

    def _file(self, path: Path, fd: int) -> File:
        file = RecordingFile(path, fd)
        file.recorder = self.recorder
        return file

    def make_directory(self, path: Path) -> None:
        if not path.exists():
            self.recorder.check("create", path)
        super().make_directory(path)
        self.recorder.made(path)

    def sync_directory(self, path: Path) -> None:
        covers = len(self.recorder.log)
        self.recorder.check("directory sync", path)
        super().sync_directory(path)
        self.recorder.note("directory sync", DirectorySynced(self.recorder.folder(path).number, covers))

    def rename(self, old: Path, new: Path) -> None:
        if not is_hint(old):
            self.recorder.check("rename", old)
        super().rename(old, new)
        if not is_hint(old):
            self.recorder.renamed(old, new)

    def unlink(self, path: Path) -> None:
        there = path.exists()
        super().unlink(path)
        if there and not is_hint(path):
            self.recorder.unlinked(path)


@contextmanager
def recorded(recorder: Recorder) -> Iterator[RecordingDisk]:
    """A disk that notes everything, and LMDB's commits noted too while it lasts."""
    commit, make_room = Writer.commit, Environment._make_room

    def noting_commit(writer: Writer) -> None:
        catalog = writer._environment.path
        if recorder.top not in catalog.parents:
            commit(writer)
            return
        try:
            recorder.check("commit", catalog)
        except (OSError, NoSpaceError) as error:
            code = error.errno if isinstance(error, OSError) else errno.ENOSPC
            raise lmdb.Error(os.strerror(code or 0)) from error
        commit(writer)
        recorder.committed(catalog)
        try:
            recorder.check("committed", catalog)
        except OSError as error:
            raise lmdb.Error(os.strerror(error.errno or 0)) from error

    def noting_length(environment: Environment, put_bytes: int) -> None:
        data = environment.path / "data.mdb"
        before = data.stat().st_size
        make_room(environment, put_bytes)
        if data.stat().st_size != before and recorder.top in environment.path.parents:
            recorder.lengthened(environment.path, data.stat().st_size)

    changed: Any = (Writer, "commit", noting_commit), (Environment, "_make_room", noting_length)
    with replaced(*changed):
        yield RecordingDisk(recorder)


def is_hint(path: Path) -> bool:
    """Whether a file belongs to an index."""
    return path.parent.name == "index"


def failure(code: int, path: Path) -> OSError | NoSpaceError:
    """What a call of files.py raises for an error number."""
    return NoSpaceError(str(path)) if code == errno.ENOSPC else OSError(code, os.strerror(code), str(path))


def stored_ranges(path: Path, limit: int = 1 << 62) -> Iterator[tuple[int, bytes]]:
    """What a sparse file holds, without its holes, in its first so many bytes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        start, size = 0, min(os.fstat(fd).st_size, limit)
        while start < size:
            try:
                start = os.lseek(fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return
            if start >= size:
                return
            end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
            yield start, os.pread(fd, end - start, start)
            start = end
    finally:
        os.close(fd)


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Other attributes for a while."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
