"""The committer: many flushes in one group, those that cannot be taken left out, shared blocks that die."""

from __future__ import annotations

import io
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import cowstore
import cowstore.collector
import cowstore.committer
from cowstore import catalog
from cowstore.committer import Committer, Flush
from cowstore.environment import Environment, Writer
from cowstore.files import File
from cowstore.layout import HOLE, IMAGE, DeviceRecord, Root
from cowstore.segments import Segments
from cowstore.slots import StateReader

BLOCK = 4096


def content(seed: object, blocks: int = 1) -> bytes:
    return random.Random(repr(seed)).randbytes(blocks * BLOCK)


def held(store: cowstore.Store, name: str) -> bytes:
    with store.device(name, readonly=True) as device:
        return device.pread(device.size, 0)


@pytest.fixture
def clones(store) -> Iterator[list[cowstore.Clone]]:
    """Four open clones; each has its first flush behind it, so that slots are at hand."""
    clones = [store.create(f"disk-{number}", 4 * BLOCK) for number in range(4)]
    for clone in clones:
        clone.pwrite(content(clone.name), 0)
        clone.flush()
    yield clones
    for clone in clones:
        clone.discard()


@pytest.fixture
def committer(store) -> Committer:
    committer = store._engine.workshop.committer
    assert isinstance(committer, Committer)
    return committer


def await_queue(committer: Committer, count: int) -> None:
    """Waits until so many flushes wait for somebody who takes them along."""
    for _ in range(1000):
        if len(committer._queue) == count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{len(committer._queue)} flushes are waiting, not {count}")


def in_one_group(committer: Committer, calls: list[Callable[[], object]]) -> list[BaseException | None]:
    """Does all at once; returns what each raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        with committer._turn:
            jobs = [pool.submit(call) for call in calls]
            await_queue(committer, len(calls))
        return [job.exception() for job in jobs]


# ------------------------------------------------------------------------------------------------- grouping


def test_flushes_that_wait_go_together(store, clones, committer, monkeypatch):
    for clone in clones:
        clone.pwrite(content((clone.name, "new")), BLOCK)
    calls: list[object] = []
    sync, write = Segments.sync, Environment.write

    def noting_sync(segments, numbers):
        calls.append(len(numbers))
        sync(segments, numbers)

    def noting_write(environment, **options):
        calls.append("write")
        return write(environment, **options)

    monkeypatch.setattr(Segments, "sync", noting_sync)
    monkeypatch.setattr(Environment, "write", noting_write)
    assert in_one_group(committer, [clone.flush for clone in clones]) == [None] * 4
    assert calls == [2, "write"]  # two segments, one of data and one of nodes
    monkeypatch.undo()
    for clone in clones:
        assert held(store, clone.name) == content(clone.name) + content((clone.name, "new")) + bytes(2 * BLOCK)


def test_a_flush_while_another_waits_for_the_disk_goes_in_the_next_group(store, clones, committer, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    groups: list[int] = []
    commit_group = Committer._commit_group

    def slow(committer, group):
        groups.append(len(group))
        begun.set()
        assert go_on.wait(5)
        commit_group(committer, group)

    monkeypatch.setattr(Committer, "_commit_group", slow)
    for clone in clones:
        clone.pwrite(b"new", 0)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(clones[0].flush)]
        assert begun.wait(5)
        jobs += [pool.submit(clone.flush) for clone in clones[1:]]
        await_queue(committer, 3)
        assert clones[0].pread(3, 0) == b"new"  # nobody who reads or writes waits for the disk
        clones[0].pwrite(b"newer", 0)
        go_on.set()
        for job in jobs:
            job.result()
    assert groups == [1, 3]
    assert [held(store, clone.name)[:3] for clone in clones] == [b"new"] * 4
    assert held(store, "disk-0")[:5] != b"newer"
    clones[0].flush()
    assert held(store, "disk-0")[:5] == b"newer"


# ------------------------------------------------------------------------------------------------- left out


def change(writer: Writer, record: DeviceRecord) -> None:
    catalog.save(writer, replace(record, root=record.base))


@pytest.mark.parametrize("meddle", [change, catalog.remove])
def test_a_device_that_somebody_else_changed_is_left_out(store, clones, committer, meddle):
    for clone in clones:
        clone.pwrite(b"new", 0)
    with store._environment.write() as writer:  # nobody does this: the lease is the clone's
        meddle(writer, catalog.find(writer, "disk-2"))
    errors = in_one_group(committer, [clone.flush for clone in clones])
    assert [number for number, error in enumerate(errors) if error] == [2]
    assert isinstance(errors[2], cowstore.StoreError)
    assert "changed by somebody else" in str(errors[2])
    assert [held(store, f"disk-{number}")[:3] for number in (0, 1, 3)] == [b"new"] * 3
    if meddle is change:
        assert held(store, "disk-2") == bytes(4 * BLOCK)


def last_flush(store: cowstore.Store, name: str, parent: int = 0) -> Flush:
    """The last flush of an image that is being made, with which it gets its name."""
    root = Root(HOLE, 1, 5 * BLOCK)
    image = DeviceRecord(0, name, IMAGE, root, root)
    before = store._lineage.start_image(image, store._engine.reservations.lease_number)
    after = replace(image, number=before.number, sequence=store._engine.reservations.sequence(0), parent=parent)
    return Flush(before, after, ())


def test_a_name_is_given_once_in_a_group(store, clones, committer):
    clones[0].pwrite(b"new", 0)
    flushes = [last_flush(store, name) for name in ("new", "new", "disk-1", "other")]
    errors = in_one_group(committer, [*(partial(committer.commit, flush) for flush in flushes), clones[0].flush])
    assert sorted(isinstance(error, cowstore.ExistsError) for error in errors[:2]) == [False, True]
    assert isinstance(errors[2], cowstore.ExistsError)
    assert errors[3:] == [None, None]
    assert [info.name for info in store.devices()] == ["disk-0", "disk-1", "disk-2", "disk-3", "new", "other"]
    assert held(store, "disk-0")[:3] == b"new"
    assert held(store, "disk-1") == content("disk-1") + bytes(3 * BLOCK)


def test_an_image_whose_parent_is_gone_is_left_out(store, clones, committer):
    clones[0].pwrite(b"new", 0)
    flush = last_flush(store, "image", parent=98765)
    errors = in_one_group(committer, [partial(committer.commit, flush), clones[0].flush])
    assert isinstance(errors[0], cowstore.NotFoundError)
    assert errors[1] is None
    assert "image" not in {info.name for info in store.devices()}
    assert held(store, "disk-0")[:3] == b"new"


# ----------------------------------------------------------------------------------------- groups that fail


def fail(*_: object, **__: object) -> None:
    raise OSError(5, "the disk is broken")


def test_a_sync_that_fails_publishes_nothing_of_the_group_now_or_later(path, clones, committer, monkeypatch):
    for clone in clones:
        clone.pwrite(b"lost", 0)
    monkeypatch.setattr(File, "sync", fail)
    errors = in_one_group(committer, [clone.flush for clone in clones[:3]])
    assert [type(error) for error in errors] == [cowstore.PoisonedError] * 3
    monkeypatch.undo()
    for clone in clones:  # also the one that was not in the group
        for call in (clone.flush, partial(clone.pwrite, b"more", 0)):
            with pytest.raises(cowstore.PoisonedError, match="the disk is broken"):
                call()
    with cowstore.open(path) as again:
        for clone in clones:
            assert held(again, clone.name)[:BLOCK] == content(clone.name)


def test_a_transaction_that_fails_publishes_nothing_of_the_group_and_all_can_flush_again(
    store, clones, committer, monkeypatch
):
    for clone in clones:
        clone.pwrite(b"kept", 0)
    monkeypatch.setattr(catalog, "move", fail)
    errors = in_one_group(committer, [clone.flush for clone in clones])
    assert [type(error) for error in errors] == [OSError] * 4
    monkeypatch.undo()
    for clone in clones:
        assert held(store, clone.name)[:BLOCK] == content(clone.name)
        clone.flush()
        assert held(store, clone.name)[:4] == b"kept"


# ----------------------------------------------------------------------------------- shared blocks that die

DATA = content("shared", 20)


@pytest.fixture
def shared(store, monkeypatch) -> cowstore.Store:
    """A store with DATA as an image, which nothing else has; its collector waits for nobody."""
    monkeypatch.setattr(cowstore.collector, "_PATIENCE", 0)
    store.import_image(io.BytesIO(DATA), "image")
    return store


def ids_of(device: cowstore.Device) -> set[int]:
    return set(device._tree.ids(0, device.size // BLOCK).tolist()) - {0}


def block_ids(store: cowstore.Store, name: str) -> set[int]:
    with store.device(name, readonly=True) as device:
        return ids_of(device)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_blocks_that_were_doomed_between_lookup_and_flush_are_stored_anew(shared, count):
    old = block_ids(shared, "image")
    with shared.create("disk", 40 * BLOCK) as disk:
        disk.pwrite(DATA[: count * BLOCK], 3 * BLOCK)
        list(disk.extents())  # looks the blocks up
        assert len(ids_of(disk) & old) == count
        shared.delete("image")
        found = shared.collect()
        assert (found.erased, found.waiting) == (0, found.doomed)
        assert found.doomed >= 20
        assert disk.pread(count * BLOCK, 3 * BLOCK) == DATA[: count * BLOCK]
        disk.pwrite(b"after", 30 * BLOCK)
        disk.flush()
        assert len(ids_of(disk)) == count + 1
        assert not ids_of(disk) & old
        assert shared.collect().erased >= 20
    expected = bytearray(40 * BLOCK)
    expected[3 * BLOCK : (3 + count) * BLOCK] = DATA[: count * BLOCK]
    expected[30 * BLOCK : 30 * BLOCK + 5] = b"after"
    assert held(shared, "disk") == expected


def test_only_what_was_doomed_is_stored_anew(shared):
    other = content("other", 20)
    shared.import_image(io.BytesIO(other), "kept")
    with shared.create("disk", 40 * BLOCK) as disk:
        disk.pwrite(DATA + other, 0)
        list(disk.extents())
        shared.delete("image")
        shared.collect()
        disk.flush()
    kept, found = block_ids(shared, "kept"), block_ids(shared, "disk")
    assert (len(found), len(found & kept)) == (40, 20)
    assert held(shared, "disk") == DATA + other


def test_blocks_that_were_doomed_and_are_written_again_in_between(shared, monkeypatch):
    """Before the first try of a flush and after it: what is staged meanwhile has old hits too."""
    disk = shared.create("disk", 60 * BLOCK)
    disk.pwrite(DATA, 0)
    list(disk.extents())
    commit, tries = Committer.commit, []

    def meddled(committer: Committer, flush: Flush) -> DeviceRecord:
        tries.append(flush)
        if len(tries) == 1:
            disk.pwrite(DATA, 20 * BLOCK)
            list(disk.extents())
            shared.delete("image")
            shared.collect()
            disk.pwrite(DATA, 40 * BLOCK)
        return commit(committer, flush)

    monkeypatch.setattr(Committer, "commit", meddled)
    disk.flush()
    assert len(tries) >= 2
    disk.flush()
    assert shared.collect().erased >= 20
    disk.close()
    assert held(shared, "disk") == DATA * 3


def test_hits_of_a_flush_that_failed_are_looked_at_by_the_next(shared, monkeypatch):
    other = content("other", 20)
    shared.import_image(io.BytesIO(other), "kept")
    with shared.create("disk", 40 * BLOCK) as disk:
        disk.pwrite(DATA, 0)
        with monkeypatch.context() as patch:
            patch.setattr(catalog, "move", fail)
            with pytest.raises(OSError, match="the disk is broken"):
                disk.flush()
        shared.delete("image")
        assert shared.collect().waiting >= 20
        disk.pwrite(other, 20 * BLOCK)  # looked up after the others were doomed
        disk.flush()
    assert shared.collect().erased >= 20
    assert held(shared, "disk") == DATA + other


def test_an_import_whose_shared_blocks_were_doomed_stores_them_anew(shared):
    old = block_ids(shared, "image")
    waiting: list[int] = []

    def collect(*_: object) -> None:
        if not waiting:
            shared.delete("image")
            waiting.append(shared.collect().waiting)

    shared.import_image(io.BytesIO(DATA), "again", progress=collect)
    assert waiting[0] >= 20
    assert not block_ids(shared, "again") & old
    assert shared.collect().erased >= 20
    assert held(shared, "again") == DATA


def test_a_flush_under_which_blocks_are_doomed_again_and_again_ends(shared, monkeypatch):
    with shared.create("disk", 20 * BLOCK) as disk:
        disk.pwrite(DATA, 0)
        stale = np.array(sorted(block_ids(shared, "image"))[:1], np.uint64)
        turns = itertools.chain(itertools.repeat(stale, 1000), itertools.repeat(stale[:0]))
        monkeypatch.setattr(cowstore.committer, "stale_hits", lambda writer, flush: next(turns))
        with pytest.raises(cowstore.StoreError, match="doomed again and again"):
            disk.flush()
        monkeypatch.undo()
        disk.flush()
    assert held(shared, "disk") == DATA


def test_hits_are_looked_at_only_when_something_was_doomed(shared, monkeypatch):
    looked: list[int] = []
    are = StateReader.are

    def noting(reader, ids, state):
        looked.extend(ids.tolist())
        return are(reader, ids, state)

    with shared.create("disk", 40 * BLOCK) as disk:
        for first in (0, 20):
            disk.pwrite(DATA, first * BLOCK)
            list(disk.extents())
            if first:
                shared.import_image(io.BytesIO(content("dead")), "dead")
                shared.delete("dead")
                shared.collect()
            monkeypatch.setattr(StateReader, "are", noting)
            disk.flush()
            monkeypatch.setattr(StateReader, "are", are)
            assert set(looked) == (block_ids(shared, "image") if first else set())
    assert block_ids(shared, "disk") == block_ids(shared, "image")
