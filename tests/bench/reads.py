"""Reading one block at random: from a warm clone against the same bytes in a raw file, whatever the lineage."""

from __future__ import annotations

import os
import random
import time
from functools import partial

import cowstore
from tests.bench import ground
from tests.bench.ground import BLOCK, MIB
from tests.bench.measure import Bench, in_turn

LIMIT, FORKS_LIMIT = 1.25, 1.05
WRITES = 8  # blocks between two forks
GENERATIONS = (1, 10, 100, 1000)


def run(bench: Bench) -> None:
    length = bench.pick(256, 32) * MIB
    raw = bench.folder / "raw"
    ground.noise_file(raw, length, 1)
    with cowstore.open(bench.folder / "store", create=True) as store:
        store.import_image(raw, "image")
        bench.say("forking a thousand times, with writes between")
        clones = lineage(store, length // BLOCK, bench.pick(1000, 100))
        offsets = [block * BLOCK for block in random.Random(2).choices(range(length // BLOCK), k=2_000)]
        fd = os.open(raw, os.O_RDONLY)
        try:
            actions = {"raw": partial(read_raw, fd, offsets)}
            for name, clone in clones.items():
                actions[name] = partial(read_clone, clone, offsets)
            found = in_turn(bench.pick(401, 21), actions, warm=3)
        finally:
            os.close(fd)
    bench.at_most("pread of a block, warm clone", found["clone"], "os.pread", found["raw"], LIMIT)
    bench.at_most("the same, another clone of the image", found["again"], "the first", found["clone"], None)
    for forks in GENERATIONS:
        if (name := f"fork {forks}") in found:
            figure = f"after {forks} forks with writes"
            bench.at_most(figure, found[name], "the first", found["clone"], FORKS_LIMIT)


def lineage(store: cowstore.Store, blocks: int, forks: int) -> dict[str, cowstore.Clone]:
    """A clone of the image and some of its descendants, open and warm; each generation has writes of its own."""
    found = {"clone": store.clone("image", "clone"), "again": store.clone("image", "again")}
    chooser, current = random.Random(3), store.clone("image", "fork-0")
    for generation in range(1, forks + 1):
        for block in chooser.sample(range(blocks), WRITES):
            current.pwrite(chooser.randbytes(BLOCK), block * BLOCK)
        current.fork(f"fork-{generation}")
        if generation - 1 not in GENERATIONS:
            current.close()
        current = writable(store, f"fork-{generation}")
        if generation in GENERATIONS:
            found[f"fork {generation}"] = current
    for clone in found.values():
        for block in range(blocks):
            clone.pread(BLOCK, block * BLOCK)
    return found


def writable(store: cowstore.Store, name: str) -> cowstore.Clone:
    clone = store.device(name)
    assert isinstance(clone, cowstore.Clone)
    return clone


def read_clone(clone: cowstore.Clone, offsets: list[int]) -> float:
    pread = clone.pread
    begun = time.perf_counter()
    for offset in offsets:
        pread(4096, offset)
    return (time.perf_counter() - begun) / len(offsets)


def read_raw(fd: int, offsets: list[int]) -> float:
    pread = os.pread
    begun = time.perf_counter()
    for offset in offsets:
        pread(fd, 4096, offset)
    return (time.perf_counter() - begun) / len(offsets)
