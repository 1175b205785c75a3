"""A small NBD client with blocking sockets, independent of the server: it stands on ``nbd_messages`` alone.

    with Client("run/nbd.sock") as client:
        client.structured_replies()
        client.go("desk-1")
        client.write(0, b"abc")
        client.flush()
        assert client.read(0, 3) == b"abc"

Sending and receiving are apart, so one thread may send() and another one receive() (without TLS, whose sockets
Python does not let two threads use): see pending.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from itertools import count
from typing import Self

from tests.unit import nbd_messages as nbd
from tests.unit.nbd_messages import Answer, Export, OptionReply, Request, demand

Place = str | os.PathLike[str] | tuple[str, int] | socket.socket
PATIENCE = 60.0  # seconds that no server may be silent


class GoneError(ConnectionError):
    """The server has closed the connection.

    Attributes:
        rest: What it had sent of the message that was awaited.
    """

    def __init__(self, rest: bytes) -> None:
        super().__init__(f"the server has gone, {len(rest)} bytes into a message")
        self.rest = rest


class OptionError(Exception):
    """An option was refused.

    Attributes:
        kind: The type of the reply.
        message: What the server says.
    """

    def __init__(self, reply: OptionReply) -> None:
        super().__init__(f"{reply.kind:#x}: {reply.message}")
        self.kind = reply.kind
        self.message = reply.message


class RequestError(Exception):
    """A request was answered with an error.

    Attributes:
        error: The protocol's number.
        message: What the server says.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"error {answer.error}: {answer.message}")
        self.error = answer.error
        self.message = answer.message


def connect(place: Place, patience: float = PATIENCE) -> socket.socket:
    """A connected socket: at a Unix path, at a host and port, or the one that is given."""
    if isinstance(place, socket.socket):
        place.settimeout(patience)
        return place
    if isinstance(place, tuple):
        sock = socket.create_connection(place, patience)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(patience)
    try:
        sock.connect(os.fspath(place))
    except BaseException:
        sock.close()
        raise
    return sock


class Client:
    """One connection.

    Args:
        place: A Unix socket's path, a TCP address, or a connected socket, which the client closes.
        flags: Client flags.
        patience: Seconds until a silent server raises TimeoutError.

    Attributes:
        sock: The socket.
        server_flags: The handshake flags.
        export: The export, once one is chosen.
        contexts: Numbers of the selected metadata contexts by name.
    """

    def __init__(
        self, place: Place, *, flags: int = nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES, patience: float = PATIENCE
    ) -> None:
        self.sock = connect(place, patience)
        self._received = bytearray()
        self._flags = flags
        self._structured = False
        self.contexts: dict[str, int] = {}
        self.export: Export | None = None
        self._cookies = count(1)
        self._replies = nbd.Replies(structured=False)
        self._early: dict[int, Answer] = {}
        try:
            self.server_flags = nbd.read_greeting(self.take)
            self.sock.sendall(nbd.client_flags(flags))
        except BaseException:
            self.sock.close()
            raise

    def take(self, size: int) -> bytes:
        """Exactly so many bytes."""
        while len(self._received) < size:
            data = self.sock.recv(max(size - len(self._received), 1 << 16))
            if not data:
                raise GoneError(bytes(self._received))
            self._received += data
        part = bytes(self._received[:size])
        del self._received[:size]
        return part

    # The handshake.

    def option(self, code: int, data: bytes = b"") -> list[OptionReply]:
        """Any option, and its replies, whatever they are."""
        self.sock.sendall(nbd.option(code, data))
        return nbd.read_option_replies(self.take, code)

    def _accepted(self, code: int, data: bytes = b"") -> list[OptionReply]:
        replies = self.option(code, data)
        if replies[-1].is_error:
            raise OptionError(replies[-1])
        return replies

    def exports(self) -> list[str]:
        """The names that LIST gives."""
        return nbd.exports_of(self._accepted(nbd.LIST))

    def info(self, name: str, *wanted: int) -> Export:
        return nbd.export_of(self._accepted(nbd.INFO, nbd.info_data(name, *wanted)))

    def go(self, name: str, *wanted: int) -> Export:
        return self._begin(nbd.export_of(self._accepted(nbd.GO, nbd.info_data(name, *wanted))))

    def export_name(self, name: str) -> Export:
        self.sock.sendall(nbd.option(nbd.EXPORT_NAME, name.encode()))
        size, flags = struct.unpack(">QH", self.take(10))
        if not self._flags & self.server_flags & nbd.NO_ZEROES:
            demand(self.take(124) == bytes(124), "no zeroes behind the flags")
        return self._begin(Export(size, flags))

    def _begin(self, export: Export) -> Export:
        self.export = export
        self._replies = nbd.Replies(structured=self._structured, contexts=self.contexts.values())
        return export

    def structured_replies(self) -> None:
        self._accepted(nbd.STRUCTURED_REPLY)
        self._structured = True

    def list_contexts(self, name: str, *queries: str) -> list[str]:
        return list(nbd.contexts_of(self._accepted(nbd.LIST_META_CONTEXT, nbd.context_data(name, *queries))))

    def set_contexts(self, name: str, *queries: str) -> dict[str, int]:
        data = nbd.context_data(name, *queries)
        self.contexts = nbd.contexts_of(self._accepted(nbd.SET_META_CONTEXT, data))
        demand(len(set(self.contexts.values())) == len(self.contexts), "contexts that share a number")
        return self.contexts

    def start_tls(self, context: ssl.SSLContext, host: str | None = None) -> None:
        """Goes on in TLS; what was agreed before counts no more."""
        self._accepted(nbd.STARTTLS)
        demand(not self._received, "bytes in the clear behind the answer to STARTTLS")
        self.sock = context.wrap_socket(self.sock, server_hostname=host)
        self._structured, self.contexts = False, {}

    def abort(self) -> None:
        """Ends the handshake, and sees the server leave."""
        self._accepted(nbd.ABORT)
        self.wait_for_end()

    # The transmission.

    def pending(
        self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"",
        cookie: int | None = None,
    ) -> Request:  # fmt: skip
        """A request whose answer is awaited from now on, to be sent in whatever way: encode() gives its bytes."""
        cookie = next(self._cookies) if cookie is None else cookie
        request = Request(kind, cookie, offset, length or len(data), flags, data)
        self._replies.expect(request)
        return request

    def send(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> Request:
        """Sends a request, and does not wait."""
        request = self.pending(kind, offset, length, flags=flags, data=data)
        self.sock.sendall(request.encode())
        return request

    def send_many(self, *requests: Request) -> None:
        """Sends what pending() has made, in one piece."""
        self.sock.sendall(b"".join(request.encode() for request in requests))

    def receive(self) -> Answer:
        """The next answer, whichever request it is for."""
        return self._replies.read(self.take)

    def answer(self, request: Request) -> Answer:
        """The answer to a request; those to others that come before it are kept for their turn."""
        while request.cookie not in self._early:
            answer = self.receive()
            self._early[answer.request.cookie] = answer
        return self._early.pop(request.cookie)

    def ask(self, kind: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> Answer:
        """Sends a request and waits for its answer."""
        return self.answer(self.send(kind, offset, length, flags=flags, data=data))

    def _done(self, answer: Answer) -> Answer:
        if answer.error:
            raise RequestError(answer)
        return answer

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        return self._done(self.ask(nbd.READ, offset, length, flags=flags)).data

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self._done(self.ask(nbd.WRITE, offset, data=data, flags=flags))

    def flush(self) -> None:
        self._done(self.ask(nbd.FLUSH))

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self._done(self.ask(nbd.TRIM, offset, length, flags=flags))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._done(self.ask(nbd.WRITE_ZEROES, offset, length, flags=flags))

    def cache(self, offset: int, length: int) -> None:
        self._done(self.ask(nbd.CACHE, offset, length))

    def status(self, offset: int, length: int, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
        """Extents by the name of their metadata context."""
        extents = self._done(self.ask(nbd.BLOCK_STATUS, offset, length, flags=flags)).extents
        return {name: extents[number] for name, number in self.contexts.items()}

    def disconnect(self) -> None:
        """Leaves as one should, and sees the server leave."""
        self.sock.sendall(Request(nbd.DISC).encode())
        self.wait_for_end()
        self.close()

    # The end.

    def wait_for_end(self) -> bytes:
        """What comes until the server closes the connection."""
        rest = bytes(self._received)
        self._received.clear()
        try:
            while data := self.sock.recv(1 << 16):
                rest += data
        except (ConnectionResetError, BrokenPipeError):
            pass  # it left while something was still on its way to it
        return rest

    def close(self) -> None:
        """Leaves without a word."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
