"""Directories that are no stores, stores that are too new, and stores of which something is damaged or missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

import cowstore
from cowstore import CatalogCorruptError, CorruptError, FormatError, NotFoundError, SegmentCorruptError

BLOCK = 4096
CONTENT = os.urandom(300 * BLOCK)  # one data segment, and one of nodes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed store with an image and a clone of it that has a block of its own."""
    (tmp_path / "disk").write_bytes(CONTENT)
    with cowstore.open(tmp_path / "s", create=True) as store:
        store.import_image(tmp_path / "disk", "image")
        with store.clone("image", "clone") as clone:
            clone.pwrite(b"own", 0)
        store.collect()
    return tmp_path / "s"


def tree(path: Path) -> dict[str, tuple[int, int]]:
    """Every file: its length and the time of its last change."""
    found = {str(one.relative_to(path)): one.stat() for one in path.rglob("*") if one.is_file()}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def assert_whole(path: Path) -> None:
    with cowstore.open(path) as store:
        for name, start in (("image", CONTENT[:3]), ("clone", b"own")):
            with store.device(name, readonly=True) as device:
                assert device.pread(device.size, 0) == start + CONTENT[3:]
        assert store.collect().doomed == 0


# ---------------------------------------------------------------------------------------- not a store


@pytest.mark.parametrize("readonly", [False, True])
def test_nothing_there(tmp_path, readonly):
    with pytest.raises(NotFoundError, match="no store named") as refused:
        cowstore.open(tmp_path / "s", readonly=readonly)
    assert refused.value.kind == "store"
    assert "cowstore init" in refused.value.hint
    with pytest.raises(NotFoundError):
        cowstore.open(tmp_path / "missing" / "s", readonly=readonly)
    assert list(tmp_path.iterdir()) == []


def test_create_does_not_make_what_is_to_be_read(tmp_path):
    with pytest.raises(NotFoundError):
        cowstore.open(tmp_path / "s", create=True, readonly=True)
    assert list(tmp_path.iterdir()) == []


def plain_file(path: Path) -> None:
    path.write_bytes(b"precious")


def full_directory(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_bytes(b"precious")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


@pytest.mark.parametrize("make", [plain_file, full_directory])
@pytest.mark.parametrize("create", [False, True])
def test_something_else_is_there(tmp_path, make, create):
    make(tmp_path / "s")
    before = tree(tmp_path)
    with pytest.raises(FormatError, match="not a store") as refused:
        cowstore.open(tmp_path / "s", create=create)
    assert refused.value.path == str(tmp_path / "s")
    assert refused.value.hint
    assert tree(tmp_path) == before


def test_a_store_is_not_made_behind_a_link(tmp_path):
    link_to_nothing(tmp_path / "s")
    with pytest.raises(FormatError):
        cowstore.open(tmp_path / "s", create=True)
    assert [one.name for one in tmp_path.iterdir()] == ["s"]


def test_an_empty_directory_becomes_a_store_only_when_told_to(tmp_path):
    (tmp_path / "s").mkdir()
    with pytest.raises(FormatError, match=r"store\.json") as refused:
        cowstore.open(tmp_path / "s")
    assert "cowstore init" in refused.value.hint
    cowstore.open(tmp_path / "s", create=True).close()
    assert [one.name for one in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_store_needs_a_directory_to_be_in(tmp_path, parent):
    (tmp_path / "file").touch()
    with pytest.raises(cowstore.StoreError, match="cannot make a store"):
        cowstore.open(tmp_path / parent / "s", create=True)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_store_that_is_moved_or_removed_while_it_is_open_is_closed(path, tmp_path, moved):
    """The kernel's files stay; nothing of the handle does."""
    store = cowstore.open(path)
    if moved:
        path.rename(tmp_path / "moved")
    else:
        shutil.rmtree(path)
    store.close()
    if moved:
        assert_whole(tmp_path / "moved")
    else:
        cowstore.open(path, create=True).close()


# ----------------------------------------------------------------------------------------- store.json


def rewritten(path: Path, **changes: object) -> None:
    """Writes store.json with other facts, and the checksum that belongs to them."""
    facts = json.loads((path / "store.json").read_bytes())
    del facts["checksum"]
    facts |= changes
    checksum = xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())
    (path / "store.json").write_text(json.dumps(facts | {"checksum": checksum}))


def test_the_helper_writes_what_is_accepted(path):
    rewritten(path)
    assert_whole(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"format": 2}, "format 2"), ({"format": 99}, "format 99"), ({"incompatible": ["zstd"]}, "feature zstd"),
     ({"format": 0}, "format 0"), ({"incompatible": ["a", "b"]}, "feature a, feature b")],
)  # fmt: skip
@pytest.mark.parametrize("readonly", [False, True])
def test_a_store_of_a_newer_format(path, changes, reason, readonly):
    rewritten(path, **changes)
    before = tree(path)
    with pytest.raises(FormatError, match=reason) as refused:
        cowstore.open(path, readonly=readonly)
    assert refused.value.path == str(path / "store.json")
    assert "newer version of cowstore" in refused.value.hint
    assert tree(path) == before


def test_a_compatible_feature_may_be_unknown(path):
    rewritten(path, compatible=["something nice"])
    assert_whole(path)


def test_every_flipped_bit_of_store_json_is_seen(path):
    file = path / "store.json"
    good = file.read_bytes()
    before = tree(path).keys()
    for position in range(len(good)):
        for bit in range(8):
            flipped = bytearray(good)
            flipped[position] ^= 1 << bit
            file.write_bytes(flipped)
            with pytest.raises(FormatError) as refused:
                cowstore.open(path)
            assert refused.value.hint, (position, bit)
    for length in range(len(good) - 1):
        file.write_bytes(good[:length])
        with pytest.raises(FormatError):
            cowstore.open(path)
    assert tree(path).keys() == before
    file.write_bytes(good)
    assert_whole(path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"[]", b"null", b"1", b'"text"', b"\xff\xfe", b"\0" * 200, b"[" * 100_000, b'{"checksum": 1}',
     b'{"format": 1, "checksum": "0"}', b"9" * 10_000, b'{"checksum": {}, "format": []}'],
)  # fmt: skip
def test_store_json_is_something_else(path, text):
    (path / "store.json").write_bytes(text)
    with pytest.raises(FormatError, match="damaged"):
        cowstore.open(path)


@pytest.mark.parametrize("facts", [{"id": 5}, {"seed": "x"}, {"seed": None}, {"id": "zz"}, {"incompatible": 3}])
def test_store_json_that_verifies_but_makes_no_sense(path, facts):
    rewritten(path, **facts)
    with pytest.raises(FormatError):
        cowstore.open(path)


def test_store_json_is_a_directory(path):
    (path / "store.json").unlink()
    (path / "store.json").mkdir()
    with pytest.raises(FormatError, match="cannot be read"):
        cowstore.open(path)


# -------------------------------------------------------------------------------------------- segments


def sparse_copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


def cut_to(length: int) -> Callable[[Path], object]:
    return lambda segment: os.truncate(segment, length)


def lengthen(segment: Path) -> None:
    os.truncate(segment, segment.stat().st_size + BLOCK)


def overwrite_header(segment: Path) -> None:
    with segment.open("r+b") as file:
        file.write(b"something else altogether")


def flip_header(segment: Path) -> None:
    with segment.open("r+b") as file:
        byte = file.read(17)[16]
        file.seek(16)
        file.write(bytes([byte ^ 1]))


def put_another_stores(segment: Path) -> None:
    with cowstore.open(segment.parents[2] / "other", create=True) as store:
        store.import_image(segment.parents[2] / "disk", "image")
    sparse_copy(segment.parents[2] / "other" / "segments" / segment.name, segment)


def put_its_neighbour(segment: Path) -> None:
    (other,) = set(segment.parent.glob("*.seg")) - {segment}
    sparse_copy(other, segment)


DAMAGES = [
    pytest.param(cut_to(0), "cut off", id="empty"),
    pytest.param(cut_to(40), "cut off", id="cut in the header"),
    pytest.param(cut_to(BLOCK), "instead of", id="cut after the header"),
    pytest.param(cut_to(40 * 2**20), "instead of", id="cut in the slots"),
    pytest.param(lengthen, "instead of", id="too long"),
    pytest.param(Path.unlink, "missing", id="missing"),
    pytest.param(overwrite_header, "begin like a segment", id="header overwritten"),
    pytest.param(flip_header, "checksum", id="header flipped"),
    pytest.param(put_another_stores, "another place or store", id="another store's"),
    pytest.param(put_its_neighbour, "another place or store", id="another place's"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
@pytest.mark.parametrize("kind", ["data", "nodes"])
def test_a_bad_segment_is_named_and_nothing_follows_from_it(path, tmp_path, damage, reason, kind):
    data, nodes = sorted((path / "segments").glob("*.seg"))
    segment = data if kind == "data" else nodes
    sparse_copy(segment, tmp_path / "kept")
    damage(segment)
    (tmp_path / "new").write_bytes(os.urandom(20 * BLOCK))
    with cowstore.open(path) as store:
        before = store.lineage()
        used = store.stats().used if kind == "data" else 0
        calls: list[Callable[[], object]] = [
            lambda: read(store, "image"), lambda: read(store, "clone"),
            lambda: store.export("image", tmp_path / "out"), lambda: store.backup(tmp_path / "copy"),
            lambda: store.import_image(tmp_path / "new", "new"),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(SegmentCorruptError, match=reason) as refused:
                call()
            assert refused.value.path == str(segment)
            assert refused.value.hint
        for call in (store.collect, lambda: store.collect(dry_run=True), lambda: store.usage("image")):
            with pytest.raises(CorruptError):
                call()
        assert store.lineage() == before
        assert kind != "data" or (store.stats().used, store.stats().doomed) == (used, 0)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "copy").exists()
    assert not [one for one in tmp_path.rglob("*") if "tmp" in one.name]
    sparse_copy(tmp_path / "kept", segment)
    with cowstore.open(path) as store:
        store.collect()
    assert_whole(path)


def read(store: cowstore.Store, name: str) -> bytes:
    with store.device(name, readonly=True) as device:
        return device.pread(device.size, 0)


# --------------------------------------------------------------------------------------------- catalog


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("damage", [Path.unlink, cut_to(0), cut_to(100), cut_to(2 * BLOCK), cut_to(12 * BLOCK)])
def test_a_bad_catalog_is_not_opened(path, damage, readonly):
    file = path / "catalog" / "data.mdb"
    kept = file.read_bytes()
    damage(file)
    before = tree(path)
    with pytest.raises(CatalogCorruptError, match=str(path / "catalog")) as refused:
        cowstore.open(path, readonly=readonly)
    assert "backup" in refused.value.hint
    assert tree(path) == before
    file.write_bytes(kept)
    assert_whole(path)
