"""Collecting a store of a million blocks, half of them dead, and what others wait for meanwhile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cowstore
from tests.bench import ground
from tests.bench.ground import BLOCK, MIB
from tests.bench.measure import Bench, Sample, clock
from tests.bench.reads import writable

SECONDS, WAIT = 5.0, 0.100
IMAGES = 8

# Another process: renames a clone to and fro and remembers the longest time that one rename took.
_OTHER = """
import sys, threading, time
import cowstore

ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
with cowstore.open(sys.argv[1]) as store:
    names, waits = ["probe-0", "probe-1"], []
    store.rename(*names)
    names.reverse()
    print("ready", flush=True)
    while not ended.is_set():
        begun = time.perf_counter()
        store.rename(*names)
        waits.append(time.perf_counter() - begun)
        names.reverse()
        time.sleep(0.001)
    if names[0] != "probe-0":
        store.rename(*names)
waits.sort()
print(waits[-1], waits[len(waits) // 2], len(waits))
"""


class Probe:
    """The other process.

    Attributes:
        longest: Seconds that its longest transaction took.
        usual: The median.
        count: How many there were.
    """

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OTHER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def end(self) -> Probe:
        said, _ = self._process.communicate("")
        longest, usual, count = said.split()
        self.longest, self.usual, self.count = float(longest), float(usual), int(count)
        return self


def run(bench: Bench) -> None:
    blocks = bench.pick(1 << 20, 1 << 16)
    shape(bench, "whole images deleted", blocks, Images, bench.pick(3, 2))
    shape(bench, "every other block trimmed", blocks, Stripes, 2)


def shape(
    bench: Bench, name: str, blocks: int, kind: Callable[[cowstore.Store, int], Images | Stripes], turns: int
) -> None:
    """Makes a store of so many blocks, kills half, collects, fills it up, kills the other half, and so on."""
    seconds, waits, notes = [], [], []
    path = bench.folder / "store"
    with cowstore.open(path, create=True) as store:
        store.create("probe-0", MIB).close()
        content = kind(store, blocks)
        for turn in range(turns):
            bench.say(f"{name}: filling")
            content.fill()
            content.kill()
            ground.settle()
            probe = Probe(path)
            with clock() as watch:
                collection = store.collect()
            seconds.append(watch.seconds)
            probe.end()
            waits.append(probe.longest)
            assert collection.freed >= blocks // 2, f"in turn {turn}: {collection}"
            notes.append(f"{probe.longest * 1000:.0f} of {probe.count} (median {probe.usual * 1000:.1f})")
    ground.fresh(path)
    bench.within(f"collect {blocks:,} blocks, half dead: {name}", Sample(tuple(seconds)), SECONDS)
    longest = "longest waits in ms, of how many transactions: " + ", ".join(notes)
    bench.within("another process's longest transaction meanwhile", Sample((max(waits),)), WAIT, "s", longest)


class Images:
    """Eight images; half of them are deleted."""

    def __init__(self, store: cowstore.Store, blocks: int) -> None:
        self._store, self._blocks = store, blocks
        self._living: list[str] = []
        self._made = 0

    def fill(self) -> None:
        while len(self._living) < IMAGES:
            self._made += 1
            self._living.append(f"image-{self._made}")
            source = ground.noise(self._blocks // IMAGES * BLOCK, self._made)
            self._store.import_image(source, self._living[-1])

    def kill(self) -> None:
        self._store.delete(*self._living[: IMAGES // 2])
        del self._living[: IMAGES // 2]


class Stripes:
    """A clone in which every other block is trimmed: the worst fragmentation there is."""

    def __init__(self, store: cowstore.Store, blocks: int) -> None:
        self._store, self._blocks = store, blocks
        self._turn = 0
        store.create("striped", blocks * BLOCK).close()

    def fill(self) -> None:
        """The first time all of it, later the blocks that were trimmed."""
        self._turn += 1
        source = ground.noise(self._blocks * BLOCK, 1000 + self._turn)
        with writable(self._store, "striped") as clone:
            if self._turn == 1:
                offset = 0
                while piece := source.read(4 * MIB):
                    offset += clone.pwrite(piece, offset)
            else:
                for block in range(self._turn % 2, self._blocks, 2):
                    clone.pwrite(source.read(BLOCK), block * BLOCK)

    def kill(self) -> None:
        with writable(self._store, "striped") as clone:
            for block in range((self._turn + 1) % 2, self._blocks, 2):
                clone.trim(BLOCK, block * BLOCK)
