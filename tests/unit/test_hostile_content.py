"""A guest that knows the format: it writes the very bytes of nodes, commit blocks and headers into its disk."""

from __future__ import annotations

import random

import numpy as np
import pytest

import cowstore
from cowstore import layout
from cowstore.layout import DATA_KINDS, MAP_KINDS, SLOT_BITS, SLOT_MASK, SLOTS_OFFSET
from cowstore.tree import ids_of

BLOCK, LEAF = 4096, 2 << 20


@pytest.fixture
def grown(store):
    """A store with a tree of three levels, images, forks and many commit blocks."""
    disk = store.create("disk", 4 << 30)
    for number in range(12):
        disk.pwrite(random.Random(number).randbytes(3 * BLOCK), number * 300 << 20)
        disk.flush()
    disk.fork("child")
    disk.seal("image")
    disk.close()
    return store


def map_blocks(store: cowstore.Store) -> list[bytes]:
    """Every node and commit block that was ever written, and the segments' headers."""
    found = []
    for path in sorted((store.path / "segments").glob("*.seg")):
        with open(path, "rb") as file:
            found.append(file.read(BLOCK))
            if layout.decode_segment_header(found[-1])[1] in MAP_KINDS:
                file.seek(SLOTS_OFFSET)
                while any(block := file.read(BLOCK)):
                    found.append(block)
    return found


def check_kinds(store: cowstore.Store, device: cowstore.Device) -> tuple[set[int], set[int]]:
    """The ids of a device's nodes and of its data, each in segments of their kind."""
    segments, nodes, data = store._engine.segments, set(), set()
    todo = [(device._tree.root.node, device._tree.root.height - 1)]
    while todo:
        node_id, level = todo.pop()
        nodes.add(node_id)
        below = [int(one) for one in ids_of(segments.node(node_id)) if one]
        if level:
            todo += [(one, level - 1) for one in below]
        else:
            data.update(below)
    assert {segments.get(one >> SLOT_BITS).kind for one in nodes} <= MAP_KINDS
    assert {segments.get(one >> SLOT_BITS).kind for one in data} <= DATA_KINDS
    return nodes, data


def test_what_is_written_holds_nodes_and_commits(grown):
    blocks = map_blocks(grown)
    commits = [block for block in blocks if block.startswith(b"COWCOMIT")]
    assert len(commits) >= 12
    assert {layout.decode_commit(block)[0].device.name for block in commits} == {"disk"}
    assert len(blocks) >= 12 + 12 * 3 + 2


@pytest.mark.parametrize("ephemeral", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_nodes_and_commits_as_content(grown, one_by_one, ephemeral):
    content = b"".join(map_blocks(grown))
    evil = grown.clone("image", "evil", ephemeral=ephemeral)
    for turn in range(3):  # from the second time on the bytes are known to the index
        offset = turn * LEAF
        if one_by_one:
            for at in range(0, len(content), BLOCK):
                evil.pwrite(content[at : at + BLOCK], offset + at)
                evil.flush()
        else:
            evil.pwrite(content, offset)
            evil.flush()
    everything = []
    for name in ("disk", "child", "image"):
        with grown.device(name, readonly=True) as device:
            everything.append(check_kinds(grown, device))
    everything.append(check_kinds(grown, evil))
    assert not {one for nodes, _ in everything for one in nodes} & {one for _, data in everything for one in data}
    before = grown.stats()
    grown.collect()
    assert grown.stats().used < before.used
    for turn in range(3):
        assert evil.pread(len(content), turn * LEAF) == content
    evil.close()
    with grown.device("disk") as disk:
        assert disk.pread(3 * BLOCK, 1500 << 20) == random.Random(5).randbytes(3 * BLOCK)


def test_a_node_that_the_index_names_is_not_shared(grown):
    """The index may err, and a guest may write the very bytes of the node that it names."""
    engine = grown._engine
    with grown.device("disk") as disk:
        node_id = disk._tree.root.node
    content = engine.segments.block(node_id)
    engine.index.insert(engine.hasher.digest(content), np.array([node_id], np.uint64))
    for name, data in {"one": content, "many": content * 9}.items():
        with grown.create(name, len(data)) as evil:
            evil.pwrite(data, 0)
            evil.flush()
            check_kinds(grown, evil)
            assert evil.pread(len(data), 0) == data


def test_an_ephemeral_block_that_the_index_names_is_not_shared(grown):
    """It would be gone after a reboot, and with it the durable clone that shares it."""
    engine, content = grown._engine, random.Random("ephemeral").randbytes(BLOCK)
    with grown.clone("image", "brief", ephemeral=True) as brief:
        brief.pwrite(content, 0)
        brief.flush()
        block_id = int(brief._tree.ids(0, 1)[0])
    assert engine.segments.get(block_id >> SLOT_BITS).kind == layout.EPHEMERAL_DATA
    engine.index.insert(engine.hasher.digest(content), np.array([block_id], np.uint64))
    for name, data in {"one": content, "many": content * 9}.items():
        with grown.create(name, len(data)) as disk:
            disk.pwrite(data, 0)
            disk.flush()
            kinds = {
                engine.segments.get(int(one) >> SLOT_BITS).kind for one in disk._tree.ids(0, len(data) // BLOCK)
            }
            assert kinds == {layout.DATA}


@pytest.mark.parametrize("what", ["digest", "content"])
def test_a_damaged_block_is_not_shared(path, what):
    """Whoever writes the same bytes again gets a sound block, and the damaged one is still reported."""
    content = random.Random(what).randbytes(BLOCK)
    with cowstore.open(path, create=True) as store, store.create("old", BLOCK) as old:
        old.pwrite(content, 0)
        old.flush()
        block_id = int(old._tree.ids(0, 1)[0])
        segment = store._engine.segments.path(block_id >> SLOT_BITS)
    slot = block_id & SLOT_MASK
    with open(segment, "r+b") as file:
        file.seek(layout.DIGESTS_OFFSET + slot * 16 if what == "digest" else SLOTS_OFFSET + slot * BLOCK)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x5A]))
    for count in (1, 9):
        with cowstore.open(path) as store, store.create(f"new-{count}", count * BLOCK) as new:
            new.pwrite(content * count, 0)
    with cowstore.open(path) as store:
        for count in (1, 9):
            with store.device(f"new-{count}") as new:
                assert new.pread(new.size, 0) == content * count
        with (
            store.device("old") as old,
            pytest.raises(cowstore.BlockCorruptError, match="match its digest"),
        ):
            old.pread(BLOCK, 0)
