"""Thousands of blocks of one digest: every read is right, and the work for each is bounded."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import xxhash

import cowstore
from cowstore.digest import UNWRITTEN, Hasher
from cowstore.segments import Segments
from tests.unit.collisions import colliding

BLOCK = 4096
LISTED = 8
MANY = 4500
WORK = LISTED + 1  # comparisons for one block: the likeliest candidate, then all that are listed


@pytest.fixture
def seed(path, store) -> int:
    return int(json.loads((path / "store.json").read_text())["seed"], 16)


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """Counts slots that are read to be compared."""
    count: Counter[str] = Counter()
    original = Segments.read_raw

    def read_raw(segments: Segments, first: int, buffer: memoryview) -> int:
        count["slots"] += len(buffer) // BLOCK
        return original(segments, first, buffer)

    monkeypatch.setattr(Segments, "read_raw", read_raw)
    return count


def ids(device: cowstore.Device) -> list[int]:
    return [int(one) for one in device._tree.ids(0, -(-device.size // BLOCK))]


@pytest.mark.parametrize("seed", [0, 1, 0x1234_5678_9ABC_DEF0, (1 << 64) - 1])
def test_the_blocks_collide(seed):
    blocks = list(colliding(seed, 1000))
    assert len(set(blocks)) == 1000
    assert len({xxhash.xxh3_128_digest(block, seed) for block in blocks}) == 1


def test_thousands_are_right_and_cost_little(store, seed, reads):
    blocks = list(colliding(seed, MANY))
    content = b"".join(blocks)
    disk = store.create("disk", len(content))
    disk.pwrite(content, 0)
    disk.flush()
    assert 0 < reads["slots"] <= WORK * MANY
    assert disk.pread(len(content), 0) == content
    assert len(set(ids(disk))) == MANY
    digest = xxhash.xxh3_128_digest(blocks[0], seed)
    assert len(store._engine.index.candidates(digest)) == LISTED
    disk.close()
    with store.device("disk") as again:
        assert [again.pread(BLOCK, at) for at in range(0, len(content), BLOCK)] == blocks


def test_those_that_are_listed_are_shared(store, seed, reads):
    blocks = list(colliding(seed, 100))
    first = store.create("first", 100 * BLOCK)
    first.pwrite(b"".join(blocks), 0)
    first.flush()
    listed = set(store._engine.index.candidates(xxhash.xxh3_128_digest(blocks[0], seed)))
    shared = [number for number, block_id in enumerate(ids(first)) if block_id in listed]
    assert len(shared) == LISTED
    for way in ("one-by-one", "at-once"):
        reads.clear()
        other = store.create(way, 100 * BLOCK)
        for number in range(100):
            other.pwrite(blocks[number], number * BLOCK)
            if way == "one-by-one":
                other.flush()
        other.flush()
        assert reads["slots"] <= WORK * 100
        same = [number for number, (one, two) in enumerate(zip(ids(first), ids(other), strict=True)) if one == two]
        assert same == shared
        assert other.pread(100 * BLOCK, 0) == b"".join(blocks)
        other.close()
    first.close()
    assert len(store._engine.index.candidates(xxhash.xxh3_128_digest(blocks[0], seed))) == LISTED


def test_an_import_shares_what_is_listed(store, seed, reads, tmp_path):
    blocks = list(colliding(seed, 2000))
    (tmp_path / "disk").write_bytes(b"".join(blocks + blocks[:500]))
    store.import_image(tmp_path / "disk", "one")
    store.import_image(tmp_path / "disk", "two")
    assert reads["slots"] <= WORK * 5000
    with store.device("one") as one, store.device("two") as two:
        assert one.read() == two.read() == b"".join(blocks + blocks[:500])
        assert len(set(ids(one)) & set(ids(two))) == LISTED


def test_many_families_at_once(store, seed, reads):
    """Blocks of different digests take turns, so that each batch has several of each."""
    families = [list(colliding(seed, 20, content)) for content in range(40)]
    blocks = [family[number] for number in range(20) for family in families]
    disk = store.create("disk", len(blocks) * BLOCK)
    disk.pwrite(b"".join(blocks), 0)
    disk.flush()
    twin = store.create("twin", len(blocks) * BLOCK)
    twin.pwrite(b"".join(reversed(blocks)), 0)
    twin.flush()
    assert reads["slots"] <= WORK * 2 * len(blocks)
    assert disk.pread(disk.size, 0) == b"".join(blocks)
    assert twin.pread(twin.size, 0) == b"".join(reversed(blocks))
    assert len(set(ids(disk)) & set(ids(twin))) == LISTED * len(families)
    disk.close()
    twin.close()


def test_collisions_outlast_a_collection_and_a_reopening(path, store, seed):
    blocks = list(colliding(seed, 60))
    for name, part in {"keep": blocks[30:], "drop": blocks[:30]}.items():
        with store.create(name, 30 * BLOCK) as disk:
            disk.pwrite(b"".join(part), 0)
    store.delete("drop")
    assert store.collect().doomed >= 30
    store.close()
    with cowstore.open(path) as again, again.clone("keep", "twin") as twin:
        twin.pwrite(b"".join(reversed(blocks[30:])), 0)
        twin.flush()
        assert twin.pread(30 * BLOCK, 0) == b"".join(reversed(blocks[30:]))
        with again.device("keep") as keep:
            assert keep.pread(30 * BLOCK, 0) == b"".join(blocks[30:])
            assert len(set(ids(keep)) & set(ids(twin))) >= 4  # of those listed, some were in the deleted device


def test_diff_and_delta_see_through_equal_digests(store, seed):
    blocks = list(colliding(seed, 20))
    base = store.create("base", 10 * BLOCK)
    base.pwrite(b"".join(blocks[:10]), 0)
    base.close()
    clone = store.clone("base", "clone")
    clone.pwrite(blocks[15], 3 * BLOCK)
    clone.pwrite(blocks[7], 7 * BLOCK)
    clone.flush()
    digest = xxhash.xxh3_128_digest(blocks[0], seed)
    assert list(clone.delta()) == [(3, digest)]
    clone.close()
    assert [(one.offset, one.length) for one in store.diff("base", "clone")] == [(3 * BLOCK, BLOCK)]


def test_the_digest_that_means_unwritten_is_filed_elsewhere():
    hasher = Hasher(0, lambda block, seed: UNWRITTEN)
    assert hasher.digest(bytes(BLOCK)) != UNWRITTEN
    assert hasher.digests([b"a", b"b"]) == [hasher.digest(b"c")] * 2


@pytest.mark.parametrize("batch", [1, 3, 5, 64])
def test_blocks_whose_digest_is_all_zeros(path, batch):
    """They may not look like slots that were never written."""
    with cowstore.open(path, create=True, _hash=lambda block, seed: UNWRITTEN) as store:
        source = np.random.default_rng(batch)
        blocks = [source.bytes(BLOCK) for _ in range(64)]
        with store.create("disk", 64 * BLOCK) as disk:
            for first, last in pairwise([*range(0, 64, batch), 64]):
                disk.pwrite(b"".join(blocks[first:last]), first * BLOCK)
                disk.flush()
        store.collect()
        with store.create("more", 64 * BLOCK) as more:
            more.pwrite(b"".join(blocks[::-1]), 0)
        with store.device("disk") as disk, store.device("more") as more:
            assert disk.pread(64 * BLOCK, 0) == b"".join(blocks)
            assert more.pread(64 * BLOCK, 0) == b"".join(blocks[::-1])
