"""Where clients connect, and who may: sockets private to their owner, stale ones replaced, living ones not."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest

from cowstore.errors import InUseError, InvalidError, StoreError
from cowstore.nbd import Listener, check_private, listen_tcp, listen_unix, make_private, passed
from tests.unit.nbd_client import Client, GoneError, connect
from tests.unit.nbd_lines import until
from tests.unit.nbd_memory import MemoryDevices
from tests.unit.nbd_serving import handing, serving

NOBODY = 65534


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Callable[..., Listener]]:
    """Listens at `nbd.sock`, or somewhere else; closed at the end."""
    made: list[Listener] = []

    def make(path: Path | None = None) -> Listener:
        made.append(listen_unix(path or tmp_path / "nbd.sock"))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def devices() -> MemoryDevices:
    return MemoryDevices({"base": b"B" * 100}, {"desk": b"D" * 100})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -------------------------------------------------------------------------------------------------- Unix sockets


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_socket_and_the_directories_that_are_made_are_private(listen, tmp_path, umask):
    before = os.umask(umask)
    try:
        path = tmp_path / "a" / "b" / "nbd.sock"
        listen(path)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert mode(path) == 0o600
    assert mode(path.parent) == mode(path.parent.parent) == 0o700


def test_directory_that_is_there_stays_as_it_is(listen, tmp_path):
    tmp_path.chmod(0o755)
    listen()
    assert mode(tmp_path) == 0o755


def test_stale_socket_is_replaced(listen, tmp_path):
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    assert path.exists()
    listen(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_living_socket_is_left_alone(listen, tmp_path):
    living = listen()
    with pytest.raises(InUseError, match="is in use"):
        listen_unix(tmp_path / "nbd.sock")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "nbd.sock"))
        living.sock.settimeout(10)
        for _ in range(2):  # the first is the one that looked whether somebody listens
            living.sock.accept()[0].close()


@pytest.mark.parametrize("kind", ["file", "directory", "link to nowhere", "link to a file"])
def test_what_is_no_socket_is_left_alone(tmp_path, kind):
    path, other = tmp_path / "nbd.sock", tmp_path / "other"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        if kind == "link to a file":
            other.write_text("precious")
        path.symlink_to(other)
    before = path.lstat()
    with pytest.raises(StoreError, match="no socket"):
        listen_unix(path)
    assert path.lstat() == before


def test_path_of_the_greatest_length_and_of_one_more(listen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room = 107 - len(str(tmp_path)) - 1
    listen(Path("s" * room))
    with pytest.raises(InvalidError, match="too long for a socket"):
        listen_unix("s" * (room + 1))


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make"):
        listen_unix(tmp_path / "file" / "nbd.sock")


def test_socket_goes_with_its_listener(listen, tmp_path):
    listen().close()
    assert list(tmp_path.iterdir()) == []


def test_address_of_a_unix_socket(listen, tmp_path):
    assert listen(tmp_path / "a b%.sock").uri == f"nbd+unix:///?socket={tmp_path}/a%20b%25.sock"


def test_private_directory_is_one_that_only_we_can_enter(tmp_path):
    private = tmp_path / "private"
    make_private(private)
    check_private(private)
    for wrong in (0o750, 0o705, 0o711):
        private.chmod(wrong)
        with pytest.raises(StoreError, match="not private"):
            check_private(private)
    private.chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(private)
    with pytest.raises(StoreError, match="not private"):
        check_private(link)


@pytest.mark.root
def test_directory_of_another_user_is_not_private(tmp_path):
    theirs = tmp_path / "theirs"
    make_private(theirs)
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(StoreError, match="not private"):
        check_private(theirs)


# --------------------------------------------------------------------------------------------------------- peers


@pytest.fixture
def nobody() -> Iterator[Callable[[Path], bytes]]:
    """A process of another user, made while there are no threads; says what it hears at a socket."""
    from_us, to_child = os.pipe()
    from_child, to_us = os.pipe()
    child = os.fork()
    if not child:
        said = b"cannot connect"
        try:
            os.close(to_child)
            os.setuid(NOBODY)
            path = os.read(from_us, 4096).decode()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(30)
                sock.connect(path)
                said = b"connected, and heard " + sock.recv(100)
        finally:
            os.write(to_us, said)
            os._exit(0)
    os.close(from_us)
    os.close(to_us)

    def hear(path: Path) -> bytes:
        os.write(to_child, os.fsencode(path))
        return os.read(from_child, 4096)

    yield hear
    os.close(to_child)
    os.close(from_child)
    os.waitpid(child, 0)


@pytest.mark.root
def test_process_of_another_user_cannot_even_connect(nobody, devices, path):
    path.parent.chmod(0o755)
    with serving(devices, path.parent):
        assert nobody(path.parent / "nbd.sock") == b"cannot connect"


@pytest.mark.root
def test_process_of_another_user_that_can_connect_hears_nothing(nobody, devices, path, caplog):
    with serving(devices, path.parent) as served:
        path.parent.chmod(0o755)
        (path.parent / "nbd.sock").chmod(0o777)
        assert nobody(path.parent / "nbd.sock") == b"connected, and heard "
        until(lambda: served.server.metrics.refused == 1)
        assert f"is user {NOBODY}'s" in caplog.text
        served.open("desk").read(0, 1)


# ----------------------------------------------------------------------------------------------------------- TCP


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("0", "127.0.0.1"),
        (":0", "127.0.0.1"),
        ("127.0.0.1:0", "127.0.0.1"),
        ("127.0.0.2:0", "127.0.0.2"),
        ("0.0.0.0:0", "0.0.0.0"),
        ("localhost:0", "127.0.0.1"),
    ],
)
def test_addresses(address, host):
    with closing(listen_tcp(address)) as listener:
        assert listener.sock.getsockname()[0] in (host, "::1" if address.startswith("localhost") else host)
        assert not listener.is_unix


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_address_of_ipv6():
    try:
        listener = listen_tcp("[::1]:0")
    except StoreError as error:
        pytest.skip(str(error))
    with closing(listener):
        assert listener.uri == f"nbd://[::1]:{listener.sock.getsockname()[1]}/"


def test_address_of_tcp():
    with closing(listen_tcp("0")) as listener:
        assert listener.uri == f"nbd://127.0.0.1:{listener.sock.getsockname()[1]}/"


@pytest.mark.parametrize(
    "address", ["", "host", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1", "\u0661"]
)
def test_what_is_no_address(address):
    with pytest.raises(InvalidError, match="no address"):
        listen_tcp(address)


def test_host_that_is_not_known():
    with pytest.raises(InvalidError, match="not known"):
        listen_tcp("no.such.host.invalid:0")


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_host_that_can_be_none(host):
    with pytest.raises(InvalidError, match="not known"):
        listen_tcp(f"{host}:0")


def test_address_that_is_not_ours():
    with pytest.raises(StoreError, match="cannot listen"):
        listen_tcp("192.0.2.1:0")


def test_port_where_somebody_listens():
    with closing(listen_tcp("0")) as first, pytest.raises(InUseError, match="is in use"):
        listen_tcp(f"127.0.0.1:{first.sock.getsockname()[1]}")


def test_clients_of_tcp_are_served_without_delay(devices, tmp_path):
    with serving(devices, tmp_path, tcp=True) as served:
        client = served.open("desk")
        assert client.read(0, 100) == b"D" * 100
        assert client.sock.family == socket.AF_INET


def test_server_may_listen_at_several_places(devices, tmp_path):
    from cowstore.nbd import Server

    listeners = [listen_unix(tmp_path / "a"), listen_unix(tmp_path / "b"), listen_tcp("0")]
    server = Server(devices, listeners)
    server.start()
    places = [tmp_path / "a", tmp_path / "b", listeners[2].sock.getsockname()]
    clients = [Client(place) for place in places]
    for client in clients:
        client.go("desk")
    assert len(server.uris) == 3
    assert server.exports.open_count() == 1
    clients[0].write(0, b"shared")
    assert clients[2].read(0, 6) == b"shared"
    for client in clients:
        client.close()
    assert server.stop()


# --------------------------------------------------------------------------------------------- sockets passed on


def test_sockets_of_another_process_are_not_taken():
    assert passed(str(os.getpid() + 1), "1") == []
    assert passed("", "") == []
    assert passed(str(os.getpid()), "") == []
    assert passed(str(os.getpid()), "x") == []


TAKE = """
import os, sys
from cowstore.nbd import passed
from cowstore.errors import InvalidError
try:
    for listener in passed(str(os.getpid()), sys.argv[1]):
        print(listener.uri, os.get_inheritable(listener.sock.fileno()))
        listener.sock.detach()
except InvalidError as error:
    print("refused:", error)
"""


def take(count: int, *handed: socket.socket | IO[Any]) -> list[str]:
    """What a process finds in the sockets that are handed to it from descriptor 3 on."""
    words, numbers = handing(handed, "-c", TAKE, str(count))
    done = subprocess.run(words, pass_fds=numbers, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_listening_sockets_are_taken_and_not_passed_on(tmp_path):
    with closing(listen_unix(tmp_path / "a")) as one, closing(listen_tcp("0")) as other:
        assert take(2, one.sock, other.sock) == [f"{one.uri} False", f"{other.uri} False"]


def test_what_is_no_listening_stream_socket_is_refused(tmp_path):
    with socket.socket() as idle, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        for wrong in (idle, datagrams):
            assert take(1, wrong) == ["refused: descriptor 3 is no listening stream socket"]
    with open(tmp_path / "file", "w") as file:
        assert "no socket" in take(1, file)[0]


def test_descriptor_that_is_not_there_is_refused(tmp_path):
    with closing(listen_unix(tmp_path / "a")) as one:
        assert "descriptor 4" in take(2, one.sock)[-1]


# ----------------------------------------------------------------------------------------------------- accepting


def test_client_that_is_gone_before_it_is_greeted_does_no_harm(devices, tmp_path):
    with serving(devices, tmp_path, tcp=True) as served:
        for _ in range(50):
            with connect(served.place) as sock:  # reset at once
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: served.server.clients == 0)
        served.open("desk").read(0, 1)


def test_server_that_can_take_no_client_for_now_goes_on_later(devices, tmp_path, monkeypatch, caplog):
    """Accepting fails, as it does where too many files are open."""
    with serving(devices, tmp_path) as served:
        accept, failures = socket.socket.accept, [OSError(24, "Too many open files")] * 2

        def exhausted(sock: socket.socket) -> tuple[socket.socket, Any]:
            if failures:
                raise failures.pop()
            return accept(sock)

        monkeypatch.setattr(socket.socket, "accept", exhausted)
        served.open("desk").read(0, 1)
    assert caplog.text.count("no client can be taken now") == 2


def test_client_for_whom_no_thread_can_be_had_is_turned_away(devices, tmp_path, monkeypatch):
    with serving(devices, tmp_path) as served:
        served.open("desk").read(0, 1)

        def fail(thread: object) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr("threading.Thread.start", fail)
            with pytest.raises((GoneError, ConnectionError)):
                served.client()
        assert served.server.clients == 1
        served.open("desk").read(0, 1)
