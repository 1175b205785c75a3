"""What an import costs a block when the index is large, against a small one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

import cowstore
from cowstore.files import Disk
from cowstore.founding import read_identity
from cowstore.index import Index
from tests.bench import ground
from tests.bench.ground import BLOCK, MIB
from tests.bench.measure import Action, Bench, in_turn, timed

LIMIT = 2.0
_BATCH = 1 << 17


def run(bench: Bench) -> None:
    small, large = 100_000, bench.pick(8_000_000, 400_000)
    length = bench.pick(128, 16) * MIB
    stores = {name: filled(bench, name, entries) for name, entries in (("small", small), ("large", large))}
    source = bench.folder / "fresh"
    turns = iter(range(1000))

    def importing(store: cowstore.Store) -> Action:
        def once() -> float:
            turn = next(turns)
            ground.noise_file(source, length, turn)
            ground.settle()
            return timed(lambda: store.import_image(source, f"image-{turn}")) / (length // BLOCK)

        return once

    try:
        found = in_turn(bench.pick(5, 2), {name: importing(store) for name, store in stores.items()}, warm=1)
        entries = {name: store.stats().index_entries for name, store in stores.items()}
    finally:
        for store in stores.values():
            store.close()
    note = f"the index held {entries['large']:,} entries in the end, the other one {entries['small']:,}"
    figure = f"import of a new block, {large / 1e6:g} M in the index"
    bench.at_most(figure, found["large"], f"{small // 1000} k in the index", found["small"], LIMIT, note)


def filled(bench: Bench, name: str, entries: int) -> cowstore.Store:
    """A store whose index holds so many digests of blocks that are not there."""
    path: Path = bench.folder / name
    cowstore.open(path, create=True).close()
    bench.say(f"filling an index with {entries:,} digests")
    index = Index.open(path / "index", read_identity(path).seed, Disk())
    try:
        for first in range(1, entries + 1, _BATCH):
            count = min(_BATCH, entries + 1 - first)
            index.insert(os.urandom(16 * count), np.arange(first, first + count, dtype=np.uint64))
        assert len(index) > 0.999 * entries
    finally:
        index.close()
    return cowstore.open(path)
