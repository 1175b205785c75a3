"""Exports: a device as a plain sparse file, written aside and renamed when it is complete and durable."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from . import slots, tree
from .digest import BLOCK_SIZE
from .errors import ExistsError, InvalidError, NoSpaceError, NotFoundError, StoreError
from .layout import FANOUT, Root
from .segments import Segments

Progress = Callable[[str, int, int], None]
_NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))  # as on FAT


def pieces(segments: Segments, root: Root) -> Iterator[tuple[int, memoryview]]:
    """Offset and bytes of everything that a tree stores, verified, in order.

    The memory is used again for the next piece.
    """
    buffer = memoryview(bytearray(FANOUT * BLOCK_SIZE))
    for index, ids in tree.leaves(segments, root):
        for position, count in slots.array_runs(ids != 0):
            piece = buffer[: count * BLOCK_SIZE]
            segments.read(ids[position : position + count], piece)
            yield (index * FANOUT + position) * BLOCK_SIZE, piece


class Export:
    """One export: a file that appears when it is complete.

    Args:
        path: Where it is to appear.
        overwrite: Whether a file that is there is replaced.
    """

    def __init__(self, path: Path, *, overwrite: bool) -> None:
        self._path = path
        self._overwrite = overwrite
        if os.path.isdir(path):
            raise InvalidError(f"{path} is a directory", hint="name the file that is to be written")
        if not overwrite and os.path.lexists(path):
            raise self._taken()
        if os.path.exists(path) and not os.path.isfile(path):
            raise InvalidError(f"{path} is not a plain file", hint="only a plain file can be replaced")
        if not os.path.isdir(path.parent):
            raise NotFoundError("directory", str(path.parent), hint="make it first")
        self._aside = path.with_name(f".{path.name[:40]}.{os.getpid()}.{threading.get_ident()}.tmp")

    def write_tree(self, segments: Segments, root: Root, progress: Progress) -> None:
        """Writes what a tree stands for."""

        def told() -> Iterator[tuple[int, memoryview]]:
            for offset, piece in pieces(segments, root):
                yield offset, piece
                progress("export", min(offset + len(piece), root.size), root.size)

        self.write(root.size, told())
        progress("export", root.size, root.size)

    def write(self, size: int, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Writes a file of so many bytes: the pieces, and holes elsewhere. Then puts it in its place."""
        try:
            fd = os.open(self._aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failure(error) from error
        try:
            os.ftruncate(fd, size)
            for offset, piece in pieces:
                _write_all(fd, piece[: size - offset], offset)
            os.fsync(fd)
            self._place()
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(fd)
            self._aside.unlink(missing_ok=True)

    def _taken(self) -> ExistsError:
        return ExistsError("file", str(self._path), hint="choose another, or say that it may be replaced")

    def _failure(self, error: OSError) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpaceError(str(self._path), hint="choose a place with more room")
        return StoreError(f"cannot write {self._path}: {error.strerror}")

    def _place(self) -> None:
        if self._overwrite:
            os.rename(self._aside, self._path)
        else:
            self._place_new()
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _place_new(self) -> None:
        """Gives the file its name if nothing has it; where there are no links, but for a short moment."""
        try:
            os.link(self._aside, self._path, follow_symlinks=False)
        except FileExistsError as error:
            raise self._taken() from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(self._path):
                raise self._taken() from error
            os.rename(self._aside, self._path)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
