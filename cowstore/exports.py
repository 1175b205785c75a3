"""Exports: a device as a plain sparse file, written aside and renamed when it is complete and durable.

Where the file system can, on XFS and btrfs, the file shares the space of the slots, run by run, and nothing is
copied. A slot that is erased and written again later gets other space then, so the file keeps its bytes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from . import slots, tree
from .digest import BLOCK_SIZE
from .errors import ExistsError, InvalidError, NoSpaceError, NotFoundError, StoreError
from .layout import FANOUT, SLOT_MASK, SLOTS_OFFSET, Root
from .segments import Segments
from .tree import Ids

Progress = Callable[[str, int, int], None]
Part = tuple[int, int, Ids]  # block number; first id of a run to be shared, 0 of what is to be copied; the ids

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK))  # as on FAT
# Another file system; one that cannot, or not at 4 KiB; files that are not of one kind; a sandbox. As for GNU cp.
_NO_REFLINK = frozenset((
    errno.EXDEV, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EBADF, errno.EINVAL, errno.ETXTBSY,
    errno.EPERM, errno.EACCES,
))  # fmt: skip
_CLONE_RANGE = 0x4020940D  # FICLONERANGE of linux/fs.h
_RANGE = struct.Struct("=qQQQ")  # file_clone_range: source, its offset, length, offset in the target

# How many runs of a leaf are shared; a leaf of more is copied. A call costs 20 to 50 us on XFS and 15 to 30 us on
# btrfs, however long its run; 64 of them 3.2 ms and 2.1 ms. Copying a leaf, with its sync, costs 1.1 ms and 5 ms.
_MOST_RUNS = {"auto": 64, "always": FANOUT, "never": 0}


class Export:
    """One export: a file that appears when it is complete.

    Args:
        path: Where it is to appear.
        overwrite: Whether a file that is there is replaced.
        reflink: "auto", "always" or "never".
        verify: Whether blocks that are shared are read and verified; those that are copied always are.
    """

    def __init__(self, path: Path, *, overwrite: bool, reflink: str, verify: bool) -> None:
        self._path = path
        self._overwrite = overwrite
        self._reflink = reflink
        self._verify = verify
        if reflink not in _MOST_RUNS:
            raise InvalidError(f"reflink cannot be {reflink!r}", hint="it is auto, always or never")
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
        """Writes what a tree stands for, and puts the file in its place. The caller holds the moment."""
        segments.refresh()  # a slot that others have erased may hold another block now, to be verified anew

        def fill(fd: int) -> None:
            os.ftruncate(fd, root.size)
            filling = _Filling(fd, self._path, segments, self._reflink, verify=self._verify)
            for end in filling.fill(root):
                progress("export", min(end, root.size), root.size)

        self._write(fill)
        progress("export", root.size, root.size)

    def write_by(self, fill: Callable[[Path], None]) -> None:
        """Has a file written by its path, an empty one that is there, and puts it in its place."""
        if self._reflink == "always":
            raise InvalidError("only a raw file can share space with the store", hint="leave reflink at auto")
        self._write(lambda _: fill(self._aside))

    def _write(self, fill: Callable[[int], None]) -> None:
        try:
            fd = os.open(self._aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failure(error) from error
        try:
            fill(fd)
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
        if error.errno in _FULL:
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


class _Filling:
    """The way of a tree's blocks into a file: shared by whole runs, or copied.

    Args:
        fd: The file, open for writing.
        path: What it is called in errors.
        segments: Where the blocks are.
        reflink: "auto", "always" or "never".
        verify: Whether shared blocks are verified.
    """

    def __init__(self, fd: int, path: Path, segments: Segments, reflink: str, *, verify: bool) -> None:
        self._fd = fd
        self._path = path
        self._segments = segments
        self._must_share = reflink == "always"
        self._most_runs = _MOST_RUNS[reflink]
        self._verify = verify
        self._buffer = memoryview(bytearray(FANOUT * BLOCK_SIZE))

    def fill(self, root: Root) -> Iterator[int]:
        """Does it in order, and yields after every 2 MiB at most how far it is, in bytes."""
        for number, first, ids in _joined(self._parts(root)):
            shared = first and self._share(number, first, len(ids))
            for at in range(0, len(ids), FANOUT):
                piece = ids[at : at + FANOUT]
                if not shared:
                    self._copy(number + at, piece, root.size)
                elif self._verify:
                    self._check(first + at, piece)
                yield (number + at + len(piece)) * BLOCK_SIZE

    def _parts(self, root: Root) -> Iterator[Part]:
        """Every leaf, by its runs where those are to be shared; holes may be left out, and parts may be empty.

        A tail that fills no block is copied: to cut a shared block takes a copy, too, and 128 KiB on XFS.
        """
        for index, ids in tree.leaves(self._segments, root):
            start = index * FANOUT
            runs = [run for run in slots.split_at_holes(ids) if run[1]] if self._most_runs else []
            if not 0 < len(runs) <= self._most_runs:
                yield start, 0, ids
                continue
            whole = root.size // BLOCK_SIZE - start
            for position, first, count in runs:
                end = position + count
                tail = max(position, min(end, whole))
                yield start + position, first, ids[position:tail]
                yield start + tail, 0, ids[tail:end]

    def _share(self, number: int, first: int, count: int) -> bool:
        """Shares a run of slots; False where it has to be copied."""
        source = self._segments.data_segment(first).file.fd
        offset = SLOTS_OFFSET + (first & SLOT_MASK) * BLOCK_SIZE
        wanted = _RANGE.pack(source, offset, count * BLOCK_SIZE, number * BLOCK_SIZE)
        try:
            fcntl.ioctl(self._fd, _CLONE_RANGE, wanted)
        except OSError as error:
            self._give_up_sharing(error)
            return False
        return True

    def _give_up_sharing(self, error: OSError) -> None:
        """Has the rest copied; where it is full, too: XFS refuses to share while it still has room for a copy."""
        if self._must_share and error.errno in _NO_REFLINK:
            raise StoreError(
                f"cannot share blocks with {self._path}: {error.strerror}",
                hint="it has to be on the store's own file system, XFS or btrfs; elsewhere blocks can be copied",
            ) from error
        if self._must_share or error.errno not in _NO_REFLINK | _FULL:
            raise error
        self._most_runs = 0

    def _check(self, first: int, ids: Ids) -> None:
        """Verifies a run that is shared, unless this process has.

        The moment is held, so its slots do not change between the call and this; and the file has no name yet.
        """
        segment, slot = self._segments.data_segment(first), first & SLOT_MASK
        if segment.verified[slot : slot + len(ids)].count(0):
            self._segments.read(ids, self._buffer[: len(ids) * BLOCK_SIZE])

    def _copy(self, number: int, ids: Ids, size: int) -> None:
        """Copies at most 512 blocks, verified; holes stay holes."""
        for position, count in slots.array_runs(ids != 0):
            piece = self._buffer[: count * BLOCK_SIZE]
            self._segments.read(ids[position : position + count], piece)
            offset = (number + position) * BLOCK_SIZE
            _write_all(self._fd, piece[: size - offset], offset)


def _joined(parts: Iterator[Part]) -> Iterator[Part]:
    """Joins runs that go on in the next leaf. A run ends with its segment."""
    number = first = count = 0  # the run that may go on
    for at, run, ids in parts:
        if not len(ids):
            continue
        if run and run & SLOT_MASK and (at, run) == (number + count, first + count):
            count += len(ids)
            continue
        if count:
            yield _run(number, first, count)
        number, first, count = at, run, len(ids) if run else 0
        if not run:
            yield at, 0, ids
    if count:
        yield _run(number, first, count)


def _run(number: int, first: int, count: int) -> Part:
    return number, first, np.arange(first, first + count, dtype=np.uint64)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
