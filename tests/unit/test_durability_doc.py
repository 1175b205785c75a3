"""docs/durability.md against the code: every row of its table that gives plain numbers is counted.

Segment syncs are counted on a disk of our own, transactions where they are committed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import cowstore
from cowstore.environment import Environment
from cowstore.files import Disk, File

PAGE = Path(__file__).parents[2] / "docs" / "durability.md"
MIB = 1 << 20


def rows() -> dict[str, tuple[int, int]]:
    """Segment syncs and transactions of each row that gives both as plain numbers."""
    found = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            operation, _, syncs, transactions = (cell.strip() for cell in line.strip("|").split("|"))
            if syncs.isdigit() and transactions.isdigit():
                found[operation] = int(syncs), int(transactions)
    return found


class CountingFile(File):
    syncs: list[Path]

    def sync(self) -> None:
        self.syncs.append(self.path)
        super().sync()


class CountingDisk(Disk):
    def __init__(self) -> None:
        self.syncs: list[Path] = []

    def _file(self, path: Path, fd: int) -> File:
        file = CountingFile(path, fd)
        file.syncs = self.syncs
        return file


@dataclass
class Bench:
    """A store in use: one that has written before, so that nothing comes from a first write."""

    folder: Path
    disk: CountingDisk = field(default_factory=CountingDisk)
    commits: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(7))
    kept: list[object] = field(default_factory=list)  # devices, which the store closes

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """Segment syncs and transactions of a block, there when it has ended."""
        syncs, commits = len(self.disk.syncs), self.commits
        counts: list[int] = []
        yield counts
        segments = [path for path in self.disk.syncs[syncs:] if path.parent.name == "segments"]
        counts += [len(segments), self.commits - commits]

    def fill(self, clone: cowstore.Clone, length: int = 4096) -> None:
        clone.pwrite(self.random.randbytes(length), 0)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    commit = Environment._commit

    def counting(self, txn):
        bench.commits += 1
        commit(self, txn)

    monkeypatch.setattr(Environment, "_commit", counting)
    return bench


@pytest.fixture
def store(bench):
    with cowstore.open(bench.folder / "s", create=True, _disk=bench.disk) as store:
        with store.create("origin", 4 * MIB) as origin:
            bench.fill(origin, 64 * 4096)
        store.seal("origin", "image")
        for name in ("desk", "other"):
            store.clone("image", name).close()
        with store.clone("image", "fleeting", ephemeral=True) as fleeting:
            bench.fill(fleeting)
        yield store


def of_clone(before: Callable, action: Callable, name: str = "desk") -> Callable:
    """An operation on an open clone, after something that is not counted."""

    def run(bench, store):
        with store.device(name) as clone:
            before(bench, clone)
            with bench.counted() as counts:
                action(bench, clone)
        return counts

    return run


def of_store(action: Callable) -> Callable:
    def run(bench, store):
        with bench.counted() as counts:
            bench.kept.append(action(bench, store))
        return counts

    return run


def nothing(_bench, _clone):
    pass


def writes(bench, clone):
    bench.fill(clone)
    clone.zero(4096, 8192)
    clone.trim(4096, 16384)
    clone.resize(5 * MIB)


def shares(_bench, clone):
    clone.pwrite(clone.pread(8192, 4096), MIB)
    clone.zero(4096, 4096)


def flush(_bench, clone):
    clone.flush()


OPERATIONS: dict[str, list[Callable]] = {
    "`pwrite`, `zero`, `trim`, `resize`": [of_clone(nothing, writes)],
    "`flush` with nothing to flush": [of_clone(nothing, flush)],
    "`flush` of new data": [of_clone(Bench.fill, flush)],
    "`flush` of zeros, or of blocks that are in the store already": [of_clone(shares, flush)],
    "`flush` of an ephemeral clone": [of_clone(Bench.fill, flush, "fleeting")],
    "`discard` of a clone": [of_clone(writes, lambda _bench, clone: clone.discard())],
    "`reset` of an open clone": [
        of_clone(lambda bench, clone: (bench.fill(clone), clone.flush()), lambda _bench, clone: clone.reset())
    ],
    "`create`, `clone`, `clone_many`": [
        of_store(lambda _bench, store: store.create("new", MIB)),
        of_store(lambda _bench, store: store.clone("image", "new")),
        of_store(lambda _bench, store: store.clone_many("image", ["a", "b", "c"])),
    ],
    "`clone` with a larger size": [of_store(lambda _bench, store: store.clone("image", "new", size=8 * MIB))],
    "`fork`, `seal` by name": [
        of_store(lambda _bench, store: store.fork("desk", "a", "b")),
        of_store(lambda _bench, store: store.seal("desk", "new")),
    ],
    "`seal` of an ephemeral clone": [of_store(lambda _bench, store: store.seal("fleeting", "new"))],
    "`reset` by name, `rename`, `delete`": [
        of_store(lambda _bench, store: store.reset("desk")),
        of_store(lambda _bench, store: store.rename("desk", "chair")),
        of_store(lambda _bench, store: store.delete("desk", "other")),
    ],
    "`device`, of an image or to be written": [
        of_store(lambda _bench, store: store.device("image")),
        of_store(lambda _bench, store: store.device("desk")),
    ],
    "`device` read-only, of a clone": [of_store(lambda _bench, store: store.device("desk", readonly=True))],
    "`export`": [of_store(lambda bench, store: store.export("desk", bench.folder / "desk.raw"))],
    "`collect` that finds nothing": [of_store(lambda _bench, store: store.collect())],
}


def test_every_row_with_numbers_is_counted():
    assert rows().keys() == OPERATIONS.keys()


@pytest.mark.parametrize(
    ("operation", "action"), [(name, one) for name, actions in OPERATIONS.items() for one in actions]
)
def test_counts(bench, store, operation, action):
    if operation.startswith("`collect`"):
        store.collect()
    assert tuple(action(bench, store)) == rows()[operation]


def test_import_syncs_at_most_twice_a_slice(bench, store):
    disk = bench.folder / "disk.raw"
    for name in ("first", "second"):  # the first one reserves what the second one is going to need
        disk.write_bytes(bench.random.randbytes(64 * 4096))
        with bench.counted() as counts:
            store.import_image(disk, name)
    assert counts == [2, 2]


def test_collection_syncs_twice_a_segment(bench, store):
    store.collect()
    with store.device("desk") as desk:
        bench.fill(desk)
        desk.flush()
        desk.reset()
    with bench.counted() as counts:
        assert store.collect().freed
    assert counts[0] == 2 * 2, "one data and one map segment"


def test_flush_syncs_before_its_transaction(bench, store, monkeypatch):
    order: list[str] = []
    commit, sync = Environment._commit, CountingFile.sync

    def noting_commit(self, txn):
        order.append("commit")
        commit(self, txn)

    def noting_sync(self):
        order.append("sync")
        sync(self)

    monkeypatch.setattr(Environment, "_commit", noting_commit)
    monkeypatch.setattr(CountingFile, "sync", noting_sync)
    with store.device("desk") as desk:
        bench.fill(desk)
        desk.flush()
        assert order == ["sync", "sync", "commit"]


def test_names_of_the_errors_exist():
    names = set(re.findall(r"`(\w+Error)`", PAGE.read_text()))
    assert names
    assert all(hasattr(cowstore, name) for name in names)
