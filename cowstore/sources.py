"""Import sources: a file that may be sparse, a block device, or any stream of bytes."""

from __future__ import annotations

import errno
import io
import mmap
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from .digest import BLOCK_SIZE
from .errors import InvalidError, SourceError

PIECE = 4 << 20  # bytes read at once
FOREIGN = ("qcow2", "vmdk", "vhdx", "vdi")
"""Formats of disk images that are not raw disks."""

_HEAD = 512  # bytes: no magic stands behind them
_MAGICS = (
    ("qcow2", 0, b"QFI\xfb"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
)


class Source(Protocol):
    """What an import reads.

    Attributes:
        name: For messages.
        size: Bytes, 0 where it is not known before the end.
    """

    name: str
    size: int

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Offset and bytes of everything that may not be zero, in order; offsets are whole blocks.

        The memory is used again for the next piece.
        """
        ...

    def close(self) -> None:
        """Closes what was opened."""
        ...


def format_of(source: str | os.PathLike[str] | BinaryIO, asked: str) -> str:
    """The format of what is to be imported, ``raw`` or a foreign one.

    Args:
        source: A path or a binary file.
        asked: A format, or ``auto``: what a file's first bytes tell. A block device or a stream is raw then.

    Raises:
        InvalidError: There is no such format.
        SourceError: The file cannot be read, or a foreign format is asked for and there is no file.
    """
    if asked not in ("auto", "raw", *FOREIGN):
        raise InvalidError(f"format {asked!r} is not known", hint=f"auto, raw, {', '.join(FOREIGN)}")
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    if asked == "auto":
        return _recognised(path) if os.path.isfile(path) else "raw"
    if asked != "raw" and not path:
        raise SourceError("a stream", f"{asked} is read from a file only", hint="put it into a file first")
    return asked


def _recognised(path: str) -> str:
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise SourceError(path, error.strerror or "it cannot be read") from error
    return next((name for name, at, magic in _MAGICS if head[at:].startswith(magic)), "raw")


def open_source(source: str | os.PathLike[str] | BinaryIO) -> Source:
    """Opens what is to be imported.

    Raises:
        SourceError: It cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source))
    name = str(getattr(source, "name", "a stream"))
    try:
        fd = source.fileno()
        regular = _is_random_access(fd) and source.tell() == 0
    except (AttributeError, OSError, io.UnsupportedOperation):
        return StreamSource(source, name)
    return FileSource(os.dup(fd), name) if regular else StreamSource(source, name)


def _open_path(path: str) -> Source:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(path, error.strerror or "it cannot be opened") from error
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            hint = "make an image of it first, for example with mke2fs -d"
            raise SourceError(path, "it is a directory", hint=hint)
        if _is_random_access(fd):
            return FileSource(fd, path)
        return StreamSource(os.fdopen(fd, "rb", buffering=0), path, owned=True)
    except OSError as error:
        os.close(fd)
        raise SourceError(path, error.strerror or "it cannot be read") from error
    except BaseException:
        os.close(fd)
        raise


def _is_random_access(fd: int) -> bool:
    """Whether the length is known: not so of files in /proc, which have none, but content."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return bool(status.st_size) or not os.pread(fd, 1, 0)
    return stat.S_ISBLK(status.st_mode)


class FileSource:
    """A regular file or block device; holes are not read."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self._buffer = memoryview(mmap.mmap(-1, PIECE))
        self._before = os.fstat(fd)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """See Source."""
        offset = 0
        while (span := self._next_data(offset)) is not None:
            offset, end = span
            while offset < end:
                piece = self._read(min(PIECE, end - offset), offset)
                yield offset, piece
                offset += len(piece)
        self._check_unchanged()

    def _next_data(self, offset: int) -> tuple[int, int] | None:
        """The next range that is not a hole, widened to whole blocks."""
        if offset >= self.size:
            return None
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            start, end = offset, self.size
        start -= start % BLOCK_SIZE
        return max(start, offset), min(-(-end // BLOCK_SIZE) * BLOCK_SIZE, self.size)

    def _read(self, length: int, offset: int) -> memoryview:
        done = 0
        while done < length:
            try:
                count = os.preadv(self._fd, [self._buffer[done:length]], offset + done)
            except OSError as error:
                raise SourceError(self.name, f"{error.strerror} at offset {offset + done}") from error
            if not count:
                raise SourceError(self.name, f"it ended at {offset + done} of {self.size} bytes", hint=_HINT)
            done += count
        return self._buffer[:length]

    def _check_unchanged(self) -> None:
        now = os.fstat(self._fd)
        if stat.S_ISREG(now.st_mode) and (now.st_size, now.st_mtime_ns) != (
            self._before.st_size, self._before.st_mtime_ns,
        ):  # fmt: skip
            raise SourceError(self.name, "it was changed while it was read", hint=_HINT)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)


_HINT = "stop what writes to it, and import it again"
_BLOCK = "make it blocking: an end and a pause cannot be told apart"


class StreamSource:
    """Bytes in order, of a length that nobody knows."""

    def __init__(self, stream: BinaryIO | io.RawIOBase, name: str, *, owned: bool = False) -> None:
        self.name = name
        self.size = 0
        self._stream = stream
        self._owned = owned
        self._buffer = bytearray(PIECE)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """See Source; the size grows with what was read."""
        while True:
            piece = self._fill()
            if not len(piece):
                return
            offset, self.size = self.size, self.size + len(piece)
            yield offset, piece
            if len(piece) < PIECE:
                return

    def _fill(self) -> memoryview:
        done = 0
        while done < PIECE:
            try:
                part = self._stream.read(PIECE - done)
            except OSError as error:
                raise SourceError(self.name, f"{error} at offset {self.size + done}") from error
            if part is None:
                raise SourceError(self.name, "it has nothing to read now, and does not block", hint=_BLOCK)
            if not part:
                break
            self._buffer[done : done + len(part)] = part
            done += len(part)
        return memoryview(self._buffer)[:done]

    def close(self) -> None:
        """Closes the stream if it was opened here."""
        if self._owned:
            self._stream.close()
