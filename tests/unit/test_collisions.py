"""Thousands of different blocks with one digest, made as a guest can make them who knows the store's seed.

XXH3 takes a long input in stripes of 64 bytes, 8 lanes of 8 each. A lane adds its data to its neighbour's sum, and
to its own the product of the low and the high half of data ^ secret. Where the low halves of data and secret are
equal, the product is 0 whatever the high half is, and the data only adds to the neighbour. Two such lanes in
neighbouring stripes whose sum stays the same: 2**32 blocks of one digest.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

import cowstore
from cowstore import blocks, catalog, slots, tree
from cowstore.blocks import SAME_DIGEST_LIMIT, Interner
from cowstore.index import CANDIDATES
from cowstore.layout import DATA, USED
from cowstore.segments import Segments

BLOCK = 4096
COUNT = 4096  # blocks of one digest
FLUSHES = 4
STRIPE = 64
SECRET = struct.unpack("<QQ", bytes.fromhex("b8fe6c3923a44bbe7c01812cf721ad1c"))  # the start of XXH3's own
WORD = (1 << 64) - 1
HALF = (1 << 32) - 1


def colliding(seed: int, count: int) -> list[bytes]:
    """Different blocks, all of one digest under that seed."""
    first_secret, second_secret = (SECRET[0] + seed) & WORD, (SECRET[1] - seed) & WORD
    block = bytearray(bytes(range(256)) * (BLOCK // 256))
    made = []
    for number in range(count):
        high = number * 0x9E3779B1 & HALF  # odd: all are different
        struct.pack_into("<Q", block, 0, (first_secret & HALF) | high << 32)
        struct.pack_into("<Q", block, STRIPE, (second_secret & HALF) | (0x12345678 - high & HALF) << 32)
        made.append(bytes(block))
    return made


def colliding_with(path: Path, count: int = COUNT) -> list[bytes]:
    """The same for the store at that path."""
    seed = int(json.loads((path / "store.json").read_text())["seed"], 16)
    made = colliding(seed, count)
    assert len(set(made)) == count
    assert len({xxhash.xxh3_128_digest(block, seed) for block in made}) == 1
    return made


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The id of each slot that is read to be compared."""
    found: list[int] = []
    read_raw = Segments.read_raw

    def counted(self: Segments, first: int, buffer: memoryview) -> int:
        found.extend(range(first, first + len(buffer) // BLOCK))
        return read_raw(self, first, buffer)

    monkeypatch.setattr(Segments, "read_raw", counted)
    return found


def write(store: cowstore.Store, name: str, made: list[bytes], flushes: int = 1) -> list[int]:
    """Writes blocks in a row to a new clone, in several flushes; returns their ids."""
    part = -(-len(made) // flushes)
    with store.create(name, len(made) * BLOCK) as clone:
        for start in range(0, len(made), part):
            clone.pwrite(b"".join(made[start : start + part]), start * BLOCK)
            clone.flush()
    return ids(store, name)


def ids(store: cowstore.Store, name: str) -> list[int]:
    root = store._find(name).root
    return [one for _, leaf in tree.leaves(store._engine.segments, root) for one in leaf.tolist() if one]


def used_data(store: cowstore.Store) -> int:
    """Data slots in use."""
    with store._read() as snapshot:
        numbers = [number for number, (kind, _) in catalog.segments(snapshot).items() if kind == DATA]
        return sum(int(np.count_nonzero(slots.load_segment(snapshot, number) == USED)) for number in numbers)


def assert_reads(store: cowstore.Store, name: str, made: list[bytes]) -> None:
    with store.device(name, readonly=True) as device:
        assert device.pread(len(made) * BLOCK, 0) == b"".join(made)


def test_a_seed_does_not_keep_anybody_from_making_collisions() -> None:
    for seed in (0, 1, WORD, 0x0123456789ABCDEF):
        assert len({xxhash.xxh3_128_digest(block, seed) for block in colliding(seed, 100)}) == 1


@pytest.mark.parametrize("flushes", [1, FLUSHES])
def test_every_block_is_read_as_it_was_written(path: Path, flushes: int, compared: list[int]) -> None:
    with cowstore.open(path, create=True) as store:
        made = colliding_with(path)
        found = write(store, "desk", made, flushes)
        assert len(set(found)) == COUNT  # different blocks, different slots
        assert 7 * COUNT < len(compared) <= (SAME_DIGEST_LIMIT + 1) * COUNT  # 8 at most, after one for the batch
        assert len(set(compared)) <= SAME_DIGEST_LIMIT
        assert len(store._engine.index.candidates(xxhash.xxh3_128_digest(made[0], store._engine.hasher.seed))) == 8
    with cowstore.open(path) as store:
        assert_reads(store, "desk", made)
        store.collect()
        assert_reads(store, "desk", made)
    with cowstore.open(path) as store:
        assert ids(store, "desk") == found
        assert_reads(store, "desk", made)


def test_a_few_are_shared_and_the_rest_cost_a_block_each(path: Path) -> None:
    with cowstore.open(path, create=True) as store:
        made = colliding_with(path)
        found = write(store, "desk", made, FLUSHES)
    with cowstore.open(path) as store:
        before, used = used_data(store), []
        assert before == COUNT
        for name, part in (("listed", made[:8]), ("others", made[8:16])):
            start = store.stats().used
            again = write(store, name, part)
            used.append(store.stats().used - start)
            assert (again == found[:8]) == (name == "listed")
            assert not set(again) & set(found[8:])
        assert used_data(store) == before + 8
        assert used[1] - used[0] == 8 * BLOCK  # nodes and commit block are the same for both
        for name, part in (("listed", made[:8]), ("others", made[8:16]), ("desk", made)):
            assert_reads(store, name, part)


def test_what_is_deleted_is_collected_and_what_is_shared_stays(path: Path) -> None:
    with cowstore.open(path, create=True) as store:
        made = colliding_with(path)
        found = write(store, "desk", made, FLUSHES)
        kept = made[4:12]
        assert write(store, "kept", kept)[:4] == found[4:8]
        store.delete("desk")
        store.collect()
        assert used_data(store) == len(kept)
        assert_reads(store, "kept", kept)
        again = made[COUNT // 4 :: -1]
        write(store, "desk", again, FLUSHES)  # into slots that were erased
        assert len(again) <= used_data(store) <= len(again) + len(kept)
    with cowstore.open(path) as store:
        assert_reads(store, "kept", kept)
        assert_reads(store, "desk", again)


@pytest.mark.parametrize("size", [1, 4, 5, 64])
def test_work_is_bounded_whatever_the_size_of_a_write(path: Path, size: int, compared: list[int]) -> None:
    """A flush of few blocks goes another way than one of many."""
    with cowstore.open(path, create=True) as store:
        made = colliding_with(path, 256)
        with store.create("desk", len(made) * BLOCK) as clone:
            for start in range(0, len(made), size):
                compared.clear()
                clone.pwrite(b"".join(made[start : start + size]), start * BLOCK)
                clone.flush()
                assert len(compared) <= (SAME_DIGEST_LIMIT + 1) * size
        assert len(set(ids(store, "desk"))) == len(made)
    with cowstore.open(path) as store:
        assert_reads(store, "desk", made)


def test_the_limits_agree() -> None:
    assert SAME_DIGEST_LIMIT == CANDIDATES == 8


# ------------------------------------------------------------------------------- these tests can fail


def test_without_a_limit_the_work_would_not_be_bounded(
    path: Path, compared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SAME_DIGEST_LIMIT", 64)
    with cowstore.open(path, create=True) as store:
        made = colliding_with(path, 256)
        write(store, "desk", made)
        assert len(compared) > 2 * (SAME_DIGEST_LIMIT + 1) * len(made)


def test_who_trusts_equal_digests_reads_the_wrong_block(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interner, "_holds", lambda *_: True)
    with cowstore.open(path, create=True) as store:
        made = colliding_with(path, 256)
        assert len(set(write(store, "desk", made))) == 1
        with pytest.raises(AssertionError):
            assert_reads(store, "desk", made)
