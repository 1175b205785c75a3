"""A guest that writes what the store itself writes: nodes of trees and commit blocks, byte by byte.

Data and nodes lie in segments of their own, and data shares an id only with used data, whatever the index says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cowstore
from cowstore import BlockCorruptError, catalog, layout, slots, tree
from cowstore.blocks import Interner
from cowstore.layout import (
    COMMIT_RUNS,
    DATA,
    DATA_KINDS,
    FREE,
    MAP,
    MAP_KINDS,
    RESERVED,
    SLOT_BITS,
    SLOTS_OFFSET,
    SLOTS_PER_SEGMENT,
    Commit,
    DeviceRecord,
    Root,
)  # fmt: skip
from cowstore.segments import Segments

BLOCK = 4096
MIB = 1 << 20
GIB = 1 << 30
SIZES = {"one": MIB, "two": 64 * MIB, "three": 2 * GIB}  # bytes; trees of one, two and three levels
PLACES = (0, 5 * BLOCK, 3 * MIB, 60 * MIB, GIB + 7 * MIB)


def content(seed: int, count: int) -> bytes:
    return np.random.default_rng(seed).bytes(count * BLOCK)


@pytest.fixture
def records(store: cowstore.Store) -> dict[int, DeviceRecord]:
    """Devices with trees of several heights, flushed several times: the record after each flush, by sequence."""
    found = {}
    for seed, (name, size) in enumerate(SIZES.items()):
        with store.create(name, size) as clone:
            for at in (one for one in PLACES if one < size):
                clone.pwrite(content(100 * seed + at // BLOCK, 3), at)
                clone.flush()
                record = store._find(name)
                found[record.sequence] = record
    return found


def written_slots(path: Path, *kinds: int) -> dict[int, tuple[bytes, bytes]]:
    """Every slot that was written in segments of these kinds: digest and block by id, read from the files."""
    found = {}
    for name in sorted((path / "segments").glob("*.seg")):
        fd = os.open(name, os.O_RDONLY)
        try:
            number, kind, _ = layout.decode_segment_header(os.pread(fd, BLOCK, 0))
            digests = os.pread(fd, SLOTS_PER_SEGMENT * 16, layout.DIGESTS_OFFSET)
            written = np.frombuffer(digests, np.uint64).reshape(-1, 2).any(axis=1)
            for slot in np.flatnonzero(written).tolist() if kind in kinds else ():
                block = os.pread(fd, BLOCK, SLOTS_OFFSET + slot * BLOCK)
                found[(number << SLOT_BITS) + slot] = digests[slot * 16 : slot * 16 + 16], block
        finally:
            os.close(fd)
    return found


def commits_in(blocks: dict[int, tuple[bytes, bytes]]) -> dict[int, Commit]:
    found = {}
    for block_id, (_, block) in blocks.items():
        try:
            commit, part, parts = layout.decode_commit(block)
        except ValueError:
            continue
        assert (part, parts) == (0, 1)
        found[block_id] = commit
    return found


def roots(store: cowstore.Store) -> list[Root]:
    with store._read() as snapshot:
        records = [one for one in catalog.devices(snapshot) if not catalog.is_gone(one)]
    return [root for one in records for root in (one.base, one.root) if root.node]


def named(segments: Segments, root: Root) -> Iterator[tuple[int, int]]:
    """Every id that a tree names: the level of what it names, -1 for data, and the id."""
    below = [root.node]
    for level in range(root.height - 1, -1, -1):
        yield from ((level, one) for one in below)
        below = [one for node in below for one in tree.ids_of(segments.node(node)).tolist() if one]
    yield from ((-1, one) for one in below)


def assert_apart(segments: Segments, roots: list[Root]) -> None:
    """Leaves name data segments only, inner nodes and roots name map segments only."""
    seen = set()
    for root in roots:
        for level, one in named(segments, root):
            kind = segments.get(one >> SLOT_BITS).kind
            assert kind in (DATA_KINDS if level < 0 else MAP_KINDS), f"{one:#x} is named at level {level}"
            seen.add(level)
    assert seen >= {-1, 0}


def ids(store: cowstore.Store, name: str) -> list[int]:
    found = tree.leaves(store._engine.segments, store._find(name).root)
    return [one for _, leaf in found for one in leaf.tolist() if one]


def write(store: cowstore.Store, name: str, data: bytes, *, ephemeral: bool = False) -> None:
    """Writes what a guest would to a new clone of the largest device."""
    with store.clone("three", name, ephemeral=ephemeral) as clone:
        clone.pwrite(data, 10 * MIB)


def assert_all_right(store: cowstore.Store, data: dict[str, bytes]) -> None:
    assert_apart(store._engine.segments, roots(store))
    for name, expected in data.items():
        with store.device(name, readonly=True) as device:
            assert device.pread(len(expected), 10 * MIB) == expected
    for seed, (name, size) in enumerate(SIZES.items()):
        with store.device(name, readonly=True) as device:
            for at in (one for one in PLACES if one < size):
                assert device.pread(3 * BLOCK, at) == content(100 * seed + at // BLOCK, 3)


def joined(blocks: dict[int, tuple[bytes, bytes]]) -> bytes:
    return b"".join(block for _, block in blocks.values())


def lie(store: cowstore.Store, hints: dict[int, bytes]) -> None:
    """Puts entries into the index that point wherever one wants."""
    index = store._engine.index
    assert index.insert(b"".join(hints.values()), np.array(list(hints), np.uint64)) == len(hints)


# ------------------------------------------------------------------------------- nodes and commit blocks


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize("ephemeral", [False, True])
@pytest.mark.parametrize("lying", [False, True])
def test_a_guest_may_write_nodes_and_commit_blocks(
    store: cowstore.Store, path: Path, ephemeral: bool, lying: bool
) -> None:
    blocks = written_slots(path, MAP)
    if lying:
        lie(store, {block_id: digest for block_id, (digest, _) in blocks.items()})
    data = joined(blocks)
    assert len(blocks) > 20
    write(store, "guest", data, ephemeral=ephemeral)
    assert not set(ids(store, "guest")) & set(blocks)
    assert_all_right(store, {"guest": data})
    later = joined(written_slots(path, *MAP_KINDS))  # what the first guest's own flush has added
    assert later != data
    write(store, "later", later, ephemeral=ephemeral)
    wanted = {"guest": data, "later": later}
    assert_all_right(store, wanted)
    store.collect()
    assert_all_right(store, wanted)
    store.close()
    with cowstore.open(path) as store:
        assert_all_right(store, wanted)
        store.delete("later")
        store.collect()
        assert_all_right(store, {"guest": data})


@pytest.mark.usefixtures("records")
def test_nodes_that_become_data_are_shared_as_data(store: cowstore.Store, path: Path) -> None:
    data = joined(written_slots(path, MAP))
    write(store, "guest", data)
    before = written_slots(path, DATA)
    write(store, "twin", data)
    assert written_slots(path, DATA) == before
    assert_all_right(store, {"guest": data, "twin": data})


def test_commit_blocks_tell_what_each_flush_has_published(
    store: cowstore.Store, path: Path, records: dict[int, DeviceRecord]
) -> None:
    blocks = written_slots(path, MAP)
    forged = replace(next(iter(records.values())), name="forged", sequence=1 << 40)
    write(store, "guest", joined(blocks) + layout.encode_commit(Commit(forged, forged.sequence), 1)[0])
    published = store._find("guest")
    records = {**records, published.sequence: published}
    found = commits_in(written_slots(path, MAP))
    assert {commit.sequence for commit in found.values()} == set(records)  # not the forged one
    assert len(found) == len(records)
    for block_id, commit in found.items():
        record = records[commit.sequence]
        assert commit.device == replace(record, children=0)
        assert (commit.device.name, commit.device.root) == (record.name, record.root)
        assert any(first <= block_id < first + count for first, count in commit.runs)
        assert any(first <= record.root.node < first + count for first, count in commit.runs)


@pytest.mark.parametrize("count", [0, 1, COMMIT_RUNS, COMMIT_RUNS + 1, 3 * COMMIT_RUNS])
def test_a_commit_survives_its_encoding(count: int) -> None:
    device = DeviceRecord(
        7, "ü" * 64, layout.CLONE, Root(1 << 55, 2, 64 * MIB), Root((1 << 56) - 1, 6, 1 << 60),
        flags=layout.EPHEMERAL, parent=3, sequence=(1 << 64) - 1, created=5, owner=9, boot=bytes(range(16)),
    )  # fmt: skip
    runs = tuple((1000 * number + 1, number + 1) for number in range(count))
    commit = Commit(device, device.sequence, runs, next_block=1 << 54)
    parts = layout.commit_parts(count)
    decoded = [layout.decode_commit(block) for block in layout.encode_commit(commit, parts)]
    assert [(part, of) for _, part, of in decoded] == [(part, parts) for part in range(parts)]
    assert tuple(run for one, _, _ in decoded for run in one.runs) == runs
    assert all(replace(one, runs=runs) == commit for one, _, _ in decoded)


def test_a_commit_with_any_byte_changed_is_refused() -> None:
    device = DeviceRecord(7, "desk", layout.CLONE, Root(0, 1, MIB), Root(5, 1, MIB), sequence=2)
    (block,) = layout.encode_commit(Commit(device, 2, ((5, 1),)), 1)
    for at in range(BLOCK):
        changed = bytearray(block)
        changed[at] ^= 0x40
        with pytest.raises(ValueError, match="commit block"):
            layout.decode_commit(bytes(changed))


# ------------------------------------------------------------------------------- hints that lead elsewhere


def digests(store: cowstore.Store, data: bytes) -> list[bytes]:
    return store._engine.hasher.digests([data[at : at + BLOCK] for at in range(0, len(data), BLOCK)])


def states(store: cowstore.Store, ids: list[int]) -> set[int]:
    with store._read() as snapshot:
        reader = slots.StateReader(snapshot)
        known = (FREE, RESERVED, layout.USED, layout.DOOMED)
        return {state for state in known if reader.are(np.array(ids, np.uint64), state).any()}


@pytest.mark.usefixtures("records")
def test_hints_to_reserved_slots_with_the_very_bytes(store: cowstore.Store, path: Path) -> None:
    """Another writer's blocks that are on the disk, but may never be published."""
    data = content(1, 20)
    with store.clone("one", "unpublished") as clone:
        clone.pwrite(data, 0)
        root = clone._moment()
        staged = [one for _, leaf in tree.leaves(store._engine.segments, root) for one in leaf.tolist() if one]
        theirs = dict(zip(staged[:20], digests(store, data), strict=True))
        assert states(store, staged[:20]) == {RESERVED}
        lie(store, theirs)
        write(store, "guest", data)
        assert not set(ids(store, "guest")) & set(staged[:20])
        clone.discard()
    store.collect()
    assert_all_right(store, {"guest": data})
    store.close()
    with cowstore.open(path) as store:
        assert_all_right(store, {"guest": data})


@pytest.mark.usefixtures("records")
def test_hints_to_free_slots_with_the_very_bytes(store: cowstore.Store, path: Path) -> None:
    data, segments = content(2, 20), store._engine.segments
    (number,) = segments.data
    last = ((number + 1) << SLOT_BITS) - 20
    free = list(range(last, last + 20))
    assert states(store, free) == {FREE}
    segments.write(last, [data], b"".join(digests(store, data)))
    lie(store, dict(zip(free, digests(store, data), strict=True)))
    write(store, "guest", data)
    assert not set(ids(store, "guest")) & set(free)
    store.collect()
    assert_all_right(store, {"guest": data})
    store.close()
    with cowstore.open(path) as store:
        assert_all_right(store, {"guest": data})


@pytest.mark.usefixtures("records")
@pytest.mark.parametrize("first", [1, 1 << 40, 1 << 55, 1 << 56, 1 << 63, (1 << 64) - 20])
def test_hints_to_slots_that_are_not_there(store: cowstore.Store, path: Path, first: int) -> None:
    data = content(3, 20)
    lie(store, dict(zip(range(first, first + 20), digests(store, data), strict=True)))
    write(store, "guest", data)
    with store.clone("one", "few") as clone:
        clone.pwrite(data[:BLOCK], 0)  # few blocks go another way than many
    store.collect()
    store.close()
    with cowstore.open(path) as store:
        assert_all_right(store, {"guest": data})
        with store.device("few", readonly=True) as device:
            assert device.pread(BLOCK, 0) == data[:BLOCK]


@pytest.mark.usefixtures("records")
def test_hints_to_other_used_data(store: cowstore.Store, path: Path) -> None:
    data, others = content(4, 5), ids(store, "one")[:5]
    lie(store, dict(zip(others, digests(store, data), strict=True)))
    write(store, "guest", data)
    assert not set(ids(store, "guest")) & set(others)
    assert_all_right(store, {"guest": data})


# ------------------------------------------------------------------------------- these tests can fail


@pytest.mark.usefixtures("records")
def test_who_believes_every_hint_names_a_node_as_data(
    store: cowstore.Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interner, "_published", lambda _self, ids, _digests: np.ones(len(ids), np.bool_))
    blocks = written_slots(path, MAP)
    lie(store, {block_id: digest for block_id, (digest, _) in blocks.items()})
    write(store, "guest", joined(blocks))
    assert set(ids(store, "guest")) & set(blocks)
    with pytest.raises(AssertionError, match="is named at level -1"):
        assert_apart(store._engine.segments, roots(store))
    with store.device("guest", readonly=True) as device, pytest.raises(BlockCorruptError, match="map segment"):
        device.pread(len(blocks) * BLOCK, 10 * MIB)


@pytest.mark.usefixtures("records")
def test_a_data_block_named_as_a_node_is_seen(store: cowstore.Store) -> None:
    segments, block_id = store._engine.segments, ids(store, "one")[0]
    for height in (1, 2, 3):
        with pytest.raises((AssertionError, BlockCorruptError)):
            assert_apart(segments, [Root(block_id, height, MIB)])
