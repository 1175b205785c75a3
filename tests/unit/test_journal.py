"""Journals: what was written and not flushed is there after the death of the process, once, and only then."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import cowstore
from cowstore import NoSpaceError, PoisonedError, catalog, journal
from cowstore.files import Disk, File
from cowstore.layout import CHANGE, JOURNAL_SIZE

BLOCK = 4096
SIZE = 64 * BLOCK + 100


def opened(store: cowstore.Store, name: str = "clone") -> cowstore.Clone:
    clone = store.device(name)
    assert isinstance(clone, cowstore.Clone)
    return clone


def files(path: Path) -> list[str]:
    return sorted(one.name for one in (path / "journals").glob("*"))


def killed(path: Path, program: str) -> None:
    """Runs lines in another process, which keeps a journal of `clone`, and kills it at their end."""
    head = (
        "import os, signal, sys, cowstore\n"
        f"store = cowstore.open({str(path)!r})\nclone = store.device('clone')\nclone.keep_journal()\n"
    )
    end = "\nos.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run(
        [sys.executable, "-c", head + program + end], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr


@pytest.fixture
def clone(store: cowstore.Store) -> str:
    with store.create("clone", SIZE) as clone:
        clone.pwrite(b"flushed", 0)
    return "clone"


def content(path: Path) -> bytes:
    with cowstore.open(path) as store, opened(store) as clone:
        return clone.pread(clone.size, 0)


def test_what_was_written_is_there_after_a_kill(clone, path):
    killed(path, f"clone.pwrite(b'not flushed', {BLOCK - 3})\nclone.zero(3, 1)\nclone.pwrite(b'x' * 9000, 5)")
    expected = bytearray(SIZE)
    expected[:7] = b"flushed"
    expected[BLOCK - 3 : BLOCK + 8] = b"not flushed"
    expected[1:4] = bytes(3)
    expected[5:9005] = b"x" * 9000
    assert files(path) != []
    assert content(path) == expected
    assert files(path) == [], "it was done again, and flushed"


def test_without_a_journal_it_is_not(clone, path):
    killed(path, "clone.keep_journal = None\nclone._journal.is_kept = False\nclone.pwrite(b'lost', 0)")
    assert content(path)[:7] == b"flushed"
    assert files(path) == []


@pytest.mark.parametrize("seed", range(6))
def test_any_changes_and_flushes_before_the_kill(clone, path, seed):
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import random\n"
    program += "from journal_changes import change, SIZE\n"
    program += f"dice, model = random.Random({seed}), bytearray(b'flushed' + bytes(SIZE - 7))\n"
    program += "for _ in range(60): change(clone, model, dice)\n"
    program += f"open({str(path.parent / 'model')!r}, 'wb').write(model)"
    killed(path, program)
    assert content(path) == (path.parent / "model").read_bytes()


def test_size_is_recorded_too(clone, path):
    killed(path, f"clone.resize({SIZE + BLOCK})\nclone.pwrite(b'tail', {SIZE + BLOCK - 4})\nclone.resize(100)")
    assert content(path) == b"flushed" + bytes(93)


def test_a_flush_takes_what_was_recorded_before_it(store, clone, path):
    with opened(store) as device:
        device.keep_journal()
        device.pwrite(b"one", 0)
        assert len(files(path)) == 1
        assert device.journal_size > 3
        device.flush()
        assert files(path) == []
        assert device.journal_size == 0
        device.pwrite(b"two", 0)
        device.pwrite(b"three", 0)
        assert len(files(path)) == 1
    assert files(path) == []


def test_what_comes_while_a_flush_is_under_way_stays_recorded(store, clone, path, monkeypatch):
    with opened(store) as device:
        device.keep_journal()
        device.pwrite(b"before", 0)
        commit = type(device._publisher)._commit

        def slow(self, flush):
            device.pwrite(b"meanwhile", 0)
            commit(self, flush)

        monkeypatch.setattr(type(device._publisher), "_commit", slow)
        device.flush()
        monkeypatch.undo()
        assert len(files(path)) == 1
        assert b"meanwhile" in (path / "journals" / files(path)[0]).read_bytes()


def test_a_kill_between_publishing_and_removing_does_no_harm(clone, path):
    program = (
        "from cowstore.journal import Journal\n"
        "Journal.covered = lambda self: None\n"
        "clone.pwrite(b'old', 0)\nclone.flush()\nclone.pwrite(b'new', 1)\nclone.flush()\nclone.pwrite(b'last', 9)"
    )
    killed(path, program)
    assert len(files(path)) == 3
    assert content(path)[:13] == b"onewhed\0\0last"


def test_a_kill_while_it_is_done_again_does_no_harm(clone, path):
    killed(path, "clone.pwrite(b'one', 0)\nclone.pwrite(b'two', 10)")
    program = "import os, signal, cowstore\nfrom cowstore.journal import Journal\n"
    program += "Journal.drop = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
    program += f"cowstore.open({str(path)!r}).device('clone')"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert files(path) != []
    assert content(path)[:13] == b"oneshed\0\0\0two"


@pytest.mark.parametrize("missing", [1, 4, 5, CHANGE.size, CHANGE.size + 3])
def test_a_change_that_is_cut_off_is_none(clone, path, missing):
    killed(path, "clone.pwrite(b'whole', 0)\nclone.pwrite(b'half', 0)")
    place = path / "journals" / files(path)[0]
    os.truncate(place, place.stat().st_size - missing)
    assert content(path)[:7] == b"wholeed"


def test_a_journal_of_an_earlier_boot_is_nothing(clone, path, monkeypatch):
    """The host's page cache is gone, and so are the guests: what was flushed is what there is."""
    killed(path, "clone.pwrite(b'gone', 0)")
    monkeypatch.setattr(journal, "boot_id", lambda: b"another boot id.")
    assert content(path)[:7] == b"flushed"
    assert files(path) == []


def test_a_journal_of_another_clone_is_nothing(clone, path, store):
    store.create("other", SIZE).close()
    other = store.info("other").number
    killed(path, "clone.pwrite(b'mine', 0)")
    (path / "journals" / files(path)[0]).rename(path / "journals" / f"{other}.1")
    with opened(store, "other") as device:
        assert device.pread(4, 0) == bytes(4)


@pytest.mark.parametrize("how", ["reset", "delete", "discard", "reset open"])
def test_what_is_given_up_does_not_come_back(store, clone, path, how):
    killed(path, "clone.pwrite(b'unwanted', 0)")
    if how == "reset":
        store.reset("clone")
    elif how == "delete":
        store.delete("clone")
        store.create("clone", SIZE).close()
    else:
        device = opened(store)
        device.keep_journal()
        device.pwrite(b"unwanted, too", 0)
        device.discard() if how == "discard" else device.reset()
    assert files(path) == []
    store.close()
    found = content(path)
    assert b"too" not in found
    assert found[:8] == (b"unwanted" if how == "discard" else bytes(8)), "what the kill left was flushed before"


def test_others_see_the_last_flush_meanwhile(store, clone, path):
    killed(path, "clone.pwrite(b'not yet', 0)")
    with store.device("clone", readonly=True) as moment:
        assert moment.pread(7, 0) == b"flushed"
    store.fork("clone", "child")
    with opened(store, "child") as child:
        assert child.pread(7, 0) == b"flushed"


class FullDisk(Disk):
    """Journals find no room, after so many bytes of the write that does not fit."""

    taken = 0

    def _file(self, path: Path, fd: int) -> File:
        file = super()._file(path, fd)
        if path.parent.name == "journals":
            file.write_many = self._refuse(file)  # type: ignore[method-assign]
        return file

    def _refuse(self, file: File):
        write = file.write_many

        def write_many(buffers, offset):
            joined = b"".join(buffers)
            if len(joined) < 100:
                write(buffers, offset)
                return
            file.write_at(joined[: self.taken], offset)
            raise NoSpaceError(str(file.path))

        return write_many


@pytest.mark.parametrize("taken", [0, 10, CHANGE.size, 1000])
def test_a_write_that_cannot_be_recorded_is_refused_and_hides_nothing(path, taken):
    disk = FullDisk()
    disk.taken = taken
    with cowstore.open(path, create=True, _disk=disk) as store:
        clone = store.create("clone", SIZE)
        clone.keep_journal()
        clone.pwrite(b"fits", 0)
        with pytest.raises(NoSpaceError):
            clone.pwrite(bytes(range(256)) * 16, BLOCK)
        clone.pwrite(b"fits too", 100)
        found = list(store._journals.of(clone.info.number).left())
        changes = [(offset, data) for kind, offset, _, data in found if kind != JOURNAL_SIZE]
        assert changes == [(0, b"fits"), (100, b"fits too")]


@pytest.mark.parametrize("failure", [NoSpaceError("segments"), PoisonedError("sync")])
def test_a_close_that_cannot_flush_keeps_the_journal(store, clone, path, monkeypatch, failure):
    device = opened(store)
    device.keep_journal()
    device.pwrite(b"precious", 0)

    def fails(*_: object) -> None:
        raise failure

    monkeypatch.setattr(type(device._publisher), "_commit", fails)
    with pytest.raises(type(failure)):
        device.close()
    monkeypatch.undo()
    assert content(path)[:8] == b"precious"


def test_an_opening_that_cannot_flush_keeps_the_journal(store, clone, path, monkeypatch):
    killed(path, "clone.pwrite(b'precious', 0)")
    monkeypatch.setattr(cowstore.Clone, "flush", lambda self: (_ for _ in ()).throw(NoSpaceError("segments")))
    with pytest.raises(NoSpaceError):
        store.device("clone")
    monkeypatch.undo()
    with opened(store) as device:
        assert device.pread(8, 0) == b"precious"


def test_a_clone_that_nobody_serves_has_none(store, clone, path):
    with opened(store) as device:
        device.pwrite(random.Random(1).randbytes(BLOCK), 0)
        assert device.journal_size == 0
        assert not (path / "journals").exists()


def test_deferred_changes_are_recorded_together(store, clone, path):
    with opened(store) as device:
        device.keep_journal()
        device.defer_records(True)
        device.pwrite(b"one", 0)
        device.zero(2, 1)
        assert files(path) == []
        device.record()
        device.defer_records(False)
        device.pwrite(b"two", 50)
        left = store._journals.of(device.info.number).left()
        found = [(offset, data) for kind, offset, _, data in left if kind != JOURNAL_SIZE]
        assert found == [(0, b"one"), (1, b""), (50, b"two")]


def test_a_flush_records_what_waits_first(store, clone, path):
    """Or it would be recorded behind the turn, and done again over what came later."""
    with opened(store) as device:
        device.keep_journal()
        device.defer_records(True)
        device.pwrite(b"waits", 0)
        device.flush()
        device.defer_records(False)
        assert files(path) == []
        assert device.journal_size == 0


def test_what_cannot_be_recorded_together_waits_no_more(path):
    with cowstore.open(path, create=True, _disk=FullDisk()) as store:
        clone = store.create("clone", SIZE)
        clone.keep_journal()
        clone.defer_records(True)
        clone.pwrite(bytes(range(256)) * 16, 0)
        with pytest.raises(NoSpaceError):
            clone.record()
        clone.record()
        assert {kind for kind, *_ in store._journals.of(clone.info.number).left()} <= {JOURNAL_SIZE}


def test_a_shrink_that_was_published_can_be_done_again(clone, path):
    """What was written behind the new end is done again too, on a device that has to be large enough for it."""
    program = (
        "from cowstore.journal import Journal\n"
        "Journal.covered = lambda self: None\n"
        f"clone.pwrite(b'behind', {SIZE - 100})\nclone.resize(8192)\nclone.flush()"
    )
    killed(path, program)
    assert content(path) == b"flushed" + bytes(8192 - 7)


def test_a_file_whose_closing_failed_is_not_forgotten(store, clone, path, monkeypatch):
    """It was in no list then, was never removed, and was done again over what was flushed later."""
    device = opened(store)
    device.keep_journal()
    device.pwrite(b"1", 0)
    close = File.close

    def fails_once(self: File) -> None:
        close(self)
        if self.path.parent.name == "journals":
            monkeypatch.undo()
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(File, "close", fails_once)
    with pytest.raises(OSError, match="Input/output"):
        device.flush()
    device.flush()
    assert files(path) == []
    device.close()


class BrokenDisk(FullDisk):
    """And what was written in part cannot be taken back either."""

    def _file(self, path: Path, fd: int) -> File:
        file = super()._file(path, fd)
        if path.parent.name == "journals":
            file.truncate = self._fails  # type: ignore[method-assign, assignment]
        return file

    @staticmethod
    def _fails(_: int) -> None:
        raise OSError(5, "Input/output error")


def test_bytes_of_a_guest_are_never_taken_for_changes(path):
    """Half a write stayed in the file, a shorter one went over its beginning, and the rest was done as resizes."""
    disk = BrokenDisk()
    disk.taken = 3000
    evil = CHANGE.pack(JOURNAL_SIZE, BLOCK, 0) * 200
    with cowstore.open(path, create=True, _disk=disk) as store:
        clone = store.create("clone", SIZE)
        clone.keep_journal()
        clone.pwrite(b"fits", 0)
        with pytest.raises(NoSpaceError):
            clone.pwrite(evil, BLOCK)
        clone.pwrite(b"more", 4)
        assert clone._journal is not None
        clone._journal.is_kept = False
        found = [change[0:2] for change in store._journals.of(clone.info.number).left()]
        assert (JOURNAL_SIZE, BLOCK) not in found
        assert (1, 4) in found
        clone.flush()
        assert files(path) == files(path)[-1:], "the broken one went with the flush"


def test_a_reset_that_fails_keeps_the_journal(store, clone, path, monkeypatch):
    killed(path, "clone.pwrite(b'precious', 0)")
    monkeypatch.setattr(catalog, "save", lambda *_: (_ for _ in ()).throw(NoSpaceError("catalog")))
    with pytest.raises(NoSpaceError):
        store.reset("clone")
    monkeypatch.undo()
    assert content(path)[:8] == b"precious"
