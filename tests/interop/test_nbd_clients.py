"""The usual NBD clients on one server: what they read, what they write, and what the store makes of it."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

import cowstore
from cowstore_cli.main import cli

from .clients import (
    BLOCK,
    HOLE,
    Content,
    Export,
    allocation,
    difference,
    ended,
    fio,
    ownership,
    said,
    server_list,
    tried_fio,
)
from .process import TIMEOUT
from .scribe import Scribe
from .server import Server

MIB = 1 << 20
SIZES = {"even": 8 * MIB, "sectors": 8 * MIB + 1536, "odd": 8 * MIB + 1001}
"""Sizes of images by name: whole blocks, whole sectors of 512 bytes as qemu's programs want them, and neither."""

every_size = pytest.mark.parametrize("image", SIZES, indirect=True)
nbdinfo = pytest.mark.program("setpriv", "nbdinfo", "nbdcopy")
nbdcopy = pytest.mark.program("setpriv", "nbdcopy")
qemu = pytest.mark.program("setpriv", "nbdcopy", "qemu-img", "qemu-io")
uses_fio = pytest.mark.program("setpriv", "nbdcopy", "fio")


def sparse_disk(size: int) -> bytes:
    """Some MiB of random data with holes between, lone blocks, blocks of almost nothing, and a tail."""
    dice = random.Random(size)
    disk = bytearray(size)
    for start, length in (
        (0, 1),
        (MIB, 2 * MIB),
        (4 * MIB - 100, 200),
        (5 * MIB + 8192, BLOCK),
        (size - 700, 700),
    ):
        disk[start : start + length] = dice.randbytes(length)
    disk[6 * MIB + 4095] = disk[6 * MIB + 3 * BLOCK] = 1
    return bytes(disk)


DISKS = {name: sparse_disk(size) for name, size in SIZES.items()}


class Shop:
    """A store with the images, and a server of it; clones are made to order."""

    def __init__(self, folder: Path, socket: Path) -> None:
        self.folder, self.store = folder, folder / "s"
        self.run("init")
        for name, disk in DISKS.items():
            (folder / f"{name}.raw").write_bytes(disk)
            self.run("import", str(folder / f"{name}.raw"), name)
        self.server = Server(self.store, socket, folder)

    def run(self, *words: str) -> str:
        """Runs the command on the store, beside the server."""
        result = CliRunner().invoke(cli, ["--store", str(self.store), *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    def at(self, name: str) -> Export:
        return Export(self.server.socket, name)

    def remove(self, name: str) -> None:
        self.wait_for(name)
        self.run("rm", name)

    def wait_for(self, clone: str) -> None:
        """Waits until the server has flushed a clone and given it back: all clients have left it."""
        end = time.monotonic() + TIMEOUT
        with cowstore.open(self.store) as store:
            while True:
                try:
                    store.device(clone).close()
                except cowstore.InUseError:
                    assert time.monotonic() < end, "the server does not give the clone back"
                    time.sleep(0.01)
                else:
                    return

    def exported(self, name: str) -> bytes:
        """What `cowstore export` makes of a device."""
        if name not in DISKS:
            self.wait_for(name)
        self.run("export", "--force", name, str(self.folder / "exported.raw"))
        return (self.folder / "exported.raw").read_bytes()

    def usage(self, clone: str) -> dict[str, int]:
        self.wait_for(clone)
        (usage,) = json.loads(self.run("du", "--json", clone))
        return usage

    def data_bytes(self, clone: str) -> int:
        """How much of a clone the store holds; less than its size where it is sparse there."""
        return self.usage(clone)["allocated"]

    def complaints(self) -> str:
        """What the server has said."""
        return self.server._errors.read_text()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """In the end the server ends well and has complained of nothing."""
    place = Path(tempfile.mkdtemp(prefix="cowstore-"))
    try:
        shop = Shop(tmp_path_factory.mktemp("shop"), place / "nbd.sock")
        with shop.server as server:
            yield shop
            server.stop()
        assert shop.complaints() == ""
    finally:
        shutil.rmtree(place)


@pytest.fixture
def image(request: pytest.FixtureRequest) -> str:
    """The name of an image."""
    return getattr(request, "param", "even")


@pytest.fixture
def clone(shop: Shop, image: str) -> Iterator[Export]:
    """A clone of the image. In the end clients see what is exported, as sparse, and the image is as it was."""
    shop.run("clone", image, "clone")
    clone = shop.at("clone")
    try:
        yield clone
        assert difference(clone.content(), shop.exported("clone")) == ""
        assert difference(shop.at(image).content(), DISKS[image]) == ""
        assert difference(shop.exported(image), DISKS[image]) == ""
    finally:
        shop.remove("clone")


@pytest.fixture
def blank(shop: Shop, image: str) -> Iterator[Export]:
    """A blank clone of the image's size. In the end clients see what is exported."""
    shop.run("create", "blank", str(SIZES[image]))
    blank = shop.at("blank")
    try:
        yield blank
        assert difference(blank.content(), shop.exported("blank")) == ""
    finally:
        shop.remove("blank")


@pytest.fixture
def disk(image: str) -> bytes:
    """The image's bytes."""
    return DISKS[image]


@pytest.fixture
def raw(shop: Shop, image: str) -> Path:
    """The file that the image was made from."""
    return shop.folder / f"{image}.raw"


def stored(content: Content) -> int:
    """How many bytes a store needs for a disk at most: a tail counts as a whole block."""
    return sum(BLOCK for at in range(0, len(content), BLOCK) if any(content[at : at + BLOCK]))


# nbdinfo


@every_size
@nbdinfo
def test_image_can_be_read_only(shop, image):
    info = shop.at(image).info()
    expected: dict[str, object] = {
        "export-size": SIZES[image],
        "is_read_only": True,
        "can_trim": False,
        "can_zero": False,
    }
    expected |= {"description": "image", "can_multi_conn": True, "can_df": True, "can_cache": True}
    expected |= {"contexts": ["base:allocation", "cowstore:own"], "is_rotational": False}
    expected |= {"block_size_minimum": 1, "block_size_preferred": BLOCK, "block_size_maximum": 32 * MIB}
    assert info.items() >= expected.items()


@every_size
@nbdinfo
def test_clone_can_everything(clone, image):
    info = clone.info()
    expected: dict[str, object] = {"export-size": SIZES[image], "is_read_only": False, "description": "clone"}
    assert info.items() >= expected.items()
    can = {
        "can_flush",
        "can_fua",
        "can_trim",
        "can_zero",
        "can_fast_zero",
        "can_multi_conn",
        "can_df",
        "can_cache",
    }
    assert {name for name in info if name.startswith("can_") and info[name]} == can


@nbdinfo
def test_info_for_people_is_clean(clone):
    said("nbdinfo", clone.uri)
    assert said("nbdinfo", "--size", clone.uri) == b"%d\n" % SIZES["even"]


@nbdinfo
def test_list_is_of_what_is_there_now(shop):
    assert server_list(shop.server.socket) == SIZES
    shop.run("create", "new", "12345")
    assert server_list(shop.server.socket) == SIZES | {"new": 12345}
    shop.run("rm", "new")
    assert server_list(shop.server.socket) == SIZES


@nbdinfo
def test_unknown_export_is_refused(shop):
    status, _, errors = ended("nbdinfo", shop.at("nobody").uri)
    assert status == 1
    assert "nobody" in errors


@every_size
@nbdinfo
def test_map_is_the_real_layout(shop, image, disk):
    found = shop.at(image).layout()
    assert found == allocation(disk)
    assert len(found) > 8


@every_size
@nbdinfo
def test_map_of_a_blank_clone_is_a_hole(blank, image):
    assert blank.layout() == [(SIZES[image], HOLE)]


@every_size
@nbdinfo
@qemu
def test_own_is_exactly_what_was_written(clone, image, disk):
    """Not what was written as it was before, nor a hole in a hole."""
    assert clone.layout("cowstore:own") == ownership(disk, disk)
    clone.qemu_io(
        "write -P 1 0 4k", "write -P 2 1M 12k", "write -P 3 3000k 20k", "write -P 4 4500000 3",
        "write -P 5 8388604 4", "discard 1200k 64k", "write -z -u 2M 8k", "write -z -u 7M 64k", "discard 7200k 4k",
        "write -P 0 7300k 4k",
    )  # fmt: skip
    written = bytearray(disk)
    for at, length, byte in (
        (0, 4096, 1), (MIB, 12288, 2), (3000 << 10, 20480, 3), (4500000, 3, 4), (8388604, 4, 5),
        (1200 << 10, 64 << 10, 0), (2 * MIB, 8192, 0),
    ):  # fmt: skip
        written[at : at + length] = bytes([byte]) * length
    assert clone.layout("cowstore:own") == ownership(written, disk)
    assert clone.layout() == allocation(written)
    assert difference(clone.content(), written) == ""


@nbdinfo
@nbdcopy
def test_what_is_copied_onto_itself_is_not_own(shop, clone, disk):
    """The store finds it again by its content."""
    said("nbdcopy", "--allocated", shop.folder / "even.raw", clone.uri)
    assert clone.layout("cowstore:own") == ownership(disk, disk)


# nbdcopy

connections = pytest.mark.parametrize("ways", ["1", "4"])


@every_size
@connections
@nbdcopy
def test_nbdcopy_out(clone, disk, tmp_path, ways):
    """The file is sparse as well, so the holes came as holes."""
    out = tmp_path / "out.raw"
    said("nbdcopy", f"--connections={ways}", "--requests=32", "--request-size=65536", clone.uri, out)
    assert difference(out.read_bytes(), disk) == ""
    assert out.stat().st_blocks * 512 < len(disk) / 2


@every_size
@connections
@nbdcopy
def test_nbdcopy_in(shop, blank, raw, disk, ways):
    """What the store has already it does not store again, and holes stay holes."""
    said("nbdcopy", f"--connections={ways}", "--requests=32", "--flush", raw, blank.uri)
    assert difference(blank.content(), disk) == ""
    assert shop.data_bytes("blank") == stored(disk)
    assert shop.usage("blank")["exclusive"] < 64 << 10


@nbdcopy
def test_nbdcopy_over_something_else(shop, clone, tmp_path):
    """Zeros where there was data give its space back."""
    other = tmp_path / "other.raw"
    content = bytearray(SIZES["even"])
    content[3 * MIB : 4 * MIB + 10] = random.Random(5).randbytes(MIB + 10)
    other.write_bytes(content)
    said("nbdcopy", "--connections=4", other, clone.uri)
    assert difference(clone.content(), content) == ""
    assert shop.data_bytes("clone") == stored(content)


@nbdcopy
def test_nbdcopy_between_two_exports(shop, clone, blank, disk):
    said("nbdcopy", "--connections=2", clone.uri, blank.uri)
    assert difference(blank.content(), disk) == ""
    assert shop.data_bytes("blank") == stored(disk)


# qemu-img


@every_size
@qemu
def test_qemu_img_compare(clone, raw, tmp_path):
    said("qemu-img", "compare", "-f", "raw", "-F", "raw", clone.uri, raw)
    clone.qemu_io("write -P 7 3M 1")
    status, output, errors = ended("qemu-img", "compare", "-f", "raw", "-F", "raw", clone.uri, raw)
    assert (status, errors) == (1, "")
    assert f"offset {3 * MIB}" in output.decode()


@every_size
@qemu
def test_qemu_img_info(clone, disk):
    """Its sizes are whole sectors."""
    info = json.loads(said("qemu-img", "info", "--output=json", clone.uri))
    assert (info["format"], info["virtual-size"]) == ("raw", -(-len(disk) // 512) * 512)


@pytest.mark.parametrize("image", ["even", "sectors"], indirect=True)
@qemu
def test_qemu_img_map(clone, disk):
    found = json.loads(said("qemu-img", "map", "-f", "raw", "--output=json", clone.uri))
    assert [(run["length"], 0 if run["data"] else HOLE) for run in found] == allocation(disk)
    assert all(run["zero"] != run["data"] for run in found)


@every_size
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@qemu
def test_qemu_img_convert_out(clone, disk, tmp_path, kind):
    """What it adds to fill a sector is zeros."""
    out, back = tmp_path / "out", tmp_path / "back.raw"
    said("qemu-img", "convert", "-f", "raw", "-O", kind, clone.uri, out)
    said("qemu-img", "convert", "-f", kind, "-O", "raw", out, back)
    assert difference(back.read_bytes(), disk + bytes(-len(disk) % 512)) == ""
    assert out.stat().st_blocks * 512 < len(disk) / 2


# An export that does not end with a sector is out of the question: qemu would write beyond its end.
@pytest.mark.parametrize("image", ["even", "sectors"], indirect=True)
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@qemu
def test_qemu_img_convert_in(shop, blank, raw, disk, tmp_path, kind):
    source = tmp_path / "source"
    said("qemu-img", "convert", "-f", "raw", "-O", kind, raw, source)
    said("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", kind, "-O", "raw", source, blank.uri)
    assert difference(blank.content(), disk) == ""
    assert shop.data_bytes("blank") == stored(disk)


# qemu-io


@every_size
@pytest.mark.parametrize("grain", [4096, 512, 1])
@qemu
def test_qemu_io_reads_what_it_wrote(clone, disk, grain):
    scribe = Scribe(disk, random.Random(grain))
    clone.qemu_io(*scribe.commands(40, grain))
    assert difference(clone.content(), scribe.content) == ""
    assert clone.layout() == allocation(scribe.content)


@qemu
def test_qemu_io_writes_at_once(clone, disk):
    """Many requests are under way together."""
    places = range(0, 2 * MIB, 100_352)
    writes = [f"aio_write -P {1 + number} {at} 70000" for number, at in enumerate(places)]
    reads = [f"aio_read -P {1 + number} {at} 70000" for number, at in enumerate(places)]
    clone.qemu_io(*writes, "aio_flush", *reads, "aio_flush", "flush")
    expected = bytearray(disk)
    for number, at in enumerate(places):
        expected[at : at + 70000] = bytes([1 + number]) * 70000
    assert difference(clone.content(), expected) == ""


@qemu
def test_qemu_io_notices_what_is_not_there(clone):
    """The tests above could fail."""
    status, output, _ = ended("qemu-io", "-f", "raw", "-c", "read -P 9 7M 4k", clone.uri)
    assert status == 1
    assert b"Pattern verification failed" in output


@qemu
def test_image_cannot_be_written(shop):
    status, _, errors = ended("qemu-io", "-f", "raw", "-c", "write 0 4k", shop.at("even").uri)
    assert status == 1
    assert "read-only" in errors or "Permission" in errors


# fio: each process has a connection and a part of the export of its own.

APART = ("--size=2M", "--offset_increment=2M")


def count(reports: list[dict], action: str) -> int:
    """How often something was done."""
    return sum(report[action]["total_ios"] for report in reports)


@pytest.mark.parametrize(("image", "processes"), [("even", 4), ("odd", 2)], indirect=["image"])
@uses_fio
def test_fio_verifies_what_it_wrote(clone, tmp_path, processes):
    reports = fio(tmp_path, clone, ("write", "--rw=randwrite", f"--numjobs={processes}", *APART))
    assert count(reports, "write") == count(reports, "read") == processes * 512


@uses_fio
def test_fio_verifies_beside_trims_and_flushes(clone, tmp_path):
    sizes = ("--bsrange=512-64k", "--bs_unaligned", "--fsync=32")
    write = ("write", "--rw=randwrite", "--numjobs=2", *sizes, *APART)
    trim = ("trim", "--rw=randtrimwrite", "--numjobs=2", "--offset=4M", "--fsync=16", *APART)
    reports = fio(tmp_path, clone, write, trim)
    assert count(reports, "trim") == 2 * 512
    assert count(reports, "read") >= count(reports, "write") / 2 > 0


@uses_fio
@qemu
def test_fio_verifies_after_the_server_was_stopped(shop, clone, tmp_path):
    """What all clients have left is durable. And fio would notice, if it were not."""
    job = ("write", "--rw=randwrite", "--numjobs=3", *APART)
    fio(tmp_path, clone, (*job, "--do_verify=0"))
    shop.server.stop()
    shop.server.restart()
    reports = fio(tmp_path, clone, (*job, "--verify_only=1"))
    assert count(reports, "read") == 3 * 512
    clone.qemu_io("write -P 1 3M 1")
    status, complaints, _ = tried_fio(tmp_path, clone, (*job, "--verify_only=1"))
    assert status != 0
    assert "verify" in " ".join(complaints)
