"""Channels: the bytes of one connection, plain or in TLS, and whose turn it is to send.

The thin shell around the protocol. Two threads send on one connection, its own and the flusher of its export;
one receives.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from .wire import Buffer

_PARTS = 1024  # of one sendmsg: IOV_MAX on Linux
_UNSENT = 1 << 20  # bytes that the kernel takes before a client reads them, where it lets us
_LOOK = 100e-6  # seconds that the next request is looked for; QEMU's own event loop looks for up to 32e-6
_CROWDED = 20e-6  # seconds that one look takes only where others are at work
Parts = Sequence[Buffer]
_Reply = tuple[Buffer, Callable[[], object]]


class Channel:
    """A connection in the clear.

    Args:
        sock: The connected socket, which the channel closes.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._turn = threading.Lock()
        self._keeps_turn = False
        self._posted: deque[_Reply] = deque()
        self.is_dropped = False
        self._ending = 0.0  # of time.monotonic(), when the server stops
        self._is_busy = False  # whether the last request came soon
        self._deadline: float | None = None  # of time.monotonic(), until the handshake has ended

    # Receiving.

    def receive_before(self, deadline: float, length: int = 64 << 10) -> bytes:
        """Up to so many bytes, none at the end of the connection; for the handshake.

        Args:
            deadline: Of time.monotonic(); TimeoutError when it has passed.
            length: Bytes.
        """
        self._deadline = deadline
        space = memoryview(bytearray(length))
        return bytes(space[: self.receive_into(space)])

    def _hurry(self) -> None:
        """Before each call on the socket in the handshake: lets it end by the deadline, however it drips."""
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the handshake took too long")
            self._sock.settimeout(left)

    def settle(self, send_seconds: float) -> None:
        """After the handshake: receiving waits as long as it takes, sending only so long without progress."""
        self._deadline = None
        self._sock.settimeout(None)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNSENT)  # less of a long read has to be copied
        whole = int(send_seconds)
        timeout = struct.pack("ll", whole, int((send_seconds - whole) * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def receive_into(self, space: memoryview) -> int:
        """Fills some of the space; 0 at the end of the connection."""
        if self._deadline is not None:
            self._hurry()
            return self._sock.recv_into(space)
        if self._ending:
            return self._receive_last(space)
        begun = time.perf_counter()
        count = self._look(space, begun) if self._is_busy else None
        if count is None:
            count = self._sock.recv_into(space)
        self._is_busy = time.perf_counter() - begun < 2 * _LOOK
        return count

    def _receive_last(self, space: memoryview) -> int:
        """What came before the server began to stop, and of a client that goes on asking not for long."""
        if time.monotonic() > self._ending:
            return 0
        try:
            return self._sock.recv_into(space, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def _look(self, space: memoryview, begun: float) -> int | None:
        """Looks for the next request for a moment before sleeping, where the last one came soon.

        To be woken costs more than all that is done for a small request, above all on a virtual machine. It ends
        at once where a look takes long: then others want the interpreter or the processor.
        """
        before = begun
        while True:
            try:
                return self._sock.recv_into(space, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                now = time.perf_counter()
                if now - before > _CROWDED or now - begun > _LOOK:
                    return None
                before = now

    # Sending.

    def send(self, data: Buffer) -> None:
        """Sends everything, when it is our turn; from any thread.

        Raises:
            BlockingIOError: The client left its replies unread for too long.
        """
        with self._turn:
            self._send_all(self._encode([data]))

    def post(self, data: Buffer, sent: Callable[[], object] = lambda: None) -> None:
        """Has a small reply sent as soon as it is its turn; from any thread, and it never waits.

        A client that does not read gets a thread that waits for it, so that the flusher, which others wait for,
        need not.

        Args:
            data: The reply.
            sent: Called when it has gone out, or never will.
        """
        self._posted.append((data, sent))
        self._send_posted()

    def _send_posted(self) -> None:
        """Sends what was posted, unless somebody has the turn: he does it when he gives it up."""
        while self._posted and self._turn.acquire(blocking=False):
            replies = [self._posted.popleft() for _ in range(len(self._posted))]
            rest: Parts = ()
            try:
                rest = self._send_some(self._encode([data for data, _ in replies]))
                if rest:
                    sender = threading.Thread(target=self._send_rest, args=(rest, replies), name="cowstore-sender")
                    sender.daemon = True
                    sender.start()
                    return  # it has the turn now
            except Exception:  # noqa: BLE001 - it is gone, or there is no thread or memory; its own thread finds out
                self.drop()
            self._end_turn(replies)

    def _send_rest(self, rest: Parts, replies: Sequence[_Reply]) -> None:
        try:
            self._send_all(rest)
        except Exception:  # noqa: BLE001 - as above
            self.drop()
        self._end_turn(replies)
        self._send_posted()

    def _end_turn(self, replies: Sequence[_Reply]) -> None:
        self._turn.release()
        for _, sent in replies:
            sent()

    def _give_turn(self) -> None:
        """Gives the turn up, and sends what was posted meanwhile, or it would stay where it is."""
        self._turn.release()
        self._send_posted()

    def start(self, parts: Parts) -> Parts:
        """Sends what goes out without waiting, and returns the rest for finish(); for the connection's own thread.

        While there is a rest nobody else's bytes come between.
        """
        if not self._turn.acquire(blocking=False):
            return parts
        try:
            rest = self._send_some(self._encode(parts))
        except BaseException:
            self._give_turn()
            raise
        self._keeps_turn = bool(rest)
        if not rest:
            self._give_turn()
        return rest

    def finish(self, rest: Parts) -> None:
        """Sends what start() has left."""
        if not self._keeps_turn:
            self._turn.acquire()
        try:
            self._send_all(rest if self._keeps_turn else self._encode(rest))
        finally:
            self._keeps_turn = False
            self._give_turn()

    def _encode(self, parts: Parts) -> Parts:
        """The parts as they go over the wire; whoever has the turn calls it, once for each part."""
        return parts

    def _send_some(self, parts: Parts) -> Parts:
        try:
            sent = self._sock.sendmsg(parts[:_PARTS], [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return parts
        return after(parts, sent)

    def _send_all(self, parts: Parts) -> None:
        while parts:
            self._hurry()
            parts = after(parts, self._sock.sendmsg(parts[:_PARTS]))

    # The end.

    def start_tls(self, context: ssl.SSLContext, rest: bytes, deadline: float) -> Channel:
        """Leads the client into TLS; what it has sent already belongs there. The new channel takes over.

        Raises:
            OSError: It failed, ssl.SSLError among them.
        """
        secure = SecureChannel(self._sock, context, rest)
        secure.shake_hands(deadline)
        return secure

    def hang_up(self, seconds: float) -> None:
        """Ends receiving, from any thread: what came already can be taken for so long, and then comes the end."""
        self._ending = time.monotonic() + seconds
        shut(self._sock, socket.SHUT_RD)

    def drop(self) -> None:
        """Ends the connection, from any thread; whoever waits for it finds out."""
        self.is_dropped = True
        shut(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket."""
        self._sock.close()


class SecureChannel(Channel):
    """A connection in TLS, over memory buffers: one thread may receive while another one sends."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, rest: bytes) -> None:
        super().__init__(sock)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(rest)
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._using = threading.Lock()  # an SSL object is not safe to use from two threads
        self._raw = memoryview(bytearray(256 << 10))

    def shake_hands(self, deadline: float) -> None:
        """Does the TLS handshake."""
        self._deadline = deadline
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._put_out()
                count = super().receive_into(self._raw)
                if not count:
                    raise ConnectionResetError("the client left during the TLS handshake") from None
                self._incoming.write(self._raw[:count])
                continue
            except ssl.SSLError:
                self._put_out()  # the alert that tells the client why
                raise
            self._put_out()
            return

    def receive_into(self, space: memoryview) -> int:
        """See Channel."""
        while True:
            with self._using:
                done = self._decrypt(space)
            if done is not None:
                return done
            count = super().receive_into(self._raw)
            if not count:
                return 0
            with self._using:
                self._incoming.write(self._raw[:count])

    def _decrypt(self, space: memoryview) -> int | None:
        """Fills the space from the records that are there; None where one more is needed first."""
        done = 0
        try:
            while done < len(space):
                count = self._tls.read(len(space) - done, space[done:])
                if not count:
                    break
                done += int(count)
        except ssl.SSLWantReadError:
            return done or None
        except ssl.SSLZeroReturnError:
            return done
        return done

    def _encode(self, parts: Parts) -> Parts:
        with self._using:
            self._tls.write(b"".join(parts))
            return [self._outgoing.read()]

    def _put_out(self) -> None:
        with self._using:
            data = self._outgoing.read()
        if data:
            self._send_all([data])

    def close(self) -> None:
        """Ends TLS, so that the client can tell an end from a cut, and closes the socket."""
        try:
            with self._using:
                self._tls.unwrap()
        except (OSError, ValueError):
            pass  # the client's own end has not come, or never will
        try:
            self._sock.send(self._outgoing.read(), socket.MSG_DONTWAIT)
        except OSError:
            pass
        super().close()


def after(parts: Parts, sent: int) -> Parts:
    """What is left of the parts when so many bytes are sent."""
    for position, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[position + 1 :]]
        sent -= len(part)
    return []


def shut(sock: socket.socket, how: int) -> None:
    """Shuts a socket down, if it is still there."""
    try:
        sock.shutdown(how)
    except OSError:
        pass
