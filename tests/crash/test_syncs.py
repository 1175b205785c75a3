"""How many syncs a flush costs, and that flushes share them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import pytest

import cowstore
from cowstore.clones import Clone
from cowstore.files import File

from .model import BLOCK
from .recording import Recorder, recorded

CLONES = 16


@pytest.fixture
def recorder(arena):
    return Recorder(arena)


@pytest.fixture
def store(arena, recorder):
    with recorded(recorder) as disk, cowstore.open(arena / "store", create=True, _disk=disk) as store:
        yield store


@pytest.fixture
def warm(store):
    """Makes clones that were flushed before, so that slots and sequence numbers are at hand."""
    clones = []

    def warm(name: str) -> Clone:
        clone = store.create(name, 1 << 20)
        clones.append(clone)
        clone.pwrite(Random(name).randbytes(BLOCK), 0)
        clone.flush()
        return clone

    yield warm
    for clone in clones:
        clone.close()


@contextmanager
def counted(recorder: Recorder) -> Iterator[Counter[str]]:
    before, spent = Counter(recorder.counts), Counter[str]()
    yield spent
    spent.update(recorder.counts - before)


def costs(recorder: Recorder, action) -> tuple[int, int, int]:
    """Syncs of files, syncs of directories, commits."""
    with counted(recorder) as spent:
        action()
    return spent["sync"], spent["directory sync"], spent["commit"]


def test_one_block(warm, recorder):
    clone = warm("a")
    clone.pwrite(Random(1).randbytes(BLOCK), 5 * BLOCK)
    assert costs(recorder, clone.flush) == (2, 0, 1)


def test_many_blocks_cost_no_more(warm, recorder):
    clone = warm("a")
    clone.pwrite(Random(1).randbytes(100 * BLOCK), 5 * BLOCK)
    assert costs(recorder, clone.flush) == (2, 0, 1)


def test_nothing_to_flush(warm, recorder):
    clone = warm("a")
    before = len(recorder.log)
    assert costs(recorder, clone.flush) == (0, 0, 0)
    clone.pwrite(clone.pread(BLOCK, 0), 0)  # the same bytes: no new root
    clone.flush()
    assert not [one for one in recorder.log[before:] if type(one).__name__ in ("Synced", "Committed")]


def test_known_blocks(warm, recorder):
    clone = warm("a")
    clone.pwrite(clone.pread(BLOCK, 0), 7 * BLOCK)
    assert costs(recorder, clone.flush) == (1, 0, 1)


def test_ephemeral(store, warm, recorder):
    warm("a")
    with store.clone("a", "e", ephemeral=True) as clone:
        clone.pwrite(Random(1).randbytes(BLOCK), 0)
        clone.flush()
        clone.pwrite(Random(2).randbytes(BLOCK), 0)
        assert costs(recorder, clone.flush) == (0, 0, 1)


def test_writes_cost_nothing(warm, recorder):
    clone = warm("a")
    assert costs(recorder, lambda: clone.pwrite(Random(1).randbytes(60 * BLOCK), 0)) == (0, 0, 0)


def test_flushes_at_once_share(store, warm, recorder):
    """The first one waits in its sync until all others stand behind it: they go in one group."""
    clones = [warm(f"c{number}") for number in range(CLONES)]
    for number, clone in enumerate(clones):
        clone.pwrite(Random(number).randbytes(BLOCK), 3 * BLOCK)
    committer = store._engine.workshop.committer
    waiting = threading.Event()

    def hold(_file: File) -> None:
        waiting.set()
        deadline = time.monotonic() + 10
        while len(committer._queue) < CLONES - 1 and not everybody.is_set() and time.monotonic() < deadline:
            time.sleep(0.005)
        everybody.set()

    everybody = threading.Event()
    threads = [threading.Thread(target=clone.flush) for clone in clones]
    recorder.hold = hold
    with counted(recorder) as spent:
        threads[0].start()
        assert waiting.wait(10)
        for thread in threads[1:]:
            thread.start()
        for thread in threads:
            thread.join()
    recorder.hold = None
    assert (spent["sync"], spent["commit"]) == (4, 2)
    for number, clone in enumerate(clones):
        assert clone.pread(BLOCK, 3 * BLOCK) == Random(number).randbytes(BLOCK)
