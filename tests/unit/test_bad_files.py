"""Files outside the store: sources that cannot be read or change meanwhile, and places that cannot be written."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowstore
from cowstore import ExistsError, InvalidError, NotFoundError, SourceError, StoreError

BLOCK = 4096
MIB = 1 << 20
CONTENT = os.urandom(9 * MIB)  # three pieces of an import


class StopError(Exception):
    """Raised by a test's own callback."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").write_bytes(CONTENT)
    return tmp_path / "disk"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[cowstore.Store]:
    with cowstore.open(tmp_path / "s", create=True) as store:
        yield store


@pytest.fixture
def image(store: cowstore.Store, disk: Path) -> str:
    return store.import_image(disk, "image").name


@pytest.fixture(autouse=True)
def nothing_half_made(store: cowstore.Store, tmp_path: Path) -> Iterator[None]:
    """Whatever failed, what it had stored is given up, and nothing unfinished lies about."""
    yield
    devices = store.devices()
    store.close()
    with cowstore.open(store.path) as again:
        again.collect()
        assert again.devices() == devices
        assert again.stats().used == again.exclusive(*(one.name for one in devices))
        assert (again.stats().reserved, again.stats().doomed) == (0, 0)
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


def after(bytes_done: int, action: Callable[[], object]) -> Callable[[str, int, int], None]:
    """A progress callback that does something once, when so many bytes are done."""
    todo = [action]

    def progress(_step: str, done: int, _total: int) -> None:
        if done >= bytes_done and todo:
            todo.pop()()

    return progress


# ---------------------------------------------------------------------------------------------- import


def refused_import(store: cowstore.Store, source: object, **options: object) -> SourceError:
    with pytest.raises(SourceError) as refused:
        store.import_image(source, "image", **options)  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"cannot import {refused.value.source}: ")
    assert store.devices() == []
    return refused.value


def test_no_such_file(store, tmp_path):
    error = refused_import(store, tmp_path / "nowhere")
    assert error.source == str(tmp_path / "nowhere")
    assert "No such file" in str(error)


def test_a_directory(store, tmp_path):
    error = refused_import(store, tmp_path)
    assert "directory" in str(error)
    assert "mke2fs -d" in error.hint


def test_an_unreadable_file(store, disk, monkeypatch):
    disk.chmod(0)
    if os.geteuid() == 0:  # root may read everything
        real = os.open

        def refuse(path, *rest, **options):
            if path == str(disk):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return real(path, *rest, **options)

        monkeypatch.setattr(os, "open", refuse)
    assert "Permission denied" in str(refused_import(store, str(disk)))


def test_a_file_that_cannot_be_measured(store):
    """The memory of a process looks like a file, but has no end."""
    refused_import(store, "/proc/self/mem")


def test_a_file_with_content_but_no_length(store):
    """As there are in /proc: taken as a stream, not as an empty image."""
    text = Path("/proc/self/limits").read_bytes()
    assert os.stat("/proc/self/limits").st_size == 0
    assert store.import_image("/proc/self/limits", "limits").size == len(text)


def test_a_file_that_shrinks(store, disk):
    error = refused_import(store, disk, progress=after(4 * MIB, lambda: os.truncate(disk, 5 * MIB)))
    assert f"of {9 * MIB} bytes" in str(error)
    assert "import it again" in error.hint


def test_a_file_that_shrinks_to_what_was_read(store, disk):
    refused_import(store, disk, progress=after(8 * MIB, lambda: os.truncate(disk, 8 * MIB)))


def test_a_file_that_grows(store, disk):
    def grow() -> None:
        with disk.open("ab") as file:
            file.write(b"more")

    error = refused_import(store, disk, progress=after(4 * MIB, grow))
    assert "changed while it was read" in str(error)
    assert "import it again" in error.hint


@pytest.mark.parametrize("offset", [0, 5 * MIB], ids=["what was read", "what is still to be read"])
def test_a_file_that_is_written(store, disk, offset):
    def write() -> None:
        with disk.open("r+b") as file:
            file.seek(offset)
            file.write(b"other bytes, no other length")

    assert "changed" in str(refused_import(store, disk, progress=after(4 * MIB, write)))


def test_a_file_that_is_replaced_is_read_as_it_was(store, disk, tmp_path):
    def replace() -> None:
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").rename(disk)

    store.import_image(disk, "image", progress=after(4 * MIB, replace))
    with store.device("image") as image:
        assert image.pread(len(CONTENT), 0) == CONTENT


def test_a_disk_that_fails(store, disk, monkeypatch):
    real = os.preadv

    def fail(fd, buffers, offset):
        if offset >= 8 * MIB:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", fail)
    assert f"Input/output error at offset {8 * MIB}" in str(refused_import(store, disk))


class BadStream(io.RawIOBase):
    """So many good bytes, then whatever the answer is."""

    def __init__(self, good: int, answer: Callable[[], bytes | None]) -> None:
        self.good, self.answer = good, answer

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes | None:
        if not self.good:
            return self.answer()
        count, self.good = min(size, self.good), self.good - min(size, self.good)
        return os.urandom(count)


def fail_with(error: BaseException) -> Callable[[], bytes]:
    def answer() -> bytes:
        raise error

    return answer


def test_a_stream_that_fails(store):
    error = refused_import(store, BadStream(5 * MIB, fail_with(OSError(errno.EIO, "Input/output error"))))
    assert f"at offset {5 * MIB}" in str(error)


def test_a_stream_that_would_block(store):
    """No bytes at this moment are not the end."""
    assert "block" in str(refused_import(store, BadStream(5 * MIB, lambda: None)))


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_whatever_a_stream_or_a_callback_raises(store, disk, error):
    with pytest.raises(error):
        store.import_image(BadStream(5 * MIB, fail_with(error())), "image")
    with pytest.raises(error):
        store.import_image(disk, "image", progress=after(4 * MIB, fail_with(error())))
    assert store.devices() == []


def test_text_is_not_a_disk(store):
    with pytest.raises((TypeError, SourceError)):
        store.import_image(io.StringIO("text"), "image")
    assert store.devices() == []


def test_the_name_is_taken_meanwhile(store, disk):
    taken = after(4 * MIB, lambda: store.create("image", BLOCK).close())
    with pytest.raises(ExistsError, match="clone 'image' exists already"):
        store.import_image(disk, "image", progress=taken)
    assert [(one.name, one.kind) for one in store.devices()] == [("image", "clone")]


def test_an_empty_file_is_an_empty_image(store, tmp_path):
    (tmp_path / "empty").touch()
    assert store.import_image(tmp_path / "empty", "image").size == 0
    assert store.import_image(io.BytesIO(), "stream").size == 0


# ---------------------------------------------------------------------------------------------- export


def test_export_keeps_the_file_that_is_there(store, image, tmp_path):
    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(ExistsError) as refused:
        store.export(image, tmp_path / "out")
    assert (refused.value.kind, refused.value.name) == ("file", str(tmp_path / "out"))
    assert refused.value.hint
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_export_keeps_the_file_that_comes_meanwhile(store, image, tmp_path):
    with pytest.raises(ExistsError) as refused:
        store.export(image, tmp_path / "out", progress=after(4 * MIB, lambda: (tmp_path / "out").touch()))
    assert refused.value.hint
    assert (tmp_path / "out").read_bytes() == b""


@pytest.mark.parametrize("overwrite", [False, True])
def test_export_does_not_write_through_a_link(store, image, tmp_path, overwrite):
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "out").symlink_to("victim")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("out", "dangling"):
        if overwrite:
            store.export(image, tmp_path / name, overwrite=True)
            assert not (tmp_path / name).is_symlink()
            assert (tmp_path / name).read_bytes() == CONTENT
        else:
            with pytest.raises(ExistsError):
                store.export(image, tmp_path / name)
            assert (tmp_path / name).is_symlink()
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_export_to_a_directory(store, image, tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    with pytest.raises(InvalidError, match="is a directory") as refused:
        store.export(image, tmp_path / "out", overwrite=overwrite)
    assert refused.value.hint
    assert list((tmp_path / "out").iterdir()) == []


def test_export_does_not_replace_what_is_no_file(store, image, tmp_path):
    """`--force` and /dev/null must not make a plain file of it."""
    os.mkfifo(tmp_path / "out")
    with pytest.raises(InvalidError, match="not a plain file"):
        store.export(image, tmp_path / "out", overwrite=True)
    assert stat.S_ISFIFO((tmp_path / "out").stat().st_mode)


@pytest.mark.parametrize("parent", ["nowhere", "disk"])
def test_export_and_backup_need_a_directory_to_write_in(store, image, tmp_path, parent):
    calls: list[Callable[[], object]] = [
        lambda: store.export(image, tmp_path / parent / "out"),
        lambda: store.backup(tmp_path / parent / "copy"),
    ]
    for call in calls:
        with pytest.raises(NotFoundError, match=f"no directory named '{tmp_path / parent}'") as refused:
            call()
        assert refused.value.hint


def test_export_under_an_impossible_name(store, image, tmp_path):
    store.export(image, tmp_path / ("x" * 255))
    with pytest.raises(StoreError, match="cannot write"):
        store.export(image, tmp_path / ("x" * 300))
    with pytest.raises(StoreError, match="cannot write"):
        store.backup(tmp_path / ("x" * 300))


def test_export_where_the_file_system_knows_no_links(store, image, tmp_path, monkeypatch):
    """FAT and some network file systems: the file is renamed, and what is there is kept all the same."""

    def refuse(*_paths, **_options):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    store.export(image, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == CONTENT
    with pytest.raises(ExistsError):
        store.export(image, tmp_path / "other", progress=after(4 * MIB, lambda: (tmp_path / "other").touch()))
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_whatever_a_callback_raises(store, image, tmp_path, error):
    progress = fail_with(error())
    with pytest.raises(error):
        store.export(image, tmp_path / "out", progress=lambda *_: progress())
    with pytest.raises(error):
        store.backup(tmp_path / "copy", progress=lambda *_: progress())
    assert {path.name for path in tmp_path.iterdir()} == {"s", "disk"}


# ---------------------------------------------------------------------------------------------- backup


def test_backup_makes_a_new_directory_only(store, image, tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "directory", "link", "s"):
        with pytest.raises(ExistsError) as refused:
            store.backup(tmp_path / name)
        assert (refused.value.name, refused.value.kind) == (str(tmp_path / name), "file")
        assert "new directory" in refused.value.hint
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert list((tmp_path / "directory").iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_backup_loses_to_what_comes_meanwhile(store, image, tmp_path):
    def take() -> None:
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "precious").touch()

    with pytest.raises(StoreError, match="copy"):
        store.backup(tmp_path / "copy", progress=after(MIB, take))
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["precious"]
