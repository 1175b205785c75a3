"""Runs of slots: first block id and count. Lists of them are merged, subtracted and intersected."""

from __future__ import annotations

from collections.abc import Iterable

from .layout import SLOT_MASK, Run


def merge_runs(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Runs in order, neighbours within a segment joined."""
    merged: list[Run] = []
    for first, count in sorted(runs):
        if merged and sum(merged[-1]) == first and first & SLOT_MASK:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return tuple(merged)


def subtract_runs(runs: Iterable[Run], taken: Iterable[Run]) -> tuple[Run, ...]:
    """What is left of some runs when others are taken out; none of either overlaps another of its list."""
    left: list[Run] = []
    out = sorted(taken)
    position = 0
    for first, count in sorted(runs):
        end = first + count
        while position < len(out) and sum(out[position]) <= first:
            position += 1
        at = position
        while at < len(out) and out[at][0] < end:
            start, length = out[at]
            if start > first:
                left.append((first, start - first))
            first = max(first, start + length)
            at += 1
        if first < end:
            left.append((first, end - first))
    return tuple(left)


def intersect_runs(runs: Iterable[Run], others: Iterable[Run]) -> tuple[Run, ...]:
    """The slots that are in both lists."""
    runs = tuple(runs)
    return subtract_runs(runs, subtract_runs(runs, others))
