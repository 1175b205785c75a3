"""Differences: the ranges of bytes in which two trees differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import tree
from .digest import BLOCK_SIZE
from .environment import Snapshot
from .layout import FANOUT, Root
from .segments import Segments


@dataclass(frozen=True)
class Change:
    """A range in which two devices differ.

    Attributes:
        offset: Bytes from the start.
        length: Bytes; the end of the larger device may cut the last block.
    """

    offset: int
    length: int


def changes(segments: Segments, old: Root, new: Root, pin: Snapshot) -> Iterator[Change]:
    """Changed ranges, merged and in order. The cost follows the change.

    Where one device is longer, what it stores beyond the other's end counts as changed, holes do not. The pin
    is held until the end.
    """
    with pin:
        for change in _merged(segments, old, new):
            pin.check_open()
            yield change


def _merged(segments: Segments, old: Root, new: Root) -> Iterator[Change]:
    size = max(old.size, new.size)
    start = end = -1
    for number in _changed_blocks(segments, old, new):
        offset = number * BLOCK_SIZE
        if offset != end:
            if end >= 0:
                yield Change(start, end - start)
            start = offset
        end = min(offset + BLOCK_SIZE, size)
    if end >= 0:
        yield Change(start, end - start)


def _changed_blocks(segments: Segments, old: Root, new: Root) -> Iterator[int]:
    for index, before, now in tree.diff(segments, old, new):
        for slot, _ in tree.changed_blocks(segments, before, now):
            yield index * FANOUT + slot
