"""Drafts: a tree that is being changed. A write copies the path from the root to its leaf, in memory.

emit() writes the changed nodes to reserved slots, bottom up, and the draft goes on from the new root; nothing
is published by that. The nodes of the old root are never touched, so whoever reads it is not disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from . import layout
from .digest import BLOCK_SIZE, Buffer, Hasher
from .layout import EPHEMERAL_MAP, FANOUT, FANOUT_BITS, HOLE, MAP, Commit, DeviceRecord, Root, Run
from .reservations import Reservations
from .runs import merge_runs
from .segments import Node, Segments
from .tree import FANOUT_MASK, Ids, Key, TreeView, ids_of

CHANGED_LIMIT = 4096  # nodes, 16 MiB: beyond that a draft is emitted before its flush


class Draft(TreeView):
    """A tree with changes in memory. Not safe to use from several threads at once.

    Attributes:
        changed: The nodes that differ from the root's. With a node every node above it is among them.
        written: Map slots written since they were last published.
    """

    def __init__(self, segments: Segments, root: Root, *, ephemeral: bool = False) -> None:
        super().__init__(segments, root)
        self.changed: set[Key] = set()
        self.written: list[Run] = []
        self._kind = EPHEMERAL_MAP if ephemeral else MAP

    def changed_leaf(self, index: int) -> Node:
        """A leaf to be written to, and with it all nodes above it."""
        if (0, index) not in self.changed:
            self._own(0, index)
        return self.leaves[index]

    def _own(self, level: int, index: int) -> None:
        """Makes a node of our own, after those above it."""
        if level < self.root.height - 1 and (level + 1, index >> FANOUT_BITS) not in self.changed:
            self._own(level + 1, index >> FANOUT_BITS)
        node = self._node(level, index)
        if node.readonly:
            node = memoryview(bytearray(node)).cast("Q")
        if level == 0:
            self.leaves[index] = node
        else:
            self._inner[level, index] = node
        self.changed.add((level, index))

    def _shed(self) -> None:
        """Makes room, but keeps what is changed. The dicts stay the same objects: readers hold them."""
        for index in [index for index in self.leaves if (0, index) not in self.changed]:
            del self.leaves[index]
        for key in [key for key in self._inner if key not in self.changed]:
            del self._inner[key]

    def set_ids(self, first: int, ids: Ids) -> None:
        """Names the blocks from the first one on; 0 makes a hole."""
        done = 0
        while done < len(ids):
            index, slot = (first + done) >> FANOUT_BITS, (first + done) & FANOUT_MASK
            part = ids[done : done + FANOUT - slot]
            if (0, index) in self.changed or (ids_of(self.leaf(index))[slot : slot + len(part)] != part).any():
                ids_of(self.changed_leaf(index))[slot : slot + len(part)] = part
            done += len(part)

    def set_scattered(self, numbers: npt.NDArray[np.int64], ids: Ids) -> None:
        """Names blocks by their numbers, which rise; 0 makes a hole. Each leaf costs one array operation."""
        indexes = numbers >> FANOUT_BITS
        edges = [0, *(np.flatnonzero(np.diff(indexes)) + 1).tolist(), len(numbers)]
        for start, end in pairwise(edges):
            index, slots = int(indexes[start]), numbers[start:end] & FANOUT_MASK
            if (0, index) in self.changed or (ids_of(self.leaf(index))[slots] != ids[start:end]).any():
                ids_of(self.changed_leaf(index))[slots] = ids[start:end]

    def clear(self, first: int, end: int) -> None:
        """Makes holes of the blocks from first up to end. Whole subtrees cost one id each."""
        self._clear(self.root.height - 1, 0, first, end)

    def _clear(self, level: int, index: int, first: int, end: int) -> None:
        """Clears part of a node; first and end are blocks of the device."""
        if not self._names_anything(level, index):
            return
        span = 1 << (FANOUT_BITS * level)  # blocks for each id of the node
        start = index << (FANOUT_BITS * (level + 1))
        low, high = max(first - start, 0), min(end - start, span << FANOUT_BITS)
        whole = slice(-(-low // span), high // span)
        if whole.start < whole.stop:
            self._cut(level, index, whole)
        edges = {low // span} if low % span else set()
        if high % span:
            edges.add(high // span)
        for child in sorted(edges):
            self._clear(level - 1, (index << FANOUT_BITS) + child, first, end)

    def _names_anything(self, level: int, index: int) -> bool:
        return (level, index) in self.changed or self._child_id(level, index) != HOLE

    def _cut(self, level: int, index: int, part: slice) -> None:
        """Sets ids of one node to 0 and forgets what was below them."""
        if not level:  # nothing is below a leaf
            if ids_of(self.leaf(index))[part].any():
                ids_of(self.changed_leaf(index))[part] = HOLE
            return
        first, stop = (index << FANOUT_BITS) + part.start, (index << FANOUT_BITS) + part.stop

        def is_below(key: Key) -> bool:
            return key[0] < level and first <= key[1] >> FANOUT_BITS * (level - 1 - key[0]) < stop

        below = set(filter(is_below, self.changed))
        if below or ids_of(self._node(level, index))[part].any():
            self._own(level, index)
            ids_of(self._node(level, index))[part] = HOLE
        self.changed -= below
        for key in list(filter(is_below, self._inner)):
            del self._inner[key]
        for at in [at for at in self.leaves if is_below((0, at))]:
            del self.leaves[at]

    def resize(self, size: int) -> None:
        """Changes the size in bytes. What is cut off is gone: growing again shows zeros.

        The tail of the last block is the caller's affair.
        """
        blocks, height = -(-size // BLOCK_SIZE), layout.height_for(size)
        if size < self.root.size:
            self.clear(blocks, 1 << (FANOUT_BITS * self.root.height))
        while self.root.height > height:
            self._lower()
        while self.root.height < height:
            self._raise()
        self.root = replace(self.root, size=size)

    def _lower(self) -> None:
        """Takes the top node away; all it names is its first child."""
        level = self.root.height - 1
        node_id = self._child_id(level - 1, 0)
        self.changed.discard((level, 0))
        self._inner.pop((level, 0), None)
        self.root = Root(node_id, level, self.root.size)

    def _raise(self) -> None:
        """Puts a node on top, whose first child is the present top node."""
        old, level = self.root, self.root.height
        self.root = Root(HOLE, level + 1, old.size)
        if old.node or (level - 1, 0) in self.changed:
            top = memoryview(bytearray(BLOCK_SIZE)).cast("Q")
            top[0] = old.node
            self._inner[level, 0] = top
            self.changed.add((level, 0))

    def is_large(self) -> bool:
        """Whether so much is changed that it should be emitted."""
        return len(self.changed) > CHANGED_LIMIT

    def emit(self, reservations: Reservations, hasher: Hasher) -> None:
        """Writes the changed nodes to reserved slots; the root moves, and nothing is changed any more.

        Args:
            reservations: Give the slots.
            hasher: Gives the digests.
        """
        keys = sorted(self.changed)
        if not keys:
            return
        runs = reservations.take(self._kind, len(keys))
        before = self.root
        try:
            nodes = self._link(
                keys, [block_id for first, count in runs for block_id in range(first, first + count)]
            )
            self._write(reservations, hasher, runs, [node.cast("B") for node in nodes])
        except BaseException:
            self.root = before
            raise
        self.changed.clear()

    def write_commit(
        self, reservations: Reservations, hasher: Hasher, device: DeviceRecord, data: list[Run]
    ) -> None:
        """Writes the commit block of a flush, or several where its list of slots is long.

        Args:
            reservations: Give the slots.
            hasher: Gives the digests.
            device: The record that the flush is going to publish.
            data: The data slots that it wrote.
        """
        runs = merge_runs([*data, *self.written])
        parts = 1
        while layout.commit_parts(len(runs) + parts) > parts:
            parts += 1
        own = reservations.take(self._kind, parts)
        blocks = layout.encode_commit(Commit(device, device.sequence, (*runs, *own)), parts)
        self._write(reservations, hasher, own, blocks)

    def _link(self, keys: list[Key], ids: list[int]) -> list[Node]:
        """Gives every changed node that names anything an id, bottom up; returns those nodes."""
        nodes: list[Node] = []
        for level, index in keys:
            node = self._node(level, index)
            node_id = HOLE
            if ids_of(node).any():
                node_id = ids[len(nodes)]
                nodes.append(node)
            if level == self.root.height - 1:
                self.root = replace(self.root, node=node_id)
            else:
                self._inner[level + 1, index >> FANOUT_BITS][index & FANOUT_MASK] = node_id
        return nodes

    def _write(
        self, reservations: Reservations, hasher: Hasher, runs: list[Run], blocks: Sequence[Buffer]
    ) -> None:
        """Writes blocks to slots of which there may be too many; those are returned."""
        digests = hasher.digests(blocks)
        done = 0
        for position, (first, count) in enumerate(runs):
            used = min(count, len(blocks) - done)
            try:
                if used:
                    self._segments.write(first, blocks[done : done + used], b"".join(digests[done : done + used]))
            except BaseException:
                reservations.doom_later(runs[position:])
                raise
            if used:
                self.written.append((first, used))
            if used < count:
                reservations.give_back(self._kind, [(first + used, count - used)])
            done += used
