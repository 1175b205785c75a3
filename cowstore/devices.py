"""Devices: the read path. Leaf, block id, slice of a mapping.

An image, or one moment of a clone, opened for reading. Writable clones build on it in ``clones.py``.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, SupportsIndex

import numpy as np

from . import slots, tree
from .catalog import DeviceInfo
from .digest import BLOCK_SIZE, DIGEST_SIZE
from .environment import Environment
from .errors import BlockCorruptError, ClosedError, CorruptError, InvalidError, RangeError, ReadOnlyError
from .layout import FANOUT, FANOUT_BITS, SLOTS_OFFSET, Root
from .segments import Segments
from .tree import Ids, TreeView

ZERO_DIGEST = bytes(DIGEST_SIZE)
_NOTHING: dict[int, bytes] = {}
Piece = bytes | memoryview | int


@dataclass(frozen=True)
class Extent:
    """A run of a device's bytes that are alike.

    Attributes:
        offset: Bytes from the start.
        length: Bytes.
        data: Whether anything is stored there; otherwise it reads as zeros.
        own: Whether the device has it and its parent's moment has not.
    """

    offset: int
    length: int
    data: bool
    own: bool


class Device(io.RawIOBase):
    """An open device, read-only. Also a standard binary file object.

    Any number of threads may use one device. A call is done as a whole under the device's lock; a pread() of
    one block does without it and sees that block as a whole. The file position of read(), seek() and tell()
    is one for all threads, so they use pread().

    Offsets and lengths are bytes and need not be aligned.
    """

    def __init__(
        self, info: DeviceInfo, base: Root, view: TreeView, environment: Environment, segments: Segments,
        release: Callable[[], None], settle: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.info = info
        self._base = base
        self._tree = view
        self._leaves = view.leaves
        self._environment = environment
        self._segments = segments
        self._data = segments.data
        self._release: Callable[[], None] | None = release
        self._settle = settle  # what close() does after it, and a destructor must not
        self._dirty = _NOTHING
        self._size = view.root.size
        self._lock = threading.RLock()
        self._position = 0
        self._epoch = 0  # moves before anything that this device reads may be erased

    @property
    def name(self) -> str:
        """The device's name when it was opened."""
        return self.info.name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def __repr__(self) -> str:
        state = "closed" if self._release is None else f"{self._size} bytes"
        return f"<{type(self).__name__} {self.info.name!r}, {state}>"

    # Reading.

    def pread(self, length: int, offset: int) -> bytes:
        """Reads bytes.

        Args:
            length: Bytes to read.
            offset: Where to begin.

        Raises:
            RangeError: Some of it lies outside the device.
            BlockCorruptError: A block is not what was written.
        """
        # The hot path is longer and plainer than the house likes: a call costs as much as all of its work, and a
        # lock as much as copying the block. So it takes none, but looks at the epoch before and after: a block
        # that was named when the epoch was read is not erased before a flush is published, and every flush
        # begins by moving the epoch. The unflushed blocks are looked at before the leaf, because a block that
        # leaves them is named by its leaf first.
        epoch = self._epoch
        block = offset >> 12
        skip = offset & 4095
        if 0 < length <= 4096 - skip and offset + length <= self._size and block not in self._dirty:
            leaf = self._leaves.get(block >> 9)
            if leaf is not None:
                block_id = leaf[block & 511]
                if not block_id:
                    return bytes(length)
                segment = self._data.get(block_id >> 18)
                slot = block_id & 0x3FFFF
                if segment is not None and segment.verified[slot]:
                    start = SLOTS_OFFSET + (slot << 12) + skip
                    data = segment.map[start : start + length]
                    if epoch == self._epoch:
                        return data
        with self._lock:
            buffer = bytearray(self._checked(length, offset))
            self._read_into(memoryview(buffer), offset)
            return bytes(buffer)

    def steady(self) -> AbstractContextManager[object]:
        """While it is held, what views() has returned stays as it is: writes and flushes of the device wait."""
        return self._lock

    def views(self, length: int, offset: int) -> list[Piece]:
        """The bytes of a range in pieces and without a copy; call it, and use them, while steady() is held.

        A flush that began before goes on meanwhile and may be published: it names everything that the tree
        named when it began, and the next one needs the lock to begin. So nothing that the tree names while the
        lock is held is erased before it is given up.

        Args:
            length: Bytes.
            offset: Where to begin.

        Returns:
            Buffers of bytes, and numbers: so many zeros.

        Raises:
            RangeError: Some of it lies outside the device.
            BlockCorruptError: A block is not what was written.
        """
        block, skip = offset >> 12, offset & 4095
        if 0 < length <= 4096 - skip and offset + length <= self._size:  # in one block, as most of a guest's reads
            written = self._dirty.get(block)
            if written is not None:
                return [written if length == 4096 else memoryview(written)[skip : skip + length]]
            leaf = self._leaves.get(block >> 9)
            if leaf is not None:
                block_id = leaf[block & 511]
                if not block_id:
                    return [length]
                segment = self._data.get(block_id >> 18)
                slot = block_id & 0x3FFFF
                if segment is not None and segment.verified[slot]:
                    start = SLOTS_OFFSET + (slot << 12) + skip
                    return [segment.view[start : start + length]]
        self._checked(length, offset)
        return self._pieces(length, offset) if length else []

    def _pieces(self, length: int, offset: int) -> list[Piece]:
        """Views of any range: the blocks that hold it, less what stands before and behind."""
        first, end = offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)
        pieces: list[Piece] = []
        for start in range(first, end, FANOUT):
            stop = min(start + FANOUT, end)
            for number in sorted(self._dirty.keys() & range(start, stop)) if self._dirty else ():
                self._stored_pieces(start, number, pieces)
                pieces.append(self._dirty[number])
                start = number + 1
            self._stored_pieces(start, stop, pieces)
        skip = offset - first * BLOCK_SIZE
        pieces[0] = _from(pieces[0], skip)
        surplus = (end - first) * BLOCK_SIZE - skip - length
        if surplus:
            pieces[-1] = _without(pieces[-1], surplus)
        return pieces

    def _stored_pieces(self, start: int, stop: int, pieces: list[Piece]) -> None:
        """Adds what the tree has for the blocks from start up to stop."""
        if start == stop:
            return
        with self._named(start, stop - start):
            for _, block_id, count in slots.split_at_holes(self._tree.ids(start, stop - start)):
                if block_id:
                    pieces.append(self._segments.views(block_id, count))
                elif pieces and isinstance(pieces[-1], int):
                    pieces[-1] += count * BLOCK_SIZE
                else:
                    pieces.append(count * BLOCK_SIZE)

    def prefetch(self, length: int, offset: int) -> None:
        """Asks for a range to be brought into memory from the disk; does not wait for it.

        Args:
            length: Bytes.
            offset: Where to begin.
        """
        with self._lock:
            self._checked(length, offset)
            first, end = offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)
            for start in range(first, end, FANOUT):
                ids = self._tree.ids(start, min(FANOUT, end - start))
                for _, block_id, count in slots.split_at_holes(ids):
                    if block_id:
                        self._segments.prefetch(block_id, count)

    def preadinto(self, buffer: Any, offset: int) -> int:
        """Fills a writable buffer with the bytes from offset on; returns its length in bytes."""
        view = memoryview(buffer).cast("B")
        with self._lock:
            self._checked(len(view), offset)
            self._read_into(view, offset)
        return len(view)

    def _checked(self, length: int, offset: int) -> int:
        self._check_open()
        if offset < 0 or length < 0 or offset + length > self._size:
            raise RangeError(self.name, offset, length, self._size)
        return length

    def _check_open(self) -> None:
        if self._release is None:
            raise ClosedError(f"device {self.name!r} is closed")

    def _read_into(self, view: memoryview, offset: int) -> None:
        """Reads any range: whole blocks in place, cut ones at both ends through a block of their own."""
        skip = offset % BLOCK_SIZE
        if skip and len(view):
            head = min(BLOCK_SIZE - skip, len(view))
            view[:head] = self._block(offset // BLOCK_SIZE)[skip : skip + head]
            view, offset = view[head:], offset + head
        count, tail = divmod(len(view), BLOCK_SIZE)
        first = offset // BLOCK_SIZE
        for start in range(0, count, FANOUT):
            part = view[start * BLOCK_SIZE : min(start + FANOUT, count) * BLOCK_SIZE]
            self._read_blocks(part, first + start)
        if tail:
            view[count * BLOCK_SIZE :] = self._block(first + count)[:tail]

    def _block(self, number: int) -> memoryview:
        buffer = memoryview(bytearray(BLOCK_SIZE))
        self._read_blocks(buffer, number)
        return buffer

    def _read_blocks(self, view: memoryview, first: int) -> None:
        count = len(view) // BLOCK_SIZE
        with self._named(first, count):
            ids = self._tree.ids(first, count)
            self._segments.read(ids, view)
        if self._dirty:
            mine = self._dirty.keys() & range(first, first + count) if len(self._dirty) > count else self._dirty
            for number in mine:
                if first <= number < first + count:
                    at = (number - first) * BLOCK_SIZE
                    view[at : at + BLOCK_SIZE] = self._dirty[number]

    @contextmanager
    def _named(self, first: int, count: int) -> Iterator[None]:
        """Adds the device's name and the offset to what is said of a damaged block."""
        try:
            yield
        except BlockCorruptError as error:
            offset = first * BLOCK_SIZE
            with suppress(CorruptError):  # of a node: the range must do
                where = np.flatnonzero(self._tree.ids(first, count) == np.uint64(error.block_id))
                offset += int(where[0]) * BLOCK_SIZE if len(where) else 0
            raise BlockCorruptError(
                error.block_id, error.reason, name=self.name, offset=offset, expected=error.expected
            ) from error

    # What it is made of.

    def _moment(self) -> Root:
        """The root of the device's present content."""
        self._check_open()
        return self._tree.root

    def extents(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """Runs of data or zeros, own or inherited, in order; unflushed writes are seen.

        Args:
            offset: Where to begin.
            length: Bytes; to the end where it is not given.
        """
        with self._lock:
            length = self._checked(self._size - offset if length is None else length, offset)
            root = self._moment()
            pin = self._environment.read()
        with pin:
            for extent in _merged(self._extents(root, offset, offset + length)):
                self._check_open()
                yield extent

    def _extents(self, root: Root, offset: int, end: int) -> Iterator[Extent]:
        span = FANOUT * BLOCK_SIZE
        first, stop = offset // span, -(-end // span)
        for index, inherited, ids in tree.pairs(self._segments, self._base, root, first, stop):
            start = index * span
            if start > offset:
                yield Extent(offset, start - offset, False, False)
            offset, last = max(offset, start), min(start + span, end)
            yield from _runs(ids, inherited, start, offset, last)
            offset = last
        if offset < end:
            yield Extent(offset, end - offset, False, False)

    def delta(self) -> Iterator[tuple[int, bytes]]:
        """What the device has and its parent's moment has not: block number and digest, in order.

        A block that became zero has ZERO_DIGEST, 16 zero bytes. The cost follows the change.
        """
        with self._lock:
            root = self._moment()
            pin = self._environment.read()
        with pin:
            for index, old, new in tree.diff(self._segments, self._base, root):
                for slot, digest in tree.changed_blocks(self._segments, old, new):
                    self._check_open()
                    yield (index << FANOUT_BITS) + slot, digest

    # As a file.

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads from the file position on; fewer bytes at the end."""
        view = memoryview(buffer).cast("B")
        with self._lock:
            self._check_open()
            count = max(0, min(len(view), self._size - self._position))
            if count:
                self.preadinto(view[:count], self._position)
                self._position += count
        return count

    def seek(self, offset: SupportsIndex, whence: int = io.SEEK_SET) -> int:
        """Moves the file position; it may lie beyond the end, as in any file."""
        with self._lock:
            self._check_open()
            if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
                raise InvalidError(f"whence {whence} is not known")
            start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
            position = start + offset.__index__()
            if position < 0:
                raise InvalidError(f"{self.name}: a file position of {position} is negative")
            self._position = position
            return position

    def tell(self) -> int:
        """The file position in bytes."""
        self._check_open()
        return self._position

    def write(self, data: Any) -> int:
        """Refused: images are immutable, and of a clone this is one moment."""
        clone_it = self.info.kind == "image"
        hint = "clone it and write to the clone" if clone_it else "it was opened read-only"
        raise ReadOnlyError(f"{self.info.kind} {self.name!r}", hint=hint)

    # The end.

    def close(self) -> None:
        """Gives the device back; harmless when done twice."""
        with self._lock:
            release, self._release = self._release, None
            self._leaves = {}
            self._epoch += 1
        if release is not None:
            release()
            if self._settle is not None:
                self._settle()
        super().close()

    def abandon(self) -> None:
        """In a child made by os.fork(): nothing may be used or released, the parent owns it."""
        self._lock = threading.RLock()
        self._release = None
        self._leaves = {}

    def __del__(self) -> None:
        # No flush here: a destructor runs at any point, also inside a call that holds the locks it would need.
        release = getattr(self, "_release", None)
        if release is not None:
            self._release = None
            release()
            warnings.warn(f"device {self.info.name!r} was never closed", ResourceWarning, stacklevel=2)


def _from(piece: Piece, skip: int) -> Piece:
    """A piece without its first bytes."""
    return piece - skip if isinstance(piece, int) else memoryview(piece)[skip:]


def _without(piece: Piece, surplus: int) -> Piece:
    """A piece without its last bytes."""
    return piece - surplus if isinstance(piece, int) else memoryview(piece)[:-surplus]


def _runs(ids: Ids, inherited: Ids, start: int, offset: int, end: int) -> Iterator[Extent]:
    """The runs within one leaf that starts at a byte offset, as far as they lie between offset and end."""
    kinds = (ids != 0).astype(np.int8) + 2 * (ids != inherited)
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    for first, last in pairwise(edges):
        low, high = max(start + first * BLOCK_SIZE, offset), min(start + last * BLOCK_SIZE, end)
        if low < high:
            yield Extent(low, high - low, bool(kinds[first] & 1), bool(kinds[first] & 2))


def _merged(extents: Iterator[Extent]) -> Iterator[Extent]:
    """Neighbours that are alike, in one."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and (last.data, last.own) == (extent.data, extent.own):
            last = Extent(last.offset, last.length + extent.length, last.data, last.own)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last
