"""What the memories of checkpoints share with disks, and with each other."""

from __future__ import annotations

import pytest

import cowstore

from .memories import PAGE, Memory, noise, take


@pytest.fixture
def store(tmp_path):
    with cowstore.open(tmp_path / "s", create=True) as store:
        with store.create("disk", 16 * PAGE) as disk:
            disk.pwrite(noise("on disk", 3 * PAGE), 5 * PAGE)
        yield store


SHARED, ALONE = noise("both", 2 * PAGE), noise("alone", PAGE)
FIRST = Memory({0: noise("on disk", 2 * PAGE), 4: SHARED, 9: ALONE})
SECOND = Memory({1: SHARED, 20: noise("second", PAGE)})


def counted(store: cowstore.Store) -> list[tuple[str, int, int, int]]:
    return [(one.checkpoint, one.pages, one.on_disk, one.shared) for one in store.stats().memories]


def test_pages_are_counted_where_they_are(store):
    assert counted(store) == []
    take(store, "one", FIRST, ("disk",))
    assert counted(store) == [("one", 5, 2, 0)]
    take(store, "two", SECOND)
    assert counted(store) == [("one", 5, 2, 2), ("two", 3, 0, 2)]
    store.delete("disk")
    assert counted(store)[0] == ("one", 5, 2, 2), "the checkpoint has the disk still"
    store.checkpoints.delete("two")
    assert counted(store) == [("one", 5, 2, 0)]


def test_a_memory_that_somebody_reads_is_no_disk(store):
    take(store, "one", FIRST)
    before = counted(store)
    with store.checkpoints.memory("one"):
        assert counted(store) == before
    with store.checkpoints.begin(()) as pending:
        pending.take_memory(FIRST)
        assert counted(store) == before
    assert before == [("one", 5, 2, 0)]


def test_a_page_that_stands_twice_counts_twice(store):
    take(store, "one", Memory({0: ALONE, 7: ALONE}))
    assert counted(store) == [("one", 2, 0, 0)]
