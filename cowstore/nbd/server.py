"""The server: listens, and gives every client a thread.

A thread a client, because a read that waits for the disk must not keep anybody else waiting, and because the
socket and the disk are used with blocking calls, in which Python lets the other threads run.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cowstore.errors import NotFoundError

from .channel import Channel
from .exports import Devices, Exports
from .handshake import Chosen, Handshake, ProtocolError
from .limits import Limits
from .listeners import Listener, peer
from .metrics import Metrics, prometheus
from .requests import Requests
from .transmission import Transmission

_log = logging.getLogger("cowstore.nbd")
_BREATH = 0.1  # seconds, when no further connection can be taken for now


class Server:
    """An NBD server. Start it, and stop it; it listens from the beginning to the end of its life.

    Args:
        devices: What it serves, for example an open store.
        listeners: Where; the server closes them.
        names: The devices that are offered; all where there are none.
        tls: Required of every client where it is given.
        limits: What a client may ask.

    Attributes:
        metrics: What it has done.
        exports: What it offers.
    """

    def __init__(
        self,
        devices: Devices,
        listeners: Sequence[Listener],
        *,
        names: Iterable[str] = (),
        tls: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.metrics = Metrics()
        self.exports = Exports(devices, names)
        self._listeners = listeners
        self._tls = tls
        self._limits = limits or Limits()
        self._clients: dict[threading.Thread, Channel] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._waker, self._wake = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept_all, name="cowstore-nbd", daemon=True)

    @property
    def uris(self) -> list[str]:
        """Where clients find it."""
        return [listener.address("nbd" if self._tls is None else "nbds") for listener in self._listeners]

    @property
    def place(self) -> Path:
        """The path of the Unix socket that it listens at.

        Raises:
            NotFoundError: It listens at none, or to clients with certificates only.
        """
        for listener in self._listeners:
            if listener.is_unix and self._tls is None:
                return Path(str(listener.sock.getsockname()))
        raise NotFoundError("socket", " and ".join(self.uris), hint="machines need a server at a Unix socket")

    @property
    def clients(self) -> int:
        """How many clients are connected now."""
        with self._lock:
            return len(self._clients)

    def start(self) -> None:
        """Begins to take clients."""
        self._acceptor.start()

    def stop(self) -> bool:
        """Takes no more clients, answers what they have asked, flushes and gives every device back.

        Returns:
            Whether that was done in time; otherwise the clients that were left have been dropped.
        """
        self._stopping.set()
        self._waker.close()
        if self._acceptor.ident is not None:
            self._acceptor.join()
        self._wake.close()
        for listener in self._listeners:
            listener.close()
        deadline = time.monotonic() + self._limits.stop_seconds
        for channel in self._channels():
            channel.hang_up(self._limits.stop_seconds / 4)
        in_time = self._join(deadline)
        if not in_time:
            for channel in self._channels():
                channel.drop()
            self._join(time.monotonic() + 1)
            self.exports.close()
        return in_time

    def _channels(self) -> list[Channel]:
        with self._lock:
            return list(self._clients.values())

    def _join(self, deadline: float) -> bool:
        """Waits for all clients' threads; whether they have ended in time."""
        while True:
            with self._lock:
                thread = next(iter(self._clients), None)
            if thread is None:
                return True
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                return False

    def flush(self, name: str) -> None:
        """Makes durable every write to a device that any client has been answered.

        Raises:
            StoreError: That failed.
        """
        export = self.exports.acquire(name)
        try:
            if export.writable:
                export.disk.flush()
        finally:
            self.exports.release(export)

    def prometheus(self) -> str:
        """The metrics in Prometheus' text format."""
        metrics, exports = self.metrics, self.exports.open_count()
        return prometheus(metrics.sum(), self.clients, exports, metrics.connections, metrics.refused)

    # Taking clients.

    def _accept_all(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            for listener in self._listeners:
                listener.sock.setblocking(False)
                selector.register(listener.sock, selectors.EVENT_READ, listener)
            while not self._stopping.is_set():
                for key, _ in selector.select():
                    if isinstance(key.data, Listener):
                        self._accept(key.data)

    def _accept(self, listener: Listener) -> None:
        try:
            sock, _ = listener.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            _log.error("no client can be taken now: %s", error)
            time.sleep(_BREATH)
            return
        self.metrics.connections += 1
        try:
            reason = self._unwelcome(listener, sock)
            if not reason:
                self._welcome(listener, sock)
                return
        except (OSError, RuntimeError) as error:  # it is gone already, or no thread can be had
            reason = str(error)
        self.metrics.refused += 1
        _log.warning("a client was turned away: %s", reason)
        sock.close()

    def _unwelcome(self, listener: Listener, sock: socket.socket) -> str:
        """Why a client is turned away; empty where it is not."""
        if self.clients >= self._limits.connections:
            return f"there are {self._limits.connections} clients already"
        if listener.is_unix:
            pid, uid = peer(sock)
            if uid != os.geteuid():
                return f"process {pid} is user {uid}'s"
        return ""

    def _welcome(self, listener: Listener, sock: socket.socket) -> None:
        sock.setblocking(True)
        if not listener.is_unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        channel = Channel(sock)
        thread = threading.Thread(target=self._serve, args=(channel,), name="cowstore-client", daemon=True)
        with self._lock:
            self._clients[thread] = channel
        try:
            thread.start()
        except BaseException:
            with self._lock:
                del self._clients[thread]
            raise

    # A client's thread.

    def _serve(self, channel: Channel) -> None:
        try:
            self._attend(channel)
        except (ProtocolError, OSError) as error:
            _log.info("a client was dropped: %s", error)
        except Exception:  # noqa: BLE001 - the last door of a thread: other clients go on
            _log.exception("a client's thread failed")
        finally:
            with self._lock:
                channel = self._clients.get(threading.current_thread(), channel)
            channel.close()
            with self._lock:
                self._clients.pop(threading.current_thread(), None)

    def _attend(self, channel: Channel) -> None:
        """The handshake, and then the transmission."""
        deadline = time.monotonic() + self._limits.handshake_seconds
        handshake = Handshake(
            self.exports, self._limits, tls_required=self._tls is not None, stopping=self._stopping.is_set
        )
        try:
            channel, rest = self._shake_hands(channel, handshake, deadline)
            if handshake.chosen is not None:
                channel.settle(self._limits.send_seconds)
                self._transmit(channel, handshake.chosen, rest)
        finally:
            if handshake.chosen is not None:
                self.exports.release(handshake.chosen.export)

    def _shake_hands(self, channel: Channel, handshake: Handshake, deadline: float) -> tuple[Channel, bytes]:
        """Leads a client to its export; returns its channel, in TLS perhaps, and what it sent already."""
        rest = b""
        while True:
            if handshake.output:
                channel.send(bytes(handshake.output))
                handshake.output.clear()
            if handshake.chosen or handshake.ended:
                return channel, rest
            if handshake.wants_tls:
                channel = self._secure(channel, rest, deadline)
                handshake.secured()
            data = b"" if handshake.backlog else channel.receive_before(deadline)
            if not data and not handshake.backlog:
                raise ConnectionResetError("the client left during the handshake")
            try:
                rest = handshake.receive(data)
            except ProtocolError:
                channel.send(bytes(handshake.output))
                raise

    def _secure(self, channel: Channel, rest: bytes, deadline: float) -> Channel:
        assert self._tls is not None
        secure = channel.start_tls(self._tls, rest, deadline)
        with self._lock:
            self._clients[threading.current_thread()] = secure
        return secure

    def _transmit(self, channel: Channel, chosen: Chosen, rest: bytes) -> None:
        requests = Requests(self._limits)
        transmission = Transmission(chosen, channel, self._limits, self.metrics)
        try:
            staying = True
            while staying:
                space = requests.space()
                if rest:
                    count = min(len(space), len(rest))
                    space[:count], rest = rest[:count], rest[count:]
                else:
                    count = channel.receive_into(space)
                if not count:
                    return
                complete = requests.received(count)
                staying = not complete or transmission.handle(complete)
        finally:
            transmission.end()
