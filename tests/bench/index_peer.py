"""The digest index against LMDB in its place: lookups, inserts, space, at 100 thousand and 8 million entries.

Both are given what the store has, a list of 16-byte digests, and use it as suits them: LMDB sorted, for one
getmulti or putmulti, ours joined. LMDB's values are made beforehand, and what it finds is not put back into the
order of the question. It is measured with its default, a sync at each commit, and without; ours is never synced,
since it is a hint. Also runs alone: `python -m tests.bench.index_peer [--quick]`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from cowstore.files import Disk
from cowstore.index import Index
from tests.bench import ground
from tests.bench.measure import Bench, Sample, in_turn, report, timed

SMALL, LARGE = 100_000, 8_000_000
LOOKUP, INSERT = 0.25e-6, 0.5e-6  # seconds a digest
FLUSH = 60e-6  # seconds for one digest, looked up and inserted
MILLION = 1_000_000
HALF = 0.5  # of LMDB's time at most; for less another format would not be worth it

Digests = list[bytes]


class Ours:
    """The index as the store uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = Index.open(folder, 1, Disk())

    def lookup(self, digests: Digests) -> int:
        return int(np.count_nonzero(self.index.lookup(b"".join(digests))))

    def insert(self, digests: Digests, first: int) -> int:
        return self.index.insert(b"".join(digests), np.arange(first, first + len(digests), dtype=np.uint64))

    def close(self) -> None:
        self.index.close()


class Theirs:
    """LMDB, one row a digest, in sorted batches."""

    def __init__(self, folder: Path, *, sync: bool) -> None:
        self.folder = folder
        self.env: Any = lmdb.open(str(folder), map_size=1 << 40, mode=0o700, lib_version=0, sync=sync)
        self.value = [number.to_bytes(8, "little") for number in range(1 << 16)]

    def lookup(self, digests: Digests) -> int:
        with self.env.begin() as txn, txn.cursor() as cursor:
            return len(cursor.getmulti(sorted(digests)))

    def insert(self, digests: Digests, first: int) -> int:
        values = self.value * -(-len(digests) // len(self.value))
        with self.env.begin(write=True) as txn, txn.cursor() as cursor:
            return int(cursor.putmulti(zip(sorted(digests), values, strict=False), overwrite=False)[1])

    def close(self) -> None:
        self.env.close()


Side = Ours | Theirs


class Source:
    """Digests that are all different, and numbers for their blocks."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.made = 0

    def fresh(self, count: int) -> tuple[Digests, int]:
        self.made += count
        return split(self.random.bytes(16 * count)), 1 + self.made - count


def split(raw: bytes) -> Digests:
    return [raw[at : at + 16] for at in range(0, len(raw), 16)]


def run(bench: Bench) -> None:
    for entries, name in ((bench.pick(SMALL, 20_000), "100 k"), (bench.pick(LARGE, 400_000), "8 M")):
        Duel(bench, name, entries).fight()


class Duel:
    """Both, filled with so many entries of the same digests."""

    def __init__(self, bench: Bench, name: str, entries: int) -> None:
        self.bench = bench
        self.name = name
        self.entries = entries
        self.source = Source(entries)
        self.known = b""  # some of their digests, in one piece: millions of objects would slow the collector
        self.ours = Ours(bench.folder / f"ours {name}")
        self.theirs = Theirs(bench.folder / f"LMDB {name}", sync=False)

    def fight(self) -> None:
        self.fill()
        for size in (1024, 16_384):
            self.compare(f"lookup of {size:,} that are there", partial(self.lookup, size, True), "LMDB", LOOKUP)
            self.compare(f"lookup of {size:,} that are new", partial(self.lookup, size, False), "LMDB", LOOKUP)
        self.inserts("LMDB, no sync")
        self.theirs.close()
        self.theirs = Theirs(self.theirs.folder, sync=True)
        self.inserts("LMDB")
        self.compare("one digest, looked up and inserted", self.one, "LMDB", FLUSH)
        self.written_back()
        self.ours.close()
        self.theirs.close()

    def compare(
        self, figure: str, action: Callable[[Side], float], peer: str, limit: float = 0, count: int = 21
    ) -> None:
        """A ratio; at 8 million entries a plain limit, too."""
        sides = {"ours": partial(action, self.ours), "LMDB": partial(action, self.theirs)}
        capacity = self.ours.index.capacity
        found = in_turn(self.bench.pick(count, 1), sides, warm=2 if count > 1 else 0)
        note = "" if capacity == self.ours.index.capacity else "the table has grown meanwhile, all of it copied"
        self.bench.at_most(f"{self.name}: {figure}", found["ours"], peer, found["LMDB"], HALF, note)
        if limit and self.entries >= LARGE:
            self.bench.within(f"{self.name}: {figure}, by itself", found["ours"], limit)

    def fill(self) -> None:
        """Ours in batches of 64 thousand, growing from its smallest size; LMDB in as large ones as there are."""
        self.bench.say(f"filling both with {self.entries:,} entries")
        seconds = {"ours": 0.0, "LMDB": 0.0}
        for begin in range(0, self.entries, MILLION):
            batch, first = self.source.fresh(min(MILLION, self.entries - begin))
            for at in range(0, len(batch), 1 << 16):
                part = batch[at : at + (1 << 16)]
                seconds["ours"] += timed(partial(self.ours.insert, part, first + at))
            seconds["LMDB"] += timed(partial(self.theirs.insert, batch, first))
            self.known += b"".join(batch[:: -(-self.entries // 400_000)])
        assert len(self.ours.index) == self.theirs.env.stat()["entries"] == self.entries
        found = {name: Sample((value / self.entries,)) for name, value in seconds.items()}
        peer = "LMDB, 1 M at a time, no sync"
        self.bench.at_most(f"{self.name}: filling it, a digest", found["ours"], peer, found["LMDB"], HALF)
        self.bench.within(f"{self.name}: filling it, a digest, by itself", found["ours"], INSERT)
        self.theirs.env.sync(True)
        ground.settle()
        size, other = (ground.disk_bytes(side.folder) / self.entries for side in (self.ours, self.theirs))
        stat = self.theirs.env.stat()
        used = (stat["branch_pages"] + stat["leaf_pages"]) * stat["psize"] / self.entries
        note = f"LMDB: {other:.0f} B, {used:.0f} B of them in use"
        self.bench.fact(f"{self.name}: space an entry", Sample((size,)), "B", note)

    def lookup(self, size: int, hits: bool, side: Side) -> float:
        if hits:
            rows = np.frombuffer(self.known, np.uint8).reshape(-1, 16)
            digests = split(self.source.random.choice(rows, size, replace=False).tobytes())
        else:
            digests = self.source.fresh(size)[0]
        found: list[int] = []
        seconds = timed(lambda: found.append(side.lookup(digests)))
        assert found == [size if hits else 0]
        return seconds / size

    def inserts(self, peer: str) -> None:
        self.compare("insert of 4,096, a digest", partial(self.insert, 4096), peer, INSERT, 9)
        self.compare("insert of 65,536, a digest", partial(self.insert, 1 << 16), peer, INSERT, 3)
        if self.entries >= MILLION:
            # One batch each: whether the table grows in just that one would be chance. Filling it tells of that.
            self.ours.index.rebuild([], len(self.ours.index) + MILLION)
            self.compare("insert of 1,000,000, a digest", partial(self.insert, MILLION), peer, INSERT, 1)

    def insert(self, size: int, side: Side) -> float:
        return timed(partial(side.insert, *self.source.fresh(size))) / size

    def one(self, side: Side) -> float:
        """What a flush of one 4 KiB block asks of it, ten times in a row."""
        each = [self.source.fresh(1) for _ in range(10)]
        return timed(lambda: [(side.lookup(digest), side.insert(digest, first)) for digest, first in each]) / 10

    def written_back(self) -> None:
        """The kernel has cleaned all pages: each is write-protected until it is written again."""
        ground.settle()
        found = Sample((self.insert(4096, self.ours),))
        self.bench.fact(f"{self.name}: insert of 4,096 just after the kernel wrote all pages back", found)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="cowstore-bench-") as folder:
        bench = Bench(Path(folder), "--quick" in sys.argv[1:], "index_peer")
        bench.say(f"data in {folder}, {ground.file_system(Path(folder))}")
        run(bench)
    print(report(bench.rows))


if __name__ == "__main__":
    main()
