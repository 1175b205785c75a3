"""Leases: who holds what, in this process and in others, and what becomes of the lock files.

What they mean for devices, and what a second writer is told, is shown in test_bad_neighbours.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import cowstore
from cowstore.files import Disk, File
from cowstore.leases import Leases

ROOT = Path(__file__).parents[2]

HOLDING = """
import sys
from pathlib import Path
from cowstore.files import Disk
from cowstore.leases import Leases
held = Leases(Disk(), Path(sys.argv[1])).take(7, "it", exclusive=sys.argv[2] == "writer")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def leases(tmp_path) -> Leases:
    return Leases(Disk(), tmp_path)


def test_readers_share_and_writers_do_not(leases):
    first, second = (leases.take(7, "it", exclusive=False) for _ in range(2))
    with pytest.raises(cowstore.InUseError):
        leases.take(7, "it", exclusive=True)
    first.close()
    first.close()  # harmless, and not the other reader's end
    with pytest.raises(cowstore.InUseError):
        leases.take(7, "it", exclusive=True)
    second.close()
    writer = leases.take(7, "it", exclusive=True)
    for exclusive in (True, False):
        with pytest.raises(cowstore.InUseError, match="it is in use by this process") as caught:
            leases.take(7, "it", exclusive=exclusive)
        assert (caught.value.what, caught.value.holder) == ("it", os.getpid())
    leases.take(8, "another", exclusive=True).close()
    writer.close()
    leases.take(7, "it", exclusive=True).close()


@pytest.mark.parametrize("exclusive", [True, False])
def test_asking_tells_who_holds_and_takes_nothing(leases, tmp_path, exclusive):
    assert not leases.is_held(7)
    assert list(tmp_path.iterdir()) == []
    held = leases.take(7, "it", exclusive=exclusive)
    assert leases.is_held(7)
    held.close()
    for _ in range(2):
        assert not leases.is_held(7)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_question_at_the_same_moment_refuses_nobody(leases, tmp_path, monkeypatch, exclusive):
    """is_held() has the lock for a moment; whoever wants it then waits for that moment."""
    leases.take(7, "it", exclusive=True).close()
    asking = Disk().open(tmp_path / "7")
    assert asking.try_lock(exclusive=True)
    monkeypatch.setattr("cowstore.leases.time", SimpleNamespace(sleep=lambda _: asking.unlock()))
    leases.take(7, "it", exclusive=exclusive).close()
    asking.close()


@pytest.mark.parametrize("kind", ["writer", "reader"])
def test_another_process_holds_until_its_end(leases, tmp_path, kind):
    words = [sys.executable, "-c", HOLDING, str(tmp_path), kind]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            assert leases.is_held(7)
            with pytest.raises(cowstore.InUseError, match=f"process {other.pid}") as caught:
                leases.take(7, "it", exclusive=True)
            assert caught.value.holder == other.pid
            if kind == "reader":
                leases.take(7, "it", exclusive=False).close()
        finally:
            other.kill()
    assert not leases.is_held(7)
    leases.take(7, "it", exclusive=True).close()


def removing(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Has the lock file removed after it was opened and before it is locked, so many times."""
    lock, left = File.try_lock, [None] * times

    def try_lock(file: File, *, exclusive: bool) -> bool:
        if left:
            left.pop()
            file.path.unlink()
        return lock(file, exclusive=exclusive)

    monkeypatch.setattr(File, "try_lock", try_lock)


def test_the_lock_of_a_removed_file_is_worth_nothing(leases, monkeypatch):
    """Who deletes a device removes its lock file, which somebody else may have opened before."""
    removing(monkeypatch, times=3)
    held = leases.take(7, "it", exclusive=True)
    with pytest.raises(cowstore.InUseError):
        leases.take(7, "it", exclusive=True)
    held.close()


def test_a_lock_file_that_is_removed_again_and_again(leases, monkeypatch):
    removing(monkeypatch, times=1000)
    with pytest.raises(cowstore.StoreError, match="the lease of it changes all the time"):
        leases.take(7, "it", exclusive=True)


def test_lock_files_go_with_what_they_are_for(path, store):
    names = [f"disk-{number}" for number in range(3)]
    store.create("base", 4096).close()
    store.clone_many("base", names)
    for name in names:
        store.device(name).close()
    numbers = {str(store.info(name).number) for name in ("base", *names)}

    def lock_files() -> set[str]:
        return {one.name for one in (path / "leases").iterdir() if one.name.isdigit()}

    assert numbers <= lock_files()
    store.delete(*names, "base")
    assert not numbers & lock_files()
    with store.create("last", 4096) as last:
        last.pwrite(b"a", 0)  # with this the process takes a lease of its own
        last.flush()
    store.delete("last")
    assert len(lock_files()) == 1
    store.close()
    assert not lock_files()
