"""A disk that is full: a clear error, nothing lost, a way out, and never a signal.

Each play runs in a process of its own, on a small file system of its own: what a mapping writes where there is no
space left ends a process with SIGBUS, which no test inside it could tell.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import cowstore
from cowstore import NoSpaceError
from cowstore.environment import Environment
from cowstore.leases import Leases

ROOT = Path(__file__).parents[2]
BLOCK = 4096
MIB = 1 << 20
SIZES = {"tmpfs": 64 * MIB, "ext4": 64 * MIB, "xfs": 300 * MIB, "btrfs": 128 * MIB}  # of the file systems
MAKE = {
    "ext4": ["mke2fs", "-q", "-t", "ext4", "-m", "0"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
}
CONTENT = os.urandom(BLOCK) * (8 * MIB // BLOCK)


@pytest.fixture
def full_disk(kind: str, tmp_path: Path) -> Iterator[Path]:
    """A directory on a small file system of its own, which each play fills up."""
    place, image = tmp_path / "small", tmp_path / "image"
    place.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZES[kind]}", "none", str(place)]
    else:
        with image.open("wb") as file:
            file.truncate(SIZES[kind])
        subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
        command = ["mount", "-o", "loop", str(image), str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount {kind} here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def run(play: Callable[[Path], None], place: Path) -> None:
    program = (
        f"import sys, pathlib; from {__name__} import {play.__name__} as play; play(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, place],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr}"


def free(place: Path) -> int:
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def random_disk(size: int) -> io.BytesIO:
    return io.BytesIO(os.urandom(size))


def fill(place: Path) -> None:
    """Takes all space there is, to the last byte."""
    with (place / "ballast").open("ab", buffering=0) as ballast:
        for size in (MIB, BLOCK, 1):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                pass
        os.fsync(ballast.fileno())


def refused(call: Callable[[], object]) -> NoSpaceError:
    with pytest.raises(NoSpaceError, match="no space left for") as refused:
        call()
    assert refused.value.hint
    assert refused.value.path in str(refused.value)
    return refused.value


def opened(store: cowstore.Store, name: str) -> cowstore.Clone:
    clone = store.device(name)
    assert isinstance(clone, cowstore.Clone)
    return clone


def names(store: cowstore.Store) -> list[str]:
    return [one.name for one in store.devices()]


def check_whole(store: cowstore.Store) -> None:
    """Every block that a device names is what its digest says."""
    for name in names(store):
        with store.device(name, readonly=True) as device:
            for extent in device.extents():
                for offset in range(extent.offset, extent.offset + extent.length, MIB):
                    device.pread(min(MIB, extent.offset + extent.length - offset), offset)


# ----------------------------------------------------------------------------------------------- plays


def play_import(place: Path) -> None:
    with cowstore.open(place / "s", create=True) as store:
        kept = os.urandom(8 * MIB)
        store.import_image(io.BytesIO(kept), "kept")
        used = store.stats().used
        for _ in range(3):  # each failure gives all of its space back
            error = refused(lambda: store.import_image(random_disk(free(place) * 2), "large"))
            assert Path(error.path).is_relative_to(place / "s")
            assert names(store) == ["kept"]
            store.collect()
            assert store.stats().used <= used
        store.import_image(random_disk(16 * MIB), "fits")
        with store.device("kept") as device:
            assert device.pread(len(kept), 0) == kept
        check_whole(store)
    assert sorted(path.name for path in place.iterdir() if path.name != "lost+found") == ["s"]


def play_write(place: Path) -> None:
    with cowstore.open(place / "s", create=True) as store:
        store.import_image(random_disk(24 * MIB), "ballast")
        desk = store.create("desk", 1 << 30)
        desk.pwrite(b"flushed", 0)
        desk.flush()
        written = b""

        def write() -> None:
            nonlocal written
            while True:
                piece = os.urandom(MIB)
                desk.pwrite(piece, BLOCK + len(written))
                written += piece

        refused(write)
        refused(desk.flush)
        assert len(written) > 8 * MIB
        assert desk.pread(len(written), BLOCK) == written  # what is not flushed is still there to be read
        with store.device("desk", readonly=True) as moment:
            assert moment.pread(8, 0) == b"flushed\0"
        store.delete("ballast")
        assert store.collect().freed * BLOCK >= 24 * MIB
        desk.flush()
        desk.pwrite(b"and on", 0)
        desk.close()
    with cowstore.open(place / "s") as store, opened(store, "desk") as desk:
        assert desk.pread(6, 0) == b"and on"
        assert desk.pread(len(written), BLOCK) == written
        check_whole(store)


def play_full_to_the_last_byte(place: Path) -> None:
    """Others have filled the disk: devices are read and deleted, and the space comes back."""
    store = cowstore.open(place / "s", create=True)
    kept = os.urandom(4 * MIB)
    store.import_image(io.BytesIO(kept), "kept")
    store.import_image(random_disk(16 * MIB), "old")
    store.clone("kept", "desk").close()
    desk, image = opened(store, "desk"), store.device("kept")
    desk.pwrite(b"unflushed", 0)
    fill(place)
    assert not list(place.glob("*tmp"))
    # Some of these find room in what they have, and some do not: either they are done, or nothing is.
    for number in range(3):
        before = names(store)
        with suppress(NoSpaceError):
            store.create(f"new-{number}", MIB).close()
            before = sorted([*before, f"new-{number}"])
        assert names(store) == before
        with suppress(NoSpaceError):
            store.clone_many("kept", [f"many-{number}-{each}" for each in range(3000)])
            before = names(store)
        assert names(store) == before
    refused(lambda: store.import_image(random_disk(16 * MIB), "large"))
    refused(lambda: store.export("kept", place / "out", reflink="never"))  # to share what is there needs no room
    refused(lambda: store.backup(place / "copy"))
    assert image.pread(len(kept), 0) == kept
    assert desk.pread(9, 0) == b"unflushed"
    store.delete("old")
    store.collect()
    desk.flush()
    store.import_image(random_disk(8 * MIB), "new")
    fill(place)
    store.delete("new", *(name for name in names(store) if name not in ("kept", "desk")))
    store.collect()
    desk.pwrite(b"and on", 0)
    for device in (desk, image):
        device.close()
    store.close()
    (place / "ballast").unlink()
    with cowstore.open(place / "s") as store:
        assert names(store) == ["desk", "kept"]
        store.collect()
        assert (place / "s" / "reserve").stat().st_blocks > 0  # the next full disk finds it again
        with opened(store, "desk") as desk:
            assert desk.pread(9, 0) == b"and onhed"
        check_whole(store)
    assert sorted(path.name for path in place.iterdir() if path.name != "lost+found") == ["s"]


def play_close(place: Path) -> None:
    """A store can always be closed; a clone whose last writes find no room says so."""
    store = cowstore.open(place / "s", create=True)
    store.import_image(random_disk(4 * MIB), "image")
    desk = store.clone("image", "desk")
    desk.pwrite(os.urandom(8 * MIB // 2), 0)
    fill(place)
    refused(desk.close)
    assert desk.closed
    store.close()
    with cowstore.open(place / "s") as again:
        assert names(again) == ["desk", "image"]
        check_whole(again)


def play_many_readers(place: Path) -> None:
    """LMDB's table of readers is mapped: a reader on a page that has no space yet would be a SIGBUS."""
    with cowstore.open(place / "s", create=True) as store:
        store.import_image(random_disk(MIB), "image")
        store.clone_many("image", [f"desk-{number}" for number in range(300)])
        fill(place)
        moments = [store._environment.read() for _ in range(200)]  # three pages of the table
        for moment in moments:
            moment.close()


def play_open(place: Path) -> None:
    """A store that was copied without LMDB's lock file, and is opened on a full disk."""
    with cowstore.open(place / "s", create=True) as store:
        store.import_image(io.BytesIO(CONTENT), "image")
    (place / "s" / "catalog" / "lock.mdb").unlink()
    fill(place)
    for readonly in (True, False):
        with suppress(NoSpaceError):
            cowstore.open(place / "s", readonly=readonly).close()
    (place / "ballast").unlink()
    with cowstore.open(place / "s") as store, store.device("image") as image:
        assert image.pread(len(CONTENT), 0) == CONTENT


def play_init(place: Path) -> None:
    fill(place)
    refused(lambda: cowstore.open(place / "s", create=True))
    assert sorted(path.name for path in place.iterdir() if path.name != "lost+found") == ["ballast"]
    (place / "ballast").unlink()
    cowstore.open(place / "s", create=True).close()


LONG_PLAYS = [play_import, play_write]
PLAYS = [play_full_to_the_last_byte, play_close, play_many_readers, play_open, play_init]
CASES = [
    pytest.param(
        kind,
        play,
        marks=pytest.mark.program(*MAKE.get(kind, [])[:1]),
        id=f"{kind}-{play.__name__.removeprefix('play_')}",
    )
    for kind in SIZES
    for play in (PLAYS if kind == "xfs" else LONG_PLAYS + PLAYS)  # an XFS is never small
]


@pytest.mark.root
@pytest.mark.program("mount", "umount")
@pytest.mark.parametrize(("kind", "play"), CASES)
def test_full_disk(full_disk: Path, play: Callable[[Path], None]) -> None:
    run(play, full_disk)


# ------------------------------------------------------------------------ commits that find no room


@contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it lasts, no transaction finds room to be committed in."""

    def refuse(self: Environment, writer: object) -> None:
        raise NoSpaceError(str(self.path))

    with monkeypatch.context() as patch:
        patch.setattr(Environment, "_commit", refuse)
        yield


@pytest.fixture
def store(tmp_path: Path) -> Iterator[cowstore.Store]:
    with cowstore.open(tmp_path / "s", create=True) as store:
        store.import_image(io.BytesIO(CONTENT), "image")
        store.clone("image", "desk").close()
        yield store


def test_what_was_given_up_is_not_forgotten(store, monkeypatch):
    """A collection that finds no room is tried again, and then takes everything that a failed import left."""
    used = store.stats().used
    with no_room(monkeypatch):
        refused(lambda: store.import_image(random_disk(MIB), "large"))
        refused(store.collect)
    store.collect()
    assert store.stats().used <= used
    assert store.stats().doomed == 0
    store.close()
    with cowstore.open(store.path) as again:
        assert again.collect().erased == 0  # nothing was left to a lease that nobody holds


def test_what_was_published_of_an_import_is_not_forgotten(store, monkeypatch):
    """The hidden image of a failed import is dropped by the next collection, where it could not be at once."""
    used = store.stats().used
    with ExitStack() as stack:

        def progress(_step: str, done: int, _total: int) -> None:
            if done == 72 * MIB:  # the first slice of 64 MiB is on its way, or published
                stack.enter_context(no_room(monkeypatch))

        refused(lambda: store.import_image(random_disk(80 * MIB), "large", progress=progress))
        refused(store.collect)
    store.collect()
    assert store.stats().used <= used


def test_a_store_can_always_be_closed(store, monkeypatch):
    desk = store.device("desk")
    desk.pwrite(os.urandom(MIB), 0)
    desk.flush()
    with no_room(monkeypatch):
        store.close()
    assert desk.closed
    with cowstore.open(store.path) as again:
        again.collect()
        assert again.stats().reserved == 0


def test_reading_needs_no_room(store, monkeypatch, tmp_path):
    with no_room(monkeypatch):
        with store.device("desk", readonly=True) as moment, store.device("image") as image:
            assert moment.pread(len(CONTENT), 0) == image.pread(len(CONTENT), 0) == CONTENT
        store.export("desk", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.create("new", MIB),
        lambda store: store.clone("image", "new"),
        lambda store: store.clone("image", "new", size=64 * MIB),
        lambda store: store.clone_many("image", ["a", "b"]),
        lambda store: store.fork("desk", "new"),
        lambda store: store.seal("desk", "new"),
        lambda store: store.reset("desk"),
        lambda store: store.rename("desk", "new"),
        lambda store: store.delete("desk"),
        lambda store: store.import_image(random_disk(MIB), "new"),
    ],
)
def test_a_transaction_without_room_changes_nothing(store, monkeypatch, call):
    before = store.lineage()
    with no_room(monkeypatch):
        refused(lambda: call(store))
    assert store.lineage() == before
    made = call(store)  # and the next one does
    if isinstance(made, cowstore.Device):
        made.close()


@pytest.fixture
def no_lock_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Leases, number: int, _what: str, *, exclusive: bool) -> None:
        raise NoSpaceError(f"leases/{number}")

    monkeypatch.setattr(Leases, "take", refuse)


def test_a_clone_that_gets_no_lock_file_is_not_made(store, no_lock_files):
    before = store.lineage()
    for call in (lambda: store.create("new", MIB), lambda: store.clone("image", "new")):
        refused(call)
        assert store.lineage() == before


def test_reading_needs_no_lock_file(store, no_lock_files):
    for name in ("image", "desk"):
        with store.device(name, readonly=True) as device:
            assert device.pread(len(CONTENT), 0) == CONTENT
    refused(lambda: store.device("desk"))
