"""Listeners: the sockets that clients connect to, private by default."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from pathlib import Path
from urllib.parse import quote

from cowstore.errors import InUseError, InvalidError, StoreError

_BACKLOG = 128
_PATH_BYTES = 107  # of a Unix socket, without its final zero
_FIRST_PASSED = 3  # the first descriptor that systemd hands over, see sd_listen_fds(3)
_PEER = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED


class Listener:
    """A listening socket.

    Attributes:
        sock: The socket.
        path: Its file, which goes with it; None where it is not ours to remove.
    """

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        self.sock = sock
        self.path = path

    @property
    def is_unix(self) -> bool:
        """Whether its clients are processes of this host, which can be asked who they are."""
        return self.sock.family == socket.AF_UNIX

    @property
    def uri(self) -> str:
        """Where clients find it; an export's name goes between the last slash and the question mark."""
        return self.address("nbd")

    def address(self, scheme: str) -> str:
        """The same; the scheme is ``nbds`` where TLS is required."""
        if self.is_unix:
            return f"{scheme}+unix:///?socket={quote(str(self.sock.getsockname()))}"
        host, port = self.sock.getsockname()[:2]
        return f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"

    def close(self) -> None:
        """Closes the socket and removes its file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        self.sock.close()


def listen_unix(path: str | os.PathLike[str]) -> Listener:
    """A Unix socket that only its owner can connect to; its directory is made, private, where it is missing.

    Raises:
        InUseError: Somebody listens there.
        StoreError: It cannot be made.
    """
    place = Path(path).absolute()
    if len(os.fsencode(place)) > _PATH_BYTES:
        raise InvalidError(f"{place} is too long for a socket", hint=f"at most {_PATH_BYTES} bytes")
    make_private(place.parent)
    _remove_stale(place)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(os.fspath(place))
        place.chmod(0o600)  # nobody can connect before listen(); the umask is the whole process's, and not ours
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise StoreError(f"cannot listen at {place}: {error.strerror}") from error
    return Listener(sock, place)


def make_private(directory: Path) -> None:
    """Makes a directory that only its owner can enter, and those above it, where they are missing.

    Raises:
        StoreError: It cannot be made.
    """
    for place in reversed([directory, *directory.parents]):
        try:
            if not place.is_dir():
                place.mkdir()
                place.chmod(0o700)  # whatever the umask takes away
        except OSError as error:
            if place.is_dir():
                continue  # somebody else has made it meanwhile
            raise StoreError(f"cannot make {place}: {error.strerror}") from error


def check_private(directory: Path) -> None:
    """Refuses a directory that somebody else may have prepared.

    Raises:
        StoreError: It is a link, another user's, or others may enter it.
    """
    found = os.stat(directory, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StoreError(f"{directory} is not private to this user", hint="remove it, or name another place")


def _remove_stale(path: Path) -> None:
    """Removes the socket of a server that is gone; anything else that is there stays."""
    try:
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            raise StoreError(f"{path} is there and is no socket", hint="name another place")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot tell who listens at {path}: {error.strerror}") from error
        else:
            raise InUseError(f"socket {path}", hint="stop what listens there, or name another place")


def listen_tcp(address: str) -> Listener:
    """A TCP socket.

    Args:
        address: ``HOST:PORT``, ``[HOST]:PORT`` or ``PORT``; without a host, or with an empty one, the loopback
            address. Port 0 takes a free one.

    Raises:
        InvalidError: It is no address.
        StoreError: Nobody can listen there.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise InvalidError(f"{address!r} is no address", hint="HOST:PORT, for example 127.0.0.1:10809")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InvalidError(f"host {host!r} is not known: {error}", hint="name one that is") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise InUseError(f"address {address}", hint="stop what listens there, or name another port") from error
        raise StoreError(f"cannot listen at {address}: {error.strerror}") from error
    return Listener(sock)


def passed(pid: str, count: str) -> list[Listener]:
    """The sockets that systemd hands over.

    Args:
        pid: LISTEN_PID; they are another process's where it is not ours.
        count: LISTEN_FDS.

    Raises:
        InvalidError: One of them is no listening stream socket.
    """
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = []
    for descriptor in range(_FIRST_PASSED, _FIRST_PASSED + int(count)):
        try:
            os.set_inheritable(descriptor, False)
            sock = socket.socket(fileno=descriptor)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise InvalidError(f"descriptor {descriptor} is no socket: {error.strerror}") from error
        if not listens or sock.type != socket.SOCK_STREAM:
            raise InvalidError(f"descriptor {descriptor} is no listening stream socket")
        found.append(Listener(sock))
    return found


def peer(sock: socket.socket) -> tuple[int, int]:
    """The process and the user behind a connected Unix socket."""
    pid, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid
