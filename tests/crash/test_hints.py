"""The index may say anything: what it says is looked at before it is used, and damage is never shared."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import cowstore
from cowstore import Store, layout
from cowstore.clones import Clone

from .model import BLOCK
from .surroundings import FIRST_BOOT, LATER_BOOT, booted


@pytest.fixture
def store(arena):
    with booted(FIRST_BOOT), cowstore.open(arena / "store", create=True) as store:
        store.create("a", 100 * BLOCK).close()
        store.create("b", 100 * BLOCK).close()
        yield store


def write(store: Store, name: str, data: bytes) -> None:
    with store.device(name) as clone:
        assert isinstance(clone, Clone)
        clone.pwrite(data, 0)


def id_of(store: Store, name: str, number: int = 0) -> int:
    with store.device(name) as clone:
        return int(clone._tree.ids(number, 1)[0])


def claim(store: Store, data: bytes, block_id: int) -> None:
    """Has the index say that a block is there."""
    engine = store._engine
    engine.index.insert(engine.hasher.digest(data), np.array([block_id], np.uint64))


def read(arena: Path, name: str) -> bytes:
    with booted(LATER_BOOT), cowstore.open(arena / "store") as store, store.device(name) as clone:
        return clone.pread(BLOCK, 0)


@pytest.mark.parametrize("count", [1, 20], ids=["few", "many"])
def test_blocks_of_ephemeral_clones_are_not_shared(arena, store, count):
    blocks = [os.urandom(BLOCK) for _ in range(count)]
    store.clone("a", "ephemeral", ephemeral=True).close()
    write(store, "ephemeral", b"".join(blocks))
    for number, block in enumerate(blocks):
        claim(store, block, id_of(store, "ephemeral", number))
    write(store, "b", b"".join(blocks))
    segments = store._engine.segments
    kinds = {segments.get(id_of(store, "b", number) >> layout.SLOT_BITS).kind for number in range(count)}
    assert kinds == {layout.DATA}


@pytest.mark.parametrize("count", [1, 20], ids=["few", "many"])
def test_nodes_are_not_shared_as_data(arena, store, count):
    write(store, "a", os.urandom(BLOCK))
    with store.device("a") as clone:
        node = clone._tree.root.node
    block = store._engine.segments.block(node)
    claim(store, block, node)
    write(store, "b", block + os.urandom((count - 1) * BLOCK))
    assert id_of(store, "b") != node
    store.close()
    assert read(arena, "b") == block


@pytest.mark.parametrize("count", [1, 20], ids=["few", "many"])
def test_blocks_with_a_damaged_digest_are_not_shared(arena, store, count):
    block = os.urandom(BLOCK)
    write(store, "a", block)
    block_id = id_of(store, "a")
    store.close()
    path = arena / "store" / "segments" / f"{block_id >> layout.SLOT_BITS:08d}.seg"
    with open(path, "r+b") as file:
        file.seek(layout.DIGESTS_OFFSET + (block_id & layout.SLOT_MASK) * 16)
        digest = file.read(16)
        file.seek(-16, os.SEEK_CUR)
        file.write(bytes([digest[0] ^ 1]) + digest[1:])
    with cowstore.open(arena / "store") as again:
        write(again, "b", block + os.urandom((count - 1) * BLOCK))
    assert read(arena, "b") == block
