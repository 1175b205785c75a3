"""Trees, from one level to four: read, walked side by side and changed, against plain dicts of ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowstore
from cowstore import layout, tree
from cowstore.draft import Draft
from cowstore.engine import Engine
from cowstore.layout import FANOUT, HOLE, MAP_KINDS, SLOT_BITS, Root
from cowstore.segments import Node, Segments
from cowstore.tree import HOLE_NODE, TreeView, ids_of

BLOCK = 4096
LEAF, NODE, HIGH = 512, 512**2, 512**3  # blocks under a node of one level, of two and of three
SPOTS = [
    0,
    1,
    2,
    510,
    511,
    512,
    513,
    1023,
    1024,
    NODE - 1,
    NODE,
    NODE + 513,
    HIGH - 1,
    HIGH,
    HIGH + NODE + 7,
    3 * HIGH,
]
BLOCKS = [1, 5, 511, 512, 513, 1024, 1025, NODE - 1, NODE, NODE + 1, HIGH, HIGH + 1, 4 * HIGH]
SIZES = sorted({blocks * BLOCK - cut for blocks in BLOCKS for cut in (0, 1)} | {0, (4 * HIGH + 9) * BLOCK})
IDS = st.sampled_from([0, 1, 2, 7, (1 << SLOT_BITS) + 3, (1 << 56) - 1])


@dataclass
class Model:
    """A device's blocks as a dict, holes left out."""

    size: int
    ids: dict[int, int] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return -(-self.size // BLOCK)

    def set(self, first: int, ids: list[int]) -> None:
        self.ids |= {first + at: one for at, one in enumerate(ids)}
        self.ids = {number: one for number, one in self.ids.items() if one}

    def clear(self, first: int, end: int) -> None:
        self.ids = {number: one for number, one in self.ids.items() if not first <= number < end}

    def resize(self, size: int) -> None:
        self.size = size
        self.clear(self.blocks, 1 << 62)

    def leaves(self) -> dict[int, dict[int, int]]:
        found: dict[int, dict[int, int]] = {}
        for number, one in sorted(self.ids.items()):
            found.setdefault(number // 512, {})[number % 512] = one
        return found


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, int, int, list[int]]:
    way = draw(st.sampled_from(["set", "set", "set", "clear", "clear", "resize", "emit"]))
    first, end = sorted((draw(st.sampled_from(SPOTS)), draw(st.sampled_from([*SPOTS, 4 * HIGH]))))
    if way == "resize":
        return way, draw(st.sampled_from(SIZES)), 0, []
    count = draw(st.sampled_from([1, 2, 3, 600]))
    ids = draw(st.lists(IDS, min_size=1, max_size=3)) * count
    return way, first, end, ids


CHANGES = st.lists(changes(), max_size=12)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with cowstore.open(tmp_path_factory.mktemp("trees") / "store", create=True) as store:
        yield store._engine


def started(engine: Engine, size: int) -> tuple[Draft, Model]:
    return Draft(engine.segments, Root(HOLE, layout.height_for(size), size)), Model(size)


def follow(engine: Engine, draft: Draft, model: Model, todo: list[tuple[str, int, int, list[int]]]) -> None:
    for way, first, end, ids in todo:
        if way == "resize":
            draft.resize(first)
            model.resize(first)
            assert (draft.root.size, draft.root.height) == (first, layout.height_for(first))
        elif way == "emit":
            emit(engine, draft)
        elif way == "clear":
            end = min(end, model.blocks)
            draft.clear(min(first, end), end)
            model.clear(min(first, end), end)
        elif first < model.blocks:
            ids = ids[: model.blocks - first]
            draft.set_ids(first, np.array(ids, np.uint64))
            model.set(first, ids)
        check_nodes(draft)


def emit(engine: Engine, draft: Draft) -> Root:
    draft.emit(engine.reservations, engine.hasher)
    assert not draft.changed
    assert {engine.segments.get(first >> SLOT_BITS).kind for first, _ in draft.written} <= MAP_KINDS
    return draft.root


def check_nodes(draft: Draft) -> None:
    """With a changed node every node above it is changed too, and no node is held that is not in the tree."""
    top = draft.root.height - 1
    for level, index in draft.changed:
        assert level <= top
        if level < top:
            assert (level + 1, index >> 9) in draft.changed
        else:
            assert index == 0


def check(view: TreeView, model: Model) -> None:
    for first in {0, *(spot - 2 for spot in SPOTS if spot > 2), *(leaf * 512 for leaf in model.leaves())}:
        count = min(600, model.blocks - first)
        if count > 0:
            expected = [model.ids.get(number, 0) for number in range(first, first + count)]
            assert view.ids(first, count).tolist() == expected


def as_dict(ids: np.ndarray) -> dict[int, int]:
    return {at: int(ids[at]) for at in np.flatnonzero(ids).tolist()}


@given(st.sampled_from(SIZES), CHANGES)
def test_a_draft_is_a_dict(engine, size, todo):
    draft, model = started(engine, size)
    follow(engine, draft, model, todo)
    check(draft, model)
    root = emit(engine, draft)
    assert root.height == layout.height_for(model.size)
    assert (root.node == HOLE) == (not model.ids)
    check(draft, model)
    check(TreeView(engine.segments, root), model)
    found = {index: as_dict(ids) for index, ids in tree.leaves(engine.segments, root)}
    assert {index: leaf for index, leaf in found.items() if leaf} == model.leaves()
    assert len(found) <= max(len(model.leaves()), 1)


@given(st.sampled_from(SIZES), CHANGES, CHANGES)
def test_a_walk_of_two_trees_finds_what_differs(engine, size, todo, more):
    draft, model = started(engine, size)
    follow(engine, draft, model, todo)
    old, before = emit(engine, draft), model.leaves()
    follow(engine, draft, model, more)
    new, after = emit(engine, draft), model.leaves()
    check(
        TreeView(engine.segments, old),
        Model(old.size, {k * 512 + at: v for k, leaf in before.items() for at, v in leaf.items()}),
    )
    for one, two, first, second in ((old, new, before, after), (new, old, after, before)):
        found = [
            (index, as_dict(ids), as_dict(others)) for index, ids, others in tree.diff(engine.segments, one, two)
        ]
        expected = sorted(index for index in first.keys() | second.keys() if first.get(index) != second.get(index))
        assert found == [(index, first.get(index, {}), second.get(index, {})) for index in expected]
        pairs = [
            (index, as_dict(ids), as_dict(others)) for index, ids, others in tree.pairs(engine.segments, one, two)
        ]
        solid = [pair for pair in pairs if pair[1] or pair[2]]
        assert solid == [
            (index, first.get(index, {}), second.get(index, {})) for index in sorted(first.keys() | second.keys())
        ]
        assert [index for index, _, _ in pairs] == sorted({index for index, _, _ in pairs})


@given(st.sampled_from(SIZES), CHANGES, st.sampled_from(SPOTS), st.sampled_from(SPOTS))
def test_a_window_shows_its_leaves_only(engine, size, todo, first, stop):
    draft, model = started(engine, size)
    follow(engine, draft, model, todo)
    low, high = sorted((first // 512, stop // 512))
    empty, root = Root(HOLE, 1, 0), emit(engine, draft)
    found = {index: as_dict(ids) for index, _, ids in tree.pairs(engine.segments, empty, root, low, high)}
    expected = {index: leaf for index, leaf in model.leaves().items() if low <= index < high}
    assert {index: leaf for index, leaf in found.items() if leaf and (low <= index < high)} == expected
    assert all(low <= index < high or index == 0 for index in found)


def test_a_small_cache_changes_nothing(engine, monkeypatch):
    monkeypatch.setattr(tree, "_CACHE_LIMIT", 2)
    draft, model = started(engine, 4 * HIGH * BLOCK)
    for number, spot in enumerate(SPOTS, 1):
        draft.set_ids(spot, np.array([number], np.uint64))
        model.set(spot, [number])
        check(draft, model)
    root = emit(engine, draft)
    draft.clear(0, HIGH)
    model_before = Model(model.size, dict(model.ids))
    model.clear(0, HIGH)
    check(draft, model)
    check(TreeView(engine.segments, root), model_before)
    assert len(TreeView(engine.segments, root).leaves) <= 2


def test_the_cost_follows_the_change(engine, monkeypatch):
    """A walk of two large trees reads only the nodes on the way to what differs."""
    draft, _ = started(engine, NODE * BLOCK)
    for leaf in range(0, 512, 3):
        draft.set_ids(leaf * 512, np.arange(1, 10, dtype=np.uint64))
    old = emit(engine, draft)
    draft.set_ids(99 * 512 + 7, np.array([12345], np.uint64))
    new = emit(engine, draft)
    read: list[int] = []
    original = type(engine.segments).node

    def node(segments: Segments, node_id: int) -> Node:
        read.append(node_id)
        return original(segments, node_id)

    monkeypatch.setattr(Segments, "node", node)
    assert [index for index, _, _ in tree.diff(engine.segments, old, new)] == [99]
    assert len(read) == 4
    read.clear()
    assert list(tree.diff(engine.segments, old, old)) == []
    assert len(read) <= 2


def test_clearing_whole_subtrees_costs_a_few_nodes(engine):
    draft, _ = started(engine, 4 * HIGH * BLOCK)
    for spot in range(0, 4 * HIGH - 100, HIGH // 3):
        draft.set_ids(spot, np.arange(1, 100, dtype=np.uint64))
    emit(engine, draft)
    draft.clear(5, 4 * HIGH - 5)
    assert len(draft.changed) <= 8
    draft.clear(0, 4 * HIGH)
    emit(engine, draft)
    assert draft.root.node == HOLE


def test_the_old_tree_is_never_touched(engine):
    draft, model = started(engine, 3 * LEAF * BLOCK)
    draft.set_ids(0, np.arange(1, 1500, dtype=np.uint64))
    model.set(0, list(range(1, 1500)))
    old = emit(engine, draft)
    view = TreeView(engine.segments, old)
    held = view.leaf(0)
    assert held.readonly
    draft.set_ids(0, np.zeros(1400, np.uint64))
    draft.resize(BLOCK)
    emit(engine, draft)
    check(view, model)
    check(TreeView(engine.segments, old), model)
    assert held[0] == 1


def test_what_is_not_changed_is_not_written(engine):
    draft, _ = started(engine, 2 * LEAF * BLOCK)
    ids = np.arange(1, 600, dtype=np.uint64)
    draft.set_ids(0, ids)
    root = emit(engine, draft)
    draft.set_ids(0, ids)
    draft.clear(700, 1000)
    draft.resize(2 * LEAF * BLOCK)
    assert not draft.changed
    assert emit(engine, draft) == root


def test_a_hole_is_one_node(engine):
    view = TreeView(engine.segments, Root(HOLE, 4, 4 * HIGH * BLOCK))
    assert view.leaf(5) is HOLE_NODE
    assert not ids_of(view.leaf(HIGH // 512)).any()
    assert len(HOLE_NODE) == FANOUT
    with pytest.raises(TypeError):
        HOLE_NODE[0] = 1


def test_nodes_that_hold_nothing_are_holes(engine):
    draft, _ = started(engine, 4 * HIGH * BLOCK)
    draft.set_ids(3 * HIGH, np.array([5, 6], np.uint64))
    draft.set_ids(7, np.array([8], np.uint64))
    emit(engine, draft)
    draft.set_ids(3 * HIGH, np.array([0, 0], np.uint64))
    root = emit(engine, draft)
    top = ids_of(engine.segments.node(root.node))
    assert np.flatnonzero(top).tolist() == [0]


def test_data_where_a_node_should_be_is_damage(path):
    with cowstore.open(path, create=True) as store, store.create("disk", 2 * LEAF * BLOCK) as disk:
        disk.pwrite(b"a" * BLOCK, 0)
        disk.flush()
        data_id, node_id = int(disk._tree.ids(0, 1)[0]), disk._tree.root.node
        segments = store._engine.segments
        with pytest.raises(cowstore.BlockCorruptError, match="named as a node"):
            segments.node(data_id)
        with pytest.raises(cowstore.BlockCorruptError, match="named as data"):
            segments.read(np.array([node_id], np.uint64), memoryview(bytearray(BLOCK)))
        with pytest.raises(cowstore.SegmentCorruptError, match="missing"):
            segments.node(12345 << SLOT_BITS)


def test_scattered_blocks_are_named_as_one_by_one(engine):
    draft, model = started(engine, 4 * HIGH * BLOCK)
    other, _ = started(engine, 4 * HIGH * BLOCK)
    numbers = sorted({spot + near for spot in SPOTS for near in (0, 1, 5, 511)} - {4 * HIGH})
    numbers = [number for number in numbers if number < 4 * HIGH]
    ids = np.arange(1, len(numbers) + 1, dtype=np.uint64)
    ids[::3] = 0  # holes among them
    draft.set_scattered(np.array(numbers, np.int64), ids)
    for number, block_id in zip(numbers, ids.tolist(), strict=True):
        other.set_ids(number, np.array([block_id], np.uint64))
        model.set(number, [block_id])
    check(draft, model)
    assert draft.changed == other.changed, "what is a hole already changes nothing"
