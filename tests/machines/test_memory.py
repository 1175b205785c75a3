"""Memory images: forked by the thousand, each apart from all others, and snapshots that are exact."""

from __future__ import annotations

import ctypes
import os
import random
import resource
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowstore
from cowstore import catalog, index, journal, reservations
from cowstore.errors import MachineError
from cowstore.machines import memory
from cowstore.machines.pages import address_of

from .children import opened
from .images import MIB, PAGE, SIZE, content, imported, names, place, seen, stored


@pytest.fixture
def path() -> Iterator[Path]:
    with place() as path:
        yield path


@pytest.fixture
def store(path: Path) -> Iterator[cowstore.Store]:
    with cowstore.open(path, create=True) as store:
        yield store


# Mapping.


def test_it_is_the_image_and_writing_it_changes_nothing_else(store):
    data = imported(store)
    with memory.open(store, "boot") as image:
        assert image.size == SIZE
        with image.map() as ram, image.map() as other:
            assert seen(ram) == data
            assert ram.dirty().tolist() == [], "reading makes no page its own"
            ram.view[PAGE : PAGE + 4] = b"abcd"
            array = np.frombuffer(ram.view, np.uint32)
            array[-1] = 7
            del array
            expected = bytearray(data)
            expected[PAGE : PAGE + 4], expected[-4:] = b"abcd", (7).to_bytes(4, "little")
            assert seen(ram) == expected
            assert ram.dirty().tolist() == [1, 63]
            assert seen(other) == data
            assert other.dirty().tolist() == []
    assert stored(store, "boot") == data


def test_a_thousand_at_once_see_nothing_of_each_other(store):
    data = imported(store)
    before = len(opened())
    with memory.open(store, "boot") as image:
        rams = [image.map() for _ in range(1000)]
        assert len(opened()) < before + 50, "a thousand of them take no descriptors"
        for number, ram in enumerate(rams):
            ram.view[number % 64 * PAGE : number % 64 * PAGE + 8] = number.to_bytes(8, "big")
            ram.view[-8:] = (number + 1).to_bytes(8, "big")
        for number, ram in enumerate(rams):
            at, expected = number % 64 * PAGE, bytearray(data)
            expected[at : at + 8], expected[-8:] = number.to_bytes(8, "big"), (number + 1).to_bytes(8, "big")
            assert seen(ram) == expected, number
            assert ram.dirty().tolist() == sorted({number % 64, 63})
        rams[500].restore()
        assert rams[500].view == data
        assert rams[501].dirty().tolist() == [501 % 64, 63]
        fresh = image.map()
        assert seen(fresh) == data
        for ram in [*rams, fresh]:
            ram.close()


def test_mapping_costs_the_same_whatever_the_size(store):
    """Of an image of a terabyte with one page in it, a hundred mappings take no memory to speak of."""
    with store.create("wide", 1 << 40) as clone:
        clone.pwrite(b"far", (1 << 40) - PAGE)
        clone.seal("wide-image")
    with memory.open(store, "wide-image") as image:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rams = [image.map() for _ in range(100)]
        assert all(bytes(ram.view[-PAGE : -PAGE + 3]) == b"far" for ram in rams)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
        for ram in rams:
            ram.close()


def test_restore_gives_the_memory_back(store):
    data = imported(store, size=64 * MIB)
    with memory.open(store, "boot") as image, image.map() as ram:
        ram.view[:] = random.Random(9).randbytes(64 * MIB)
        own = private_kib("/memfd:boot")
        assert own == 64 << 10
        ram.restore()
        assert private_kib("/memfd:boot") == 0
        assert ram.dirty().tolist() == []
        assert seen(ram) == data
        ram.view[5] ^= 0xFF
        assert ram.dirty().tolist() == [0], "and it can be written again"


def private_kib(name: str) -> int:
    """KiB of anonymous memory in the mappings of a file, by the kernel's other account of them."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = name in line
        elif inside and line.startswith("Anonymous:"):
            found += int(line.split()[1])
    return found


def test_locked_memory_cannot_be_given_back(store):
    imported(store)
    with memory.open(store, "boot") as image, image.map() as ram:
        ram.view[0] ^= 1
        locked = ctypes.CDLL(None).mlock(ctypes.c_void_p(address_of(ram._opened())), ctypes.c_size_t(PAGE))
        assert locked == 0
        with pytest.raises(MachineError, match="cannot be restored") as refused:
            ram.restore()
        assert "mlockall" in refused.value.hint


# Snapshots.


def test_a_snapshot_of_a_snapshot(store):
    data = imported(store)
    expected = bytearray(data)
    with memory.open(store, "boot") as image, image.map() as ram:
        ram.view[100:104] = expected[100:104] = b"one!"
        info = ram.snapshot("boot-2")
        assert (info.name, info.size) == ("boot-2", SIZE)
        assert store.info("boot-2").kind == "image"
        assert store.info("boot-2").parent == "boot"
        assert ram.dirty().tolist() == [0], "it goes on where it was"
        second = bytes(expected)
        ram.view[-4:] = expected[-4:] = b"late"
        ram.view[SIZE // 4 : SIZE // 2] = expected[SIZE // 4 : SIZE // 2] = os.urandom(SIZE // 4)
        ram.snapshot("boot-3")
        third = bytes(expected)
        ram.restore()
        assert seen(ram) == data
    assert (stored(store, "boot"), stored(store, "boot-2"), stored(store, "boot-3")) == (data, second, third)
    with memory.open(store, "boot-2") as image, image.map() as ram:
        assert seen(ram) == second
        ram.view[: 2 * PAGE] = bytes(2 * PAGE)
        ram.snapshot("boot-2a")
    assert stored(store, "boot-2a") == bytes(2 * PAGE) + second[2 * PAGE :]
    store.delete("boot", "boot-2")
    store.collect()
    assert stored(store, "boot-2a") == bytes(2 * PAGE) + second[2 * PAGE :], "without its ancestors, too"
    assert stored(store, "boot-3") == third


def test_a_snapshot_of_nothing(store):
    data = imported(store)
    with memory.open(store, "boot") as image, image.map() as ram:
        ram.snapshot("same")
    assert stored(store, "same") == data
    assert store.usage("same").own == 0


def test_what_is_written_and_is_as_it_was_costs_nothing(store):
    data = imported(store)
    with memory.open(store, "boot") as image, image.map() as ram:
        ram.view[:] = data
        assert len(ram.dirty()) == 64
        ram.snapshot("same")
    assert store.usage("same").own == 0


def test_the_cost_follows_the_dirty_pages(store):
    data = imported(store, size=64 * MIB)
    store.collect()
    before, expected = store.stats().used, bytearray(data)
    with memory.open(store, "boot") as image, image.map() as ram:
        for number in (0, 5000, 16383):
            ram.view[number * PAGE] ^= 0x55
            expected[number * PAGE] ^= 0x55
        ram.snapshot("boot-2")
    usage = store.usage("boot-2")
    assert usage.own == 3 * PAGE
    # Three blocks of data and the nodes above them: a leaf each, one that names the leaves, and the commit block.
    assert 3 * PAGE < store.stats().used - before <= (3 + 3 + 1 + 1) * PAGE
    assert stored(store, "boot-2") == expected


def test_of_a_clone_it_is_the_moment_that_was_opened(store):
    imported(store)
    with store.clone("boot", "desk") as desk:
        desk.pwrite(b"flushed", 0)
        desk.flush()
        desk.pwrite(b"pending", 0)
        with memory.open(store, "desk") as image:
            moment = stored(store, "desk")
            assert moment[:7] == b"flushed"
            with image.map() as ram:
                assert seen(ram) == moment
                desk.flush()  # the clone goes on, and is even gone
                desk.close()
                store.delete("desk", "boot")
                store.collect()
                ram.view[-1] ^= 1
                ram.snapshot("after")
                store.create("desk", 3 * PAGE).close()  # another one of its name
                ram.snapshot("again")
    expected = moment[:-1] + bytes([moment[-1] ^ 1])
    assert stored(store, "after") == stored(store, "again") == expected
    assert store.info("again").parent is None
    store.collect()
    assert stored(store, "after") == expected


def test_of_a_renamed_image(store):
    data = imported(store)
    with memory.open(store, "boot") as image, image.map() as ram:
        store.rename("boot", "old")
        imported(store, "boot", 2 * SIZE)
        ram.view[0] ^= 1
        ram.snapshot("child")
    assert store.info("child").parent == "old"
    assert stored(store, "child") == bytes([data[0] ^ 1]) + data[1:]


def test_of_an_ephemeral_clone_it_outlives_the_next_boot(path, monkeypatch):
    with cowstore.open(path, create=True) as store:
        data = bytearray(imported(store))
        with store.clone("boot", "desk", ephemeral=True) as desk:
            desk.pwrite(b"own of the clone", 10 * PAGE)
        with memory.open(store, "desk") as image, image.map() as ram:
            ram.view[0:2] = b"hi"
            ram.snapshot("kept")
        data[10 * PAGE : 10 * PAGE + 16], data[0:2] = b"own of the clone", b"hi"
        assert store.usage("kept").own == 2 * PAGE
        assert store.info("kept").parent == "boot"
        assert not store.info("kept").ephemeral
    for module in (catalog, reservations, index, journal):
        monkeypatch.setattr(module, "boot_id", lambda: b"another boot id.")
    with cowstore.open(path) as store:
        store.collect()
        assert names(store) == ["boot", "kept"]
        assert stored(store, "kept") == data


class Noise:
    """A memory for a checkpoint."""

    name, size = "noise", SIZE

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        yield 0, memoryview(content("noise"))

    def close(self) -> None:
        pass


def checkpoint(store: cowstore.Store, name: str) -> None:
    with store.checkpoints.begin([]) as pending:
        pending.take_memory(Noise())
        pending.take_state(b"state")
        pending.publish(name, {})


def test_of_a_checkpoint(store):
    checkpoint(store, "moment")
    data = content("noise")
    with memory.open(store, checkpoint="moment") as image, image.map() as ram:
        assert seen(ram) == data
        store.checkpoints.delete("moment")
        store.collect()
        ram.view[-1] ^= 1
        ram.snapshot("child")
    store.collect()
    assert stored(store, "child") == data[:-1] + bytes([data[-1] ^ 1])
    assert store.usage("child").own == PAGE


def test_a_snapshots_checkpoint_may_go(store):
    checkpoint(store, "moment")
    with memory.open(store, checkpoint="moment") as image, image.map() as ram:
        ram.snapshot("child")
    store.checkpoints.delete("moment")
    store.collect()
    assert stored(store, "child") == content("noise")
    store.delete("child")
    assert store.lineage() == []


WRITE = st.tuples(st.just("write"), st.integers(0, 2), st.integers(0, 8 * PAGE - 1), st.binary(max_size=PAGE + 10))
OTHER = st.tuples(st.sampled_from(["restore", "snapshot"]), st.integers(0, 2))
MAP = st.tuples(st.just("map"), st.integers(0, 2), st.integers(0, 20))


class Model:
    """Mappings of images of eight pages, and beside each a bytearray."""

    size = 8 * PAGE

    def __init__(self, store: cowstore.Store, start: bytes) -> None:
        self.store = store
        self.images = {"boot": memory.open(store, "boot")}
        self.wanted = {"boot": start}
        self.origins = ["boot"] * 3
        self.rams = [self.images["boot"].map() for _ in self.origins]
        self.models = [bytearray(start) for _ in self.origins]
        self.touched = [set[int]() for _ in self.origins]

    def write(self, which: int, offset: int, data: bytes) -> None:
        data = data[: self.size - offset]
        self.rams[which].view[offset : offset + len(data)] = data
        self.models[which][offset : offset + len(data)] = data
        if data:
            self.touched[which] |= set(range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1))

    def restore(self, which: int) -> None:
        self.rams[which].restore()
        self._fresh(which)

    def _fresh(self, which: int) -> None:
        self.models[which], self.touched[which] = bytearray(self.wanted[self.origins[which]]), set()

    def snapshot(self, which: int) -> None:
        name = f"image-{len(self.wanted)}"
        self.rams[which].snapshot(name)
        self.wanted[name] = bytes(self.models[which])

    def map(self, which: int, number: int) -> None:
        name = list(self.wanted)[number % len(self.wanted)]
        if name not in self.images:
            self.images[name] = memory.open(self.store, name)
        self.rams[which].close()
        self.rams[which], self.origins[which] = self.images[name].map(), name
        self._fresh(which)

    def check(self) -> None:
        for ram, model, touched in zip(self.rams, self.models, self.touched, strict=True):
            assert seen(ram) == model
            assert set(ram.dirty().tolist()) == touched

    def close(self) -> None:
        for ram in self.rams:
            ram.close()
        for image in self.images.values():
            image.close()
        self.store.delete(*(name for name in self.wanted if name != "boot"))


def test_it_is_a_bytearray(store):
    """Any calls on any mappings, against plain bytearrays."""
    start = imported(store, size=Model.size)

    @given(st.lists(WRITE | OTHER | MAP, max_size=25))
    def run(steps: list[Any]) -> None:
        with closing(Model(store, start)) as model:
            for word, which, *rest in steps:
                getattr(model, word)(which, *rest)
                model.check()
            assert {name: stored(store, name) for name in names(store)} == model.wanted

    run()
