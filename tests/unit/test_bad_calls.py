"""Calls that can never be right: bad names and numbers, closed handles, what is only to be read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import cowstore
from cowstore import ClosedError, ExistsError, InvalidError, NotFoundError, RangeError, ReadOnlyError

BLOCK = 4096
SIZE = 10 * BLOCK + 100  # bytes; the last block is cut

BAD_NAMES = ["", ".", "..", ".hidden", "a/b", "/a", "a b", "a\n", "\n", "a\0b", "ä", "a*", "x" * 129, "a:b", "'"]
GOOD_NAMES = ["a", "_", "-", "0", "A.b_c-9", "a..b", "x" * 128]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[cowstore.Store]:
    """An image `base`, a clone `desk` of it, and a blank clone `blank`."""
    with cowstore.open(tmp_path / "s", create=True) as store:
        store.import_image(io.BytesIO(b"base" * (SIZE // 4)), "base")
        store.clone("base", "desk").close()
        store.create("blank", SIZE).close()
        yield store


@pytest.fixture
def unchanged(store: cowstore.Store) -> Iterator[None]:
    """After the test the store has the devices, the content and the used slots that it had before."""
    store.collect()
    before = facts(store)
    yield
    with cowstore.open(store.path) as again:
        again.collect()
        assert facts(again) == before
    assert not [path for path in store.path.rglob("*") if "tmp" in path.name]


def facts(store: cowstore.Store) -> object:
    content = {}
    for one in store.devices():
        with store.device(one.name, readonly=True) as device:
            content[one.name] = device.pread(device.size, 0)
    return store.lineage(), content, store.stats().used


# ------------------------------------------------------------------------------------------------- names


def calls_with_a_new_name(store: cowstore.Store) -> dict[str, Callable[[str], object]]:
    return {
        "import_image": lambda name: store.import_image(io.BytesIO(b"x" * BLOCK), name),
        "create": lambda name: store.create(name, BLOCK),
        "clone": lambda name: store.clone("base", name),
        "clone, enlarged": lambda name: store.clone("base", name, size=2 * SIZE),
        "clone_many": lambda name: store.clone_many("base", ["fine", name]),
        "fork": lambda name: store.fork("desk", "fine", name),
        "seal": lambda name: store.seal("desk", name),
        "rename": lambda name: store.rename("desk", name),
    }


def test_no_device_gets_a_bad_name(store, unchanged):
    with store.device("desk") as desk:
        for call in (*calls_with_a_new_name(store).values(), desk.seal, desk.fork):
            for name in BAD_NAMES:
                with pytest.raises(InvalidError, match="is not a name") as refused:
                    call(name)
                assert "1 to 128" in refused.value.hint


def test_no_device_has_a_bad_name(store, unchanged):
    """Asking for one says what is wrong with it; it is not only "not found"."""
    for call in (store.info, store.device, store.delete, store.usage, store.reset):
        for name in BAD_NAMES:
            with pytest.raises(InvalidError, match="is not a name"):
                call(name)


def test_good_names_are_taken(store):
    for name in GOOD_NAMES:
        assert store.seal("desk", name).name == name
        assert store.info(name).kind == "image"


def test_no_name_is_given_twice(store, unchanged):
    for call in calls_with_a_new_name(store).values():
        with pytest.raises(ExistsError, match="'base' exists already") as refused:
            call("base")
        assert (refused.value.kind, refused.value.name) == ("image", "base")
    with pytest.raises(InvalidError, match="twice"):
        store.clone_many("base", ["a", "b", "a"])
    with pytest.raises(InvalidError, match="twice"):
        store.fork("desk", "a", "a")


def test_a_name_that_is_taken_is_told_before_the_source_is_read(store, unchanged):
    with pytest.raises(ExistsError):
        store.import_image("/nowhere", "base")


def test_what_is_not_there(store, unchanged, tmp_path):
    calls: list[Callable[[], object]] = [
        lambda: store.info("nobody"), lambda: store.device("nobody"),
        lambda: store.device("nobody", readonly=True),
        lambda: store.clone("nobody", "new"), lambda: store.clone_many("nobody", ["new"]),
        lambda: store.fork("nobody", "new"), lambda: store.seal("nobody", "new"), lambda: store.reset("nobody"),
        lambda: store.rename("nobody", "new"), lambda: store.delete("desk", "nobody"),
        lambda: store.usage("nobody"), lambda: store.usages("desk", "nobody"),
        lambda: store.exclusive("desk", "nobody"), lambda: store.diff("desk", "nobody"),
        lambda: store.diff("nobody", "desk"), lambda: store.export("nobody", tmp_path / "out"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(NotFoundError, match="'nobody'") as refused:
            call()
        assert refused.value.name == "nobody"
        assert refused.value.hint
    assert not (tmp_path / "out").exists()


def test_an_image_is_no_clone(store, unchanged):
    for call in (store.reset, lambda name: store.fork(name, "new"), lambda name: store.seal(name, "new")):
        with pytest.raises(NotFoundError, match="no clone named 'base'") as refused:
            call("base")
        assert refused.value.hint == "base is an image"


# --------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("size", [-1, -(1 << 70), (1 << 60) + 1, 1 << 80])
def test_no_device_has_an_impossible_size(store, unchanged, size):
    with store.device("blank") as blank:
        calls: list[Callable[[], object]] = [
            lambda: store.create("new", size), lambda: store.clone("base", "new", size=size),
            lambda: blank.resize(size), lambda: blank.truncate(size),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(InvalidError, match=f"size of {size} bytes") as refused:
                call()
            assert str(1 << 60) in refused.value.hint


def test_the_largest_device(store):
    with store.create("whale", 1 << 60) as whale:
        whale.pwrite(b"the end", (1 << 60) - 7)
        whale.flush()
        assert whale.pread(7, (1 << 60) - 7) == b"the end"
        assert [(one.offset, one.length) for one in whale.extents() if one.data] == [((1 << 60) - BLOCK, BLOCK)]
        whale.trim(1 << 60, 0)
        assert not any(one.data for one in whale.extents())


def test_a_clone_is_not_smaller_than_its_parent(store, unchanged):
    with pytest.raises(InvalidError, match=f"smaller than its {SIZE} bytes") as refused:
        store.clone("base", "new", size=SIZE - 1)
    assert "resize" in refused.value.hint


OUTSIDE = [
    (-1, 0), (0, -1), (-1, -1), (1, SIZE), (SIZE + 1, 0), (SIZE, 1), (0, SIZE + 1), (1, 1 << 64), (1 << 64, 0),
    (1 << 64, 1 << 64), (BLOCK, -BLOCK), (5, -5), (1 << 70, -(1 << 70)), (0, -(1 << 70)),
]  # fmt: skip


@pytest.mark.parametrize(("length", "offset"), OUTSIDE)
def test_nothing_lies_outside_a_device(store, unchanged, length, offset):
    with store.device("desk") as desk, store.device("base") as base:
        calls: list[Callable[[], object]] = [
            lambda: desk.pread(length, offset), lambda: base.pread(length, offset),
            lambda: desk.zero(length, offset), lambda: desk.trim(length, offset),
            lambda: next(desk.extents(offset, length)), lambda: next(base.extents(offset, length)),
        ]  # fmt: skip
        if 0 <= length < 1 << 30:
            calls.append(lambda: desk.pwrite(bytes(length), offset))
            calls.append(lambda: desk.preadinto(bytearray(length), offset))
        for call in calls:
            with pytest.raises(RangeError, match="lie outside its") as refused:
                call()
            found = refused.value
            assert (found.length, found.offset, found.size) == (length, offset, SIZE)
            assert found.name in ("desk", "base")


def test_what_is_inside_is_allowed_to_the_last_byte(store):
    with store.device("blank") as blank:
        assert blank.pread(0, SIZE) == b""
        assert blank.pwrite(b"", SIZE) == 0
        blank.zero(0, SIZE)
        blank.trim(SIZE, 0)
        assert blank.pwrite(b"x", SIZE - 1) == 1
        assert blank.pread(SIZE, 0) == bytes(SIZE - 1) + b"x"


def test_a_file_position_is_never_negative(store, unchanged):
    with store.device("desk") as desk:
        for offset, whence in ((-1, 0), (-1, 1), (-SIZE - 1, 2), (0, 9)):
            with pytest.raises(ValueError, match=r"negative|not known"):
                desk.seek(offset, whence)
        assert desk.seek(SIZE + 5) == SIZE + 5
        assert desk.read(3) == b""


def test_what_is_written_behind_the_end_is_not_swallowed(store, unchanged):
    """A raw file that took nothing and said so would keep a buffered writer busy for ever."""
    with store.device("desk") as desk:
        for position in (SIZE, SIZE + 5):
            desk.seek(position)
            with pytest.raises(RangeError):
                desk.write(b"abc")
        desk.seek(SIZE - 2)
        assert desk.write(b"start") == 2
        desk.seek(SIZE - 2)
        buffered = io.BufferedWriter(desk, 16)
        buffered.write(b"start")
        with pytest.raises(RangeError):
            buffered.flush()
        assert desk.pread(2, SIZE - 2) == b"st"
        desk.reset()
        with pytest.raises(RangeError):  # io keeps what it could not write
            buffered.detach()


# -------------------------------------------------------------------------------------------- read-only


def test_a_store_opened_to_be_read_changes_nothing(store, unchanged, tmp_path):
    """Also where the same process has it open for writing: LMDB's handle is shared, the right to write is not."""
    with cowstore.open(store.path, readonly=True) as reader:
        calls: list[Callable[[], object]] = [
            partial(call, "new") for call in calls_with_a_new_name(reader).values()
        ]
        calls += [
            partial(reader.delete, "desk"),
            partial(reader.reset, "desk"),
            partial(reader.collect, dry_run=True),
        ]
        calls.append(reader.collect)
        for call in calls:
            with pytest.raises(ReadOnlyError, match="is read-only") as refused:
                call()
            assert refused.value.hint
        with reader.device("desk") as desk:
            assert type(desk) is cowstore.Device
            with pytest.raises(ReadOnlyError, match="clone 'desk'") as refused:
                desk.write(b"x")
            assert "open" in refused.value.hint
        reader.export("desk", tmp_path / "out")
        reader.backup(tmp_path / "copy")
    assert (tmp_path / "out").stat().st_size == SIZE


def test_a_store_that_is_only_read_comes_first(tmp_path, store):
    """LMDB knows one handle a process, and it cannot become a writer's."""
    store.close()
    with cowstore.open(store.path, readonly=True) as reader:
        with pytest.raises(cowstore.InUseError, match="in use by this process") as refused:
            cowstore.open(store.path)
        assert "read-only" in refused.value.hint
        assert len(reader.devices()) == 3
    cowstore.open(store.path).close()


def test_images_are_not_written(store, unchanged):
    with store.device("base") as base:
        assert not base.writable()
        assert not hasattr(base, "pwrite")
        with pytest.raises(ReadOnlyError, match="image 'base' is read-only") as refused:
            base.write(b"x")
        assert "clone it" in refused.value.hint
        with pytest.raises(io.UnsupportedOperation):
            base.truncate(0)


# ----------------------------------------------------------------------------------------------- closed


def test_a_closed_store_is_closed(store, unchanged, tmp_path):
    generator = store.diff("base", "desk")
    store.close()
    store.close()
    calls: list[Callable[[], object]] = [
        *(partial(call, "new") for call in calls_with_a_new_name(store).values()),
        store.devices, store.lineage, store.stats, store.collect, store.own_bytes, store.usages,
        lambda: store.info("desk"), lambda: store.usage("desk"), lambda: store.exclusive("desk"),
        lambda: store.delete("desk"), lambda: store.device("desk"), lambda: store.device("desk", readonly=True),
        lambda: store.reset("desk"), lambda: store.diff("base", "desk"),
        lambda: store.export("desk", tmp_path / "out"), lambda: store.backup(tmp_path / "copy"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ClosedError, match="is closed") as refused:
            call()
        assert refused.value.hint
    with pytest.raises(ClosedError):
        next(generator)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_a_closed_store_closes_its_devices_and_ends_their_generators(store, unchanged):
    with store.create("many", 64 * BLOCK) as many:
        for number in range(0, 64, 2):
            many.pwrite(b"x", number * BLOCK)
    many, base = store.device("many"), store.device("base")
    other = store.fork("many", "other")[0].name
    many.pwrite(b"y" * 2 * BLOCK, 8 * BLOCK)
    generators: list[Iterator[object]] = [many.extents(), many.delta(), base.extents()]
    for generator in generators[:2]:
        next(generator)
    store.close()
    for generator in generators:
        with pytest.raises(ClosedError):
            list(generator)
    for device in (many, base):
        with pytest.raises(ClosedError, match="is closed"):
            device.pread(1, 0)
        assert device.closed
    with cowstore.open(store.path) as again:
        with again.device("many") as many:
            assert many.pread(2 * BLOCK, 8 * BLOCK) == b"y" * 2 * BLOCK  # closing flushed it
        again.delete("many", other)


def test_a_closed_device_is_closed(store, unchanged):
    base, desk, moment = store.device("base"), store.device("desk"), store.device("desk", readonly=True)
    reads: list[Callable[[cowstore.Device], object]] = [
        lambda device: device.pread(1, 0), lambda device: device.pread(0, 0), lambda device: device.tell(),
        lambda device: device.preadinto(bytearray(1), 0), lambda device: device.read(1),
        lambda device: device.seek(0), lambda device: next(device.extents()), lambda device: next(device.delta()),
    ]  # fmt: skip
    for device in (base, desk, moment):
        device.close()
        device.close()
        for read in reads:
            with pytest.raises(ClosedError, match="closed"):
                read(device)
    writes: list[Callable[[], object]] = [
        lambda: desk.pwrite(b"x", 0), lambda: desk.zero(1, 0), lambda: desk.trim(1, 0), lambda: desk.resize(1),
        lambda: desk.write(b"x"), lambda: desk.fork("new"), lambda: desk.seal("new"), desk.reset,
        lambda: desk.truncate(0),
    ]  # fmt: skip
    for write in writes:
        with pytest.raises(ClosedError, match="closed"):
            write()


def test_a_device_that_is_dropped_is_told_and_given_back(store):
    desk = store.device("desk")
    desk.pwrite(b"lost", 0)
    with pytest.warns(ResourceWarning, match="device 'desk' was never closed"):
        del desk
    with store.device("desk") as desk:
        assert desk.pread(4, 0) == b"base"
