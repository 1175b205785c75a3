"""Owners: which device alone reaches a slot, for all devices in one walk.

A device's exclusive bytes are the slots that nobody else reaches. Asked of a thousand devices one by one this
would be a thousand walks over everything; here each node is entered at most twice: by the first device that
reaches it, which becomes its owner, and by the first other one, which makes it and all below it shared.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .layout import SLOT_BITS, SLOT_MASK, SLOTS_PER_SEGMENT, Root
from .segments import Segments
from .tree import Ids, ids_of

_PIECE = 2048  # nodes whose ids are held at once: 8 MiB
_NOBODY, _SHARED = 0, -1


class Owners:
    """The owner of every slot that was reached.

    Args:
        segments: Where the nodes are.
        count: How many owners there will be, at most.
    """

    def __init__(self, segments: Segments, count: int) -> None:
        self._segments = segments
        self._type = np.min_scalar_type(-max(count, 1))
        self._count = count
        self._owner: dict[int, npt.NDArray[np.signedinteger]] = {}

    def claim(self, owner: int, root: Root) -> None:
        """Gives an owner, a number from 1 on, what this root reaches and nobody else has reached.

        Raises:
            CorruptError: A node does not verify.
        """
        if root.node:
            self._descend(np.array([root.node], np.uint64), root.height - 1, owner)

    def _descend(self, nodes: Ids, level: int, owner: int) -> None:
        changed = self._take(nodes, owner)
        for start in range(0, len(changed), _PIECE):
            below = [ids_of(self._segments.node(node)) for node in changed[start : start + _PIECE].tolist()]
            ids = np.concatenate(below)
            ids = ids[ids != 0]
            if level:
                self._descend(ids, level - 1, owner)
            else:
                self._take(ids, owner)

    def _take(self, ids: Ids, owner: int) -> Ids:
        """Claims slots; returns those that were nobody's or another's alone, sorted."""
        ids = np.unique(ids)
        changed = np.zeros(len(ids), np.bool_)
        numbers = ids >> np.uint64(SLOT_BITS)
        for number in np.unique(numbers).tolist():
            here = np.flatnonzero(numbers == number)
            owners = self._of(number)
            at = (ids[here] & np.uint64(SLOT_MASK)).astype(np.intp)
            before = owners[at]
            owners[at] = np.where((before == _NOBODY) | (before == owner), owner, _SHARED)
            changed[here] = (before != owner) & (before != _SHARED)
        return ids[changed]

    def _of(self, number: int) -> npt.NDArray[np.signedinteger]:
        owners = self._owner.get(number)
        if owners is None:
            owners = self._owner[number] = np.zeros(SLOTS_PER_SEGMENT, self._type)
        return owners

    def counts(self) -> list[int]:
        """How many slots each owner has alone; the first item stands for nobody and is 0."""
        total = np.zeros(self._count + 1, np.int64)
        for owners in self._owner.values():
            total += np.bincount(owners[owners > 0], minlength=self._count + 1)
        return [int(count) for count in total]
