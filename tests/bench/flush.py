"""One block written and made durable: ours, a raw file's, and where the time goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cowstore
from cowstore.environment import Environment
from cowstore.files import File
from tests.bench import ground
from tests.bench.ground import BLOCK, GIB, MIB
from tests.bench.measure import Action, Bench, Sample, in_turn

LIMIT = 6.0
SIZE = 1 * GIB  # of the device: two levels of nodes
NODES = 2  # nodes and a commit block go with every block
_MOST = 5000  # blocks that any of them writes in all


class Meter:
    """Where the time of a flush goes: the wall time in segment syncs and in the catalog's commit."""

    def __init__(self) -> None:
        self.syncs: list[tuple[float, float]] = []
        self.commits: list[float] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        genuine_sync: Any = File.sync
        genuine_commit: Any = Environment._commit

        def sync(file: File) -> None:
            begun = time.perf_counter()
            genuine_sync(file)
            self.syncs.append((begun, time.perf_counter()))

        def commit(environment: Environment, txn: object) -> None:
            begun = time.perf_counter()
            genuine_commit(environment, txn)
            self.commits.append(time.perf_counter() - begun)

        self._patch(sync, commit)
        try:
            yield
        finally:
            self._patch(genuine_sync, genuine_commit)

    def _patch(self, sync: Any, commit: Any) -> None:
        setattr(File, "sync", sync)  # noqa: B010 - a plain assignment needs a type: ignore for each
        setattr(Environment, "_commit", commit)  # noqa: B010

    def taken(self) -> tuple[float, float]:
        """Seconds of syncs and of commits since the last call; syncs that overlap count once."""
        syncs = max(end for _, end in self.syncs) - min(start for start, _ in self.syncs) if self.syncs else 0.0
        commits = sum(self.commits)
        self.syncs, self.commits = [], []
        return syncs, commits


def run(bench: Bench) -> None:
    store_path, rounds = bench.folder / "store", bench.pick(300, 20)
    meter, parts = Meter(), []
    with cowstore.open(store_path, create=True) as store, store.create("clone", SIZE) as clone:
        clone.pwrite(ground.noise(16 * MIB, 1).read(16 * MIB), 0)
        clone.flush()

        def ours() -> float:
            block, place = os.urandom(BLOCK), int.from_bytes(os.urandom(2), "big") % 4096 * BLOCK
            begun = time.perf_counter()
            clone.pwrite(block, place)
            clone.flush()
            seconds = time.perf_counter() - begun
            syncs, commits = meter.taken()
            parts.append((syncs, commits, seconds - syncs - commits))
            return seconds

        with meter.attached():
            actions = {
                "ours": ours,
                "overwrite": overwriting(bench.folder / "overwritten"),
                "append": appending(bench.folder / "appended"),
                "one sync": one_sync(bench.folder / "one-sync"),
            }
            ground.settle()
            found = in_turn(rounds, actions, warm=20)
    syncs, commits, rest = (Sample(part[20:]) for part in zip(*parts, strict=True))
    where = ", ".join(
        f"{name} {part.median * 1000:.2f} ms"
        for name, part in (("segment syncs", syncs), ("catalog commit", commits), ("the rest", rest))
    )
    bench.at_most("write a block and flush", found["ours"], "pwrite + fdatasync", found["overwrite"], LIMIT, where)
    bench.at_most("the same", found["ours"], "append + fdatasync", found["append"], None)
    bench.at_most(
        "one sync a flush would take", found["one sync"], "pwrite + fdatasync", found["overwrite"], None,
        "block, nodes, commit block and digests written to one segment, one fdatasync, no catalog",
    )  # fmt: skip


def overwriting(path: Path) -> Action:
    """Writes and syncs a block in the middle of a file that has all its space."""
    ground.noise_file(path, 16 * MIB, 3)
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)

    def once() -> float:
        block, place = os.urandom(BLOCK), int.from_bytes(os.urandom(2), "big") % 4096 * BLOCK
        begun = time.perf_counter()
        os.pwrite(fd, block, place)
        os.fdatasync(fd)
        return time.perf_counter() - begun

    return once


def appending(path: Path) -> Action:
    """The same at the end of a file that grows."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)

    def once() -> float:
        block = os.urandom(BLOCK)
        end = os.fstat(fd).st_size
        begun = time.perf_counter()
        os.pwrite(fd, block, end)
        os.fdatasync(fd)
        return time.perf_counter() - begun

    return once


def one_sync(path: Path) -> Action:
    """The bytes of a flush into a sparse file like a segment, and one fdatasync."""
    fd, slots = os.open(path, os.O_RDWR | os.O_CREAT), 1 + NODES + 1
    os.ftruncate(fd, GIB)
    os.fsync(fd)
    turn = iter(range(_MOST))

    def once() -> float:
        blocks, digests, at = os.urandom(BLOCK * slots), os.urandom(16 * slots), next(turn) * slots
        begun = time.perf_counter()
        os.pwrite(fd, blocks, 8 * MIB + at * BLOCK)
        os.pwrite(fd, digests, BLOCK + 16 * at)
        os.fdatasync(fd)
        return time.perf_counter() - begun

    return once
