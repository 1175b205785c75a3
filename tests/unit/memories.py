"""Memories for checkpoints, taken with disks, and what is there of them afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import cowstore
from cowstore import catalog
from cowstore.checkpoints import CheckpointInfo
from cowstore.layout import HIDDEN

PAGE = 4096
MIB = 1 << 20
SIZE = 32 * PAGE


def noise(seed: object, length: int) -> bytes:
    return random.Random(repr(seed)).randbytes(length)


class Memory:
    """A memory whose pages are handed over, by number."""

    name = "test"

    def __init__(self, pages: dict[int, bytes], size: int = SIZE) -> None:
        self.pages = pages
        self.size = size

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        for number in sorted(self.pages):
            yield number * PAGE, memoryview(self.pages[number])

    def close(self) -> None:
        pass

    def content(self, before: bytes = b"") -> bytes:
        """The whole of it, laid over an earlier one."""
        data = bytearray(before or bytes(self.size))
        for number, page in self.pages.items():
            data[number * PAGE : number * PAGE + len(page)] = page
        return bytes(data)


BOOT = Memory({0: noise("boot", PAGE), 5: noise("more", 3 * PAGE), 31: noise("last", PAGE)})


def make_disks(store: cowstore.Store) -> dict[str, bytes]:
    """Two clones, `root` durable and `data` ephemeral, both with content of their own; their content by name."""
    wanted = {}
    for name, ephemeral in (("root", False), ("data", True)):
        with store.create("made", 2 * MIB + 512) as clone:
            clone.pwrite(noise(name, 20 * PAGE), MIB)
            clone.seal(f"{name}-image")
        store.delete("made")
        with store.clone(f"{name}-image", name, ephemeral=ephemeral) as clone:
            clone.pwrite(noise((name, "own"), 2 * PAGE), 512)
            clone.flush()
            wanted[name] = clone.pread(clone.size, 0)
    return wanted


def take(
    store: cowstore.Store, name: str, memory: Memory = BOOT, disks: tuple[str, ...] = (), since: str | None = None
) -> CheckpointInfo:
    with store.checkpoints.begin(disks) as pending:
        earlier = None if since is None else store.checkpoints.info(since).number
        pending.take_memory(memory, since=earlier)
        pending.take_state(b"state of " + name.encode())
        pending.settle_disks()
        return pending.publish(name, {"cpus": 2, "of": name})


def memory_of(store: cowstore.Store, name: str) -> bytes:
    with store.checkpoints.memory(name) as device:
        return device.pread(device.size, 0)


def stored(store: cowstore.Store, name: str) -> bytes:
    with store.device(name, readonly=True) as device:
        return device.pread(device.size, 0)


def hidden(store: cowstore.Store) -> int:
    with store._environment.read() as snapshot:
        return sum(bool(record.flags & HIDDEN) for record in catalog.devices(snapshot))


def steady(store: cowstore.Store) -> tuple[Any, ...]:
    """What is there, by name, hidden, and in blocks that are used, after a collection."""
    store.collect()
    shown = [info.name for info in store.devices()]
    return shown, store.checkpoints.all(), hidden(store), store.stats().used
