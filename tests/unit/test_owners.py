"""The usage of all devices in one walk is what each of them is told alone."""

from __future__ import annotations

import random

import pytest

import cowstore

BLOCK = 4096


@pytest.fixture
def store(tmp_path):
    with cowstore.open(tmp_path / "s", create=True) as store:
        yield store


def test_one_walk_tells_what_many_tell(store):
    """A lineage in which blocks, leaves and whole trees are shared in every way, over two heights of tree."""
    chance = random.Random(7)
    with store.create("d0", 8 << 20) as first:
        first.pwrite(chance.randbytes(64 * BLOCK), 0)
    names = ["d0"]
    for number in range(1, 25):
        parent, name = chance.choice(names), f"d{number}"
        with store.clone(parent, name) as clone:
            for _ in range(chance.randrange(4)):
                content = chance.choice([chance.randbytes(BLOCK), b"the same".ljust(BLOCK)])
                clone.pwrite(content, chance.randrange(clone.size // BLOCK) * BLOCK)
            if chance.random() < 0.2:
                clone.trim(BLOCK * 32, 0)
        names.append(name)
    store.seal("d3", "image")
    store.delete("d0", "d7")
    names = [one.name for one in store.devices()]
    found = store.usages()
    assert found == {name: store.usage(name) for name in names}
    assert any(usage.exclusive for usage in found.values())
    assert store.usages("d3", "d4") == {name: found[name] for name in ("d3", "d4")}


def test_a_device_alone_owns_everything(store):
    with store.create("a", 1 << 20) as clone:
        clone.pwrite(b"x", 0)
    assert store.usages()["a"].exclusive == store.exclusive("a") == 2 * BLOCK  # the block and its leaf


def test_a_name_that_is_not_there(store):
    with pytest.raises(cowstore.NotFoundError):
        store.usages("nobody")
    assert store.usages() == {}


def test_progress_ends_at_the_end(store):
    with store.create("a", 1 << 20) as clone:
        clone.pwrite(b"x", 0)
    told: list[tuple[str, int, int]] = []
    store.usages(progress=lambda *one: told.append(one))
    assert told[-1][1] < told[-1][2]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
