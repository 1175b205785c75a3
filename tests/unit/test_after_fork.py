"""A process made by os.fork(): it may use nothing of its parent's store, and harms nothing by trying."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowstore
from cowstore import ClosedError, InUseError

BLOCK = 4096


def in_child(action: Callable[[], object]) -> None:
    """Runs something in a forked child; what it raises fails the test."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        try:
            action()
        except BaseException:  # noqa: BLE001 - handed to the parent
            os.write(theirs, traceback.format_exc()[-60000:].encode())
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - pytest's own end of work is not to be seen
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert not said, said


@pytest.fixture
def store(tmp_path: Path) -> Iterator[cowstore.Store]:
    with cowstore.open(tmp_path / "s", create=True) as store:
        yield store


@pytest.fixture
def desk(store: cowstore.Store) -> Iterator[cowstore.Clone]:
    """A clone of many leaves, every second block written, and one write that is not flushed."""
    with store.create("desk", 16 << 20) as desk:
        for number in range(0, 4096, 2):
            desk.pwrite(number.to_bytes(8, "big") * 512, number * BLOCK)
        desk.flush()
        desk.pwrite(b"unflushed", BLOCK)
        yield desk


def pins(store: cowstore.Store) -> list[tuple[int, int]]:
    return store._environment.pins()


def test_every_call_on_the_store_says_that_it_is_closed(store, desk, tmp_path):
    calls: list[Callable[[], object]] = [
        store.devices, store.lineage, store.stats, store.collect, store.own_bytes, store.usages,
        lambda: store.info("desk"), lambda: store.usage("desk"), lambda: store.exclusive("desk"),
        lambda: store.create("new", 1), lambda: store.clone("desk", "new"),
        lambda: store.clone_many("desk", ["new"]),
        lambda: store.fork("desk", "new"), lambda: store.seal("desk", "new"), lambda: store.reset("desk"),
        lambda: store.rename("desk", "new"), lambda: store.delete("desk"), lambda: store.device("desk"),
        lambda: store.device("desk", readonly=True), lambda: next(store.diff("desk", "desk")),
        lambda: store.import_image(__file__, "new"), lambda: store.export("desk", tmp_path / "out"),
        lambda: store.backup(tmp_path / "copy"),
    ]  # fmt: skip

    def child() -> None:
        for call in calls:
            with pytest.raises(ClosedError, match="closed"):
                call()
        store.close()

    in_child(child)
    assert [one.name for one in store.devices()] == ["desk"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_every_call_on_a_device_says_that_it_is_closed(store, desk):
    image = store.device(store.seal("desk", "image").name)
    moment = store.device("desk", readonly=True)
    reads: list[Callable[[cowstore.Device], object]] = [
        lambda device: device.pread(1, 0), lambda device: device.pread(3 * BLOCK, 0),
        lambda device: device.preadinto(bytearray(1), 0), lambda device: device.read(1),
        lambda device: device.seek(0), lambda device: next(device.extents()), lambda device: next(device.delta()),
    ]  # fmt: skip
    writes: list[Callable[[cowstore.Clone], object]] = [
        lambda clone: clone.pwrite(b"x", 0), lambda clone: clone.zero(1, 0), lambda clone: clone.trim(BLOCK, 0),
        lambda clone: clone.resize(1), lambda clone: clone.fork("new"), lambda clone: clone.seal("new"),
        lambda clone: clone.reset(), lambda clone: clone.write(b"x"),
    ]  # fmt: skip

    def child() -> None:
        for device in (image, moment, desk):
            for read in reads:
                with pytest.raises(ClosedError, match="closed"):
                    read(device)
        for write in writes:
            with pytest.raises(ClosedError, match="closed"):
                write(desk)
        for device in (image, moment, desk):
            device.close()

    in_child(child)
    for device in (image, moment):
        assert device.pread(8, 2 * BLOCK) == (2).to_bytes(8, "big")
        device.close()
    assert desk.pread(9, BLOCK) == b"unflushed"
    desk.flush()


def test_generators_of_the_parent_end_in_the_child(store, desk):
    store.fork("desk", "child")
    for number in range(0, 4096, 64):
        desk.pwrite(b"x", number * BLOCK)
    desk.flush()
    generators: list[Iterator[object]] = [desk.extents(), desk.delta(), store.diff("desk", "child")]
    for generator in generators:
        next(generator)

    def child() -> None:
        for generator in generators:
            with pytest.raises(ClosedError):
                next(generator)

    in_child(child)
    assert [len(list(generator)) for generator in generators] == [4093, 2048, 63]


def test_the_end_of_a_child_takes_no_pin_from_the_parent(store, desk):
    """LMDB's reader table lies in shared memory: an abort of an inherited transaction would clear the parent's."""
    store.fork("desk", "child")
    desk.pwrite(b"x", 0)
    desk.flush()
    generators: list[Iterator[object]] = [desk.extents(), desk.delta(), store.diff("desk", "child")]
    for generator in generators:
        next(generator)
    before = pins(store)
    assert len(before) >= 3
    mine = list(generators)

    def child() -> None:
        generators.clear()
        mine.clear()
        gc.collect()

    in_child(child)
    assert pins(store) == before
    for generator in mine:
        list(generator)


def test_a_child_that_ends_leaves_the_leases_to_its_parent(store, desk):
    in_child(lambda: None)
    with pytest.raises(InUseError) as refused:
        store.device("desk")
    assert refused.value.holder == os.getpid()


def test_a_child_that_lives_on_does_not_keep_what_the_parent_gives_up(store, desk):
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    try:
        desk.close()
        store.device("desk").close()
        store.delete("desk")
        assert store.collect().waiting == 0
    finally:
        os.close(theirs)
        os.waitpid(child, 0)


def test_a_child_may_open_the_store_anew(store, desk):
    desk.flush()

    def child() -> None:
        with cowstore.open(store.path) as again:
            with pytest.raises(InUseError) as refused:
                again.device("desk")
            assert refused.value.holder == os.getppid()
            with again.device("desk", readonly=True) as moment:
                assert moment.pread(9, BLOCK) == b"unflushed"
            with again.clone("desk", "theirs") as clone:
                clone.pwrite(b"mine", 0)
            again.collect()

    in_child(child)
    with store.device("theirs") as clone:
        assert clone.pread(4, 0) == b"mine"
    desk.pwrite(b"still here", 0)
    desk.flush()
    assert desk.pread(10, 0) == b"still here"


def test_a_fork_in_the_middle_of_an_import_harms_neither(store, tmp_path):
    content = os.urandom(24 << 20)
    (tmp_path / "disk").write_bytes(content)
    forked: list[int] = []

    def progress(_step: str, _done: int, _total: int) -> None:
        if not forked:
            forked.append(1)

            def child() -> None:
                with pytest.raises(ClosedError):
                    store.devices()

            in_child(child)

    store.import_image(tmp_path / "disk", "disk", progress=progress)
    with store.device("disk") as disk:
        assert disk.pread(len(content), 0) == content
