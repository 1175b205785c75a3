"""Others who hold what is wanted: in the same process, in another one, stopped, or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import cowstore
from cowstore import InUseError

BLOCK = 4096
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[cowstore.Store]:
    """An image `base` and a clone `desk` of it."""
    (tmp_path / "disk").write_bytes(os.urandom(20 * BLOCK))
    with cowstore.open(tmp_path / "s", create=True) as store:
        store.import_image(tmp_path / "disk", "base")
        store.clone("base", "desk").close()
        yield store


@contextmanager
def neighbour(path: Path, program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the store open as `store`, runs a program, says that it is done, and waits."""
    head = "import os, sys, cowstore\nstore = cowstore.open(sys.argv[1])"
    text = f"{head}\n{program}\nprint(flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", text, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"\n"
            yield process
        finally:
            process.kill()


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def calls_that_need_the_writers_lease(store: cowstore.Store) -> list[Callable[[], object]]:
    return [
        lambda: store.device("desk"),
        lambda: store.reset("desk"),
        lambda: store.delete("desk"),
        lambda: store.delete("base", "desk"),
    ]


def calls_that_do_not(store: cowstore.Store) -> list[Callable[[], object]]:
    return [
        lambda: store.device("desk", readonly=True).close(),
        lambda: store.fork("desk", "child"),
        lambda: store.seal("desk", "image"),
        lambda: store.clone("desk", "another").close(),
        lambda: store.rename("desk", "renamed"),
        lambda: store.rename("renamed", "desk"),
        lambda: store.usage("desk"),
        store.collect,
        lambda: store.delete("child", "image", "another"),
    ]


# ------------------------------------------------------------------------------------------- one writer


def assert_refused(store: cowstore.Store, holder: int) -> None:
    before = store.lineage()
    for call in calls_that_need_the_writers_lease(store):
        with pytest.raises(InUseError, match="clone 'desk' is in use by") as refused:
            call()
        assert (refused.value.what, refused.value.holder) == ("clone 'desk'", holder)
        assert str(holder) in str(refused.value) or holder == os.getpid()
        assert refused.value.hint
    assert store.lineage() == before
    for call in calls_that_do_not(store):
        call()
    assert store.lineage() == before


def test_a_second_writer_in_the_same_process(store):
    with store.device("desk") as desk:
        assert_refused(store, os.getpid())
        with cowstore.open(store.path) as again:
            assert_refused(again, os.getpid())
        desk.pwrite(b"mine", 0)
    with store.device("desk") as desk:
        assert desk.pread(4, 0) == b"mine"


def test_a_second_writer_in_another_process(store):
    with neighbour(store.path, "desk = store.device('desk'); desk.pwrite(b'mine', 0); desk.flush()") as process:
        assert_refused(store, process.pid)
        with store.device("desk", readonly=True) as moment:
            assert moment.pread(4, 0) == b"mine"
    process.wait()
    with store.device("desk") as desk:  # the kernel gave the lease up with its process
        assert desk.pread(4, 0) == b"mine"


def test_a_second_writer_in_another_thread(store):
    """Of many who try at once, one gets it."""
    opened: list[cowstore.Device] = []
    refused: list[InUseError] = []
    start = threading.Barrier(8)

    def attempt() -> None:
        start.wait()
        try:
            opened.append(store.device("desk"))
        except InUseError as error:
            refused.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(refused)) == (1, 7)
    opened[0].close()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_image_that_is_read_is_not_deleted(store, elsewhere):
    def assert_kept(holder: int) -> None:
        with pytest.raises(InUseError, match="image 'base' is in use") as refused:
            store.delete("base")
        assert refused.value.holder == holder
        assert [one.name for one in store.devices()] == ["base", "desk"]

    if elsewhere:
        with neighbour(store.path, "base = store.device('base')") as process:
            assert_kept(process.pid)
            store.device("base").close()  # any number may read it
    else:
        with store.device("base"), store.device("base"):
            assert_kept(os.getpid())
    store.delete("base")


def test_two_stores_on_one_path_in_one_process(store, tmp_path):
    (tmp_path / "link").symlink_to("s")
    with cowstore.open(tmp_path / "link") as other, cowstore.open(store.path, readonly=True) as reader:
        with other.create("theirs", MIB) as theirs:
            theirs.pwrite(b"theirs", 0)
        assert [one.name for one in store.devices()] == ["base", "desk", "theirs"]
        with store.device("theirs") as theirs, reader.device("theirs") as moment:
            theirs.pwrite(b"ours  ", 0)
            assert moment.pread(6, 0) == b"theirs"
        store.collect()
        store.delete("theirs")
    assert [one.name for one in store.devices()] == ["base", "desk"]


def test_a_device_deleted_and_made_again_is_another_one(store):
    with neighbour(store.path, "desk = store.device('desk', readonly=True)"):
        store.delete("desk")
        store.create("desk", MIB).close()
    assert store.info("desk").parent is None


# -------------------------------------------------------------------------------------------- the locks


def test_one_collection_at_a_time(store):
    hold = (
        "def progress(*_):\n"
        "    print(flush=True)\n"
        "    sys.stdin.read()\n"
        "store.collect(progress=progress)\n"
    )  # fmt: skip
    with neighbour(store.path, hold) as process:
        for dry_run in (False, True):
            with pytest.raises(InUseError, match=f"the collector is in use by process {process.pid}") as refused:
                store.collect(dry_run=dry_run)
            assert refused.value.holder == process.pid
            assert refused.value.hint
        store.create("scratch", MIB).close()
    process.wait()
    assert store.collect().waiting == 0


def test_one_collection_at_a_time_in_one_process(store):
    def again(*_: object) -> None:
        with pytest.raises(InUseError, match="the collector is in use by this process"):
            store.collect()

    store.collect(progress=again)


def test_a_stopped_process_that_holds_the_write_lock(store, monkeypatch):
    """LMDB would wait for ever."""
    desk = store.device("desk")
    desk.pwrite(b"mine", 0)
    hold = "w = store._environment.write()\nw.__enter__()"
    with neighbour(store.path, hold) as process, stopped(process), cowstore.open(store.path) as again:
        monkeypatch.setattr(again._environment._gate, "_timeout", 1.0)
        calls: list[Callable[[], object]] = [
            lambda: again.create("new", 1), lambda: again.rename("base", "new"), lambda: again.delete("base"),
            lambda: again.clone_many("base", ["new"]), desk.flush, lambda: desk.fork("new"),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(InUseError, match="write lock") as refused:
                call()
            assert refused.value.holder == process.pid
            assert "stopped" in refused.value.hint
        assert [one.name for one in again.devices()] == ["base", "desk"]  # readers do not wait
        assert desk.pread(4, 0) == b"mine"
    process.wait()
    desk.flush()  # nothing is lost
    desk.close()
    with store.device("desk") as desk:
        assert desk.pread(4, 0) == b"mine"


def test_a_stopped_reader_holds_the_collector_up_and_is_named(store, monkeypatch):
    monkeypatch.setattr("cowstore.collector._PATIENCE", 0.5)
    with store.device("desk") as desk:
        desk.pwrite(os.urandom(20 * BLOCK), 0)
    with neighbour(store.path, "it = store.diff('base', 'desk'); next(it)") as process, stopped(process):
        store.delete("desk")
        held = store.collect()
        assert (held.freed, held.pins) == (0, (process.pid,))
        assert held.waiting == held.doomed > 20
    process.wait()
    assert store.collect().freed == held.waiting


# ------------------------------------------------------------------------------------------- the killed


@pytest.mark.parametrize(
    "program",
    [
        pytest.param("store.import_image(sys.argv[1] + '/../big', 'new', progress=told)", id="import"),
        pytest.param("store.backup(sys.argv[1] + '/../copy', progress=told)", id="backup"),
        pytest.param("store.export('base', sys.argv[1] + '/../out', progress=told)", id="export"),
        pytest.param(
            "desk = store.device('desk')\ndesk.pwrite(os.urandom(32 << 20), 0)\ntold('', 1 << 30, 0)", id="write"
        ),
    ],
)
def test_the_killed_leave_nothing_that_a_collection_does_not_remove(store, tmp_path, program):
    (tmp_path / "big").write_bytes(os.urandom(80 * MIB))
    with store.device("desk") as desk:
        desk.resize(32 * MIB)
    store.collect()
    before = store.lineage(), store.stats().used
    told = (
        "def told(_, done, total):\n"
        "    if done >= 72 << 20 or done == total:\n"
        "        print(flush=True)\n"
        "        sys.stdin.read()\n"
    )  # fmt: skip
    with neighbour(store.path, told + program) as process:
        assert store.lineage() == before[0]
    assert process.wait() == -signal.SIGKILL
    assert store.lineage() == before[0]
    done = store.collect()
    assert done.waiting == 0
    assert (store.lineage(), store.stats().used) == before
    assert store.stats().doomed == 0
    assert len(list((store.path / "leases").glob("[0-9]*"))) <= 3  # of ours, and of what was opened
    store.close()
    with cowstore.open(store.path) as again:
        assert again.stats().reserved == 0
        assert again.import_image(tmp_path / "big", "new").size == 80 * MIB


def test_what_was_flushed_before_the_kill_is_there(store):
    program = "desk = store.device('desk'); desk.pwrite(b'kept', 0); desk.flush(); desk.pwrite(b'lost', 0)"
    with neighbour(store.path, program) as process:
        pass
    process.wait()
    with store.device("desk") as desk:
        assert desk.pread(4, 0) == b"kept"
