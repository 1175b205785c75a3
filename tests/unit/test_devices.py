"""Devices: every offset and length, as a file, from several threads, and what is left when one is dropped."""

from __future__ import annotations

import gc
import io
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import cowstore
from cowstore.store import Store
from tests.sample import MIB

BLOCK, LEAF = 4096, 2 * MIB
SIZE = 2 * LEAF + 3 * BLOCK + 17
EDGES = [0, BLOCK, 2 * BLOCK, LEAF, 2 * LEAF, SIZE - 17, SIZE]
NEAR = sorted({edge + shift for edge in EDGES for shift in (-BLOCK, -1, 0, 1) if 0 <= edge + shift <= SIZE})


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def disk(store: Store) -> Iterator[cowstore.Clone]:
    """A clone of an image of SIZE bytes, unchanged."""
    store.import_image(io.BytesIO(content(SIZE)), "image")
    with store.clone("image", "disk") as disk:
        yield disk


# ------------------------------------------------------------------------------------- offsets and lengths


def test_every_edge_can_be_read(disk):
    expected = content(SIZE)
    for start in NEAR:
        for end in NEAR:
            if start <= end:
                assert disk.pread(end - start, start) == expected[start:end]


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("length", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("way", ["pwrite", "zero", "trim"])
def test_every_edge_can_be_written(disk, way, length, flush):
    expected = bytearray(content(SIZE))
    for number, start in enumerate(near for near in NEAR if near + length <= SIZE):
        if way == "pwrite":
            data = content(length, number)
            assert disk.pwrite(data, start) == length
        else:
            data = bytes(length)
            getattr(disk, way)(length, start)
        expected[start : start + length] = data
        if flush:
            disk.flush()
    assert disk.pread(SIZE, 0) == expected


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: memoryview(data).cast("H")])
def test_any_buffer_can_be_written_and_filled(disk, kind):
    assert disk.pwrite(kind(b"abcd"), 5) == 4
    buffer = bytearray(8)
    assert disk.preadinto(memoryview(buffer).cast("Q"), 4) == 8
    assert buffer[1:5] == b"abcd"


def test_what_was_written_belongs_to_the_device(disk):
    buffer = bytearray(b"a" * BLOCK)
    disk.pwrite(buffer, 0)
    buffer[:] = b"b" * BLOCK
    read = disk.pread(BLOCK, 0)
    assert read == b"a" * BLOCK
    disk.pwrite(buffer, 0)
    assert read == b"a" * BLOCK


@pytest.mark.parametrize(
    ("length", "offset"),
    [(1, SIZE), (1, -1), (-1, 0), (0, SIZE + 1), (SIZE + 1, 0), (0, -1), (2, SIZE - 1), (-5, 10)],
)
def test_what_lies_outside_is_refused(disk, length, offset):
    calls: list[Callable[[], Any]] = [
        lambda: disk.pread(length, offset), lambda: disk.zero(length, offset), lambda: disk.trim(length, offset),
        lambda: list(disk.extents(offset, length)),
    ]  # fmt: skip
    if length >= 0:
        calls += [lambda: disk.pwrite(bytes(length), offset), lambda: disk.preadinto(bytearray(length), offset)]
    for call in calls:
        with pytest.raises(cowstore.RangeError) as caught:
            call()
        error = caught.value
        assert (error.name, error.offset, error.length, error.size) == ("disk", offset, length, SIZE)
    assert disk.pread(SIZE, 0) == content(SIZE)


@pytest.mark.parametrize("size", [-1, (1 << 60) + 1])
def test_a_size_that_cannot_be_is_refused(store, disk, size):
    with pytest.raises(cowstore.InvalidError):
        disk.resize(size)
    with pytest.raises(cowstore.InvalidError):
        store.create("other", size)
    assert disk.size == SIZE


@pytest.mark.parametrize("size", [0, 1, BLOCK, LEAF, LEAF + 1, SIZE - 18, SIZE - 1])
def test_what_is_cut_off_is_zeros_when_it_comes_back(disk, size):
    for grown in (SIZE, 1 << 40):
        disk.resize(size)
        disk.resize(grown)
        disk.flush()
        assert disk.pread(SIZE, 0) == content(SIZE)[:size] + bytes(SIZE - size)
    assert disk.pread(10, (1 << 40) - 10) == bytes(10)


# ---------------------------------------------------------------------------------------------- as a file


def test_buffered_reader_reads_all(disk):
    with io.BufferedReader(disk, 10_000) as reader:
        assert reader.read(1000) == content(SIZE)[:1000]
        assert reader.seek(-5, io.SEEK_END) == SIZE - 5
        assert reader.read() == content(SIZE)[-5:]
        assert reader.read() == b""
    assert disk.closed


def test_buffered_writer_writes_and_flushes(store, disk):
    with io.BufferedWriter(disk, 10_000) as writer:
        writer.seek(5)
        for number in range(5000):
            writer.write(b"%04d" % number)
    expected = b"".join(b"%04d" % number for number in range(5000))
    with store.device("disk") as again:
        assert again.pread(20_000, 5) == expected


def test_buffered_writer_is_told_of_the_end(disk):
    writer = io.BufferedWriter(disk, 4096)
    writer.seek(SIZE - 10)
    writer.write(b"q" * 3000)
    with pytest.raises(cowstore.RangeError):
        writer.flush()
    disk.discard()
    assert writer.closed


def test_positions_are_those_of_a_file(disk):
    assert (disk.readable(), disk.writable(), disk.seekable()) == (True, True, True)
    assert disk.seek(10) == disk.tell() == 10
    assert disk.read(5) == content(SIZE)[10:15]
    assert disk.seek(5, io.SEEK_CUR) == 20
    assert disk.write(b"xyz") == 3
    assert disk.tell() == 23
    assert disk.seek(-2, io.SEEK_END) == SIZE - 2
    assert disk.write(b"xyz") == 2
    assert disk.seek(SIZE + 100) == SIZE + 100
    assert disk.read() == disk.read(10) == b""
    assert disk.readinto(bytearray(3)) == 0
    with pytest.raises(cowstore.RangeError):
        disk.write(b"a")
    for bad in ((-1,), (-SIZE - 1, io.SEEK_END), (0, 9)):
        with pytest.raises(cowstore.InvalidError):
            disk.seek(*bad)
    disk.seek(100)
    assert disk.truncate() == 100
    assert disk.truncate(50) == disk.size == disk.info.size == 50
    assert disk.tell() == 100


def test_an_image_is_read_only(store, disk):
    with store.device("image") as image:
        assert not image.writable()
        assert image.read() == content(SIZE)
        with pytest.raises(cowstore.ReadOnlyError):
            image.write(b"a")
        with pytest.raises(OSError, match="truncate"):
            image.truncate(5)


def test_a_device_can_be_imported(store, disk):
    disk.pwrite(b"changed", 3)
    disk.seek(3)
    store.import_image(disk, "copy")
    with store.device("copy") as copy:
        assert copy.pread(copy.size, 0) == b"changed" + content(SIZE)[10:]


def test_a_closed_device_says_so(disk):
    extents, delta = disk.extents(), disk.delta()
    disk.pwrite(b"a", 0)
    disk.close()
    disk.close()
    disk.discard()
    assert "closed" in repr(disk)
    calls = [
        lambda: disk.pread(1, 0), lambda: disk.pread(0, 0), lambda: disk.preadinto(bytearray(1), 0),
        lambda: disk.pwrite(b"a", 0), lambda: disk.zero(1, 0), lambda: disk.trim(1, 0), lambda: disk.resize(5),
        lambda: disk.fork("x"), lambda: disk.seal("x"), disk.reset, lambda: next(disk.delta()), disk.read,
        lambda: next(disk.extents()), lambda: disk.seek(0), lambda: disk.write(b"a"), lambda: next(extents),
        lambda: next(delta), disk.tell, disk.truncate, disk.flush,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(cowstore.ClosedError):
            call()


# ------------------------------------------------------------------------------------------------ dropped


def test_a_dropped_clone_warns_and_is_as_it_was_flushed(store, disk):
    disk.close()
    dropped = [store.device("disk")]
    dropped[0].pwrite(b"flushed", 0)
    dropped[0].flush()
    dropped[0].pwrite(b"dropped", 0)
    with pytest.warns(ResourceWarning, match="'disk' was never closed"):
        dropped.clear()
    with store.device("disk") as again:
        assert again.pread(7, 0) == b"flushed"


@pytest.mark.filterwarnings("error::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_dropped_clone_is_given_back_where_warnings_are_errors(store):
    store.create("disk", BLOCK)
    gc.collect()
    store.device("disk").close()


# ------------------------------------------------------------------------------------------------ threads


def test_threads_write_and_read_one_device(store, disk):
    """Each thread owns every fourth piece; pieces are no whole blocks, so that neighbours share some."""
    piece, count, expected = 1000, 4000, bytearray(content(SIZE))
    end = threading.Event()

    def write(thread: int) -> None:
        source = random.Random(thread)
        for _ in range(300):
            at = source.randrange(thread, count, 4) * piece
            data = source.randbytes(piece)
            disk.pwrite(data, at)
            expected[at : at + piece] = data
            assert disk.pread(piece, at) == data

    def flush() -> None:
        while not end.is_set():
            disk.flush()
            store.collect()

    def read() -> None:
        while not end.is_set():
            for at in range(0, SIZE - BLOCK, 7 * BLOCK):
                assert len(disk.pread(BLOCK, at)) == BLOCK

    with ThreadPoolExecutor(7) as pool:
        others = [pool.submit(flush), pool.submit(read), pool.submit(read)]
        writers = [pool.submit(write, thread) for thread in range(4)]
        errors = [writer.exception() for writer in writers]
        end.set()
        errors += [other.exception() for other in others]
    assert errors == [None] * 7
    assert disk.pread(SIZE, 0) == expected
    disk.close()
    with store.device("disk") as again:
        assert again.pread(SIZE, 0) == expected


class SlowLeaf:
    """A leaf that lets others work between the lookup of an id and the reading of its block."""

    def __init__(self, leaf: memoryview, work: Callable[[], object]) -> None:
        self._leaf, self._work = leaf, work

    def __getitem__(self, at: int) -> int:
        block_id = self._leaf[at]
        self._work()
        return int(block_id)


def test_a_read_that_is_overtaken_by_a_flush_and_a_collection_is_right(store):
    disk = store.create("disk", BLOCK)
    disk.pwrite(b"1" * BLOCK, 0)
    disk.flush()
    assert disk.pread(BLOCK, 0) == b"1" * BLOCK

    def overtake() -> None:
        disk._leaves[0] = leaf
        disk.pwrite(b"2" * BLOCK, 0)
        disk.flush()
        assert store.collect().freed
        disk.pwrite(b"3" * BLOCK, 0)
        disk.flush()

    leaf = disk._leaves[0]
    disk._leaves[0] = SlowLeaf(leaf, overtake)
    assert disk.pread(BLOCK, 0) == b"3" * BLOCK
    disk.close()
