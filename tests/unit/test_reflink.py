"""Exports that share space with the store: the same bytes, for good, whatever becomes of the store.

On real file systems: XFS and btrfs, which can, and ext4 and tmpfs, which cannot.
"""

from __future__ import annotations

import fcntl
import io
import os
import random
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowstore
from cowstore import BlockCorruptError, StoreError
from cowstore.layout import FANOUT
from tests.unit.stored import BLOCK, blocks, damage, ids_of, left_in

MIB = 1 << 20
LEAF = FANOUT * BLOCK
MAKE = {
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "ext4": ["mke2fs", "-q", "-t", "ext4"],
}
FIEMAP, FIEMAP_SYNC, EXTENT_SHARED = 0xC020660B, 1, 0x2000


def kinds(*names: str):
    """File systems by name, each with the program that makes it."""
    params = [pytest.param(name, marks=pytest.mark.program(*MAKE.get(name, [])[:1])) for name in names]
    return pytest.mark.parametrize("mounted", params, indirect=True)


def on(*names: str):
    """A test on mounted file systems."""
    marks = [pytest.mark.root, pytest.mark.program("mount", "umount"), kinds(*names)]

    def mark(test):
        for one in marks:
            test = one(test)
        return test

    return mark


@pytest.fixture(scope="module")
def mounted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own, for all tests that want this kind."""
    kind, folder = request.param, tmp_path_factory.mktemp("mounted")
    place, image = folder / "place", folder / "image"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(place)]
    if kind in MAKE:
        with image.open("wb") as file:
            file.truncate(512 * MIB)
        subprocess.run([*MAKE[kind], image], check=True, capture_output=True)
        command = ["mount", "-o", "loop", str(image), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount {kind} here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.fixture
def place(mounted: Path) -> Iterator[Path]:
    """An empty directory there."""
    directory = Path(tempfile.mkdtemp(dir=mounted))
    yield directory
    subprocess.run(["rm", "-r", directory], check=True)


@pytest.fixture
def store_there(place: Path) -> Iterator[cowstore.Store]:
    with cowstore.open(place / "s", create=True) as store:
        yield store


def extents(path: Path) -> Iterator[tuple[int, int]]:
    """Length and flags of each extent of a file, as FIEMAP tells them."""
    with path.open("rb") as file:
        request = struct.pack("=QQLLLL", 0, (1 << 64) - 1, FIEMAP_SYNC, 0, 1000, 0)
        answer = bytearray(request + bytes(1000 * 56))
        fcntl.ioctl(file, FIEMAP, answer)
    (count,) = struct.unpack_from("=L", answer, 20)
    assert count < 1000
    for number in range(count):
        _, _, length, _, _, flags = struct.unpack_from("=QQQQQL", answer, 32 + number * 56)
        yield length, flags


def shared_blocks(path: Path) -> int:
    return sum(length for length, flags in extents(path) if flags & EXTENT_SHARED) // BLOCK


def own_blocks(path: Path) -> int:
    return sum(length for length, flags in extents(path) if not flags & EXTENT_SHARED) // BLOCK


def used(place: Path) -> int:
    """Bytes in use of a file system, once what was removed before is really gone."""
    found, before = 0, -1
    while found != before:
        os.sync()
        status = os.statvfs(place)
        found, before = (status.f_blocks - status.f_bfree) * status.f_frsize, found
        time.sleep(0.1)
    return found


def forget_verified(store: cowstore.Store) -> None:
    for segment in store._engine.segments.opened.values():
        segment.forget_verified()


# ------------------------------------------------------------------------------------------- a model of a device


class Model:
    """A clone and what it should hold; and images and other clones that went the same way."""

    def __init__(self, store: cowstore.Store, seed: int, size: int) -> None:
        self.random = random.Random(seed)
        self.store = store
        self.content = bytearray(size)
        for _ in range(12):
            self.change(self.put)
        store.import_image(io.BytesIO(self.content), "image")
        self.clone = store.clone("image", "clone", ephemeral=bool(seed % 2))

    def put(self, offset: int, piece: bytes) -> None:
        self.content[offset : offset + len(piece)] = piece

    def write(self, offset: int, piece: bytes) -> None:
        self.put(offset, piece)
        self.clone.pwrite(piece, offset)

    def change(self, put: Callable[[int, bytes], None]) -> None:
        """Something at a random place: long, short, zeros, or scattered single blocks; the tail is among it."""
        size, step = len(self.content), self.random.choice([1, BLOCK])
        length = min(self.random.choice([3, BLOCK, 5 * BLOCK, 40 * BLOCK, 3 * MIB]), size)
        offset = self.random.choice([self.random.randrange(size - length + 1) // step * step, size - length])
        if self.random.random() < 0.2:
            put(offset, bytes(length))
        elif self.random.random() < 0.8:
            put(offset, self.random.randbytes(length))
        else:
            for at in range(offset // BLOCK * BLOCK, size - BLOCK, 3 * BLOCK)[:50]:
                put(at, self.random.randbytes(BLOCK))

    def live(self) -> None:
        """Writes, and forks between them, so that runs of slots are cut."""
        for number in range(4):
            for _ in range(6):
                self.change(self.write)
            self.clone.fork(f"fork-{number}")


@on("xfs", "btrfs")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("size", [3, 9 * MIB, 9 * MIB + 5, 12 * MIB - 1])
def test_the_file_is_the_device(store_there, place, seed, size):
    store, model = store_there, Model(store_there, seed, size)
    image = bytes(model.content)
    model.live()
    held = {"image": image, "clone": bytes(model.content), "fork-3": bytes(model.content)}
    for name, content in held.items():
        for reflink, verify in (("auto", True), ("always", True), ("always", False), ("never", True)):
            store.export(name, place / f"{name}-{reflink}", overwrite=True, reflink=reflink, verify=verify)
            assert (place / f"{name}-{reflink}").read_bytes() == content
        has_tail = bool(size % BLOCK and content[size // BLOCK * BLOCK :].strip(b"\0"))
        assert own_blocks(place / f"{name}-always") == has_tail
    store.close()
    forgotten = [place / f"{name}-always" for name in held]
    assert [path.read_bytes() for path in forgotten] == list(held.values())


# ------------------------------------------------------------------------------------------------------- sharing


@on("xfs", "btrfs")
@pytest.mark.parametrize("reflink", ["auto", "always", "never"])
def test_space_is_shared(store_there, place, reflink):
    content = blocks("long", 5000) + bytes(3 * LEAF) + blocks("again", 100)
    store_there.import_image(io.BytesIO(content), "image")
    before = used(place)
    store_there.export("image", place / "out", reflink=reflink)
    taken, data = used(place) - before, 5100 * BLOCK
    if reflink == "never":
        assert (shared_blocks(place / "out"), own_blocks(place / "out")) == (0, 5100)
        assert taken >= data
    else:
        assert (shared_blocks(place / "out"), own_blocks(place / "out")) == (5100, 0)
        assert taken < data / 50


@on("xfs", "btrfs")
def test_what_becomes_of_the_store_is_nothing_to_the_file(store_there, place):
    """Deleted, erased, with its slots written again: the file keeps what it has, and so does the store."""
    store, old, new = store_there, blocks("old", 900), blocks("new", 1800)
    scattered = b"".join(old[at : at + BLOCK] + bytes(BLOCK) for at in range(0, 64 * BLOCK, BLOCK))
    store.import_image(io.BytesIO(old), "image")
    with store.create("scattered", len(scattered)) as clone:  # singles between others: erased without a hole
        for at in range(0, len(scattered), 2 * BLOCK):
            clone.pwrite(blocks(("clone", at)), at)
            clone.flush()
            store.clone("scattered", f"kept-{at}").close()
        content = clone.pread(clone.size, 0)
    for name in ("image", "scattered"):
        store.export(name, place / name, reflink="always")
    places = {*ids_of(store, "image"), *ids_of(store, "scattered")} - {0}
    store.delete(*(one.name for one in store.devices()))
    assert store.collect().freed >= 932
    assert (place / "image").read_bytes() == old
    assert (place / "scattered").read_bytes() == content
    store.close()  # which gives back what it had reserved, so that all slots are there to be written
    with cowstore.open(store.path) as store:
        store.import_image(io.BytesIO(new), "new")
        assert places <= {*ids_of(store, "new")}
        drop_cache(place / "image", place / "scattered")
        assert (place / "image").read_bytes() == old
        assert (place / "scattered").read_bytes() == content
        with (place / "image").open("r+b") as file:  # nor does the store mind what becomes of the file
            file.write(bytes(len(old)))
    with cowstore.open(store.path) as store, store.device("new") as device:
        assert device.pread(device.size, 0) == new


def drop_cache(*paths: Path) -> None:
    """Has files read from the disk."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@on("xfs", "btrfs")
def test_a_replaced_file_and_the_progress(store_there, place):
    (place / "out").write_bytes(b"old")
    store_there.import_image(io.BytesIO(blocks("image", 3000) + b"tail"), "image")
    told: list[tuple[str, int, int]] = []
    store_there.export(
        "image", place / "out", overwrite=True, reflink="always", progress=lambda *step: told.append(step)
    )
    assert (place / "out").read_bytes() == blocks("image", 3000) + b"tail"
    done = [count for _, count, _ in told]
    assert {(step, total) for step, _, total in told} == {("export", 3000 * BLOCK + 4)}
    assert done == sorted(done)
    assert done[-1] == 3000 * BLOCK + 4
    assert max(after - before for before, after in zip([0, *done], done, strict=False)) <= LEAF
    assert left_in(place) == ["out", "s"]


# ---------------------------------------------------------------------------------------------- where it cannot be


@on("ext4", "tmpfs")
def test_a_file_system_that_cannot(store_there, place):
    content = blocks("image", 600)
    store_there.import_image(io.BytesIO(content), "image")
    with pytest.raises(StoreError, match=r"cannot share blocks with .*out: Operation not supported") as refused:
        store_there.export("image", place / "out", reflink="always")
    assert refused.value.hint
    assert str(place / "out") in str(refused.value)
    assert left_in(place) == ["s"]
    for reflink in ("auto", "never"):
        store_there.export("image", place / reflink, reflink=reflink)
        assert (place / reflink).read_bytes() == content


@on("xfs", "btrfs", "tmpfs")
def test_another_file_system(store_there, place, tmp_path):
    content = blocks("image", 600)
    store_there.import_image(io.BytesIO(content), "image")
    with pytest.raises(StoreError, match=r"cannot share blocks with .*out: Invalid cross-device link"):
        store_there.export("image", tmp_path / "out", reflink="always")
    assert left_in(tmp_path) == []
    store_there.export("image", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content


@on("xfs", "btrfs")
@pytest.mark.parametrize("reflink", ["auto", "always"])
def test_damage_is_refused(store_there, place, reflink):
    content = blocks("image", 1200)
    store_there.import_image(io.BytesIO(content), "image")
    damage(store_there, ids_of(store_there, "image")[1000])
    forget_verified(store_there)
    with store_there.device("image") as image:
        image.pread(BLOCK, 990 * BLOCK)  # what is verified of a run says nothing of the others in it
    with pytest.raises(BlockCorruptError):
        store_there.export("image", place / "out", reflink=reflink)
    assert left_in(place) == ["s"]
