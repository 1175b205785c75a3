"""The server on real sockets with a real store: whose disks they are, and what works beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowstore
from cowstore import InUseError
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_client import OptionError, RequestError
from tests.unit.nbd_lines import until
from tests.unit.nbd_memory import MemoryDevices
from tests.unit.nbd_serving import Serving, descriptors, serving, threads

BLOCK, MIB = 4096, 1 << 20
IMAGE = bytes(range(256)) * 64 + bytes(16 * BLOCK) + b"tail"


@pytest.fixture
def stocked(store: cowstore.Store, tmp_path: Path) -> cowstore.Store:
    """The image `base`, and its clone `desk`."""
    (tmp_path / "disk.raw").write_bytes(IMAGE)
    store.import_image(tmp_path / "disk.raw", "base")
    store.clone("base", "desk", size=MIB).close()
    return store


@pytest.fixture
def served(stocked: cowstore.Store, path: Path) -> Iterator[Serving]:
    with serving(stocked, path.parent) as one:
        yield one


def last_flushed(store: cowstore.Store, name: str) -> bytes:
    with store.device(name, readonly=True) as device:
        return device.pread(device.size, 0)


# ----------------------------------------------------------------------------------------------------- the disks


@pytest.mark.parametrize("structured", [True, False])
def test_image_can_be_read_and_not_changed(served, structured):
    client = served.open("base", structured=structured)
    assert client.export.flags & nbd.READ_ONLY
    assert client.read(0, len(IMAGE)) == IMAGE
    for change in (nbd.TRIM, nbd.WRITE_ZEROES):
        assert client.ask(change, 0, BLOCK).error == nbd.EPERM
    with pytest.raises(RequestError):
        client.write(0, b"x")
    client.flush()
    assert client.read(0, len(IMAGE)) == IMAGE


@pytest.mark.parametrize("structured", [True, False])
def test_clone_can_be_written(served, stocked, structured):
    client = served.open("desk", structured=structured)
    model = bytearray(IMAGE.ljust(MIB, b"\0"))
    for offset, data in [(0, b"abc"), (5000, os.urandom(70_000)), (MIB - 5, b"12345")]:
        client.write(offset, data)
        model[offset : offset + len(data)] = data
    for ask, offset, length in [(client.zero, 100, 9000), (client.trim, 50_000, 3 * BLOCK)]:
        ask(offset, length)
        model[offset : offset + length] = bytes(length)
    assert client.read(0, MIB) == model
    client.flush()
    assert last_flushed(stocked, "desk") == model


def test_extents_are_the_devices(served):
    client = served.open("desk", "base:allocation", "cowstore:own")
    client.write(20 * BLOCK, b"x" * BLOCK)
    found = client.status(0, MIB)
    assert found["base:allocation"] == [(4 * BLOCK, 0), (16 * BLOCK, 3), (BLOCK, 0), (MIB - 21 * BLOCK, 3)]
    assert found["cowstore:own"] == [(20 * BLOCK, 0), (BLOCK, 1), (MIB - 21 * BLOCK, 0)]


def test_damage_is_an_error_and_never_its_bytes(stocked, path):
    stocked.close()
    for segment in (stocked.path / "segments").glob("*.seg"):
        with open(segment, "r+b") as file:
            data = file.read(16 * MIB)
            if (at := data.find(IMAGE[:BLOCK])) >= 0:
                file.seek(at)
                file.write(bytes([data[at] ^ 1]))
    with cowstore.open(stocked.path) as again, serving(again, path.parent) as served:
        client = served.open("base")
        answer = client.ask(nbd.READ, 0, BLOCK)
        assert (answer.error, answer.data) == (nbd.EIO, b"")
        assert "base" in answer.message
        assert client.read(4 * BLOCK, 16 * BLOCK) == bytes(16 * BLOCK)


# ------------------------------------------------------------------------------------ one handle for all clients


def test_clients_of_a_clone_see_each_others_writes(served):
    one, other = served.open("desk"), served.open("desk")
    one.write(10, b"from one")
    assert other.read(10, 8) == b"from one"


@pytest.mark.parametrize("flags", [0, nbd.FUA])
def test_flush_on_one_connection_covers_the_other(served, stocked, flags):
    one, other = served.open("desk"), served.open("desk")
    one.write(0, b"from one")
    assert last_flushed(stocked, "desk")[:8] != b"from one"
    if flags:
        other.write(9000, b"from the other", flags)
    else:
        other.flush()
    assert last_flushed(stocked, "desk")[:8] == b"from one"


def test_clone_is_open_from_its_first_client_to_its_last(served, stocked):
    first, second = served.open("desk"), served.open("desk")
    first.disconnect()
    with pytest.raises(InUseError) as caught:
        stocked.delete("desk")
    assert caught.value.holder == os.getpid()
    second.disconnect()
    stocked.delete("desk")
    assert served.client().exports() == ["base"]


def test_image_is_open_as_long_as_a_client_has_it(served, stocked):
    client = served.open("base")
    with pytest.raises(InUseError):
        stocked.delete("base")
    client.disconnect()
    stocked.delete("base")


@pytest.mark.parametrize("politely", [True, False])
def test_unflushed_writes_are_flushed_when_the_last_client_leaves(served, stocked, politely):
    client = served.open("desk")
    client.write(0, b"unflushed")
    client.disconnect() if politely else client.close()
    until(lambda: served.server.clients == 0)
    assert last_flushed(stocked, "desk")[:9] == b"unflushed"


def test_looking_opens_nothing(served, stocked):
    client = served.client()
    client.exports()
    client.info("desk", 1, 2, 3)
    stocked.delete("desk")
    with pytest.raises(OptionError) as caught:
        client.go("desk")
    assert caught.value.kind == nbd.UNKNOWN


@pytest.mark.parametrize("name", ["", ".", "../base", "a\0b", "\u00e9", "x" * 300, "x" * 4000])
def test_what_can_be_no_name_is_unknown(served, name):
    client = served.client()
    for ask in (client.info, client.go):
        with pytest.raises(OptionError) as caught:
            ask(name)
        assert caught.value.kind == nbd.UNKNOWN
    assert client.exports() == ["base", "desk"]


# ---------------------------------------------------------------------------------------- what goes on beside it


def test_clones_made_meanwhile_are_there_at_once(served, stocked):
    client = served.client()
    stocked.clone_many("base", ["new-1", "new-2"])
    assert client.exports() == ["base", "desk", "new-1", "new-2"]
    client.go("new-2")
    client.write(0, b"new")


def test_device_that_is_renamed_while_open_is_the_same(served, stocked):
    before = served.open("desk")
    before.write(0, b"unflushed")
    stocked.rename("desk", "renamed")
    after = served.open("renamed")
    assert after.read(0, 9) == b"unflushed"
    with pytest.raises(OptionError):
        served.open("desk")
    before.disconnect()
    after.flush()


HOLD = (
    "import cowstore, sys; device = cowstore.open(sys.argv[1]).device('desk'); print('held', flush=True); input()"
)


def test_clone_that_another_process_holds_is_refused_with_its_pid(served, stocked):
    words = [sys.executable, "-W", "ignore", "-c", HOLD, str(stocked.path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        client = served.client()
        with pytest.raises(OptionError, match=rf"in use by process {other.pid}\b") as caught:
            client.go("desk")
        assert caught.value.kind == nbd.POLICY
        client.go("base")
        other.communicate(b"\n")
    served.open("desk").write(0, b"free")


def test_everything_that_reads_works_beside_a_served_clone(served, stocked, tmp_path):
    client = served.open("desk")
    client.write(0, b"flushed")
    client.flush()
    client.write(0, b"not yet")
    stocked.fork("desk", "fork")
    stocked.seal("desk", "sealed")
    stocked.export("desk", tmp_path / "out.raw")
    expected = b"flushed" + IMAGE[7:].ljust(MIB - 7, b"\0")
    assert last_flushed(stocked, "fork") == last_flushed(stocked, "sealed") == expected
    assert (tmp_path / "out.raw").read_bytes() == expected
    (change, *_) = stocked.diff("base", "desk")
    assert (change.offset, change.length) == (0, BLOCK)
    assert stocked.usage("desk").own == stocked.usages()["desk"].own == BLOCK
    assert client.read(0, 7) == b"not yet"
    assert served.client().exports() == ["base", "desk", "fork", "sealed"]


def test_what_would_change_a_served_clone_is_refused(served, stocked):
    served.open("desk")
    for refused in (stocked.delete, stocked.reset, stocked.device):
        with pytest.raises(InUseError):
            refused("desk")


def test_one_server_a_store_on_a_host(stocked):
    with stocked.serving():
        with (
            cowstore.open(stocked.path) as again,
            pytest.raises(InUseError, match="serving store") as caught,
            again.serving(),
        ):
            pass
        assert caught.value.holder == os.getpid()
    with stocked.serving():
        pass


def test_store_that_is_closed_under_the_server(stocked, path):
    with serving(stocked, path.parent) as served:
        client = served.open("desk")
        client.write(0, b"x")
        stocked.close()
        assert client.ask(nbd.READ, 0, 10).error == nbd.ESHUTDOWN
        assert client.ask(nbd.FLUSH).error == nbd.ESHUTDOWN
        with pytest.raises(OptionError):
            served.client().go("desk")
    with cowstore.open(stocked.path) as again:
        assert last_flushed(again, "desk")[:1] == b"x"


def test_list_of_a_store_that_is_closed_under_the_server(stocked, path, caplog):
    with serving(stocked, path.parent) as served:
        client = served.client()
        stocked.close()
        client.option(nbd.LIST)


# ------------------------------------------------------------------------------------------------ leaving traces


def vanish(served: Serving, turn: int) -> None:
    """A client that asks a hundred things and is gone before the answers."""
    client = served.open("desk", structured=bool(turn % 3))
    kinds = [nbd.READ, nbd.WRITE, nbd.WRITE_ZEROES, nbd.FLUSH, nbd.READ]
    many = []
    for number in range(100):
        kind = kinds[(number + turn) % 5]
        if kind == nbd.WRITE:
            many.append(client.pending(kind, number * BLOCK, data=b"w" * BLOCK, flags=number % 20 == 3))
        elif kind == nbd.FLUSH:
            many.append(client.pending(kind) if number % 4 == 0 else client.pending(nbd.TRIM, 0, BLOCK))
        else:
            many.append(client.pending(kind, number * BLOCK, BLOCK * (1 + turn % 20)))
    client.send_many(*many)
    client.close()


def test_client_that_vanishes_a_thousand_times_over_leaves_nothing(served, stocked):
    vanish(served, 0)
    until(lambda: served.server.clients == 0)
    before = descriptors()
    for turn in range(1000):
        vanish(served, turn)
    until(lambda: served.server.clients == 0)
    assert served.server.exports.open_count() == 0
    assert threads() == ["cowstore-nbd"]
    assert descriptors() <= before
    assert served.server.metrics.connections == 1001
    stocked.delete("desk")


def test_nothing_is_left_of_a_server_that_has_stopped(stocked, path):
    before = descriptors()
    with serving(stocked, path.parent) as served:
        for name in ("base", "desk", "desk"):
            served.open(name)
    assert threads() == []
    assert descriptors() == before
    assert not (path.parent / "nbd.sock").exists()
    stocked.delete("desk", "base")


def test_failing_device_is_given_back(path, caplog):
    devices = MemoryDevices({}, {"desk": bytes(MIB)})
    devices.prepare = lambda disk: disk.failures.update(close=OSError(5, "Input/output error"))
    with serving(devices, path.parent) as served:
        served.open("desk").disconnect()
        assert served.server.exports.open_count() == 0
    assert "keeps its journal" in caplog.text
