"""What depends on no size: clones by the thousand, the fork of a large clone, the trim of a huge one."""

from __future__ import annotations

import itertools
import random
from functools import partial

import cowstore
from tests.bench import ground
from tests.bench.ground import BLOCK, GIB, MIB, TIB
from tests.bench.measure import Bench, Sample, clock, in_turn, timed
from tests.bench.reads import writable

COUNT = 1000


def run(bench: Bench) -> None:
    with cowstore.open(bench.folder / "store", create=True) as store:
        store.import_image(ground.noise(16 * MIB, 1), "image")
        many(bench, store)
        fork(bench, store)
        trim(bench, store)


def many(bench: Bench, store: cowstore.Store) -> None:
    grown, number = [], itertools.count()

    def clone() -> float:
        names = [f"desk-{next(number)}" for _ in range(COUNT)]
        before = ground.disk_bytes(store.path)
        seconds = timed(lambda: store.clone_many("image", names))
        grown.append((ground.disk_bytes(store.path) - before) / COUNT)
        return seconds

    found = in_turn(bench.pick(9, 3), {"many": clone})
    bench.within(f"clone_many of {COUNT:,}", found["many"], 0.100)
    bench.within("the store's growth, each", Sample(tuple(grown)), 1024, "B")


def fork(bench: Bench, store: cowstore.Store) -> None:
    size, number = bench.pick(1024, 64) * MIB, itertools.count()
    with store.create("large", 2 * size) as clone:
        stream, offset = ground.noise(size, 5), 0
        while piece := stream.read(4 * MIB):
            offset += clone.pwrite(piece, offset)
        clone.flush()
        found = in_turn(
            bench.pick(15, 3),
            {
                "fork": lambda: timed(lambda: clone.fork(f"fork-{next(number)}")),
                "by name": lambda: timed(lambda: store.fork("large", f"fork-{next(number)}")),
            },
        )
    bench.within("fork of a flushed clone with 1 GiB", found["fork"], 0.020)
    bench.within("the same by name", found["by name"], 0.020)


def trim(bench: Bench, store: cowstore.Store) -> None:
    """A disk of 1 TiB with data all over it and 64 MiB in one piece."""
    places = random.Random(7).sample(range(TIB // BLOCK), bench.pick(4000, 200))
    with store.create("huge", TIB) as clone:
        clone.pwrite(ground.noise(16 * MIB, 8).read(16 * MIB), 512 * GIB)
        for place in places:
            clone.pwrite(place.to_bytes(8, "big") * 512, place * BLOCK)
        clone.fork(*(f"huge-{number}" for number in range(10)))
    bare, flushed = [], []
    for number in range(bench.pick(9, 3)):
        with writable(store, f"huge-{number}") as clone:
            with clock() as both:
                bare.append(timed(partial(clone.trim, TIB, 0)))
                clone.flush()
            flushed.append(both.seconds)
            assert not any(extent.data for extent in clone.extents())
    bench.within("trim of a whole 1 TiB clone, with its flush", Sample(tuple(flushed)), 0.050)
    bench.fact("the trim alone", Sample(tuple(bare)))
