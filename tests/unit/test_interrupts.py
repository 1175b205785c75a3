"""What an interrupt, a damaged neighbour or a late call must not do to others."""

from __future__ import annotations

import os
import threading

import pytest

import cowstore
from cowstore.committer import Committer
from cowstore.draft import CHANGED_LIMIT
from cowstore.layout import SLOT_MASK, SLOTS_OFFSET

BLOCK = 4096


@pytest.fixture
def store(tmp_path):
    with cowstore.open(tmp_path / "a.store", create=True) as store:
        yield store


def test_interrupted_while_another_thread_takes_the_flush_along(store, monkeypatch):
    ours, theirs = store.create("ours", 1 << 20), store.create("theirs", 1 << 20)
    leading, go_on = threading.Event(), threading.Event()
    whole = Committer._commit_group

    def slow(committer, group):
        leading.set()
        assert go_on.wait(30)
        whole(committer, group)

    monkeypatch.setattr(Committer, "_commit_group", slow)
    theirs.pwrite(b"T" * BLOCK, 0)
    leader = threading.Thread(target=theirs.flush)
    leader.start()
    assert leading.wait(30)
    committer = store._engine.workshop.committer
    real = committer._turn

    class Interrupted:
        """A lock whose first waiter is interrupted."""

        first = True

        def __enter__(self):
            if self.first:
                self.first = False
                raise KeyboardInterrupt
            return real.__enter__()

        def __exit__(self, *error):
            return real.__exit__(*error)

    committer._turn = Interrupted()
    ours.pwrite(b"O" * BLOCK, 0)
    threading.Timer(0.2, go_on.set).start()
    with pytest.raises(KeyboardInterrupt):
        ours.flush()
    leader.join()
    committer._turn = real
    monkeypatch.undo()
    ours.pwrite(b"P" * BLOCK, BLOCK)
    ours.flush()
    theirs.pwrite(b"U" * BLOCK, BLOCK)
    theirs.flush()
    assert ours.pread(2 * BLOCK, 0) == b"O" * BLOCK + b"P" * BLOCK
    assert theirs.pread(2 * BLOCK, 0) == b"T" * BLOCK + b"U" * BLOCK
    ours.close()
    theirs.close()


def test_interrupted_after_the_transaction_was_done(store, monkeypatch):
    disk = store.create("disk", 1 << 20)
    commit = Committer.commit

    def interrupted(committer, flush):
        commit(committer, flush)
        raise KeyboardInterrupt

    monkeypatch.setattr(Committer, "commit", interrupted)
    disk.pwrite(b"A" * BLOCK, 0)
    with pytest.raises(KeyboardInterrupt):
        disk.flush()
    monkeypatch.undo()
    disk.pwrite(b"B" * BLOCK, BLOCK)
    disk.flush()
    disk.close()
    with store.device("disk", readonly=True) as again:
        assert again.pread(2 * BLOCK, 0) == b"A" * BLOCK + b"B" * BLOCK
    store.collect()


def test_slots_given_up_by_mistake_are_left_alone(store):
    disk = store.create("disk", 1 << 20)
    disk.pwrite(b"A" * BLOCK, 0)
    disk.flush()
    used = int(disk._tree.ids(0, 1)[0])
    store._engine.reservations.doom_later([(used, 1)])
    disk.pwrite(b"B" * BLOCK, BLOCK)
    disk.flush()
    store.collect()
    disk.close()
    with store.device("disk", readonly=True) as again:
        assert again.pread(BLOCK, 0) == b"A" * BLOCK


def test_flush_of_a_closed_clone_is_refused(store):
    disk = store.create("disk", 1 << 20)
    disk.pwrite(b"A" * BLOCK, 0)
    disk.discard()
    with pytest.raises(cowstore.ClosedError):
        disk.flush()
    disk.close()  # harmless


def test_many_small_trims_stay_bounded(store):
    disk = store.create("disk", 64 << 30)
    for number in range(3 * CHANGED_LIMIT):
        disk.pwrite(b"x", number << 21)
        if number % 512 == 511:
            disk.flush()
    for number in range(3 * CHANGED_LIMIT):
        disk.trim(BLOCK, number << 21)
        assert len(disk._publisher.draft.changed) <= CHANGED_LIMIT + 4
    disk.flush()
    assert not any(extent.data for extent in disk.extents())
    disk.close()


@pytest.mark.parametrize("harm", ["wrong bytes", "segment is gone"])
def test_a_damaged_block_elsewhere_does_not_keep_others_from_writing(tmp_path, harm):
    content = os.urandom(BLOCK)
    path = tmp_path / "a.store"
    with cowstore.open(path, create=True) as store:
        disk = store.create("disk", 1 << 20)
        disk.pwrite(content, 0)
        disk.flush()
        block_id = int(disk._tree.ids(0, 1)[0])
        file = store._engine.segments.path(block_id >> 18)
        disk.close()
    if harm == "segment is gone":
        file.rename(file.with_suffix(".away"))
    else:
        with open(file, "r+b") as data:
            data.seek(SLOTS_OFFSET + (block_id & SLOT_MASK) * BLOCK)
            data.write(bytes(byte ^ 1 for byte in content[:16]))
    with cowstore.open(path) as store:
        if harm == "segment is gone":
            store._engine.reservations._barren[block_id >> 18, 1] = -1
        other = store.create("other", 1 << 20)
        if harm == "wrong bytes":
            other.pwrite(content, 0)
            other.flush()
            assert int(other._tree.ids(0, 1)[0]) != block_id
            assert other.pread(BLOCK, 0) == content
            with (
                store.device("disk", readonly=True) as damaged,
                pytest.raises(cowstore.BlockCorruptError) as caught,
            ):
                damaged.pread(BLOCK, 0)
            assert (caught.value.name, caught.value.offset) == ("disk", 0)
        else:
            interner = store._engine.workshop.interner(False)
            assert not interner._candidates([store._engine.hasher.digest(content)]).any()
            interner.close()
        other.close()
