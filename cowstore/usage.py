"""Space: what a device takes, what it shares, and what its deletion would free, exactly."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from . import catalog, slots, tree
from .digest import BLOCK_SIZE
from .environment import Snapshot
from .layout import (
    DOOMED,
    FREE,
    IMAGE,
    RESERVED,
    SLOT_BITS,
    SLOT_MASK,
    SLOTS_PER_SEGMENT,
    USED,
    DeviceRecord,
    Root,
)
from .marks import Marks
from .owners import Owners
from .segments import Segments

_NO_IDS: tree.Ids = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Usage:
    """What a device takes, in bytes.

    Attributes:
        virtual: Its size.
        allocated: What is not a hole.
        inherited: Of that, what its parent's moment has at the same place.
        own: Of that, the rest.
        exclusive: What deleting the device frees after a collection: blocks and nodes nobody else reaches.
    """

    virtual: int
    allocated: int
    inherited: int
    own: int
    exclusive: int


@dataclass(frozen=True)
class MemoryUsage:
    """How much of a checkpoint's memory is shared, in pages.

    Attributes:
        checkpoint: Its name.
        pages: Pages that are not zero.
        on_disk: Of those, the pages whose content some disk has, too, which is stored once for both.
        shared: Of those, the pages whose content the memory of another checkpoint has, too.
    """

    checkpoint: str
    pages: int
    on_disk: int
    shared: int


@dataclass(frozen=True)
class Stats:
    """What a store holds.

    Attributes:
        images: Images by name.
        clones: Clones by name.
        segments: Segment files.
        virtual: Sum of all devices' sizes, bytes.
        allocated: Sum of what their trees name, bytes; what it would take without any sharing.
        used: Bytes of slots that are in use, nodes and garbage not yet collected included.
        reserved: Bytes of slots that writers hold ready.
        doomed: Bytes of slots waiting to be erased.
        free: Bytes of slots that can be written within the segments there are.
        index_entries: Digests in the index, about.
        file_bytes: What the segment files take on the disk.
        catalog_bytes: What the catalog takes on the disk.
        memories: What each checkpoint's memory shares, in the order of their names.
    """

    images: int
    clones: int
    segments: int
    virtual: int
    allocated: int
    used: int
    reserved: int
    doomed: int
    free: int
    index_entries: int
    file_bytes: int
    catalog_bytes: int
    memories: tuple[MemoryUsage, ...]


def usage(snapshot: Snapshot, segments: Segments, record: DeviceRecord) -> Usage:
    """The usage of one device."""
    own, inherited = _split(segments, record.base, record.root)
    exclusive = exclusive_bytes(snapshot, segments, {record.number})
    return Usage(record.root.size, own + inherited, inherited, own, exclusive)


def usages(
    snapshot: Snapshot, segments: Segments, names: Collection[str], progress: Callable[[str, int, int], None]
) -> dict[str, Usage]:
    """The usage of some devices by name, of all where none is named; one walk for all of them."""
    records = [record for record in catalog.devices(snapshot) if not catalog.is_gone(record)]
    wanted = {catalog.find(snapshot, name).number for name in names}
    shown = [one for one in records if one.visible and (not wanted or one.number in wanted)]
    owners = Owners(segments, len(records))
    for owner, record in enumerate(records, 1):
        progress("usage", owner - 1, len(records) + len(shown))
        owners.claim(owner, record.base)
        owners.claim(owner, record.root)
    alone = dict(zip((one.number for one in records), owners.counts()[1:], strict=True))
    split: dict[tuple[Root, Root], tuple[int, int]] = {}
    found = {}
    for done, record in enumerate(shown, len(records)):
        progress("usage", done, len(records) + len(shown))
        key = (record.base, record.root)
        if key not in split:
            split[key] = _split(segments, *key)
        own, inherited = split[key]
        exclusive = alone[record.number] * BLOCK_SIZE
        found[record.name] = Usage(record.root.size, own + inherited, inherited, own, exclusive)
    return dict(sorted(found.items()))


def _split(segments: Segments, base: Root, root: Root) -> tuple[int, int]:
    """What a tree names, in bytes: what its base does not name at the same place, and what it does."""
    own = inherited = 0
    for _, before, now in tree.pairs(segments, base, root):
        solid = now != 0
        same = int(np.count_nonzero(solid & (before == now)))
        inherited += same
        own += int(np.count_nonzero(solid)) - same
    return own * BLOCK_SIZE, inherited * BLOCK_SIZE


def exclusive_bytes(snapshot: Snapshot, segments: Segments, numbers: Collection[int]) -> int:
    """Bytes of slots that only these devices reach: what deleting them all frees."""
    kept: list[Root] = []
    gone: list[Root] = []
    for record in catalog.devices(snapshot):
        if not catalog.is_gone(record):
            (gone if record.number in numbers else kept).extend((record.base, record.root))
    marks = Marks(segments)
    marks.mark(kept)
    return marks.mark(gone) * BLOCK_SIZE


def own_bytes(snapshot: Snapshot, segments: Segments) -> dict[str, int]:
    """For each visible device, by name, the bytes that it has and its parent's moment has not."""
    known: dict[tuple[Root, Root], int] = {}
    found = {}
    for record in catalog.devices(snapshot):
        if record.visible and not catalog.is_gone(record):
            key = (record.base, record.root)
            if key not in known:
                known[key] = _changed(segments, *key)
            found[record.name] = known[key]
    return found


def _changed(segments: Segments, base: Root, root: Root) -> int:
    blocks = 0
    for _, before, now in tree.diff(segments, base, root):
        blocks += int(np.count_nonzero((now != 0) & (before != now)))
    return blocks * BLOCK_SIZE


def stats(snapshot: Snapshot, segments: Segments, index_entries: int, catalog_bytes: int) -> Stats:
    """The whole store in numbers."""
    shown = [record for record in catalog.devices(snapshot) if record.visible and not catalog.is_gone(record)]
    images = sum(record.kind == IMAGE for record in shown)
    numbers = catalog.segments(snapshot)
    counts = np.zeros(4, np.int64)
    for number in numbers:
        counts += np.bincount(slots.load_segment(snapshot, number), minlength=4)
    assert counts.sum() == len(numbers) * SLOTS_PER_SEGMENT
    size = {state: int(counts[state]) * BLOCK_SIZE for state in (FREE, RESERVED, USED, DOOMED)}
    return Stats(
        images, len(shown) - images, len(numbers), sum(record.root.size for record in shown),
        _allocated(segments, shown), size[USED], size[RESERVED], size[DOOMED], size[FREE], index_entries,
        segments.file_bytes(), catalog_bytes, memories(snapshot, segments),
    )  # fmt: skip


def memories(snapshot: Snapshot, segments: Segments) -> tuple[MemoryUsage, ...]:
    """What the memory of each checkpoint shares with disks, and with that of others."""
    checkpoints = sorted(catalog.checkpoints(snapshot), key=lambda one: one.name)
    if not checkpoints:
        return ()
    records = {record.number: record for record in catalog.devices(snapshot)}
    kept = {number for one in checkpoints for number in one.disks}
    disks = [
        one.root for number, one in records.items()
        if (one.visible or number in kept) and not catalog.is_gone(one)
    ]  # fmt: skip
    marks = Marks(segments)  # each node is entered once, however many clones have it
    marks.mark(disks)
    pages = [_ids(segments, records[one.memory].root) for one in checkpoints]
    known, times = np.unique(np.concatenate([np.unique(ids) for ids in pages]), return_counts=True)
    several = known[times > 1]
    return tuple(
        MemoryUsage(one.name, len(ids), _reached(marks, ids), int(np.isin(ids, several).sum()))
        for one, ids in zip(checkpoints, pages, strict=True)
    )


def _reached(marks: Marks, ids: tree.Ids) -> int:
    """How many of some ids, one for each place, the marks have reached."""
    numbers = ids >> np.uint64(SLOT_BITS)
    at = (ids & np.uint64(SLOT_MASK)).astype(np.intp)
    return sum(int(marks.reached(number)[at[numbers == number]].sum()) for number in np.unique(numbers).tolist())


def _ids(segments: Segments, root: Root) -> tree.Ids:
    """The ids of all blocks that a tree names, one for each place."""
    return np.concatenate([ids[ids != 0] for _, ids in tree.leaves(segments, root)] or [_NO_IDS])


def _allocated(segments: Segments, records: list[DeviceRecord]) -> int:
    """Bytes that all trees name; equal roots are counted by one walk."""
    by_root: dict[Root, int] = {}
    total = 0
    for record in records:
        if record.root not in by_root:
            by_root[record.root] = sum(int(np.count_nonzero(ids)) for _, ids in tree.leaves(segments, record.root))
        total += by_root[record.root]
    return total * BLOCK_SIZE
