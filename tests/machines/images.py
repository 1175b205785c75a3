"""Memory images to be mapped, and what is seen of them in a store."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cowstore
from cowstore import catalog
from cowstore.layout import HIDDEN
from cowstore.machines import memory

PAGE = 4096
MIB = 1 << 20
SIZE = 64 * PAGE


@contextmanager
def place() -> Iterator[Path]:
    """Where a test's store is, in memory where there is a place for files in memory."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="cowstore-", dir=shared) as folder:
        yield Path(folder, "store")


def content(seed: object = "boot", size: int = SIZE) -> bytes:
    """Noise, with a hole in its second quarter."""
    data = bytearray(random.Random(repr(seed)).randbytes(size))
    data[size // 4 : size // 2] = bytes(size // 4)
    return bytes(data)


def imported(store: cowstore.Store, name: str = "boot", size: int = SIZE) -> bytes:
    data = content(name, size)
    with store.create("filled", size) as clone:
        clone.pwrite(data, 0)
        clone.seal(name)
    store.delete("filled")
    return data


def stored(store: cowstore.Store, name: str) -> bytes:
    with store.device(name, readonly=True) as device:
        return device.pread(device.size, 0)


def seen(ram: memory.Ram) -> bytes:
    """All of a mapping; views themselves are compared a byte at a time."""
    return bytes(ram.view)


def names(store: cowstore.Store) -> list[str]:
    return [info.name for info in store.devices()]


def hidden(store: cowstore.Store) -> int:
    """Devices that go by no name and are not kept as ancestors."""
    with store._environment.read() as snapshot:
        return sum(bool(record.flags & HIDDEN) for record in catalog.devices(snapshot))
