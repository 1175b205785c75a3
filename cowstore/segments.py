"""Segments: files of slots, and the verified way to the blocks in them.

A slot holds the raw bytes of a block; its digest stands in the same file, so that one sync covers both. The
first time a process reads a block it reads it with pread and checks it against its digest, so that media
errors and truncation are errors and not signals; after that it reads from the mapping.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import layout, slots
from .digest import BLOCK_SIZE, DIGEST_SIZE, UNWRITTEN, Buffer, Hasher
from .errors import BlockCorruptError, ClosedError, FormatError, PoisonedError, ReadOnlyError, SegmentCorruptError
from .files import Disk, File
from .layout import DATA_KINDS, DIGESTS_OFFSET, MAP_KINDS, SEGMENT_SIZE, SLOT_BITS, SLOT_MASK, SLOTS_OFFSET, Run

_PUNCH_PIECE = 4096  # slots: 16 MiB
Node = memoryview  # of 512 unsigned 64-bit ids


class Segment:
    """One segment file, open.

    Attributes:
        number: Its number.
        kind: One of layout's kinds.
        map: A read-only mapping of the whole file.
        view: The same as a view.
        verified: A byte for each slot, not 0 once its block was read and checked in this process.
    """

    def __init__(self, number: int, kind: int, file: File, stamp: int) -> None:
        self.number = number
        self.kind = kind
        self.file = file
        self.stamp = stamp
        self.syncing = threading.Lock()
        self.map = file.map(SEGMENT_SIZE)
        self.view = memoryview(self.map)
        self.verified = mmap.mmap(-1, layout.SLOTS_PER_SEGMENT)

    def forget_verified(self) -> None:
        """Has every block checked anew; an erased slot may hold another block now."""
        self.verified = mmap.mmap(-1, layout.SLOTS_PER_SEGMENT)


class Segments:
    """The segments of a store in one process.

    Args:
        disk: Opens the files.
        directory: Where they are.
        hasher: Computes digests under the store's seed.
        store_id: Every segment carries it.
        erasure: Gives the number of the last erasure that the catalog knows.
        writable: Whether files are opened for writing.
    """

    def __init__(
        self,
        disk: Disk,
        directory: Path,
        hasher: Hasher,
        store_id: bytes,
        erasure: Callable[[], int],
        *,
        writable: bool,
    ) -> None:
        self.opened: dict[int, Segment] = {}
        self.data: dict[int, Segment] = {}  # those of them that hold data: Device.pread looks here
        self.poisoned = ""
        self._disk = disk
        self._directory = directory
        self._hasher = hasher
        self._store_id = store_id
        self._erasure = erasure
        self._writable = writable
        self._closed = False
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def path(self, number: int) -> Path:
        """A segment's file."""
        return self._directory / f"{number:08d}.seg"

    def get(self, number: int) -> Segment:
        """A segment, opened and vetted at its first use.

        Raises:
            SegmentCorruptError: Its file is missing, cut off, damaged, or another store's.
            FormatError: It was erased in later than the catalog knows.
        """
        segment = self.opened.get(number)
        if segment is None:
            with self._lock:
                if self._closed:
                    raise ClosedError("the store is closed")
                segment = self.opened.get(number)
                if segment is None:
                    segment = self.opened[number] = self._open(number)
                    if segment.kind in DATA_KINDS:
                        self.data[number] = segment
        return segment

    def _open(self, number: int) -> Segment:
        path = self.path(number)
        try:
            file = self._disk.open(path, write=self._writable)
        except FileNotFoundError:
            raise SegmentCorruptError(str(path), "its file is missing") from None
        try:
            kind, stamp = self._vet(number, file)
            return Segment(number, kind, file, stamp)
        except BaseException:
            file.close()
            raise

    def _vet(self, number: int, file: File) -> tuple[int, int]:
        header, path = file.read_at(BLOCK_SIZE, 0), str(file.path)
        try:
            found, kind, store_id = layout.decode_segment_header(header)
        except ValueError as error:
            raise SegmentCorruptError(path, str(error)) from error
        if found != number or store_id != self._store_id:
            raise SegmentCorruptError(path, "it belongs to another place or store")
        if file.size() != SEGMENT_SIZE:
            raise SegmentCorruptError(path, f"it has {file.size()} bytes instead of {SEGMENT_SIZE}")
        stamp = layout.decode_stamps(header)
        if stamp > self._erasure():
            raise FormatError(
                path, "the catalog is older than the last erasure here", hint="restore a newer catalog"
            )
        return kind, stamp

    def refresh(self) -> None:
        """Looks for erasures by other processes; called when a device is opened, before its first read."""
        for segment in list(self.opened.values()):
            stamp = layout.decode_stamps(segment.file.read_at(BLOCK_SIZE, 0))
            if stamp != segment.stamp:
                segment.stamp = stamp
                segment.forget_verified()

    def create(self, number: int, kind: int) -> None:
        """Makes an empty segment file, durably and all at once. A failed write or sync poisons the handle."""
        try:
            self._create(number, kind)
        except OSError as error:
            raise self._poisoned(f"new segment {self.path(number)}", error) from error

    def _create(self, number: int, kind: int) -> None:
        path = self.path(number)
        aside = path.with_suffix(".tmp")
        self._disk.unlink(aside)
        file = self._disk.open(aside, write=True, exclusive=True)
        try:
            file.write_at(layout.encode_segment_header(number, kind, self._store_id), 0)
            file.truncate(SEGMENT_SIZE)
            file.sync()
        except BaseException:
            self._disk.unlink(aside)
            raise
        finally:
            file.close()
        self._disk.rename(aside, path)
        self._disk.sync_directory(self._directory)

    # Reading.

    def block(self, block_id: int) -> bytes:
        """One block of any kind, verified.

        Raises:
            BlockCorruptError: It does not match its digest.
        """
        segment, slot = self.get(block_id >> SLOT_BITS), block_id & SLOT_MASK
        start = SLOTS_OFFSET + slot * BLOCK_SIZE
        if segment.verified[slot]:
            return segment.map[start : start + BLOCK_SIZE]
        data = bytearray(BLOCK_SIZE)
        self._read_verified(segment, slot, memoryview(data))
        return bytes(data)

    def node(self, block_id: int) -> Node:
        """A node: a view of the mapping as 512 unsigned 64-bit numbers, verified and of a map segment."""
        segment, slot = self.get(block_id >> SLOT_BITS), block_id & SLOT_MASK
        if segment.kind not in MAP_KINDS:
            raise BlockCorruptError(block_id, "it is named as a node but lies in a data segment")
        start = SLOTS_OFFSET + slot * BLOCK_SIZE
        if not segment.verified[slot]:
            self._read_verified(segment, slot, memoryview(bytearray(BLOCK_SIZE)))
        return segment.view[start : start + BLOCK_SIZE].cast("Q")

    def data_segment(self, block_id: int) -> Segment:
        """The segment of a data block; an error where a leaf names something else."""
        if block_id >= layout.BLOCK_ID_LIMIT:
            raise BlockCorruptError(block_id, "its reserved bits are not zero")
        segment = self.get(block_id >> SLOT_BITS)
        if segment.kind not in DATA_KINDS:
            raise BlockCorruptError(block_id, "it is named as data but lies in a map segment")
        return segment

    def read(self, ids: npt.NDArray[np.uint64], buffer: memoryview) -> None:
        """Fills a buffer with the data blocks of these ids, verified; holes become zeros.

        Args:
            ids: N block ids, 0 for a hole.
            buffer: N * 4,096 bytes.
        """
        for position, first, count in slots.split_at_holes(ids):
            part = buffer[position * BLOCK_SIZE : (position + count) * BLOCK_SIZE]
            if not first:
                part[:] = bytes(len(part))
                continue
            segment, slot = self.data_segment(first), first & SLOT_MASK
            if segment.verified[slot : slot + count].count(0):
                self._read_verified(segment, slot, part)
            else:
                start = SLOTS_OFFSET + slot * BLOCK_SIZE
                part[:] = segment.view[start : start + len(part)]

    def views(self, first: int, count: int) -> memoryview:
        """Data slots in a row, verified, as a view of the mapping where they were read before.

        The view is good only as long as the slots cannot be erased.
        """
        segment, slot = self.data_segment(first), first & SLOT_MASK
        if segment.verified[slot : slot + count].count(0):
            buffer = memoryview(bytearray(count * BLOCK_SIZE))
            self._read_verified(segment, slot, buffer)
            return buffer
        start = SLOTS_OFFSET + slot * BLOCK_SIZE
        return segment.view[start : start + count * BLOCK_SIZE]

    def prefetch(self, first: int, count: int) -> None:
        """Asks for data slots in a row to be brought into the page cache."""
        segment = self.data_segment(first)
        segment.file.prefetch(SLOTS_OFFSET + (first & SLOT_MASK) * BLOCK_SIZE, count * BLOCK_SIZE)

    def read_raw(self, first: int, buffer: memoryview) -> int:
        """Reads slots in a row as they are, unverified, to be compared; returns the bytes read."""
        segment = self.get(first >> SLOT_BITS)
        return segment.file.read_into(buffer, SLOTS_OFFSET + (first & SLOT_MASK) * BLOCK_SIZE)

    def _read_verified(self, segment: Segment, slot: int, buffer: memoryview) -> None:
        count = len(buffer) // BLOCK_SIZE
        try:
            done = segment.file.read_into(buffer, SLOTS_OFFSET + slot * BLOCK_SIZE)
        except OSError as error:
            raise BlockCorruptError((segment.number << SLOT_BITS) + slot, f"it cannot be read: {error}") from error
        if done != len(buffer):
            raise SegmentCorruptError(str(segment.file.path), "it is cut off")
        stored = segment.file.read_at(count * DIGEST_SIZE, DIGESTS_OFFSET + slot * DIGEST_SIZE)
        found = self._hasher.digests([buffer[at : at + BLOCK_SIZE] for at in range(0, len(buffer), BLOCK_SIZE)])
        if b"".join(found) != stored:
            self._accuse(segment, slot, stored, found)
        segment.verified[slot : slot + count] = b"\1" * count

    def _accuse(self, segment: Segment, slot: int, stored: bytes, found: list[bytes]) -> None:
        for position, digest in enumerate(found):
            expected = stored[position * DIGEST_SIZE : (position + 1) * DIGEST_SIZE]
            if digest != expected:
                reason = "it was erased" if expected == UNWRITTEN else "its bytes do not match its digest"
                block_id = (segment.number << SLOT_BITS) + slot + position
                raise BlockCorruptError(block_id, reason, expected=expected)

    def digests(self, first: int, count: int) -> bytes:
        """The stored digests of slots in a row, 16 bytes each; zeros where nothing was written."""
        segment, slot = self.get(first >> SLOT_BITS), first & SLOT_MASK
        return segment.file.read_at(count * DIGEST_SIZE, DIGESTS_OFFSET + slot * DIGEST_SIZE)

    # Writing.

    def check_writable(self) -> None:
        """Raises PoisonedError or ReadOnlyError where nothing may be written."""
        if self.poisoned:
            raise PoisonedError(self.poisoned)
        if not self._writable:
            raise ReadOnlyError(f"store {self._directory.parent}", hint="it was opened read-only")

    def write(self, first: int, buffers: Sequence[Buffer], digests: bytes) -> None:
        """Writes reserved slots in a row and their digests; durable only after sync().

        Args:
            first: Block id of the first slot.
            buffers: Whole blocks, one or several a buffer.
            digests: 16 bytes for each block.
        """
        self.check_writable()
        segment, slot = self.get(first >> SLOT_BITS), first & SLOT_MASK
        count = len(digests) // DIGEST_SIZE
        try:
            segment.file.write_many(buffers, SLOTS_OFFSET + slot * BLOCK_SIZE)
            segment.file.write_at(digests, DIGESTS_OFFSET + slot * DIGEST_SIZE)
        except OSError as error:
            raise self._poisoned(str(segment.file.path), error) from error
        segment.verified[slot : slot + count] = bytes(count)

    def sync(self, numbers: Iterable[int]) -> None:
        """Makes what was written to these segments durable. A failure poisons the handle.

        Raises:
            PoisonedError: A sync failed, now or earlier.
        """
        self.check_writable()
        segments = [self.get(number) for number in numbers]
        others = [self._workers().submit(self._sync, segment) for segment in segments[1:]]
        for segment in segments[:1]:
            self._sync(segment)  # here rather than by a worker: that saves a change of threads
        for other in others:
            other.result()

    def _sync(self, segment: Segment) -> None:
        """Syncs one file, one thread at a time.

        The kernel tells of a failure once. Who came second, and was told nothing, must still not succeed.
        """
        with segment.syncing:
            self.check_writable()
            try:
                segment.file.sync()
            except OSError as error:
                raise self._poisoned("sync of a segment", error) from error

    def _poisoned(self, what: str, error: OSError) -> PoisonedError:
        self.poisoned = f"{what}: {error.strerror}"
        return PoisonedError(self.poisoned)

    def _workers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(4, "cowstore-sync")
            return self._pool

    def erase(self, runs: Sequence[Run], erasure: int, keep: int) -> None:
        """Erases doomed slots: stamps the headers, zeroes the digests, punches holes, syncs.

        Args:
            runs: The slots, sorted.
            erasure: Its number; written to the headers and synced before anything else.
            keep: Shorter runs of slots keep their space on the disk, for the blocks written there next.
        """
        self.check_writable()
        try:
            self._erase(runs, erasure, keep)
        except OSError as error:
            raise self._poisoned("erasure in a segment", error) from error

    def _erase(self, runs: Sequence[Run], erasure: int, keep: int) -> None:
        numbers = sorted({first >> SLOT_BITS for first, _ in runs})
        for number in numbers:
            file = self.get(number).file
            file.write_at(layout.encode_stamp(erasure), layout.next_stamp_offset(file.read_at(BLOCK_SIZE, 0)))
        self.sync(numbers)
        for first, count in runs:
            segment, slot = self.get(first >> SLOT_BITS), first & SLOT_MASK
            segment.file.write_at(bytes(count * DIGEST_SIZE), DIGESTS_OFFSET + slot * DIGEST_SIZE)
            if count >= keep:
                self._punch(segment, slot, count)
        self.sync(numbers)
        self.refresh()

    def _punch(self, segment: Segment, slot: int, count: int) -> None:
        """Makes holes, piece by piece: the journal takes everybody's next sync along with a large one."""
        for first in range(slot, slot + count, _PUNCH_PIECE):
            length = min(_PUNCH_PIECE, slot + count - first)
            segment.file.punch(SLOTS_OFFSET + first * BLOCK_SIZE, length * BLOCK_SIZE)
            if length == _PUNCH_PIECE:
                self._sync(segment)

    def file_bytes(self) -> int:
        """Bytes that the segment files take on the disk."""
        return sum(path.stat().st_blocks * 512 for path in self._directory.glob("*.seg"))

    def close(self) -> None:
        """Closes every file. Views of the mappings that are still in use keep them alive."""
        with self._lock:
            self._closed = True
            segments = list(self.opened.values())
            self.opened.clear()
            self.data.clear()
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        for segment in segments:
            segment.file.close()
