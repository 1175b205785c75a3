"""Memory images where something fails, ends, dies, forks, or goes on in other threads."""

from __future__ import annotations

import gc
import mmap
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import cowstore
from cowstore import catalog, environment
from cowstore.errors import (
    ClosedError,
    CorruptError,
    ExistsError,
    InvalidError,
    MachineError,
    NotFoundError,
    ReadOnlyError,
)
from cowstore.machines import memory, template
from tests.unit.stored import damage, ids_of

from .children import in_child, opened, standing
from .images import MIB, PAGE, hidden, imported, names, place, seen, stored

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path() -> Iterator[Path]:
    with place() as path:
        yield path


@pytest.fixture
def store(path: Path) -> Iterator[cowstore.Store]:
    with cowstore.open(path, create=True) as store:
        yield store


# What is refused, and what failures leave.


def test_sizes_that_are_no_whole_pages(store):
    for size in (0, 1, PAGE - 1, PAGE + 512):
        store.create(f"odd-{size}", size).close()
        store.checkpoints.origin(f"odd-{size}").close()
        before = opened()
        with pytest.raises(InvalidError, match=f"has {size} bytes, which are no whole pages"):
            memory.open(store, f"odd-{size}")
        assert opened() == before
    assert hidden(store) == 0


@pytest.mark.parametrize("words", [{}, {"name": "boot", "checkpoint": "moment"}])
def test_neither_nor_both(store, words):
    with pytest.raises(InvalidError, match="of a device or of a checkpoint"):
        memory.open(store, **words)


def test_names_that_are_not_there(store):
    with pytest.raises(NotFoundError, match="no device named 'boot'"):
        memory.open(store, "boot")
    with pytest.raises(NotFoundError, match="no checkpoint named 'boot'"):
        memory.open(store, checkpoint="boot")


def test_what_cannot_be_built_leaves_nothing(store, monkeypatch):
    imported(store)
    with memory.open(store, "boot"):
        pass
    before = opened()
    monkeypatch.setattr(template, "available", lambda: 0)
    with pytest.raises(MachineError, match="no memory left"):
        memory.open(store, "boot")
    monkeypatch.undo()
    damage(store, ids_of(store, "boot")[50])
    fresh = store.path
    store.close()
    with cowstore.open(fresh) as store:
        with pytest.raises(CorruptError):
            memory.open(store, "boot")
        assert hidden(store) == 0
    gc.collect()
    assert not any("/memfd:" in target for target in set(opened().values()) - set(before.values()))


@pytest.fixture
def ram(store) -> Iterator[memory.Ram]:
    """A mapping of which three pages are dirty."""
    imported(store)
    with memory.open(store, "boot") as image, image.map() as ram:
        for number in (1, 30, 31):
            ram.view[number * PAGE] ^= 0x10
        yield ram


def steady(store: cowstore.Store) -> tuple[list[str], int, int]:
    """What is there by name, hidden, and used, after a collection."""
    store.collect()
    return names(store), hidden(store), store.stats().used


def test_a_name_that_is_taken(store, ram):
    before = steady(store)
    with pytest.raises(ExistsError):
        ram.snapshot("boot")
    assert steady(store) == before


def test_a_name_that_is_taken_meanwhile(store, ram, monkeypatch):
    steady(store)
    pieces = memory.Dirty.pieces

    def late(self: memory.Dirty) -> Iterator[tuple[int, memoryview]]:
        yield from pieces(self)
        store.clone_many("boot", ["mine"])

    monkeypatch.setattr(memory.Dirty, "pieces", late)
    used = store.stats().used
    with pytest.raises(ExistsError):
        ram.snapshot("mine")
    assert store.info("mine").kind == "clone"
    store.delete("mine")
    assert steady(store)[::2] == (["boot"], used)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b"])
def test_a_name_that_is_none(store, ram, name):
    before = steady(store)
    with pytest.raises(InvalidError, match="is not a name"):
        ram.snapshot(name)
    assert steady(store) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle(store, ram, monkeypatch, error):
    before = steady(store)

    def broken(self: memory.Dirty) -> Iterator[tuple[int, memoryview]]:
        yield PAGE, memoryview(b"z" * PAGE)
        raise error("no more")

    monkeypatch.setattr(memory.Dirty, "pieces", broken)
    with pytest.raises(error, match="no more"):
        ram.snapshot("half")
    assert steady(store) == before
    monkeypatch.undo()
    ram.snapshot("whole")
    assert stored(store, "whole") == seen(ram)


def test_a_failure_as_it_gets_its_name(store, ram, monkeypatch):
    before, move = steady(store), catalog.move

    def fail(writer, current, flushed):
        if flushed.visible:
            raise RuntimeError("not now")
        return move(writer, current, flushed)

    monkeypatch.setattr(catalog, "move", fail)
    with pytest.raises(RuntimeError, match="not now"):
        ram.snapshot("half")
    monkeypatch.undo()
    assert steady(store) == before


def test_an_interrupt_after_it_has_its_name(store, ram, monkeypatch):
    """The transaction is done: what an interrupt cleans up must not be the image."""
    commit = environment.Writer.commit

    def interrupted(writer: environment.Writer) -> None:
        named = any(record.name == "done" for record in catalog.devices(writer))
        commit(writer)
        if named:
            raise KeyboardInterrupt

    monkeypatch.setattr(environment.Writer, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ram.snapshot("done")
    monkeypatch.undo()
    store.collect()
    assert stored(store, "done") == seen(ram)


DIES = """
import os, signal, sys
import cowstore
from cowstore.machines import memory
store = cowstore.open(sys.argv[1])
image = memory.open(store, "boot")
ram = image.map()
ram.view[:] = os.urandom(len(ram.view))
pieces = memory.Dirty.pieces
def dying(self):
    for offset, piece in pieces(self):
        yield offset, piece
        if offset >= int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
memory.Dirty.pieces = dying
ram.snapshot("half")
"""


@pytest.mark.parametrize("offset", [0, 80 << 20])  # before and after a first part is published
def test_a_process_that_dies_in_the_middle(path, offset):
    with cowstore.open(path, create=True) as store:
        imported(store, size=96 * MIB)
        before = steady(store)
    done = subprocess.run([sys.executable, "-c", DIES, path, str(offset)], cwd=ROOT, check=False)
    assert done.returncode == -9
    with cowstore.open(path) as store:
        assert names(store) == ["boot"]
        assert steady(store) == before


def test_a_store_that_is_read_only(path):
    with cowstore.open(path, create=True) as store:
        data = imported(store)
    with cowstore.open(path, readonly=True) as store, memory.open(store, "boot") as image, image.map() as ram:
        assert store._environment.pins() == [], "and it holds nothing up"
        ram.view[0] ^= 1
        with pytest.raises(ReadOnlyError):
            ram.snapshot("more")
        ram.restore()
        assert seen(ram) == data


# The end, threads, and forks.


def test_after_close(store):
    data = imported(store)
    image = memory.open(store, "boot")
    ram, kept = image.map(), image.map()
    image.close()
    image.close()
    assert hidden(store) == 0
    with pytest.raises(ClosedError, match="memory image 'boot' is closed"):
        image.map()
    kept.view[0] ^= 1
    assert kept.view[1:] == data[1:]
    assert kept.dirty().tolist() == [0], "what is mapped stays"
    kept.restore()
    with pytest.raises(ClosedError):
        kept.snapshot("late")
    ram.close()
    ram.close()
    kept.close()
    calls: list[Callable[[], object]] = [lambda: ram.view, ram.dirty, ram.restore, lambda: ram.snapshot("late")]
    for call in calls:
        with pytest.raises(ClosedError, match="is closed"):
            call()
    assert "/memfd:boot" not in Path("/proc/self/maps").read_text()
    assert names(store) == ["boot"]


def test_an_array_of_it_outlives_close(store):
    data = imported(store)
    with memory.open(store, "boot") as image:
        ram = image.map()
        array, piece = np.frombuffer(ram.view, np.uint8), ram.view[PAGE : 2 * PAGE]
        lent = pickle.PickleBuffer(ram.view)  # keeps the view itself from being given up
        ram.close()
    array[0] ^= 1
    assert array[1:].tobytes() == data[1:]
    assert bytes(piece) == data[PAGE : 2 * PAGE]
    del array
    lent.release()
    assert "/memfd:boot" in Path("/proc/self/maps").read_text()
    del piece
    assert "/memfd:boot" not in Path("/proc/self/maps").read_text(), "and goes with the last of them"


def test_a_snapshot_after_the_store_is_closed(store):
    imported(store)
    with memory.open(store, "boot") as image, image.map() as ram:
        store.close()
        with pytest.raises(ClosedError):
            ram.snapshot("late")


def test_threads_map_and_snapshot_at_once(store):
    data = imported(store)
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                with image.map() as ram:
                    ram.view[number] ^= 0xFF
                    assert ram.dirty().tolist() == [0]
                    if turn == 5:
                        ram.snapshot(f"of-{number}")
        except BaseException as error:  # noqa: BLE001 - asserted below
            failed.append(error)

    with memory.open(store, "boot") as image:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    for number in range(8):
        expected = bytearray(data)
        expected[number] ^= 0xFF
        assert stored(store, f"of-{number}") == expected


def test_who_writes_during_a_snapshot_damages_nothing(store):
    """The pages are of different times then, but what is stored has the digest that it is listed with."""
    imported(store, size=8 * MIB)
    with memory.open(store, "boot") as image, image.map() as ram:
        ended = threading.Event()

        def write() -> None:
            array = np.frombuffer(ram.view, np.uint64)
            while not ended.is_set():
                array[:] += np.uint64(1)  # without the interpreter's lock

        thread = threading.Thread(target=write)
        thread.start()
        try:
            for number in range(5):
                ram.snapshot(f"torn-{number}")
        finally:
            ended.set()
            thread.join()
    path = store.path
    store.close()
    with cowstore.open(path) as store:
        for number in range(5):
            stored(store, f"torn-{number}")  # every block against its digest


def test_a_forked_process_has_a_copy(store):
    data = imported(store)
    with memory.open(store, "boot") as image, image.map() as ram:
        ram.view[0:4] = b"ours"

        def work() -> Iterator[int]:
            assert bytes(ram.view[0:4]) == b"ours"
            ram.view[PAGE : PAGE + 4] = b"kids"
            assert ram.dirty().tolist() == [0, 1]
            with image.map() as fresh:
                assert seen(fresh) == data
            with pytest.raises(ClosedError):
                ram.snapshot("child")
            yield 0
            ram.restore()
            assert seen(ram) == data
            yield 1

        with standing(work) as child:
            assert ram.view[PAGE : 2 * PAGE] == data[PAGE : 2 * PAGE]
            assert ram.dirty().tolist() == [0]
            child.go_on()
            assert bytes(ram.view[0:4]) == b"ours"
        ram.snapshot("parents")
    assert stored(store, "parents") == b"ours" + data[4:]
    assert names(store) == ["boot", "parents"]


def test_a_forked_process_with_a_store_of_its_own(store):
    data = imported(store)
    path = store.path

    def child() -> None:
        with cowstore.open(path) as mine, memory.open(mine, "boot") as image, image.map() as ram:
            ram.view[0] ^= 1
            ram.snapshot("childs")

    in_child(child)
    assert stored(store, "childs") == bytes([data[0] ^ 1]) + data[1:]


def test_importing_it_needs_no_store():
    program = "import sys, cowstore.machines.memory; sys.exit('cowstore.checkpoints' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_sealed_file_is_behind_it(store):
    """A mapping cannot reach the image by any means that memory gives."""
    data = imported(store)
    with memory.open(store, "boot") as image, image.map() as ram, image.map() as other:
        with pytest.raises(OSError, match="Permission denied"):
            ram._opened().madvise(mmap.MADV_REMOVE)
        assert seen(other) == data
