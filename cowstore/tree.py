"""Trees: a device's address space as nodes of 512 ids, read by walking down from a root.

A leaf names data blocks and covers 2 MiB; an inner node names nodes one level below; id 0 is a hole at any
level. A clone's own nodes and those it shares with its parent are walked alike: child, then parent, without
a special case.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .digest import BLOCK_SIZE, UNWRITTEN
from .errors import BlockCorruptError
from .layout import FANOUT, FANOUT_BITS, HOLE, Root
from .segments import Node, Segments

Ids = npt.NDArray[np.uint64]
Key = tuple[int, int]  # level (0 for leaves), index among the nodes of that level
FANOUT_MASK = FANOUT - 1
HOLE_NODE: Node = memoryview(bytes(BLOCK_SIZE)).cast("Q")
_HOLES = np.frombuffer(HOLE_NODE, np.uint64)
_CACHE_LIMIT = 16384  # nodes; a leaf of an image is a view of 200 bytes, a changed one an array of 4 KiB


def ids_of(node: Node) -> Ids:
    """A node as an array of 512 ids, without a copy."""
    return np.frombuffer(node, np.uint64)


class TreeView:
    """One tree, with the nodes that were read kept at hand.

    Attributes:
        root: The moment that is read.
        leaves: Leaves by index, each 512 ids. Device.pread looks here first.
    """

    def __init__(self, segments: Segments, root: Root) -> None:
        self.root = root
        self.leaves: dict[int, Node] = {}
        self._segments = segments
        self._inner: dict[Key, Node] = {}

    def leaf(self, index: int) -> Node:
        """The leaf of that index, HOLE_NODE where there is none."""
        leaf = self.leaves.get(index)
        if leaf is None:
            leaf = self._load(self._child_id(0, index))
            if len(self.leaves) >= _CACHE_LIMIT:
                self._shed()
            self.leaves[index] = leaf
        return leaf

    def _load(self, node_id: int) -> Node:
        return self._segments.node(node_id) if node_id else HOLE_NODE

    def _child_id(self, level: int, index: int) -> int:
        """The id under which a node's parent, or the root, names it."""
        if level == self.root.height - 1:
            return self.root.node if index == 0 else HOLE
        return self._node(level + 1, index >> FANOUT_BITS)[index & FANOUT_MASK]

    def _node(self, level: int, index: int) -> Node:
        if level == 0:
            return self.leaf(index)
        key = (level, index)
        node = self._inner.get(key)
        if node is None:
            node = self._load(self._child_id(level, index))
            if len(self._inner) >= _CACHE_LIMIT:
                self._shed()
            self._inner[key] = node
        return node

    def _shed(self) -> None:
        """Makes room: everything that can be read again goes."""
        self.leaves.clear()
        self._inner.clear()

    def ids(self, first: int, count: int) -> Ids:
        """The ids of blocks in a row: an array of so many, 0 for holes."""
        found = np.empty(count, np.uint64)
        done = 0
        while done < count:
            slot = (first + done) & FANOUT_MASK
            part = min(FANOUT - slot, count - done)
            leaf = self.leaf((first + done) >> FANOUT_BITS)
            found[done : done + part] = ids_of(leaf)[slot : slot + part]
            done += part
        return found


def diff(segments: Segments, old: Root, new: Root) -> Iterator[tuple[int, Ids, Ids]]:
    """The leaves in which two trees differ, in order: leaf index, the old ids, the new ids.

    Subtrees of one id are equal and are not entered, so the cost follows the change. Trees of different
    heights are compared as if the lower one stood under nodes of its own.
    """
    for index, before, after in _Walk(segments, old, new, skip_equal=True).leaves():
        if (before != after).any():
            yield index, before, after


def pairs(
    segments: Segments, old: Root, new: Root, first: int = 0, stop: int = 1 << 62
) -> Iterator[tuple[int, Ids, Ids]]:
    """Like diff(), but every leaf from first up to stop that is not a hole in both trees."""
    yield from _Walk(segments, old, new, skip_equal=False, first=first, stop=stop).leaves()


def leaves(segments: Segments, root: Root) -> Iterator[tuple[int, Ids]]:
    """Every leaf of a tree that is not a hole, in order: its index and its ids."""
    for index, _, ids in pairs(segments, Root(HOLE, root.height, root.size), root):
        yield index, ids


class _Walk:
    """A walk down two trees side by side.

    Args:
        skip_equal: Leave subtrees of one id out; otherwise only holes in both.
        first: The first leaf index of interest.
        stop: The leaf index to stop at.
    """

    def __init__(
        self, segments: Segments, old: Root, new: Root, *, skip_equal: bool, first: int = 0, stop: int = 1 << 62
    ) -> None:
        self._segments = segments
        self._old, self._new = old, new
        self._skip_equal = skip_equal
        self._first, self._stop = first, stop

    def leaves(self) -> Iterator[tuple[int, Ids, Ids]]:
        """Leaf index and both lists of 512 ids."""
        top = max(self._old.height, self._new.height) - 1
        yield from self._enter(top, 0, self._old.node, self._new.node)

    def _enter(self, level: int, index: int, old: int, new: int) -> Iterator[tuple[int, Ids, Ids]]:
        before = _children(self._segments, level, old, self._old.height)
        after = _children(self._segments, level, new, self._new.height)
        if level == 0:
            yield index, before, after
            return
        wanted = (before != after) if self._skip_equal else (before | after) != 0
        if self._old.height != self._new.height and index == 0:
            wanted[0] = True  # one id may stand at two levels there; the edge is always entered
        low, high = self._window(level, index)
        for child in np.flatnonzero(wanted[low:high]).tolist():
            at = low + child
            yield from self._enter(level - 1, (index << FANOUT_BITS) + at, int(before[at]), int(after[at]))

    def _window(self, level: int, index: int) -> tuple[int, int]:
        """Which children of a node reach into the leaves of interest."""
        shift = FANOUT_BITS * (level - 1)
        start = index << FANOUT_BITS
        return max((self._first >> shift) - start, 0), min(-(-self._stop >> shift) - start, FANOUT)


def _children(segments: Segments, level: int, node_id: int, height: int) -> Ids:
    """The ids in a node; above the top of its tree, a node that names only the top."""
    if not node_id:
        return _HOLES
    if level < height:
        return ids_of(segments.node(node_id))
    children = np.zeros(FANOUT, np.uint64)
    children[0] = node_id
    return children


def changed_blocks(segments: Segments, old: Ids, new: Ids) -> Iterator[tuple[int, bytes]]:
    """The blocks of one leaf whose content differs: position in the leaf and new digest.

    Different ids may stand for equal bytes; blocks of one digest are compared. A hole's digest is 16 zero bytes.
    """
    for slot in np.flatnonzero(old != new).tolist():
        before, after = int(old[slot]), int(new[slot])
        digest = segments.digests(after, 1) if after else UNWRITTEN
        if after and digest == UNWRITTEN:
            raise BlockCorruptError(after, "it was erased")
        same = before and after and segments.digests(before, 1) == digest
        if not same or segments.block(before) != segments.block(after):
            yield slot, digest
