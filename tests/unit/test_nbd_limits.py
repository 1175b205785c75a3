"""Hostile clients on real sockets: what they cannot make the server hold, and whom they cannot hold up."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cowstore.errors import NoSpaceError, PoisonedError
from cowstore.nbd import Limits
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_client import Client, GoneError, connect
from tests.unit.nbd_lines import until
from tests.unit.nbd_memory import MemoryDevices
from tests.unit.nbd_serving import Serving, resident_bytes, serving

BLOCK, MIB = 4096, 1 << 20
BOUND = 20.0  # seconds: far more than any limit here


@pytest.fixture
def devices() -> MemoryDevices:
    return MemoryDevices({"base": b"B" * 4 * MIB}, {"desk": b"D" * 4 * MIB})


def ends_in_time(sock: socket.socket) -> bool:
    """Whether the server closes the connection, and not the bound."""
    sock.settimeout(BOUND)
    with contextlib.suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
    return True


# ----------------------------------------------------------------------------------------------------- handshake


@pytest.mark.parametrize(
    "said", [b"", b"\0\0\0", nbd.client_flags(), nbd.client_flags() + nbd.option(7, length=60000)]
)
def test_client_that_falls_silent_in_its_handshake_is_dropped(devices, tmp_path, said):
    with serving(devices, tmp_path, limits=Limits(handshake_seconds=0.2)) as served:
        with connect(served.place) as sock:
            sock.sendall(said)
            assert ends_in_time(sock)
        until(lambda: served.server.clients == 0)


def test_client_that_sends_a_byte_now_and_then_is_dropped(devices, tmp_path):
    with serving(devices, tmp_path, limits=Limits(handshake_seconds=0.3)) as served:
        with connect(served.place) as sock, contextlib.suppress(ConnectionError):
            begun = time.monotonic()
            sock.sendall(nbd.client_flags() + nbd.option(99, length=60_000))
            while time.monotonic() - begun < BOUND:
                sock.sendall(b"x")
                time.sleep(0.02)
        assert time.monotonic() - begun < BOUND
        until(lambda: served.server.clients == 0)


def test_client_that_reads_a_little_now_and_then_is_dropped():
    """The names of many devices, asked for many times, read slowly: ten times the limit is enough."""
    many = MemoryDevices({}, {f"desk-{number:0>100}": b"" for number in range(5000)})
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with slow_server(many, theirs) as ended, ours:
        ours.sendall(nbd.client_flags() + nbd.option(nbd.LIST) * 60)
        begun = time.monotonic()
        while not ended.is_set() and time.monotonic() - begun < 3:
            ours.settimeout(1)
            with contextlib.suppress(OSError):
                ours.recv(20_000)
            time.sleep(0.1)
        late = not ended.is_set()
    assert not late


@contextlib.contextmanager
def slow_server(devices: MemoryDevices, sock: socket.socket) -> Iterator[threading.Event]:
    """One client's thread of a server, with a handshake of 0.3 seconds; says when it has ended."""
    from cowstore.nbd import Server
    from cowstore.nbd.channel import Channel

    server = Server(devices, [], limits=Limits(handshake_seconds=0.3))
    ended = threading.Event()

    def serve() -> None:
        server._serve(Channel(sock))
        ended.set()

    thread = threading.Thread(target=serve)
    thread.start()
    yield ended
    thread.join()
    server.stop()


def test_option_that_is_too_big_is_answered_and_the_client_dropped(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        client = served.client()
        client.sock.sendall(nbd.option(nbd.LIST, length=1 << 31))
        assert nbd.read_option_reply(client.take).kind == nbd.TOO_BIG
        assert client.wait_for_end() == b""


# --------------------------------------------------------------------------------------------------- connections


def test_no_more_connections_than_are_allowed(devices, tmp_path):
    with serving(devices, tmp_path, limits=Limits(connections=3)) as served:
        kept = [served.open("desk") for _ in range(3)]
        for _ in range(5):
            with pytest.raises((GoneError, ConnectionError)):
                served.client()
        assert served.server.metrics.refused == 5
        kept.pop().disconnect()
        until(lambda: served.server.clients == 2)
        served.open("base").read(0, 10)
        assert kept[0].read(0, 1) == b"D"


# ------------------------------------------------------------------------------------------------- broken frames


@pytest.mark.parametrize(
    "bad",
    [
        bytes(28),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        nbd.Request(nbd.WRITE, 1, 0, (32 << 20) + 1).encode(),
        nbd.Request(nbd.WRITE, 1, 0, (1 << 32) - 1).encode(),
    ],
    ids=["zeros", "http", "32 MiB and a byte", "4 GiB"],
)
def test_broken_frame_ends_its_connection_and_no_other(devices, tmp_path, bad):
    with serving(devices, tmp_path) as served:
        good, evil = served.open("desk"), served.open("desk")
        evil.sock.sendall(bad)
        assert evil.wait_for_end() == b""
        assert good.read(0, 4) == b"DDDD"


def test_what_was_asked_before_a_broken_frame_is_answered(devices, tmp_path):
    """As it is where the bytes come one after the other; it should not depend on how they come."""
    with serving(devices, tmp_path) as served:
        client = served.open("desk")
        request = client.pending(nbd.READ, 0, 10)
        client.sock.sendall(request.encode() + bytes(28))
        assert client.answer(request).data == b"D" * 10
        assert client.wait_for_end() == b""


def test_write_that_is_cut_off_is_not_done(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        client = served.open("desk")
        client.write(BLOCK, b"whole")
        client.sock.sendall(nbd.write(0, b"x" * 3 * MIB).encode()[:-1])
        client.close()
        until(lambda: served.server.clients == 0)
    content = devices.opened[0][1].content
    assert content[: BLOCK + 5] == b"D" * BLOCK + b"whole"


# -------------------------------------------------------------------------------------------------------- unread


def stall(served: Serving, name: str) -> Client:
    """A client that asks for much and reads nothing."""
    client = served.open(name)
    client.send_many(*(client.pending(nbd.READ, 0, 4 * MIB) for _ in range(20)))
    return client


@pytest.mark.parametrize("name", ["desk", "base"])
@pytest.mark.parametrize("tcp", [False, True])
def test_client_that_does_not_read_is_dropped(devices, tmp_path, name, tcp):
    with serving(devices, tmp_path, tcp=tcp, limits=Limits(send_seconds=0.3)) as served:
        stall(served, name)
        begun = time.monotonic()
        until(lambda: served.server.clients == 0)
        assert time.monotonic() - begun < BOUND
        assert devices.open_names == []


def test_client_that_does_not_read_holds_nobody_up_who_reads_and_writes(devices, tmp_path):
    with serving(devices, tmp_path, limits=Limits(send_seconds=60)) as served:
        stall(served, "desk")
        other = served.open("desk")
        for number in range(100):
            other.write(number, b"x")
            assert other.read(number, 1) == b"x"
        image = served.open("base")
        assert image.read(0, 4) == b"BBBB"


def test_client_that_does_not_read_holds_nobodys_flush_up(devices, tmp_path):
    with serving(devices, tmp_path, limits=Limits(send_seconds=4)) as served:
        evil = served.open("desk")
        asked = [evil.pending(nbd.READ, 0, 4 * MIB) for _ in range(20)]
        disk = devices.opened[0][1]
        disk.may_flush.clear()
        evil.send(nbd.FLUSH)
        assert disk.flushing.wait(60)
        evil.send_many(*asked)
        until(lambda: disk.count("views") > 0)
        time.sleep(0.2)  # now its thread waits, and so will whoever wants to send to it
        other = served.open("desk", patience=2)
        disk.may_flush.set()
        other.flush()


# -------------------------------------------------------------------------------------------------------- memory


def test_writes_that_are_announced_take_no_memory_before_they_come(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        clients = [served.open("desk") for _ in range(12)]
        before = resident_bytes()
        for client in clients:
            client.sock.sendall(nbd.Request(nbd.WRITE, 1, 0, 32 * MIB).encode() + b"x")
            assert client.export
        served.open("base").read(0, 10)
        time.sleep(0.2)  # for the last of them to have arrived
        assert resident_bytes() - before < 64 * MIB  # of the 384 MiB that were announced


def test_flushes_without_end_whose_answers_are_not_received(devices, tmp_path):
    """The server takes no more of them than its limit, and than sockets hold of the answers."""
    with serving(devices, tmp_path) as served:
        client = served.open("desk", structured=False)
        many = b"".join(nbd.Request(nbd.FLUSH, number).encode() for number in range(1000))
        client.sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(100):
                client.sock.sendall(many)
        assert served.server.metrics.sum().requests[nbd.FLUSH] < 50_000


def test_reads_that_are_not_received_take_no_memory_without_end(devices, tmp_path):
    with serving(devices, tmp_path) as served:
        before = resident_bytes()
        for _ in range(8):
            client = served.open("desk")
            client.sock.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                for _ in range(200):
                    client.send_many(*(client.pending(nbd.READ, 0, MIB) for _ in range(100)))
        assert resident_bytes() - before < 8 * 16 * MIB


def test_lists_that_are_not_received_take_no_memory_without_end(tmp_path):
    """A kilobyte asks sixty times for the names of five thousand devices, of 630 KB each time."""
    many = MemoryDevices({}, {f"desk-{number:0>100}": b"" for number in range(5000)})
    with serving(many, tmp_path, limits=Limits(handshake_seconds=2)) as served:
        client = served.client()
        before = resident_bytes()
        client.sock.sendall(nbd.option(nbd.LIST) * 60)
        until(lambda: not served.server.clients or resident_bytes() - before > 16 * MIB)
        assert resident_bytes() - before <= 16 * MIB


# ------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (NoSpaceError("/srv/store"), nbd.ENOSPC),
        (PoisonedError("fsync said EIO"), nbd.EIO),
        (OSError(5, "Input/output error"), nbd.EIO),
    ],
)
@pytest.mark.parametrize("structured", [True, False])
def test_flush_that_fails_is_answered_and_the_connection_goes_on(devices, tmp_path, failure, error, structured):
    with serving(devices, tmp_path) as served:
        client = served.open("desk", structured=structured)
        disk = devices.opened[0][1]
        disk.failures["flush"] = failure
        assert client.ask(nbd.FLUSH).error == error
        assert client.ask(nbd.WRITE, 0, flags=nbd.FUA, data=b"x").error == error
        del disk.failures["flush"]
        client.flush()
        assert disk.durable[:1] == b"x"
