"""Journals: writes of a clone that no flush has covered yet, kept where they survive the death of the process.

Whoever answers for others, as the server does, has to keep what was answered when its process is killed: the
guest is alive, and its next flush promises everything before it. So each write is appended to a file, without
a sync: the kernel keeps it when the process dies, and when the host dies the guest does too, which makes the
journal worth nothing; it names the boot it belongs to. The next one who opens the clone for writing does the
writes again and flushes them.

To do writes again that a flush has covered already changes nothing, so long as all that came after them are
done as well. Files are numbered, a flush begins with a new one, and those before it go, in order, when it is
published.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import layout
from .digest import Buffer
from .errors import NoSpaceError
from .files import Disk, File, boot_id
from .layout import CHANGE

_KINDS = frozenset((layout.JOURNAL_DATA, layout.JOURNAL_ZEROS, layout.JOURNAL_SIZE))
Change = tuple[int, int, int, bytes]
"""What was done: layout's JOURNAL_ kind, offset and length in bytes, and the bytes that were written."""


class Journals:
    """The journals of one store."""

    def __init__(self, disk: Disk, directory: Path) -> None:
        self._disk = disk
        self._directory = directory

    def of(self, number: int) -> Journal:
        """The journal of a clone, whose lease the caller holds."""
        return Journal(self._disk, self._directory, number)


class Journal:
    """The journal of one clone. Only the holder of the clone's lease may use it.

    Args:
        disk: Opens the files.
        directory: Where they are; made when it is first needed.
        number: The clone's number.

    Attributes:
        is_kept: Whether changes are recorded.
        is_deferred: Whether that waits for record().
        size: Bytes recorded since the last flush began.
    """

    def __init__(self, disk: Disk, directory: Path, number: int) -> None:
        self.is_kept = False
        self.is_deferred = False
        self.size = 0
        self._waiting: list[Buffer] = []
        self._device_size = 0
        self._disk = disk
        self._directory = directory
        self._number = number
        self._file: File | None = None
        self._generation = max(self._generations(), default=0)
        self._turned: list[Path] = []  # what the flush under way covers, oldest first

    @property
    def is_left(self) -> bool:
        """Whether there are files of somebody before."""
        return self._generation > 0

    def _path(self, generation: int) -> Path:
        return self._directory / f"{self._number}.{generation}"

    def _generations(self) -> list[int]:
        """Those whose files are there, in order."""
        try:
            names = [path.name.partition(".") for path in self._directory.iterdir()]
        except FileNotFoundError:
            return []
        return sorted(int(last) for first, _, last in names if first == str(self._number) and last.isdigit())

    # Recording.

    def wrote(self, data: Buffer, offset: int, size: int) -> None:
        """Records a write to a device of so many bytes."""
        if self.is_kept:
            self._device_size = size
            self._add([CHANGE.pack(layout.JOURNAL_DATA, offset, len(data)), data])

    def zeroed(self, length: int, offset: int, size: int) -> None:
        """Records that a range of a device of so many bytes became zeros."""
        if self.is_kept:
            self._device_size = size
            self._add([CHANGE.pack(layout.JOURNAL_ZEROS, offset, length)])

    def resized(self, size: int) -> None:
        """Records another size."""
        if self.is_kept:
            self._device_size = size
            self._add([CHANGE.pack(layout.JOURNAL_SIZE, size, 0)])

    def _add(self, buffers: list[Buffer]) -> None:
        if self.is_deferred:
            self._waiting += buffers
        else:
            self._append(buffers)

    def record(self) -> None:
        """Records what waits in one write, since many small ones cost twice as much; all of it, or none."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._append(waiting)

    def _append(self, buffers: list[Buffer]) -> None:
        """Adds to the file, all or nothing: half a change would hide what comes behind it."""
        file = self._file or self._begin()
        try:
            file.write_many(buffers, self.size)
        except BaseException:
            try:
                file.truncate(self.size)
            except (OSError, NoSpaceError):
                self.turn()  # nothing more goes behind what is broken; the next flush takes the rest along
            raise
        self.size += sum(map(len, buffers))

    def _begin(self) -> File:
        try:
            self._disk.make_directory(self._directory)
        except FileExistsError:
            pass
        path = self._path(self._generation + 1)
        file = self._disk.open(path, write=True, exclusive=True)
        try:
            # The size comes first: what is done again may have been cut off, or not yet be there.
            head = layout.encode_journal_header(boot_id(), self._number)
            head += CHANGE.pack(layout.JOURNAL_SIZE, self._device_size, 0)
            file.write_at(head, 0)
        except BaseException:
            file.close()
            self._disk.unlink(path)
            raise
        self._generation += 1
        self._file, self.size = file, len(head)
        return file

    # Flushing.

    def turn(self) -> None:
        """A flush begins: what was recorded until now is in it, what comes goes into another file."""
        self.record()
        file, self._file, self.size = self._file, None, 0
        if file is not None:
            self._turned.append(
                file.path
            )  # first: a file that is forgotten would be done again over later flushes
            file.close()

    def covered(self) -> None:
        """The flush is published: what was recorded before it began is needed no more."""
        while self._turned:
            self._disk.unlink(self._turned[0])
            del self._turned[0]

    # The past, and the end.

    def left(self) -> Iterator[Change]:
        """What a process that died has left, in order; nothing of an earlier boot, whose guests are gone."""
        for generation in self._generations():
            yield from self._read(self._path(generation))

    def _read(self, path: Path) -> Iterator[Change]:
        file = self._disk.open(path)
        try:
            head = layout.encode_journal_header(boot_id(), self._number)
            if file.read_at(len(head), 0) != head:
                return
            at, end = len(head), file.size()
            while at + CHANGE.size <= end:
                kind, offset, length = CHANGE.unpack(file.read_at(CHANGE.size, at))
                if kind not in _KINDS:
                    return
                at += CHANGE.size
                payload = length if kind == layout.JOURNAL_DATA else 0
                if at + payload > end:
                    return  # its writer died in the middle of it, and had not answered
                yield kind, offset, length, file.read_at(payload, at)
                at += payload
        finally:
            file.close()

    def drop(self) -> None:
        """Removes everything, oldest first: what was recorded is not wanted, or is flushed."""
        self.close()
        for generation in self._generations():
            self._disk.unlink(self._path(generation))
        self._turned = []

    def close(self) -> None:
        """Closes the file and leaves it there; harmless when done twice."""
        file, self._file, self.size = self._file, None, 0
        if file is not None:
            file.close()
