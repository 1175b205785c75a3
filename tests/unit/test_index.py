"""The index is a hint: it may miss. But it says only what it was told, and it forgets nothing without a reason."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cowstore.index
from cowstore.errors import ClosedError, InvalidError, NoSpaceError, ReadOnlyError
from cowstore.files import Disk, File
from cowstore.index import Index

SEED = 0x1234_5678_9ABC_DEF0
ROOT = Path(__file__).parents[2]
FIRST_CAPACITY = 4096


@pytest.fixture
def directory(tmp_path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def handle(directory) -> Iterator[Callable[..., Index]]:
    """Opens a handle on the one index of the test, as another process would."""
    handles: list[Index] = []

    def handle(**options: bool) -> Index:
        handles.append(Index.open(directory, SEED, Disk(), **options))
        return handles[-1]

    yield handle
    for one in handles:
        one.close()


@pytest.fixture
def index(handle) -> Index:
    return handle()


def made(count: int, seed: object = 0) -> tuple[bytes, np.ndarray]:
    """So many different digests, and ids to go with them."""
    source = random.Random(repr(seed))
    return source.randbytes(16 * count), np.array(source.sample(range(1, 1 << 56), count), np.uint64)


def cut(entries: tuple[bytes, np.ndarray], size: int) -> Iterator[tuple[bytes, np.ndarray]]:
    digests, ids = entries
    for at in range(0, len(ids), size):
        yield digests[16 * at : 16 * (at + size)], ids[at : at + size]


def recall(index: Index, digests: bytes, ids: np.ndarray) -> float:
    """The part of the entries that are found; fails on a wrong id. The digests are all different."""
    found = index.lookup(digests)
    assert ((found == ids) | (found == 0)).all()
    return float((found == ids).mean())


def columns(batch: list[tuple[bytes, int]]) -> tuple[bytes, np.ndarray]:
    return b"".join(digest for digest, _ in batch), np.array([block_id for _, block_id in batch], np.uint64)


class Model:
    """What each digest has and may have, as sets; it knows nothing of keys, buckets or probing."""

    def __init__(self) -> None:
        self.held: dict[bytes, set[int]] = {}

    def entries(self) -> list[tuple[bytes, int]]:
        return [(digest, block_id) for digest, held in self.held.items() for block_id in held]

    def insert(self, index: Index, batch: list[tuple[bytes, int]]) -> None:
        offered: dict[bytes, set[int]] = {}
        for digest, block_id in batch:
            offered.setdefault(digest, set()).add(block_id)
        added, new = index.insert(*columns(batch)), 0
        for digest, ids in offered.items():
            before, after = self.held.get(digest, set()), index.candidates(digest)
            assert len(after) == len(set(after)) == min(8, len(before | ids))
            assert before <= set(after) <= before | ids
            new += len(after) - len(before)
            self.held[digest] = set(after)
        assert added == new

    def remove(self, index: Index, batch: list[tuple[bytes, int]]) -> None:
        gone = [(digest, block_id) for digest, block_id in set(batch) if block_id in self.held.get(digest, ())]
        assert index.remove(*columns(list(set(batch)))) == len(gone)
        for digest, block_id in gone:
            self.held[digest].discard(block_id)

    def check(self, index: Index, pool: list[bytes]) -> None:
        for digest, first in zip(pool, index.lookup(b"".join(pool)).tolist(), strict=True):
            held = self.held.get(digest, set())
            assert set(index.candidates(digest)) == held
            assert first in held if held else first == 0
        assert len(index) == len(self.entries())


def follow(directory, actions, pool, ids, source) -> None:
    """Does the same to an index and to the model."""
    index, model = Index.open(directory, SEED, Disk()), Model()
    for action, size in actions:
        batch = [(source.choice(pool), source.randrange(1, ids)) for _ in range(size)]
        known = model.entries()
        if action == "insert":
            model.insert(index, batch)
        elif action == "remove":
            model.remove(index, batch + source.sample(known, min(len(known), size)))
        elif action == "reopen":
            index.close()
            index = Index.open(directory, SEED, Disk())
        else:
            assert index.rebuild([columns(known)], len(known))
            assert not index.stale
    model.check(index, pool)
    index.close()


KINDS = st.sampled_from(["insert", "insert", "insert", "remove", "reopen", "rebuild"])


@given(
    actions=st.lists(st.tuples(KINDS, st.sampled_from([1, 3, 30, 300, 1500])), min_size=1, max_size=12),
    digests=st.sampled_from([1, 2, 40, 3000]),
    alike=st.booleans(),
    ids=st.sampled_from([3, 20, 1 << 56]),
    source=st.randoms(use_true_random=False),
)
def test_does_what_a_dict_of_sets_does(tmp_path_factory, actions, digests, alike, ids, source):
    # Digests that differ in a few low bits only are what a poor hash makes.
    pool = [n.to_bytes(16, "big") if alike else source.randbytes(16) for n in range(1, digests + 1)]
    follow(tmp_path_factory.mktemp("model") / "index", actions, pool, ids, source)


def no_removal_marks(table, keys, ids, sound=cowstore.index._Table.drop):
    removed = sound(table, keys, ids)
    table.flat[table.flat == (1 << 64) - 1] = 0
    return removed


def one_too_few(table, keys, ids, sound=cowstore.index._Table.put_many):
    return sound(table, keys[1:], ids[1:])


@pytest.mark.parametrize(
    ("name", "fault"), [("PROBES", 1), ("_Table.drop", no_removal_marks), ("_Table.put_many", one_too_few)]
)
def test_the_model_catches_a_faulty_index(directory, monkeypatch, name, fault):
    monkeypatch.setattr(f"cowstore.index.{name}", fault)
    source = random.Random(1)
    pool = [source.randbytes(16) for _ in range(3000)]
    with pytest.raises(AssertionError):
        follow(directory, [("insert", 1200), ("remove", 900)] * 3, pool, 1 << 56, source)


def test_a_new_index_is_empty_and_private(directory, index):
    digests, ids = made(40)
    assert index.lookup(digests).tolist() == [0] * 40
    assert index.lookup(digests).dtype == np.uint64
    assert index.lookup(b"").tolist() == index.candidates(digests[:16]) == []
    assert (len(index), index.capacity) == (0, FIRST_CAPACITY)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(one.stat().st_mode) for one in directory.iterdir()} == {0o600}
    ids[::2] = 0  # which is passed over
    assert index.insert(memoryview(b"x" + digests)[1:], ids) == 20
    assert (index.lookup(digests) == ids).all()


@pytest.mark.parametrize("batch", [1, 24, 25, 700, 20_000])
def test_grows_and_loses_nothing(directory, index, batch):
    count = 3000 if batch == 1 else 20_000
    entries = made(count)
    for part in cut(entries, batch):
        assert index.insert(*part) == len(part[1])
        assert recall(index, *part) == 1
    assert recall(index, *entries) == 1
    assert index.capacity * 0.2 < count <= index.capacity * 0.6 or index.capacity == FIRST_CAPACITY
    assert (index.insert(*entries), len(index)) == (0, count)
    table = (directory / "table").stat()
    assert table.st_blocks * 512 >= table.st_size == 4096 + index.capacity * 16


@pytest.mark.parametrize("key", ["00" * 8, "ff" * 8, "ff" * 7 + "fe", "fe" + "ff" * 7])
def test_keys_that_mean_something_else_are_digests_too(index, key):
    entry = b"12345678" + bytes.fromhex(key), np.array([7], np.uint64)
    assert index.insert(*entry) == 1
    assert index.lookup(entry[0] * 50).tolist() == [7] * 50
    assert index.candidates(entry[0]) == [7]
    assert index.remove(*entry) == 1
    assert index.lookup(entry[0]).tolist() == [0]


@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_one_digest_has_at_most_eight_ids(index, batch):
    digests, ids = made(500)
    for turn in range(10):
        assert index.insert(digests, ids + turn) == (500 if turn < 8 else 0)
    collisions = b"d" * 16000, np.arange(1, 1001, dtype=np.uint64)
    started = time.monotonic()
    assert sum(index.insert(*part) for part in cut(collisions, batch)) == 8
    assert time.monotonic() - started < 2
    assert len(set(index.candidates(b"d" * 16))) == 8
    assert all(len(set(index.candidates(digest))) == 8 for digest, _ in cut((digests, ids), 1))


@pytest.mark.parametrize("batch", [1, 100, 300])
def test_a_crowd_in_the_last_bucket_runs_on_at_the_first(index, batch):
    unmix, places = pow(cowstore.index._MIX, -1, 1 << 64), 4 * cowstore.index.PROBES
    keys = [(number - (1 << 54)) * unmix % (1 << 64) for number in range(300)]
    crowd = columns([(bytes(8) + key.to_bytes(8, sys.byteorder), 1 + number) for number, key in enumerate(keys)])
    assert sum(index.insert(*part) for part in cut(crowd, batch)) == places
    assert sum(index.candidates(digest) == ids.tolist() for digest, ids in cut(crowd, 1)) == places
    assert 19_950 < index.insert(*made(20_000)) < 20_000  # some find the crowd in their way
    assert recall(index, *crowd) == places / 300
    assert index.remove(*crowd) == places
    assert sum(index.insert(*part) for part in cut(crowd, batch)) == places


def test_places_of_removed_entries_are_used_again(index):
    for turn in range(40):
        entries = made(1000, turn)
        assert index.insert(*entries) == 1000
        assert recall(index, *entries) == 1
        assert index.remove(*entries) == 1000
    for block_id in range(1, 1000):
        one = b"d" * 16, np.array([block_id], np.uint64)
        assert index.insert(*one) == 1
        assert index.remove(*one) == 1
    assert index.capacity <= 2 * FIRST_CAPACITY
    assert len(index) == 0


def test_what_cannot_be_right_is_refused(index):
    with pytest.raises(InvalidError, match="24"):
        index.lookup(bytes(24))
    with pytest.raises(InvalidError, match="2 digests"):
        index.insert(bytes(32), np.ones(3, np.uint64))
    index.close()
    for call in ("lookup(bytes(16))", "candidates(bytes(16))", "insert(*made(1))", "remove(*made(1))",
                 "rebuild([], 0)", "refresh()", "stale", "capacity", "__len__()"):  # fmt: skip
        with pytest.raises(ClosedError):
            eval(f"index.{call}", {"index": index, "made": made})


def test_searches_go_on_while_a_thread_writes(index):
    entries = made(60_000)
    writer = threading.Thread(target=lambda: [index.insert(*part) for part in cut(entries, 500)])
    writer.start()
    recalls = [0.0]
    while writer.is_alive():
        recalls.append(recall(index, *entries))
    assert recalls == sorted(recalls)
    assert recall(index, *entries) == 1


def test_is_stale_until_rebuilt_in_this_boot(handle, index, monkeypatch):
    assert index.stale
    index.insert(*made(9000))
    assert index.stale  # growing makes nothing complete
    assert index.rebuild([made(9000)], 9000)
    assert not handle().stale
    index.insert(*made(9000, "more"))
    monkeypatch.setattr(cowstore.index, "boot_id", lambda: b"another boot id.")
    rebooted = handle()
    assert rebooted.stale
    assert recall(rebooted, *made(9000, "more")) == 1
    assert rebooted.rebuild([], 18_000)
    assert not rebooted.stale
    monkeypatch.setattr(cowstore.index, "boot_id", lambda: bytes(16))
    assert handle().rebuild([], 18_000)
    assert handle().stale


def test_rebuild_grows_once_and_keeps_what_others_add(directory, handle, index):
    inodes = {(directory / "table").stat().st_ino}

    def batches() -> Iterator[tuple[bytes, np.ndarray]]:
        for number, part in enumerate(cut(made(30_000), 1000)):
            yield part
            inodes.add((directory / "table").stat().st_ino)
            assert handle().insert(*made(100, f"other {number}")) == 100
            assert handle().stale

    assert index.rebuild(batches(), 33_000)
    assert len(inodes) == 2
    assert recall(index, *made(30_000)) == 1
    assert {recall(index, *made(100, f"other {number}")) for number in range(30)} == {1}


def test_rebuild_throws_out_what_is_mostly_wrong_and_may_break_off(index):
    def batches() -> Iterator[tuple[bytes, np.ndarray]]:
        yield made(1000, "kept")
        raise KeyboardInterrupt

    index.insert(*made(30_000))
    with pytest.raises(KeyboardInterrupt):
        index.rebuild(batches(), 1000)
    assert index.stale
    assert (len(index), index.capacity) == (1000, FIRST_CAPACITY)
    assert recall(index, *made(1000, "kept")) == 1


def flip(path: Path, offset: int) -> None:
    """Damage that cannot be a no-op: it turns bits over."""
    np.memmap(path, np.uint8)[offset] ^= 0x5A


FIELDS = {"magic": 0, "version": 8, "bucket-size": 12, "seed": 16, "inode": 24, "buckets": 32, "checksum": 40}
SIZES = {"empty": 0, "header-only": 4096, "half": 36_864, "short": 69_631, "long": 69_633, "twice": 135_168}
DAMAGE: dict[str, Callable[[Path], object]] = {
    **{name: partial(flip, offset=offset) for name, offset in FIELDS.items()},
    **{name: partial(os.truncate, length=size) for name, size in SIZES.items()},
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a-copy": lambda path: path.with_name("table").write_bytes(path.rename(path.with_name("old")).read_bytes()),
    "a-link": lambda path: path.symlink_to(path.rename(path.with_name("elsewhere"))),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_table_that_does_not_fit_is_thrown_away(directory, handle, damage):
    entries = made(2000)
    assert handle().rebuild([entries], 2000)
    index = handle()
    assert (index.stale, recall(index, *entries)) == (False, 1)
    assert (directory / "table").stat().st_size == 69_632
    DAMAGE[damage](directory / "table")
    for index in (handle(readonly=True), handle()):
        assert index.stale
        assert len(index) == recall(index, *entries) == 0
    assert index.insert(*entries) == 2000
    assert recall(handle(), *entries) == 1


@pytest.mark.parametrize("seed", range(5))
def test_rubbish_in_the_buckets_and_counters_harms_nobody(directory, index, seed):
    source = np.random.default_rng(seed)
    index.rebuild([made(2000)], 2000)
    words = np.memmap(directory / "table", np.uint64)
    words[16:18] = source.integers(0, 1 << 64, 2, np.uint64) if seed else (1 << 64) - 1
    words[3000:] = source.integers(0, 1 << 64, len(words) - 3000, np.uint64)
    words[source.integers(512, len(words), 1500)] = 0
    words[source.integers(512, len(words), 1500)] = (1 << 64) - 1
    assert 0 <= len(index) <= index.capacity
    index.candidates(made(1)[0])
    assert index.remove(*made(2000)) > 0
    for turn in range(4):
        entries = made(3000, f"turn {turn}")
        index.insert(*entries)
        assert recall(index, *entries) > 0.9
    assert index.capacity < 64 * FIRST_CAPACITY


def test_handles_share_entries_at_once_and_a_grown_table_at_refresh(directory, handle, index):
    (directory / "table.new").write_bytes(b"left by a crash")
    reader, writer = handle(), handle()
    assert not (directory / "table.new").exists()
    index.insert(*made(1000))
    assert recall(reader, *made(1000)) == 1
    index.insert(*made(5000, "more"))
    assert recall(reader, *made(5000, "more")) == 0
    reader.refresh()
    assert recall(reader, *made(5000, "more")) == 1
    assert index._adopt() is index._present()  # which costs no opening
    assert reader.capacity == index.capacity > FIRST_CAPACITY
    assert writer.insert(*made(100, "late")) == 100  # finds the table in place by itself
    assert recall(writer, *made(5000, "more")) == recall(index, *made(100, "late")) == 1


def test_readonly_searches_and_changes_nothing(directory, handle):
    reader = handle(readonly=True)
    assert (reader.stale, reader.lookup(bytes(16)).tolist()) == (True, [0])
    assert not directory.exists()
    writer = handle()
    writer.rebuild([made(100)], 100)
    reader.refresh()
    assert not reader.stale
    assert recall(reader, *made(100)) == 1
    writer.insert(*made(9000, "more"))
    reader.refresh()
    assert recall(reader, *made(9000, "more")) == 1
    for use in (reader.insert, reader.remove, lambda *entries: reader.rebuild([entries], 1)):
        with pytest.raises(ReadOnlyError):
            use(*made(1))


def test_a_busy_lock_costs_hints_not_time(directory, handle, index, monkeypatch):
    monkeypatch.setattr(cowstore.index, "PATIENCE", 0.1)
    holder = Disk().open(directory / "lock", write=True)
    assert holder.try_lock(exclusive=True)
    started = time.monotonic()
    assert index.insert(*made(10)) == 0
    assert time.monotonic() - started >= 0.1
    for _ in range(100):
        assert index.insert(*made(10)) == index.remove(*made(10)) == 0
    assert handle().lookup(bytes(16)).tolist() == [0]
    assert time.monotonic() - started < 2
    holder.unlock()

    def busy_at_one() -> Iterator[tuple[bytes, np.ndarray]]:
        assert holder.try_lock(exclusive=True)
        yield made(10)
        holder.unlock()

    assert not index.rebuild(busy_at_one(), 10)
    assert index.stale
    assert index.rebuild([made(10)], 10)
    assert index.insert(*made(10, "more")) == 10
    assert holder.try_lock(exclusive=True)
    holder.close()


def work(directory: str, name: str, reopens: bool) -> Index:
    """What each of several processes does at once."""
    source, entries = random.Random(name), made(40_000, name)
    index = Index.open(Path(directory), SEED, Disk())
    for part in cut(entries, 1000):
        for piece in cut(part, source.choice((7, 100, 1000))):
            index.insert(*piece)
        recall(index, *entries)
        index.remove(*part)
        index.insert(*part)
        if reopens and source.random() < 0.1:
            index.close()
            index = Index.open(Path(directory), SEED, Disk())
    return index


def start(expression: str) -> subprocess.Popen[str]:
    program = f"from tests.unit.test_index import work; {expression}"
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_processes_write_at_once(directory, handle):
    names = ["one", "two", "three"]
    workers = [start(f"work({str(directory)!r}, {name!r}, True)") for name in names]
    assert [(worker.communicate(timeout=300)[1], worker.returncode) for worker in workers] == [("", 0)] * 3
    for name in names:
        assert recall(handle(), *made(40_000, name)) > 0.9  # all, unless a lock was waited for in vain
    assert sorted(one.name for one in directory.iterdir()) == ["lock", "table"]


def test_a_full_disk_moves_the_index_into_memory_and_back(directory, handle, monkeypatch):
    def refuse(file: File, size: int) -> None:
        raise NoSpaceError(str(file.path))

    with monkeypatch.context() as full:
        full.setattr(File, "allocate", refuse)
        index = handle()
        assert index.insert(*made(3000)) == 3000
        assert index.rebuild([made(3000)], 3000)
        assert [one.name for one in directory.iterdir()] == ["lock"]
    other = handle()
    assert (other.stale, recall(other, *made(3000))) == (True, 0)
    index.refresh()
    assert recall(index, *made(3000)) == 1
    assert index.insert(*made(9000, "more")) == 9000
    other.refresh()
    assert recall(other, *made(9000, "more")) == recall(other, *made(3000)) == 1


@pytest.mark.root
@pytest.mark.program("mount", "umount")
def test_a_small_tmpfs_fills_up_without_a_signal(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=False).returncode:
        pytest.skip("needs to mount a tmpfs")
    try:  # in a process of its own: a write into a mapping without space would kill it
        directory = tmp_path / "index"
        worker = start(f"assert 65536 < work({str(directory)!r}, 'one', False).capacity")
        assert (worker.communicate(timeout=300)[1], worker.returncode) == ("", 0)
        assert 1 << 18 < (directory / "table").stat().st_size < 1 << 20
        assert not (directory / "table.new").exists()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("call", ["open", "make_directory", "rename", "unlink"])
def test_a_disk_that_refuses_leaves_an_index_in_memory(handle, monkeypatch, call):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "refused")

    monkeypatch.setattr(Disk, call, refuse)
    index = handle()
    assert (index.insert(*made(9000)), recall(index, *made(9000))) == (9000, 1)
