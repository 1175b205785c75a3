"""Slot states: which slots of the segments are free, reserved, used or doomed.

Kept in the catalog as chunks of 4,096 slots, two bits each. A chunk is bounded whatever the fragmentation,
where a record for every run of slots is not, and every change is one array operation a chunk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from . import catalog, layout
from .environment import SLOTS, Snapshot, Writer
from .errors import CatalogCorruptError
from .layout import CHUNK_BYTES, CHUNK_SLOTS, CHUNKS_PER_SEGMENT, FREE, SLOT_BITS, SLOT_MASK, Run

States = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Planes = tuple[int, int]  # the low and the high bit of 4,096 states
_ALL = (1 << CHUNK_SLOTS) - 1


def load(snapshot: Snapshot, segment: int, chunk: int) -> States:
    """The states of one chunk: an array of 4,096 that the caller may change."""
    return _unpack(_load_planes(snapshot, segment, chunk))


def load_segment(snapshot: Snapshot, segment: int) -> States:
    """The states of all 262,144 slots of a segment."""
    states = np.full((CHUNKS_PER_SEGMENT, CHUNK_SLOTS), FREE, np.uint8)
    for key, payload in snapshot.items(SLOTS, layout.chunk_key(segment, 0)):
        owner, chunk = layout.key_chunk(key)
        if owner != segment:
            break
        states[chunk] = _unpack(_decode(payload))
    return states.reshape(-1)


def store(writer: Writer, segment: int, chunk: int, states: States) -> None:
    """Writes the states of one chunk."""
    packed = np.packbits(np.stack((states & 1, states >> 1)), axis=1, bitorder="little")
    low, high = (int.from_bytes(plane.tobytes(), "little") for plane in packed)
    _store_planes(writer, segment, chunk, (low, high))


# A plane is one bit of every slot's state, as one large integer: a run of slots is a mask, and changing it takes
# a microsecond without NumPy.


def _load_planes(snapshot: Snapshot, segment: int, chunk: int) -> Planes:
    payload = snapshot.get(SLOTS, layout.chunk_key(segment, chunk))
    return (0, 0) if payload is None else _decode(payload)


def _decode(payload: bytes) -> Planes:
    if len(payload) == 1 and payload[0] <= layout.DOOMED:
        return payload[0] % 2 * _ALL, payload[0] // 2 * _ALL
    if len(payload) != CHUNK_BYTES:
        raise CatalogCorruptError("catalog", "a chunk of slot states has a wrong length")
    half = CHUNK_BYTES // 2
    return int.from_bytes(payload[:half], "little"), int.from_bytes(payload[half:], "little")


def _unpack(planes: Planes) -> States:
    raw = b"".join(plane.to_bytes(CHUNK_BYTES // 2, "little") for plane in planes)
    low, high = np.unpackbits(np.frombuffer(raw, np.uint8).reshape(2, -1), axis=1, bitorder="little")
    return np.asarray(low | high << 1, np.uint8)


def _store_planes(writer: Writer, segment: int, chunk: int, planes: Planes) -> None:
    key = layout.chunk_key(segment, chunk)
    low, high = planes
    if planes == (0, 0):
        writer.delete(SLOTS, key)
    elif low in (0, _ALL) and high in (0, _ALL):
        writer.put(SLOTS, key, bytes((bool(low) + 2 * bool(high),)))
    else:
        half = CHUNK_BYTES // 2
        writer.put(SLOTS, key, low.to_bytes(half, "little") + high.to_bytes(half, "little"))


class StateReader:
    """Looks states up in one snapshot, each chunk read once."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._chunks: dict[int, States] = {}

    def are(self, ids: Ids, state: int) -> Mask:
        """For each block id whether its slot has that state."""
        chunks = ids >> np.uint64(12)
        first = int(chunks[0]) if len(chunks) else 0
        if len(chunks) and (chunks == first).all():
            return np.asarray(self._chunk(first)[ids & np.uint64(CHUNK_SLOTS - 1)] == state)
        found = np.zeros(len(ids), np.bool_)
        for chunk in np.unique(chunks).tolist():
            here = chunks == chunk
            found[here] = self._chunk(chunk)[ids[here] & np.uint64(CHUNK_SLOTS - 1)] == state
        return found

    def _chunk(self, place: int) -> States:
        states = self._chunks.get(place)
        if states is None:
            states = load(self._snapshot, place >> 6, place & CHUNKS_PER_SEGMENT - 1)
            self._chunks[place] = states
        return states


def change(writer: Writer, runs: Iterable[Run], old: int, new: int) -> None:
    """Moves whole runs of slots from one state to another.

    Raises:
        CatalogCorruptError: A slot among them is not in the old state.
    """
    by_chunk: dict[tuple[int, int], int] = defaultdict(int)
    moved: dict[int, int] = defaultdict(int)
    for first, count in runs:
        moved[first >> SLOT_BITS] += count
        for segment, chunk, mask in _masks(first, count):
            by_chunk[segment, chunk] |= mask
    for (segment, chunk), mask in by_chunk.items():
        low, high = _load_planes(writer, segment, chunk)
        if (low & mask, high & mask) != (mask * (old & 1), mask * (old >> 1)):
            raise CatalogCorruptError("catalog", f"slots of segment {segment} are not in the state expected")
        low = low | mask if new & 1 else low & ~mask
        high = high | mask if new & 2 else high & ~mask
        _store_planes(writer, segment, chunk, (low, high))
    _count_free(writer, moved, old, new)


def change_masked(writer: Writer, segment: int, chunk: int, mask: Mask, old: int, new: int) -> int:
    """Moves those slots of a chunk that are in the mask and the old state; returns how many there were."""
    states = load(writer, segment, chunk)
    moved = mask & (states == old)
    count = int(np.count_nonzero(moved))
    if count:
        states[moved] = new
        store(writer, segment, chunk, states)
        _count_free(writer, {segment: count}, old, new)
    return count


def _masks(first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """A run of slots as segment, chunk and mask of the slots in it."""
    while count:
        segment, slot = first >> SLOT_BITS, first & SLOT_MASK
        chunk, start = divmod(slot, CHUNK_SLOTS)
        length = min(count, CHUNK_SLOTS - start)
        yield segment, chunk, ((1 << length) - 1) << start
        first, count = first + length, count - length


def _count_free(writer: Writer, moved: dict[int, int], old: int, new: int) -> None:
    sign = (new == FREE) - (old == FREE)
    if not sign:
        return
    known = {number: fact for number, fact in catalog.segments(writer).items() if number in moved}
    for segment, count in moved.items():
        kind, free = known[segment]
        catalog.save_segment(writer, segment, kind, free + sign * count)


def find_free(snapshot: Snapshot, segment: int, count: int, shortest: int = 1) -> list[Run]:
    """Runs of free slots of one segment, none shorter than asked, at most count slots in all."""
    found: list[Run] = []
    for first, length in array_runs(load_segment(snapshot, segment) == FREE):
        if length < shortest:
            continue
        length = min(length, count)
        found.append(((segment << SLOT_BITS) + first, length))
        count -= length
        if not count:
            break
    return found


def array_runs(mask: Mask) -> list[Run]:
    """The runs of true values: position and length."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).view(np.int8)))
    return [(int(start), int(end - start)) for start, end in edges.reshape(-1, 2)]


def split_at_holes(ids: Ids) -> list[tuple[int, int, int]]:
    """Cuts a list of ids where it stops running in sequence.

    Returns:
        (position, first id, count) for each run; the first id is 0 for a run of holes. No run crosses the
        end of a segment.
    """
    if len(ids) == 1:
        return [(0, int(ids[0]), 1)]
    follows = ids[1:] == ids[:-1] + np.uint64(1)
    follows &= (ids[:-1] != 0) & ((ids[1:] & np.uint64(SLOT_MASK)) != 0)
    follows |= (ids[1:] == 0) & (ids[:-1] == 0)
    starts = np.concatenate(([0], np.flatnonzero(~follows) + 1))
    counts = np.diff(np.concatenate((starts, [len(ids)])))
    return list(zip(starts.tolist(), ids[starts].tolist(), counts.tolist(), strict=True))
