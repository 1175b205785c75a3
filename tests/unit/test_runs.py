"""Runs of slots against sets of slots."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cowstore import layout
from cowstore.runs import merge_runs, subtract_runs

SLOT_SETS = st.sets(st.integers(0, 40) | st.integers((1 << 18) - 5, (1 << 18) + 5), max_size=40)


def runs_of(slots: set[int], cuts: set[int]) -> list[tuple[int, int]]:
    """Slots as runs, which end where a segment does, and at the cuts as well."""
    found: list[tuple[int, int]] = []
    for slot in sorted(slots):
        if found and sum(found[-1]) == slot and slot not in cuts and slot & layout.SLOT_MASK:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((slot, 1))
    return found


@given(SLOT_SETS, SLOT_SETS, st.randoms(use_true_random=False))
def test_runs_are_merged(slots, cuts, source):
    runs = runs_of(slots, cuts)
    source.shuffle(runs)
    assert list(merge_runs(runs)) == runs_of(slots, set())


@given(SLOT_SETS, SLOT_SETS, SLOT_SETS, st.randoms(use_true_random=False))
def test_runs_are_subtracted(slots, taken, cuts, source):
    runs, out = runs_of(slots, cuts), runs_of(slots & taken, cuts)
    source.shuffle(out)
    left = subtract_runs(tuple(runs), tuple(out))
    assert [slot for first, count in left for slot in range(first, first + count)] == sorted(slots - taken)
    assert all(count > 0 for _, count in left)
