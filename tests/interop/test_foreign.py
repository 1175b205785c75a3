"""Disks in other programs' formats: in and out through qemu-img, as a guest sees them, and nothing left behind."""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowstore
from cowstore import foreign
from cowstore.sources import FOREIGN

pytestmark = pytest.mark.program("qemu-img")
MIB = 1 << 20
SIZE = 24 * MIB


def qemu_img(*words: object) -> None:
    done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A sparse disk: random bytes in three places, and a hole at its end."""
    path, chance = tmp_path / "disk.raw", random.Random(1)
    with path.open("wb") as file:
        for offset in (0, 5 * MIB + 4096, 11 * MIB):
            file.seek(offset)
            file.write(chance.randbytes(MIB + 512))
        file.truncate(SIZE)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where qemu-img meets the store; nothing may be left there."""
    path = tmp_path / "t"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    yield path
    assert list(path.iterdir()) == []
    assert [one.name for one in threading.enumerate() if one.name.startswith("cowstore-")] == []


@pytest.fixture
def store(tmp_path: Path, place: Path) -> Iterator[cowstore.Store]:
    with cowstore.open(tmp_path / "s", create=True) as store:
        yield store


def content(store: cowstore.Store, name: str) -> bytes:
    with store.device(name) as device:
        return device.pread(device.size, 0)


def made(raw: Path, kind: str, *options: str) -> Path:
    path = raw.with_suffix(f".{kind}")
    qemu_img("convert", "-f", "raw", "-O", kind, *options, raw, path)
    return path


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_guest_sees_the_same_disk(store, raw, kind):
    store.import_image(raw, "raw")
    used = store.stats().used
    assert store.import_image(made(raw, kind), kind).size == SIZE
    assert content(store, kind) == raw.read_bytes()
    assert store.stats().used <= used + 8 * 4096, "blocks are shared with the raw disk; only nodes are new"


def test_compressed_clusters_are_stored_as_the_guest_sees_them(store, raw):
    store.import_image(raw, "raw")
    store.import_image(made(raw, "qcow2", "-c"), "packed")
    assert list(store.diff("raw", "packed")) == []


@pytest.mark.parametrize("kind", FOREIGN)
def test_an_export_is_the_same_disk_to_others(store, raw, kind, tmp_path):
    store.import_image(raw, "image")
    with store.clone("image", "clone") as clone:
        clone.pwrite(b"of its own", 7 * MIB + 3)
    out = tmp_path / f"out.{kind}"
    store.export("clone", out, format=kind)
    store.export("clone", tmp_path / "plain.raw")
    qemu_img("compare", "-f", kind, "-F", "raw", out, tmp_path / "plain.raw")
    assert out.stat().st_mode & 0o777 == 0o600
    assert out.stat().st_blocks * 512 < SIZE / 2 or kind == "vhdx", "holes stay holes"


def test_progress_reaches_the_end(store, raw, tmp_path):
    told = []
    store.import_image(made(raw, "qcow2"), "image", progress=lambda *facts: told.append(facts))
    store.export("image", tmp_path / "out", format="qcow2", progress=lambda *facts: told.append(facts))
    assert ("import", SIZE, SIZE) in told
    assert told[-1] == ("export", SIZE, SIZE)
    assert all(0 <= done <= total == SIZE for _, done, total in told)


def test_long_imports_are_published_in_slices(store, raw, monkeypatch):
    monkeypatch.setattr(foreign, "_SLICE", MIB)
    monkeypatch.setattr(foreign, "_TICK", 0.001)
    store.import_image(made(raw, "qcow2"), "image")
    assert content(store, "image") == raw.read_bytes()
    assert store.info("image").sequence > 1


def test_raw_takes_the_container_itself(store, raw):
    path = made(raw, "qcow2")
    store.import_image(path, "bytes", format="raw")
    assert content(store, "bytes") == path.read_bytes()


@pytest.mark.parametrize("how", ["backing", "data-file", "vmdk"])
def test_an_image_that_leads_to_other_files_is_refused(store, raw, tmp_path, how):
    """It could have any file of this host imported."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    secret = raw.rename(folder / "secret")
    evil = tmp_path / "evil"
    if how == "backing":
        qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", evil)
    elif how == "data-file":
        qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={secret},data_file_raw=on", evil, SIZE)
    else:
        evil.write_text(
            '# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
            f'RW {SIZE // 512} FLAT "elsewhere/secret" 0\nddb.adapterType = "ide"\n'
        )
    with pytest.raises(cowstore.SourceError, match=r"it leads to another file, .*secret") as refused:
        store.import_image(evil, "evil")
    assert "qemu-img convert" in refused.value.hint
    assert store.devices() == []


def test_a_vmdk_in_two_files_side_by_side_is_taken(store, raw, tmp_path):
    path = tmp_path / "flat.vmdk"
    qemu_img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, path)
    store.import_image(path, "flat")
    assert content(store, "flat") == raw.read_bytes()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_cut_off_image_is_refused_and_leaves_nothing(store, raw, kind):
    """qemu-img converts it without a word: what is missing is zeros to it."""
    path = made(raw, kind)
    os.truncate(path, path.stat().st_size - MIB)
    with pytest.raises(cowstore.SourceError):
        store.import_image(path, "image")
    assert store.lineage() == []
    assert store.collect().freed == 0


def test_a_damaged_image_is_refused_and_leaves_nothing(store, raw):
    path = made(raw, "qcow2")
    with path.open("r+b") as file:
        file.seek(40)  # the place of the first-level table
        file.write((1 << 62).to_bytes(8, "big"))
    with pytest.raises(cowstore.SourceError, match="it is damaged"):
        store.import_image(path, "image")
    assert store.lineage() == []
    assert store.collect().freed == 0


def test_a_qemu_img_that_dies_leaves_nothing(store, raw, tmp_path, monkeypatch):
    liar = tmp_path / "qemu-img"
    liar.write_text('#!/bin/sh\n[ "$1" = info ] && PATH=${PATH#*:} exec qemu-img "$@"\nkill -9 $$\n')
    liar.chmod(0o755)
    path = made(raw, "qcow2")
    store.import_image(raw, "raw")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(cowstore.SourceError, match="without a word"):
        store.import_image(path, "image")
    with pytest.raises(cowstore.StoreError, match="without a word"):
        store.export("raw", tmp_path / "out", format="qcow2")
    assert [one.name for one in store.devices()] == ["raw"]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_interrupt_ends_qemu_img_too(store, raw):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.import_image(made(raw, "qcow2"), "image", progress=interrupted)
    assert store.lineage() == []


def test_without_qemu_img_the_error_says_what_to_install(store, raw, tmp_path, monkeypatch):
    path = made(raw, "qcow2")
    store.import_image(raw, "raw")
    monkeypatch.setenv("PATH", str(tmp_path / "t"))
    calls: list[Callable[[], object]] = [
        lambda: store.import_image(path, "image"),
        lambda: store.export("raw", tmp_path / "out", format="qcow2"),
    ]
    for call in calls:
        with pytest.raises(cowstore.NotFoundError, match="qemu-img") as missing:
            call()
        assert "qemu-utils" in missing.value.hint
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten_unless_asked(store, raw, tmp_path):
    store.import_image(raw, "image")
    out = tmp_path / "out.qcow2"
    out.write_bytes(b"precious")
    with pytest.raises(cowstore.ExistsError):
        store.export("image", out, format="qcow2")
    assert out.read_bytes() == b"precious"
    store.export("image", out, format="qcow2", overwrite=True)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", out, raw)


def test_unknown_formats_are_named(store, raw, tmp_path):
    with pytest.raises(cowstore.InvalidError, match="format 'floppy' is not known"):
        store.import_image(raw, "image", format="floppy")
    store.import_image(raw, "image")
    with pytest.raises(cowstore.InvalidError, match="format 'floppy' is not known"):
        store.export("image", tmp_path / "out", format="floppy")
    with pytest.raises(cowstore.SourceError, match="from a file only"), raw.open("rb") as stream:
        store.import_image(stream, "stream", format="qcow2")


def test_a_path_that_qemu_img_would_take_for_an_address_is_a_path(store, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("nbd:localhost:1,x.qcow2")
    made(raw, "qcow2").rename(path)
    store.import_image(path, "image")
    store.export("image", "json:{}", format="qcow2")
    qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / "json:{}", raw)
