"""A server in this process, on real sockets, and the clients of a test."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cowstore import nbd as served
from tests.unit.nbd_client import Client, Place

THREADS = ("cowstore-nbd", "cowstore-client", "cowstore-flusher")


class Serving:
    """A server that runs, and who is connected to it.

    Attributes:
        server: The server.
        place: Where it listens.
    """

    def __init__(self, server: served.Server, place: Place) -> None:
        self.server = server
        self.place = place
        self._clients: list[Client] = []

    def client(self, **settings: Any) -> Client:
        """Somebody who has been greeted."""
        self._clients.append(Client(self.place, **settings))
        return self._clients[-1]

    def open(self, name: str, *contexts: str, structured: bool = True, **settings: Any) -> Client:
        """Somebody who has opened an export."""
        client = self.client(**settings)
        if structured:
            client.structured_replies()
        if contexts:
            client.set_contexts(name, *contexts)
        client.go(name)
        return client

    def leave(self) -> None:
        """All clients close their sockets."""
        for client in self._clients:
            client.close()


@contextmanager
def serving(devices: Any, directory: Path, *, tcp: bool = False, **settings: Any) -> Iterator[Serving]:
    """A server; at the end everybody leaves, and it has to stop in time, unless the test has stopped it."""
    listener = served.listen_tcp("0") if tcp else served.listen_unix(directory / "nbd.sock")
    address = listener.sock.getsockname()
    server = served.Server(devices, [listener], **settings)
    server.start()
    one = Serving(server, address)
    try:
        yield one
    finally:
        one.leave()
        in_time = server.stop()
    assert in_time


def threads() -> list[str]:
    """The server's threads in this process, by their names."""
    return [thread.name for thread in threading.enumerate() if thread.name in THREADS]


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """The memory that this process occupies."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


HAND = """
import fcntl, os, sys
handed = [fcntl.fcntl(int(one), fcntl.F_DUPFD_CLOEXEC, 100) for one in sys.argv[1].split()]
os.closerange(3, 100)
for place, one in enumerate(handed, 3):
    os.dup2(one, place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(handed)))
os.execv(sys.executable, [sys.executable, "-W", "ignore", *sys.argv[2:]])
"""


def handing(sockets: Sequence[socket.socket | IO[Any]], *words: str) -> tuple[list[str], list[int]]:
    """A command line that starts Python with these words as systemd would, and the descriptors to be passed."""
    numbers = [one.fileno() for one in sockets]
    return [sys.executable, "-W", "ignore", "-c", HAND, " ".join(map(str, numbers)), *words], numbers
