"""Every call, interrupted before each of its transactions by somebody who flushes, deletes and collects.

What a call has found in one transaction may be gone in the next one. So each is done as often as it has
transactions, and before another of them each time a disturbance runs from beginning to end. The call must then
have seen the moment before it or the one after it, and what it leaves must outlast another collection.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowstore
import cowstore.collector
from cowstore.environment import Environment
from cowstore.store import Store

BLOCK, LEAF = 4096, 2 << 20
SIZE = LEAF + 3 * BLOCK


def content(letter: str) -> bytes:
    """All blocks of it differ, and those of one letter from those of another."""
    return b"".join(b"%b%04d" % (letter.encode(), number) * (BLOCK // 5 + 1) for number in range(4))[: 3 * BLOCK]


def whole(*letters: str) -> set[bytes]:
    return {(content(letter) + bytes(LEAF - 3 * BLOCK) + content(letter))[:SIZE] for letter in letters}


class World:
    """An image, a clone and an ephemeral clone of it, which are open, and content that only a device to be deleted has."""

    def __init__(self, store: Store) -> None:
        self.store = store
        store.import_image(io.BytesIO(whole("a").pop()), "image")
        self.disk, self.brief = store.clone("image", "disk"), store.clone("image", "brief", ephemeral=True)
        self.other = store.clone("image", "other")
        self.write("b")
        store.import_image(io.BytesIO(whole("x").pop()), "garbage")

    def write(self, letter: str) -> None:
        for clone in (self.disk, self.brief):
            clone.pwrite(whole(letter).pop(), 0)
            clone.flush()

    def disturb(self) -> None:
        self.write("c")
        self.store.delete("garbage")
        self.store.collect()
        self.write("d")
        self.store.collect()

    def held(self, name: str, *, path: Path | None = None) -> bytes:
        with cowstore.open(path or self.store.path) as store, store.device(name, readonly=True) as device:
            return device.pread(device.size, 0)


Call = Callable[[World, Path], None]


def use_moment(world: World, _: Path) -> None:
    with world.store.device("disk", readonly=True) as device:
        assert device.pread(SIZE, 0) in whole("b", "d")
        world.store.collect()
        assert device.pread(SIZE, 0) in whole("b", "d")
        assert [one.length for one in device.extents() if one.data] == [3 * BLOCK, 3 * BLOCK]


def use_image(world: World, _: Path) -> None:
    with world.store.device("image") as device:
        assert device.pread(SIZE, 0) in whole("a")


def use_clone(world: World, _: Path) -> None:
    with world.store.clone("disk", "new", size=2 * SIZE) as clone:
        assert clone.pread(SIZE, 0) in whole("b", "d")
        clone.pwrite(b"new", 0)


def export(world: World, directory: Path) -> None:
    world.store.export("disk", directory / "out")
    assert (directory / "out").read_bytes() in whole("b", "d")


def back_up(world: World, directory: Path) -> None:
    world.store.backup(directory / "backup")
    assert world.held("disk", path=directory / "backup") in whole("b", "d")
    assert world.held("image", path=directory / "backup") in whole("a")


def fork(world: World, _: Path) -> None:
    world.store.fork("disk", "new")
    assert world.held("new") in whole("b", "d")


def seal(world: World, _: Path) -> None:
    world.store.seal("disk", "new")
    assert world.held("new") in whole("b", "d")


def seal_ephemeral(world: World, _: Path) -> None:
    world.store.seal("brief", "new")
    assert world.held("new") in whole("b", "d")


def seal_open_ephemeral(world: World, _: Path) -> None:
    world.brief.seal("new")
    assert world.held("new") in whole("b", "d")


def share_garbage(world: World, _: Path) -> None:
    """Writes what a deleted image has, so that its blocks are found and may be doomed before the flush."""
    world.other.pwrite(whole("x").pop(), 0)
    list(world.other.extents())
    assert world.other.pread(SIZE, 0) in whole("x")
    world.other.flush()
    assert world.other.pread(SIZE, 0) in whole("x")
    assert world.held("other") in whole("x")


def import_garbage(world: World, _: Path) -> None:
    world.store.import_image(io.BytesIO(whole("x").pop()), "new")
    assert world.held("new") in whole("x")


def fork_garbage(world: World, _: Path) -> None:
    world.other.pwrite(whole("x").pop(), 0)
    world.other.fork("new")
    assert world.held("new") in whole("x")


def reset(world: World, _: Path) -> None:
    world.other.pwrite(whole("x").pop(), 0)
    world.other.flush()
    world.other.reset()
    assert world.other.pread(SIZE, 0) in whole("a")
    assert world.held("other") in whole("a")


def diff(world: World, _: Path) -> None:
    changes = [(change.offset, change.length) for change in world.store.diff("image", "disk")]
    assert changes == [(0, 3 * BLOCK), (LEAF, 3 * BLOCK)]


def delta(world: World, _: Path) -> None:
    assert [number for number, _ in world.disk.delta()] == [0, 1, 2, 512, 513, 514]


def measure(world: World, _: Path) -> None:
    assert world.store.usage("disk").own == 6 * BLOCK
    assert world.store.exclusive("disk") in (6 * BLOCK, 9 * BLOCK)
    world.store.stats()


def collect(world: World, _: Path) -> None:
    world.store.collect()
    assert world.held("disk") in whole("b", "d")


CALLS: list[Call] = [
    use_moment, use_image, use_clone, export, back_up, fork, seal, seal_ephemeral, seal_open_ephemeral, share_garbage,
    import_garbage, fork_garbage, reset, diff, delta, measure, collect,
]  # fmt: skip


@contextmanager
def disturbed(action: Callable[[], None], turn: int) -> Iterator[list[int]]:
    """Runs an action before the transaction of that number; gives the count of the transactions so far."""
    count = [0]
    quiet = []
    originals = Environment.read, Environment.write

    def step() -> None:
        if not quiet:
            count[0] += 1
            if count[0] == turn:
                quiet.append(True)
                action()
                quiet.clear()

    def read(environment):
        step()
        return originals[0](environment)

    @contextmanager
    def write(environment, **options):
        step()
        with originals[1](environment, **options) as writer:
            yield writer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Environment, "read", read)
        patch.setattr(Environment, "write", write)
        yield count


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_what_a_call_has_found_may_be_gone(path, monkeypatch, call):
    monkeypatch.setattr(cowstore.collector, "_PATIENCE", 0)
    turn, count = 0, [1]
    while turn < count[0]:
        turn += 1
        with cowstore.open(path, create=True) as store:
            world = World(store)
            with disturbed(world.disturb, turn) as count:
                try:
                    call(world, path.parent)
                except cowstore.InUseError as refused:
                    assert call is collect  # one run at a time
                    assert refused.what == "the collector"
            for _ in range(2):
                assert store.collect(dry_run=turn > count[0]).waiting == 0
                assert world.disk.pread(SIZE, 0) in (whole("d") if turn <= count[0] else whole("b"))
                assert world.held("image") in whole("a")
                for name in [info.name for info in store.devices()]:
                    assert len(world.held(name)) >= SIZE
        for left in path.parent.iterdir():
            (shutil.rmtree if left.is_dir() else Path.unlink)(left)
    assert turn > 1 or call is fork
