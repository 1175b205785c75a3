"""The server's end: what is in flight is answered, what is written is flushed, and it does not take for ever."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import cowstore
from cowstore.nbd import Limits
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_client import Client, GoneError, connect
from tests.unit.nbd_lines import until
from tests.unit.nbd_memory import MemoryDevices
from tests.unit.nbd_serving import serving, threads

BLOCK, MIB = 4096, 1 << 20
QUICK = Limits(stop_seconds=0.5)
BOUND = 20.0  # seconds: far more than any stop here takes


@pytest.fixture
def devices() -> MemoryDevices:
    return MemoryDevices({"base": b"B" * 4 * MIB}, {"desk": b"D" * 4 * MIB})


@pytest.fixture
def apart() -> Iterator[ThreadPoolExecutor]:
    """Does something in another thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize(("tcp", "count"), [(False, 200), (True, 10)])
def test_requests_that_were_sent_are_answered(devices, tmp_path, tcp, count):
    """Of TCP, what a receiving buffer holds: the rest is still on its way."""
    with serving(devices, tmp_path, tcp=tcp) as served:
        client = served.open("desk")
        client.flush()  # it is in its transmission now
        asked = [client.pending(nbd.WRITE, number * BLOCK, data=b"w" * BLOCK) for number in range(count)]
        client.send_many(*asked, client.pending(nbd.FLUSH))
        assert served.server.stop()
        assert {client.receive().error for _ in range(count + 1)} == {0}
        assert client.wait_for_end() == b""
    disk = devices.opened[0][1]
    assert disk.durable[: count * BLOCK] == b"w" * count * BLOCK
    assert devices.open_names == []


def test_flush_that_runs_is_waited_for(devices, tmp_path, apart):
    with serving(devices, tmp_path) as served:
        client = served.open("desk")
        disk = devices.opened[0][1]
        disk.may_flush.clear()
        flush = client.send(nbd.FLUSH)
        assert disk.flushing.wait(60)
        stopped = apart.submit(served.server.stop)
        until(lambda: "cowstore-nbd" not in threads())
        assert not stopped.done()
        disk.may_flush.set()
        assert stopped.result(60)
        assert client.answer(flush).error == 0


@pytest.mark.parametrize("by", ["disc", "stop"])
def test_answers_of_flushes_reach_a_client_that_reads_late(devices, tmp_path, apart, by):
    with serving(devices, tmp_path) as served:
        client = served.open("desk", structured=False)
        client.send_many(*(client.pending(nbd.FLUSH) for _ in range(3000)))
        until(lambda: served.server.metrics.sum().requests[nbd.FLUSH])
        if by == "disc":
            client.sock.sendall(nbd.Request(nbd.DISC).encode())
        else:
            apart.submit(served.server.stop)
            until(lambda: "cowstore-nbd" not in threads())
        time.sleep(0.3)  # in which the server must not have left
        assert {client.receive().error for _ in range(3000)} == {0}
        assert client.wait_for_end() == b""


def test_unflushed_writes_are_flushed_and_the_clone_is_given_back(store, path):
    store.create("desk", MIB).close()
    with serving(store, path.parent) as served:
        client = served.open("desk")
        client.write(0, b"unflushed")
        assert served.server.stop()
        with store.device("desk", readonly=True) as device:
            assert device.pread(9, 0) == b"unflushed"
        store.delete("desk")


def test_clients_in_their_handshake_do_not_hold_it_up(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        silent = connect(served.place)
        greeted = served.client()
        until(lambda: served.server.clients == 2)
        begun = time.monotonic()
        assert served.server.stop()
        assert time.monotonic() - begun < BOUND
        assert greeted.wait_for_end() == b""
        silent.close()


def test_nobody_can_connect_any_more(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        assert served.server.stop()
        with pytest.raises(OSError, match="No such file"):
            served.client()


def read_without_receiving(client: Client) -> None:
    """Asks for more than any socket holds."""
    client.send_many(*(client.pending(nbd.READ, 0, 4 * MIB) for _ in range(20)))


@pytest.mark.parametrize("name", ["desk", "base"])
def test_client_that_does_not_read_is_dropped_and_its_writes_are_flushed(devices, tmp_path, name):
    with serving(devices, tmp_path, limits=QUICK) as served:
        client = served.open(name)
        if name == "desk":
            client.write(0, b"before")
        read_without_receiving(client)
        polite = served.open("base")
        polite.read(0, 10)
        begun = time.monotonic()
        assert not served.server.stop()
        assert time.monotonic() - begun < BOUND
        assert devices.open_names == []
        assert threads() == []
    assert devices.opened[0][0] == name
    assert ("close",) in devices.opened[0][1].calls


def test_flush_that_never_ends_does_not_hold_the_stop_up_for_ever(devices, tmp_path, apart):
    """Giving the device back has to wait for it, and so does stop(); clients are dropped in time all the same."""
    with serving(devices, tmp_path, limits=QUICK) as served:
        client = served.open("desk")
        disk = devices.opened[0][1]
        disk.may_flush.clear()
        client.send(nbd.FLUSH)
        assert disk.flushing.wait(60)
        stopped = apart.submit(served.server.stop)
        with pytest.raises(GoneError):
            client.receive()
        disk.may_flush.set()
        assert stopped.result(60) is False
        assert devices.open_names == []


def receive_all(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass


@pytest.mark.parametrize("tcp", [False, True])
def test_client_that_goes_on_asking_does_not_hold_it_up(devices, tmp_path, tcp):
    with serving(devices, tmp_path, tcp=tcp, limits=Limits(stop_seconds=3)) as served:
        client = served.open("desk", structured=False)
        client.flush()
        leaving = threading.Event()

        def ask() -> None:
            with contextlib.suppress(OSError):
                while not leaving.is_set():
                    client.send_many(*(client.pending(nbd.READ, 0, BLOCK) for _ in range(64)))

        asking = threading.Thread(target=ask)
        asking.start()
        receiving = threading.Thread(target=receive_all, args=[client.sock])
        receiving.start()
        until(lambda: served.server.metrics.sum().requests[nbd.READ] > 1000)
        try:
            assert served.server.stop()
        finally:
            leaving.set()
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_RDWR)
            asking.join()
            receiving.join()


def test_stopping_twice_is_harmless(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        assert served.server.stop()
        assert served.server.stop()


def test_server_that_was_never_started_stops(devices, tmp_path):
    listener = cowstore.nbd.listen_unix(tmp_path / "nbd.sock")
    assert cowstore.nbd.Server(devices, [listener]).stop()
    assert not (tmp_path / "nbd.sock").exists()
