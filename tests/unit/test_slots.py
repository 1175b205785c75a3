"""Slot states against plain arrays: every change, and everything that is asked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowstore import catalog, slots
from cowstore.environment import SLOTS, Environment
from cowstore.errors import CatalogCorruptError
from cowstore.files import Disk
from cowstore.layout import (
    CHUNK_SLOTS,
    CHUNKS_PER_SEGMENT,
    DATA,
    DOOMED,
    FREE,
    RESERVED,
    SLOT_BITS,
    SLOTS_PER_SEGMENT,
    USED,
    chunk_key,
)

SEGMENTS = (1, 2, 1 << 30)  # numbers; the last one's block ids have more than 32 bits
STATES = (FREE, RESERVED, USED, DOOMED)


@pytest.fixture
def environment(tmp_path) -> Iterator[Environment]:
    Environment.create(tmp_path / "catalog", Disk(), tmp_path / "gate")
    environment = Environment.open(tmp_path / "catalog", Disk(), tmp_path / "gate", readonly=False)
    with environment.write() as writer:
        for number in SEGMENTS:
            catalog.save_segment(writer, number, DATA, SLOTS_PER_SEGMENT)
    yield environment
    environment.close()


class Model:
    """States as arrays, nothing else."""

    def __init__(self) -> None:
        self.states = {number: np.zeros(SLOTS_PER_SEGMENT, np.uint8) for number in SEGMENTS}

    def runs(self, source: random.Random, state: int) -> list[tuple[int, int]]:
        """Some runs of slots that are in a state, as they lie: they may not touch or overlap."""
        found: list[tuple[int, int]] = []
        for number in SEGMENTS:
            spots = np.flatnonzero(self.states[number] == state)
            for _ in range(source.randrange(4)):
                if len(spots):
                    first = int(source.choice([spots[0], spots[-1], source.choice(spots.tolist())]))
                    most = source.choice([1, 2, 100, CHUNK_SLOTS, 3 * CHUNK_SLOTS])
                    others = np.flatnonzero(self.states[number][first : first + most] != state)
                    taken = [
                        place - (number << SLOT_BITS)
                        for place, count in found
                        for place in range(place, place + count)
                    ]
                    stop = min([int(others[0]) if len(others) else most, SLOTS_PER_SEGMENT - first])
                    if not set(range(first, first + stop)) & set(taken):
                        found.append(((number << SLOT_BITS) + first, stop))
        return found

    def change(self, runs: list[tuple[int, int]], new: int) -> None:
        for first, count in runs:
            number, slot = first >> SLOT_BITS, first & SLOTS_PER_SEGMENT - 1
            self.states[number][slot : slot + count] = new

    def check(self, environment: Environment) -> None:
        with environment.read() as snapshot:
            for number, expected in self.states.items():
                assert (slots.load_segment(snapshot, number) == expected).all()
                assert catalog.segments(snapshot)[number] == (DATA, int((expected == FREE).sum()))
            reader = slots.StateReader(snapshot)
            ids = np.concatenate(
                [(number << SLOT_BITS) + np.arange(0, SLOTS_PER_SEGMENT, 501) for number in SEGMENTS]
            )
            states = np.concatenate([self.states[number][::501] for number in SEGMENTS])
            np.random.default_rng(0).shuffle(order := np.arange(len(ids)))
            for state in STATES:
                assert (reader.are(ids[order].astype(np.uint64), state) == (states[order] == state)).all()
            assert not reader.are(np.array([5 << SLOT_BITS, (1 << 64) - 1], np.uint64), USED).any()


@pytest.mark.parametrize("seed", range(4))
def test_changes_are_those_of_arrays(environment, seed):
    source, model = random.Random(seed), Model()
    for _ in range(25):
        old, new = source.sample(STATES, 2)
        runs = model.runs(source, old)
        with environment.write() as writer:
            slots.change(writer, runs, old, new)
        model.change(runs, new)
        number, chunk = source.choice(SEGMENTS), source.randrange(CHUNKS_PER_SEGMENT)
        mask = np.random.default_rng(seed).integers(0, 2, CHUNK_SLOTS).astype(bool)
        part = model.states[number][chunk * CHUNK_SLOTS : (chunk + 1) * CHUNK_SLOTS]
        with environment.write() as writer:
            moved = slots.change_masked(writer, number, chunk, mask, old, new)
        assert moved == (mask & (part == old)).sum()
        part[mask & (part == old)] = new
    model.check(environment)


@pytest.mark.parametrize("wrong", [FREE, USED, DOOMED])
def test_a_slot_in_another_state_stops_the_change(environment, wrong):
    first = (2 << SLOT_BITS) + CHUNK_SLOTS - 3
    with environment.write() as writer:
        slots.change(writer, [(first, 6)], FREE, RESERVED)
        if wrong != FREE:
            slots.change(writer, [(first + 5, 1)], RESERVED, wrong)
        else:
            slots.change(writer, [(first + 5, 1)], RESERVED, FREE)
    with pytest.raises(CatalogCorruptError, match="not in the state expected"), environment.write() as writer:
        slots.change(writer, [(first, 6)], RESERVED, USED)
    with environment.read() as snapshot:
        states = slots.load_segment(snapshot, 2)
        assert states[CHUNK_SLOTS - 3 : CHUNK_SLOTS + 3].tolist() == [RESERVED] * 5 + [wrong]
        assert slots.load(snapshot, 2, 1)[:3].tolist() == [RESERVED, RESERVED, wrong]


def test_chunks_that_are_alike_take_little(environment):
    def sizes() -> list[int]:
        with environment.read() as snapshot:
            return [len(payload) for _, payload in snapshot.items(SLOTS)]

    for old, new in ((FREE, RESERVED), (RESERVED, USED), (USED, DOOMED)):
        with environment.write() as writer:
            slots.change(writer, [(1 << SLOT_BITS, SLOTS_PER_SEGMENT)], old, new)
        assert sizes() == [1] * CHUNKS_PER_SEGMENT
    with environment.write() as writer:
        slots.change(writer, [((1 << SLOT_BITS) + 7, 1)], DOOMED, FREE)
    assert sorted(sizes()) == [1] * (CHUNKS_PER_SEGMENT - 1) + [1024]
    with environment.write() as writer:
        slots.change(writer, [(1 << SLOT_BITS, 7), ((1 << SLOT_BITS) + 8, SLOTS_PER_SEGMENT - 8)], DOOMED, FREE)
    assert sizes() == []


@pytest.mark.parametrize("payload", [b"", b"\4", bytes(2), bytes(1023), bytes(1025)])
def test_a_chunk_of_a_wrong_length_is_damage(environment, payload):
    with environment.write() as writer:
        writer.put(SLOTS, chunk_key(1, 0), payload)
    with environment.read() as snapshot:
        with pytest.raises(CatalogCorruptError, match="slot states"):
            slots.load(snapshot, 1, 0)
        with pytest.raises(CatalogCorruptError, match="slot states"):
            slots.load_segment(snapshot, 1)


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=12),
    st.integers(1, 400),
    st.integers(1, 20),
)
def test_free_runs(used, count, shortest):
    states = np.zeros(SLOTS_PER_SEGMENT, np.uint8)
    for first, length in used:
        states[first : first + length] = USED
    states[350:] = USED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "load_segment", lambda *_: states)
        found = slots.find_free(None, 3, count, shortest)  # type: ignore[arg-type]
    free = [
        (first, length) for first, length in slots.array_runs(states == FREE) if length >= shortest
    ]  # fmt: skip
    expected = [slot for first, length in free for slot in range(first, first + length)][:count]
    assert [slot for first, length in found for slot in range(first, first + length)] == [
        (3 << SLOT_BITS) + slot for slot in expected
    ]


@given(st.lists(st.booleans(), max_size=60))
def test_array_runs(flags):
    found = slots.array_runs(np.array(flags, bool))
    assert [at for first, length in found for at in range(first, first + length)] == [
        at for at, flag in enumerate(flags) if flag
    ]
    assert all(first + length < after for (first, length), (after, _) in pairwise(found))


EDGE = 1 << SLOT_BITS
IDS = st.lists(st.sampled_from([0, 1, 2, 3, 4, EDGE - 2, EDGE - 1, EDGE, EDGE + 1, 2 * EDGE - 1, (1 << 56) - 1]))


@given(IDS.filter(bool))
def test_split_at_holes(ids):
    position = 0
    parts = slots.split_at_holes(np.array(ids, np.uint64))
    for at, first, count in parts:
        assert (at, count > 0) == (position, True)
        assert ids[at : at + count] == ([first + step for step in range(count)] if first else [0] * count)
        assert not first or first >> SLOT_BITS == first + count - 1 >> SLOT_BITS
        position += count
    assert position == len(ids)
    for (_, first, count), (_, after, _) in pairwise(parts):
        assert (first, after) != (0, 0)
        assert first == 0 or after == 0 or first + count != after or not after & (EDGE - 1)
