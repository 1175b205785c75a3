"""Marks: which slots can be reached from some roots, each node entered once.

Used by the collector to find what is dead, and for exact answers to "what would deleting this free".
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from .errors import BlockCorruptError
from .layout import DATA_KINDS, MAP_KINDS, SLOT_BITS, SLOT_MASK, SLOTS_PER_SEGMENT, Root
from .segments import Segments
from .tree import Ids, ids_of

_PIECE = 2048  # nodes whose ids are held at once: 8 MiB


class Marks:
    """A bit for every slot of every segment that was reached.

    Attributes:
        count: Slots reached.
        nodes: Nodes entered.
    """

    def __init__(self, segments: Segments) -> None:
        self.count = 0
        self.nodes = 0
        self._segments = segments
        self._reached: dict[int, npt.NDArray[np.bool_]] = {}
        self._roots: set[int] = set()

    def knows(self, root: Root) -> bool:
        """Whether everything under this root is marked already."""
        return not root.node or root.node in self._roots

    def mark(self, roots: Iterable[Root]) -> int:
        """Marks what the roots reach; returns how many slots are new.

        Raises:
            CorruptError: A node does not verify, or names what it cannot name.
        """
        before = self.count
        for root in roots:
            if not self.knows(root):
                self._descend(np.array([root.node], np.uint64), root.height - 1)
                self._roots.add(root.node)
        return self.count - before

    def _descend(self, nodes: Ids, level: int) -> None:
        """Marks nodes of one level and everything below them."""
        fresh = self._add(nodes, MAP_KINDS)
        self.nodes += len(fresh)
        for start in range(0, len(fresh), _PIECE):
            below = [ids_of(self._segments.node(node)) for node in fresh[start : start + _PIECE].tolist()]
            ids = np.concatenate(below)
            ids = ids[ids != 0]
            if level:
                self._descend(ids, level - 1)
            else:
                self._add(ids, DATA_KINDS)

    def _add(self, ids: Ids, kinds: frozenset[int]) -> Ids:
        """Marks slots; returns those that were not marked before, sorted."""
        if not len(ids):
            return ids
        ids = np.unique(ids)
        fresh = np.zeros(len(ids), np.bool_)
        numbers = ids >> np.uint64(SLOT_BITS)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            reached = self._of(number, kinds, int(ids[here][0]))
            at = (ids[here] & np.uint64(SLOT_MASK)).astype(np.intp)
            fresh[here] = ~reached[at]
            reached[at] = True
        found = ids[fresh]
        self.count += len(found)
        return found

    def _of(self, number: int, kinds: frozenset[int], example: int) -> npt.NDArray[np.bool_]:
        if self._segments.get(number).kind not in kinds:
            raise BlockCorruptError(example, "it is named at a level where its segment has no place")
        return self.reached(number)

    def numbers(self) -> list[int]:
        """The segments in which anything was reached."""
        return sorted(number for number, reached in self._reached.items() if reached.any())

    def reached(self, number: int) -> npt.NDArray[np.bool_]:
        """For each slot of a segment whether it was reached; not a copy."""
        reached = self._reached.get(number)
        if reached is None:
            reached = self._reached[number] = np.zeros(SLOTS_PER_SEGMENT, np.bool_)
        return reached
