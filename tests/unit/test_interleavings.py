"""Every call, interrupted before each of its transactions by somebody who flushes, deletes and collects.

What a call has found in one transaction may be gone in the next one. So each is done as often as it has
transactions, and before another of them each time a disturbance runs from beginning to end. The call must then
have seen the moment before it or the one after it, and what it leaves must outlast another collection.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import cowstore
import cowstore.collector
from cowstore.environment import Environment

BLOCK, LEAF = 4096, 2 << 20
SIZE = LEAF + 3 * BLOCK


def content(letter: str) -> bytes:
    """All blocks of it differ, and those of one letter from those of another."""
    return b"".join(b"%b%04d" % (letter.encode(), number) * (BLOCK // 5 + 1) for number in range(4))[: 3 * BLOCK]


def whole(*letters: str) -> set[bytes]:
    return {(content(letter) + bytes(LEAF - 3 * BLOCK) + content(letter))[:SIZE] for letter in letters}


class World:
    """An image and clones of it: two that others have open, one of ours; and an image that will be deleted."""

    def __init__(self, path: Path) -> None:
        self.store, self.theirs, self.reader = (cowstore.open(path, create=True) for _ in range(3))
        self.store.import_image(io.BytesIO(whole("a").pop()), "image")
        self.disk = self.theirs.clone("image", "disk")
        self.brief = self.theirs.clone("image", "brief", ephemeral=True)
        self.other = self.store.clone("image", "other")
        self.write("b")
        self.store.import_image(io.BytesIO(whole("x").pop()), "garbage")

    def write(self, letter: str) -> None:
        for clone in (self.disk, self.brief):
            clone.pwrite(whole(letter).pop(), 0)
            clone.flush()

    def disturb(self) -> None:
        self.write("c")
        self.theirs.delete("garbage")
        self.collect()
        self.write("d")
        self.collect()

    def collect(self) -> None:
        with suppress(cowstore.InUseError):  # the call is a collection itself: one at a time
            self.theirs.collect()

    def held(self, name: str) -> bytes:
        with self.reader.device(name, readonly=True) as device:
            return device.pread(device.size, 0)

    def close(self) -> None:
        for store in (self.store, self.theirs, self.reader):
            store.close()


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
    with cowstore.open(directory / "backup") as copy:
        for name, letters in {"disk": "bd", "image": "a"}.items():
            with copy.device(name, readonly=True) as device:
                assert device.pread(SIZE, 0) in whole(*letters)


def fork(world: World, _: Path) -> None:
    world.store.fork("disk", "new")
    assert world.held("new") in whole("b", "d")


def seal(world: World, _: Path) -> None:
    world.store.seal("disk", "new")
    assert world.held("new") in whole("b", "d")


def seal_ephemeral(world: World, _: Path) -> None:
    world.store.seal("brief", "new")
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
    world.other.pwrite(whole("x").pop(), 0)
    assert [number for number, _ in world.other.delta()] == [0, 1, 2, 512, 513, 514]
    world.other.discard()


def measure(world: World, _: Path) -> None:
    assert world.store.usage("disk").own == 6 * BLOCK
    assert world.store.exclusive("disk") in (3 * BLOCK, 9 * BLOCK)  # the other clone may share its blocks
    world.store.stats()


def collect(world: World, _: Path) -> None:
    world.store.collect()
    assert world.held("disk") in whole("b", "d")


CALLS: list[Call] = [
    use_moment, use_image, use_clone, export, back_up, fork, seal, seal_ephemeral, share_garbage,
    import_garbage, fork_garbage, reset, diff, delta, measure, collect,
]  # fmt: skip


@contextmanager
def disturbed(action: Callable[[], None], turn: int) -> Iterator[list[int]]:
    """Runs an action before the transaction of that number; gives the count of the transactions so far."""
    count = [0]
    quiet: list[bool] = []
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
        world = World(path)
        try:
            with disturbed(world.disturb, turn) as count:
                call(world, path.parent)
            check(world, "d" if turn <= count[0] else "b")
        finally:
            world.close()
        for left in path.parent.iterdir():
            (shutil.rmtree if left.is_dir() else Path.unlink)(left)


def check(world: World, letter: str) -> None:
    """Everything is there, also after collections which nothing holds up any more."""
    for _ in range(2):
        assert world.store.collect().waiting == 0
        assert world.disk.pread(SIZE, 0) in whole(letter)
        assert world.held("image") in whole("a")
        for info in world.store.devices():
            assert len(world.held(info.name)) >= SIZE
