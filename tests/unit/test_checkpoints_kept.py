"""Checkpoints that are there: their clones, their end, the next boot, backups, older and read-only stores."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import lmdb
import pytest

import cowstore
from cowstore import catalog, index, journal, reservations

from .memories import BOOT, MIB, PAGE, SIZE, Memory, hidden, make_disks, memory_of, noise, steady, stored, take


@pytest.fixture
def disks(store) -> dict[str, bytes]:
    return make_disks(store)


# Clones of disks.


def test_clones_of_disks_come_together_or_not_at_all(store, disks):
    take(store, "one", disks=("root", "data"))
    store.clone_many("root-image", ["taken"])
    before = steady(store)
    with pytest.raises(cowstore.ExistsError):
        store.checkpoints.clone_disks("one", [["r1", "d1"], ["r2", "taken"]])
    with pytest.raises(cowstore.ExistsError):
        store.checkpoints.clone_disks("one", [["r1", "d1"], ["r1", "d2"]])
    assert steady(store) == before
    made = store.checkpoints.clone_disks("one", [["r1", "d1"], ["r2", "d2"]])
    assert sorted(info.name for info in made) == ["d1", "d2", "r1", "r2"]
    with store.device("r1") as clone:
        assert isinstance(clone, cowstore.Clone)
        clone.pwrite(b"r1 alone", 0)
    assert stored(store, "r2") == disks["root"]


@pytest.mark.parametrize("names", [["r1"], ["r1", "d1", "x1"], []])
def test_names_that_are_too_few_or_too_many(store, disks, names):
    take(store, "one", disks=("root", "data"))
    before = steady(store)
    with pytest.raises(cowstore.InvalidError, match="has 2 disks"):
        store.checkpoints.clone_disks("one", [["r", "d"], names])
    assert steady(store) == before


def test_clones_keep_what_a_deleted_checkpoint_had(store, disks):
    take(store, "one", disks=("root", "data"))
    take(store, "two", disks=("root", "data"))
    store.checkpoints.clone_disks("one", [["r", "d"]])
    store.checkpoints.delete("one", "two")
    store.delete("root", "data", "root-image", "data-image")
    store.collect()
    assert store.checkpoints.all() == []
    assert stored(store, "r") == disks["root"]
    assert stored(store, "d") == disks["data"]
    store.delete("r", "d")
    assert store.lineage() == []
    store.collect()
    assert (hidden(store), store.stats().used) == (0, 0)


def test_deleting_is_all_or_nothing(store):
    take(store, "one")
    take(store, "two")
    with pytest.raises(cowstore.NotFoundError, match="no checkpoint named 'three'"):
        store.checkpoints.delete("one", "three", "two")
    assert len(store.checkpoints.all()) == 2
    store.checkpoints.delete("one", "two", "one")
    store.collect()
    assert (store.checkpoints.all(), hidden(store), store.stats().used) == ([], 0, 0)


def test_a_memory_that_is_open_outlives_its_checkpoint(store):
    take(store, "one")
    with store.checkpoints.memory("one") as memory:
        store.checkpoints.delete("one")
        store.collect()
        assert memory.pread(SIZE, 0) == BOOT.content()


# Images made of a moment; tests/machines/test_memory.py has the rest.


def test_pages_of_another_size(store, disks):
    before = steady(store)
    for size in (SIZE, 4 * MIB):
        with closing(store.checkpoints.origin("root-image")) as origin, pytest.raises(cowstore.InvalidError):
            origin.seal("more", Memory({}, size))
    assert steady(store) == before


def test_a_moment_that_a_full_disk_did_not_let_hold(store, monkeypatch):
    """It can be read as long as its pin lasts, but nothing may be made of it once its blocks are doomed."""
    with store.create("made", 8 * PAGE) as clone:
        clone.pwrite(noise("image", 8 * PAGE), 0)
        clone.seal("image")
    store.delete("made")

    def full(*_: object) -> None:
        raise cowstore.NoSpaceError("store")

    monkeypatch.setattr("cowstore.lineage.Lineage.hide", full)
    pages = Memory({1: noise(1, PAGE)}, 8 * PAGE)
    with closing(store.checkpoints.origin("image")) as origin:
        origin.seal("first", pages)
        assert stored(store, "first") == pages.content(noise("image", 8 * PAGE))
        store.delete("image")
        origin.seal("second", pages)  # what the first one was made of, its record has
        store.delete("first", "second")
        with pytest.raises(cowstore.NotFoundError, match="no moment named 'image'"):
            origin.seal("third", pages)
        assert origin.device.pread(PAGE, 0) == noise("image", PAGE)
    assert steady(store) == ([], [], 0, 0)


# The next boot, backups, older stores, and stores that are read-only.


def next_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (catalog, reservations, index, journal):
        monkeypatch.setattr(module, "boot_id", lambda: b"another boot id.")


@pytest.mark.parametrize("settled", [True, False])
def test_ephemeral_disks_are_in_it_after_the_next_boot(store, disks, settled, monkeypatch):
    """Also where nobody asked for it: a checkpoint that a boot takes a disk out of is none."""
    with store.checkpoints.begin(["root", "data"]) as pending:
        pending.take_memory(BOOT)
        pending.take_state(b"state")
        if settled:
            pending.settle_disks()
        pending.publish("one", {})
    path = store.path
    store.close()
    next_boot(monkeypatch)
    with cowstore.open(path) as store:
        store.collect()
        assert [info.name for info in store.devices()] == ["data-image", "root", "root-image"], "the clone is gone"
        assert [info.name for info in store.checkpoints.all()] == ["one"]
        store.checkpoints.clone_disks("one", [["r", "d"]])
        assert stored(store, "r") == disks["root"]
        assert stored(store, "d") == disks["data"]


def test_settling_copies_only_what_the_clone_has_of_its_own(store):
    with store.create("made", 16 * MIB) as clone:
        clone.pwrite(noise("base", 16 * MIB), 0)
        clone.seal("base")
    with store.clone("base", "disk", ephemeral=True) as clone:
        clone.pwrite(noise("own", 2 * PAGE), MIB)
    store.collect()
    before = store.stats().used
    with store.checkpoints.begin(["disk"]) as pending:
        pending.settle_disks()
        # Two blocks, a leaf, the node above, a commit block.
        assert 2 * PAGE < store.stats().used - before <= 5 * PAGE


def test_a_backup_has_them(store, disks, tmp_path):
    take(store, "one", disks=("root", "data"))
    take(store, "two", Memory({1: noise(1, PAGE)}), since="one")
    store.checkpoints.clone_disks("one", [["r", "d"]])
    store.backup(tmp_path / "copy")
    known = store.checkpoints.all()
    with cowstore.open(tmp_path / "copy") as copy:
        copy.collect()
        assert copy.checkpoints.all() == known
        assert memory_of(copy, "one") == BOOT.content()
        assert memory_of(copy, "two") == Memory({1: noise(1, PAGE)}).content(BOOT.content())
        assert copy.checkpoints.state("two") == b"state of two"
        assert "r" not in [info.name for info in copy.devices()], "ephemeral clones stay behind"
        copy.checkpoints.clone_disks("one", [["r", "d"]])
        assert stored(copy, "d") == disks["data"]
        take(copy, "three", disks=("root",))
        assert copy.checkpoints.info("three").number > max(info.number for info in known)
        copy.delete("r", "d")
        copy.checkpoints.delete("one", "two", "three")
    with cowstore.open(tmp_path / "copy", readonly=True) as copy:
        assert copy.checkpoints.all() == []


def without_table(path: Path) -> None:
    """Makes a store's catalog one of a version that knew no checkpoints."""
    env: Any = lmdb.open(str(path / "catalog"), max_dbs=16, map_size=1 << 40, lib_version=0)
    table = env.open_db(b"checkpoints", create=False)
    with env.begin(write=True) as txn:
        txn.drop(table, delete=True)
    env.close()


def test_a_store_of_a_version_that_knew_none(store, disks):
    path = store.path
    store.close()
    without_table(path)
    with cowstore.open(path, readonly=True) as old:
        assert old.checkpoints.all() == []
        with pytest.raises(cowstore.NotFoundError, match="no checkpoint named 'one'"):
            old.checkpoints.memory("one")
        assert stored(old, "root") == disks["root"]
        old.backup(path.with_name("copy"))
    with cowstore.open(path) as new:
        take(new, "one", disks=("root",))
        assert memory_of(new, "one") == BOOT.content()


def test_a_table_that_is_lost_with_what_was_in_it(store):
    take(store, "one")
    path = store.path
    store.close()
    shutil.copytree(path, path.with_name("before"))
    without_table(path)
    for readonly in (True, False):
        with pytest.raises(cowstore.CatalogCorruptError, match="records are missing"):
            cowstore.open(path, readonly=readonly)
    with cowstore.open(path.with_name("before"), readonly=True) as sound:
        assert len(sound.checkpoints.all()) == 1


def test_a_store_that_is_read_only(store, disks):
    take(store, "one", disks=("root", "data"))
    path = store.path
    store.close()
    with cowstore.open(path, readonly=True) as seen:
        assert [info.name for info in seen.checkpoints.all()] == ["one"]
        assert memory_of(seen, "one") == BOOT.content()
        assert seen.checkpoints.state("one") == b"state of one"
        refused: list[Callable[[], object]] = [
            lambda: seen.checkpoints.begin(["root"]),
            lambda: seen.checkpoints.clone_disks("one", [["r", "d"]]),
            lambda: seen.checkpoints.delete("one"),
        ]
        for call in refused:
            with pytest.raises(cowstore.ReadOnlyError):
                call()
