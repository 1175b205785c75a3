"""Views: a device's bytes where they lie; what pread() says, and unchanged while the device is held steady."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest

import cowstore
from cowstore import BlockCorruptError, RangeError
from cowstore.layout import SLOT_BITS, SLOT_MASK, SLOTS_OFFSET

BLOCK, LEAF = 4096, 2 << 20
SIZE = 3 * LEAF + 5 * BLOCK + 123


def joined(pieces: list[bytes | memoryview | int]) -> bytes:
    return b"".join(bytes(piece) for piece in pieces)  # bytes(n) are n zeros


def seen(device: cowstore.Device, length: int, offset: int) -> bytes:
    with device.steady():
        return joined(device.views(length, offset))


def ranges(chance: random.Random, count: int) -> list[tuple[int, int]]:
    """Lengths and offsets: in a block, across blocks and leaves, at both ends."""
    found = [(0, 0), (0, SIZE), (1, 0), (1, SIZE - 1), (SIZE, 0), (BLOCK, 0), (LEAF, LEAF // 2), (BLOCK, 7)]
    for _ in range(count):
        offset = chance.randrange(SIZE)
        found.append((chance.choice((1, 100, BLOCK, 3 * BLOCK, LEAF)), offset))
    return [(min(length, SIZE - offset), offset) for length, offset in found]


def change(device: cowstore.Clone, chance: random.Random) -> None:
    offset = chance.randrange(SIZE - 3 * BLOCK)
    what = chance.randrange(6)
    if what == 0:
        device.zero(chance.randrange(3 * BLOCK), offset)
    elif what == 1:
        device.flush()
    else:
        device.pwrite(chance.randbytes(chance.choice((10, BLOCK, 2 * BLOCK + 5))), offset // what * what)


@pytest.mark.parametrize("seed", range(4))
def test_views_are_what_pread_says(store, seed):
    chance = random.Random(seed)
    store.import_image(io.BytesIO(chance.randbytes(LEAF + 77) + bytes(SIZE - LEAF - 77)), "image")
    with store.clone("image", "clone") as clone:
        for _ in range(15):
            for _ in range(4):
                change(clone, chance)
            for length, offset in ranges(chance, 10):
                assert seen(clone, length, offset) == clone.pread(length, offset), (length, offset)
        for length, offset in ranges(chance, 10):
            pieces = clone.views(length, offset)
            assert sum(piece if isinstance(piece, int) else len(piece) for piece in pieces) == length
            assert all(piece > 0 if isinstance(piece, int) else len(piece) for piece in pieces)


def test_images_and_moments_have_views(store):
    content = random.Random(1).randbytes(SIZE)
    store.import_image(io.BytesIO(content), "image")
    store.clone("image", "clone").close()
    for name in ("image", "clone"):
        with store.device(name, readonly=True) as device:
            assert seen(device, SIZE, 0) == content
            assert seen(device, BLOCK, BLOCK) == content[BLOCK : 2 * BLOCK]


def test_holes_are_numbers(store):
    with store.create("clone", SIZE) as clone:
        clone.pwrite(b"x" * BLOCK, LEAF)
        assert clone.views(SIZE, 0) == [LEAF, b"x" * BLOCK, SIZE - LEAF - BLOCK]
        clone.flush()
        assert clone.views(LEAF + 5, 3)[0] == LEAF - 3


def test_what_was_read_before_is_not_copied(store):
    store.import_image(io.BytesIO(random.Random(1).randbytes(SIZE)), "image")
    with store.device("image") as image:
        image.pread(SIZE, 0)
        first, again = image.views(LEAF, 0), image.views(LEAF, 0)
        assert all(isinstance(piece, memoryview) and piece.readonly for piece in first)
        assert [piece.obj for piece in first] == [piece.obj for piece in again], "the mapping itself"


def test_ranges_outside_are_refused(store):
    with store.create("clone", SIZE) as clone:
        for length, offset in ((1, SIZE), (2, SIZE - 1), (1, -1), (-1, 0), (BLOCK, SIZE - 5)):
            with pytest.raises(RangeError):
                clone.views(length, offset)


def test_closed_devices_have_none(store):
    clone = store.create("clone", SIZE)
    clone.pwrite(b"x" * BLOCK, 0)
    clone.close()
    with pytest.raises(cowstore.ClosedError):
        clone.views(BLOCK, LEAF)


def test_damage_is_found_and_named(store, path):
    store.import_image(io.BytesIO(random.Random(1).randbytes(SIZE)), "image")
    with store.device("image") as image:
        block_id = int(image._tree.ids(9, 1)[0])
        with open(path / "segments" / f"{block_id >> SLOT_BITS:08d}.seg", "r+b") as file:
            file.seek(SLOTS_OFFSET + (block_id & SLOT_MASK) * BLOCK)
            file.write(b"damage")
        for length, offset in ((BLOCK, 9 * BLOCK), (LEAF, 0)):
            with pytest.raises(BlockCorruptError) as found:
                image.views(length, offset)
            assert (found.value.name, found.value.offset) == ("image", 9 * BLOCK)


class Churn:
    """A device whose blocks are written over and over, flushed, and collected, by two threads."""

    def __init__(self, store: cowstore.Store) -> None:
        self.device = store.create("clone", 64 * BLOCK)
        self.device.pwrite(b"\1" * 64 * BLOCK, 0)
        self.device.flush()
        self._store = store
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._again, args=(work,)) for work in (self._write, self._collect)
        ]
        self.failures: list[Exception] = []

    def _again(self, work: Callable[[int], None]) -> None:
        turn = 0
        try:
            while not self._ended.is_set():
                turn += 1
                work(turn)
        except Exception as error:  # noqa: BLE001 - told by the thread that waits
            self.failures.append(error)

    def _write(self, turn: int) -> None:
        """Other bytes in each block, so that nothing is shared and everything old is garbage."""
        for block in range(64):
            self.device.pwrite(turn.to_bytes(4, "little") + bytes((block + 1,)) * (BLOCK - 4), block * BLOCK)
        self.device.flush()

    def _collect(self, _: int) -> None:
        self._store.collect()

    def __enter__(self) -> cowstore.Clone:
        for thread in self._threads:
            thread.start()
        return self.device

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.device.close()


Holding = Callable[[cowstore.Clone], AbstractContextManager[object]]


def changes_seen(store: cowstore.Store, turns: int, holding: Holding) -> int:
    """How often views were not the same when they were looked at again a moment later; ends with the first."""
    churn = Churn(store)
    with churn as device:
        for _ in range(turns):
            with holding(device):
                device.pread(64 * BLOCK, 0)  # what was read before is seen where it lies
                pieces = device.views(64 * BLOCK, 0)
                before = joined(pieces)
                time.sleep(0.05)
                if joined(pieces) != before:
                    return 1
            time.sleep(0.005)
    assert churn.failures == []
    return 0


def test_views_stay_as_they_are_while_the_device_is_held_steady(store):
    """Though a flush that had begun is published meanwhile, and a collector looks for what it can erase."""
    assert changes_seen(store, 50, lambda device: device.steady()) == 0


def test_without_it_they_change(store):
    """So the test above can fail."""
    assert changes_seen(store, 1000, lambda _: nullcontext()) == 1
