"""Blocks of devices that can be told apart, where they are stored, and how one of them is damaged."""

from __future__ import annotations

import os
import random
from pathlib import Path

import cowstore
from cowstore.layout import SLOT_BITS, SLOT_MASK, SLOTS_OFFSET

BLOCK = 4096


def blocks(seed: object, count: int = 1) -> bytes:
    return random.Random(repr(seed)).randbytes(count * BLOCK)


def ids_of(store: cowstore.Store, name: str) -> list[int]:
    """The ids of a device's blocks, in order."""
    with store.device(name, readonly=True) as device:
        return device._tree.ids(0, -(-device.size // BLOCK)).tolist()


def damage(store: cowstore.Store, block_id: int) -> None:
    """Flips a bit of a block on the disk."""
    with (store.path / "segments" / f"{block_id >> SLOT_BITS:08d}.seg").open("r+b") as file:
        file.seek(SLOTS_OFFSET + (block_id & SLOT_MASK) * BLOCK + 100)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def left_in(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name != "lost+found")
