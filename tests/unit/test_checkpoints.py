"""Checkpoints: whole or not there, exact, and no more than what has changed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowstore
from cowstore import catalog, environment
from cowstore.checkpoints import Pending

from .memories import BOOT, MIB, PAGE, SIZE, Memory, hidden, make_disks, memory_of, noise, steady, stored, take

ROOT = Path(__file__).parents[2]


@pytest.fixture
def disks(store) -> dict[str, bytes]:
    return make_disks(store)


# Round trip.


def test_what_is_taken_is_there(store, disks):
    told: list[tuple[str, int, int]] = []
    with store.checkpoints.begin(["root", "data"]) as pending:
        pending.take_memory(BOOT, progress=lambda *words: told.append(words))
        pending.take_state(b"registers")
        pending.settle_disks()
        assert store.checkpoints.all() == []
        info = pending.publish("morning", {"cpus": 2}, automatic=True)
    assert told[-1] == ("memory", SIZE, SIZE)
    assert store.checkpoints.all() == [info]
    assert store.checkpoints.info("morning") == info
    assert (info.name, info.memory_size, info.state_size) == ("morning", SIZE, 9)
    assert info.disk_sizes == (2 * MIB + 512, 2 * MIB + 512)
    assert (info.configuration, info.automatic, len(info.images)) == ({"cpus": 2}, True, 4)
    assert memory_of(store, "morning") == BOOT.content()
    assert store.checkpoints.state("morning") == b"registers"
    store.checkpoints.clone_disks("morning", [["root-2", "data-2"]])
    assert {name: stored(store, f"{name}-2") for name in disks} == disks
    shown = {one.name: one for one in store.devices()}
    assert shown.keys() == {"root", "data", "root-image", "data-image", "root-2", "data-2"}
    assert shown["root-2"].ephemeral
    assert shown["data-2"].parent == "morning.disk1"


@pytest.mark.parametrize("length", [0, 1, PAGE, PAGE + 1, 3 * MIB + 5])
def test_states_of_any_length(store, length):
    with store.checkpoints.begin([]) as pending:
        pending.take_memory(BOOT)
        pending.take_state(noise("state", length))
        assert pending.publish("one", {}).state_size == length
    assert store.checkpoints.state("one") == noise("state", length)


def test_they_are_sorted_by_name_and_survive_reopening(store):
    for name in ("noon", "dawn", "evening"):
        take(store, name)
    known = store.checkpoints.all()
    assert [info.name for info in known] == ["dawn", "evening", "noon"]
    store.collect()
    store.close()
    with cowstore.open(store.path) as again:
        assert again.checkpoints.all() == known
        assert memory_of(again, "dawn") == BOOT.content()


def test_disks_are_of_one_moment(store, disks):
    """What is written and flushed after begin() is not in it."""
    with store.device("root") as root, store.checkpoints.begin(["root", "data"]) as pending:
        assert isinstance(root, cowstore.Clone)
        root.pwrite(b"after", 0)
        root.flush()
        pending.take_memory(BOOT)
        pending.take_state(b"")
        pending.publish("one", {})
    store.checkpoints.clone_disks("one", [["r", "d"]])
    assert stored(store, "r") == disks["root"]
    assert stored(store, "root")[:5] == b"after"


def test_of_an_image_there_is_no_checkpoint(store, disks):
    before = steady(store)
    with pytest.raises(cowstore.NotFoundError, match="no clone named 'root-image'"):
        store.checkpoints.begin(["root", "root-image"])
    assert steady(store) == before


# What a later one costs.


def test_only_changed_pages_cost(store):
    size = 16 * MIB
    boot = Memory({0: noise("boot", size)}, size)
    take(store, "boot", boot)
    store.collect()
    before = store.stats().used
    later = Memory({7: noise(7, PAGE), 2000: noise(2000, PAGE), 2001: bytes(PAGE)}, size)
    take(store, "later", later, since="boot")
    # Two blocks (the third is zeros), two leaves, the node above; a block of state, its leaf; two commit blocks.
    assert 2 * PAGE < store.stats().used - before <= (2 + 3 + 2 + 2) * PAGE
    assert memory_of(store, "later") == later.content(boot.content())
    assert memory_of(store, "boot") == boot.content()
    store.checkpoints.delete("boot")
    store.collect()
    assert memory_of(store, "later") == later.content(boot.content()), "without the earlier one, too"


def test_an_earlier_one_of_another_size(store):
    take(store, "boot")
    before = steady(store)
    with pytest.raises(cowstore.InvalidError, match=f"has {SIZE} bytes, and not {SIZE + PAGE}"):
        take(store, "later", Memory({}, SIZE + PAGE), since="boot")
    assert steady(store) == before


def test_an_earlier_one_that_is_not_there(store):
    before = steady(store)
    with pytest.raises(cowstore.NotFoundError, match="no checkpoint named 'boot'"):
        take(store, "later", since="boot")
    assert steady(store) == before


def test_an_earlier_one_may_go_while_pages_are_taken(store):
    take(store, "boot")

    class Meanwhile(Memory):
        def pieces(self) -> Iterator[tuple[int, memoryview]]:
            store.checkpoints.delete("boot")
            store.collect()
            yield from super().pieces()

    later = Meanwhile({1: noise(1, PAGE)})
    take(store, "later", later, since="boot")
    store.collect()
    assert memory_of(store, "later") == later.content(BOOT.content())


# Failures leave nothing.


def test_what_is_not_published_is_dropped(store, disks):
    before = steady(store)
    with store.checkpoints.begin(["root", "data"]) as pending:
        pending.take_memory(BOOT)
        pending.take_state(b"state")
        pending.settle_disks()
        assert hidden(store) > before[2]
    assert hidden(store) == before[2], "at once, and not only with a collection"
    pending.close()
    assert steady(store) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("length", [PAGE, 70 * MIB])  # before and after a first part is published
def test_pages_that_fail(store, disks, error, length):
    before = steady(store)

    class Failing(Memory):
        def pieces(self) -> Iterator[tuple[int, memoryview]]:
            for offset in range(0, length, MIB):
                yield offset, memoryview(noise(offset, min(MIB, length)))
            raise error("no more pages")

    with pytest.raises(error, match="no more pages"):
        take(store, "one", Failing({}, 128 * MIB), ("root", "data"))
    assert steady(store) == before


def test_a_name_that_is_taken_meanwhile(store, disks):
    take(store, "one")
    before = steady(store)
    with pytest.raises(cowstore.ExistsError, match="checkpoint 'one' exists already"):
        take(store, "one", Memory({3: noise(3, PAGE)}), ("root", "data"))
    assert steady(store) == before
    with pytest.raises(cowstore.ExistsError):
        store.checkpoints.check_free("one")
    store.checkpoints.check_free("two")


@pytest.mark.parametrize("name", ["", ".one", "a/b", "x" * 129])
def test_a_name_that_is_none(store, name):
    before = steady(store)
    with pytest.raises(cowstore.InvalidError, match="is not a name"):
        take(store, name)
    with pytest.raises(cowstore.InvalidError, match="is not a name"):
        store.checkpoints.check_free(name)
    assert steady(store) == before


def test_the_longest_name(store, disks):
    name = "x" * 128
    take(store, name, disks=("root",))
    assert store.checkpoints.info(name).name == name


@pytest.mark.parametrize(
    ("configuration", "error"), [({"a": "x" * 70000}, cowstore.InvalidError), ({"a": {1, 2}}, TypeError)]
)
def test_a_configuration_that_cannot_be_kept(store, configuration, error):
    before = steady(store)
    with store.checkpoints.begin([]) as pending:
        pending.take_memory(BOOT)
        pending.take_state(b"")
        with pytest.raises(error):
            pending.publish("one", configuration)
    assert steady(store) == before


def test_a_failure_while_disks_are_settled(store, disks, monkeypatch):
    before = steady(store)

    def fail(*_: object) -> None:
        raise RuntimeError("no copy")

    monkeypatch.setattr("cowstore.imports.Import.copy", fail)
    with pytest.raises(RuntimeError, match="no copy"):
        take(store, "one", disks=("root", "data"))
    monkeypatch.undo()
    assert steady(store) == before


def test_a_failure_as_it_is_published(store, disks, monkeypatch):
    before = steady(store)

    def fail(*_: object) -> None:
        raise RuntimeError("not now")

    monkeypatch.setattr(catalog, "save_checkpoint", fail)
    with pytest.raises(RuntimeError, match="not now"):
        take(store, "one", disks=("root", "data"))
    monkeypatch.undo()
    assert steady(store) == before


def test_an_interrupt_after_it_is_published(store, disks, monkeypatch):
    """The transaction is done: what the interrupt cleans up must not be the checkpoint's images."""
    commit = environment.Writer.commit

    def interrupted(writer: environment.Writer) -> None:
        published = any(catalog.checkpoints(writer))
        commit(writer)
        if published:
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(environment.Writer, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        take(store, "one", disks=("root", "data"))
    store.collect()
    assert memory_of(store, "one") == BOOT.content()
    store.checkpoints.clone_disks("one", [["r", "d"]])
    assert stored(store, "d") == disks["data"]


def prepared(store: cowstore.Store) -> Pending:
    pending = store.checkpoints.begin(["root", "data"])
    pending.take_memory(BOOT)
    pending.take_state(b"state")
    pending.settle_disks()
    return pending


def test_a_store_that_is_closed_without_publishing(store, disks):
    before = steady(store)
    pending = prepared(store)
    path = store.path
    store.close()
    with cowstore.open(path) as again:
        assert steady(again) == before
    with pytest.raises(cowstore.StoreError):
        pending.publish("late", {})
    pending.close()  # and nothing is left for it to do


DIES = """
import os, signal, sys
import cowstore
from tests.unit.memories import BOOT, Memory, noise
store, step = cowstore.open(sys.argv[1]), sys.argv[2]
def reached(name):
    if name == step:
        os.kill(os.getpid(), signal.SIGKILL)
class Dying(Memory):
    def pieces(self):
        for offset in range(0, 70 << 20, 1 << 20):
            yield offset, memoryview(noise(offset, 1 << 20))
        reached("pages")
pending = store.checkpoints.begin(["root", "data"])
reached("disks")
pending.take_memory(Dying({}, 128 << 20) if step == "pages" else BOOT)
reached("memory")
pending.take_state(b"state")
reached("state")
pending.settle_disks()
reached("settled")
pending.publish("one", {})
reached("published")
"""


@pytest.mark.parametrize("step", ["disks", "pages", "memory", "state", "settled", "published"])
def test_a_process_that_dies(store, disks, step):
    before = steady(store)
    done = subprocess.run([sys.executable, "-c", DIES, store.path, step], cwd=ROOT, check=False)
    assert done.returncode == -9
    if step == "published":
        store.collect()
        assert memory_of(store, "one") == BOOT.content()
        store.checkpoints.delete("one")
    else:
        with pytest.raises(cowstore.NotFoundError):
            store.checkpoints.info("one")
    assert steady(store) == before
