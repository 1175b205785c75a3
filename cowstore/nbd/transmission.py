"""The transmission: requests are done on a disk and answered, a batch at a time.

A batch is what one read from the socket brought. Everything in it is done under the disk's lock, and what goes
out without waiting is sent from the store's own memory before the lock is given up; what a slow client leaves
for later is copied. Durability is asked for when the lock is free again, since a flush needs it.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable

from cowstore.errors import ClosedError, InvalidError, NoSpaceError, ReadOnlyError, StoreError

from . import wire
from .channel import Channel
from .exports import Extent, Piece
from .handshake import CONTEXTS, OWN, Chosen
from .limits import Limits
from .metrics import Metrics
from .requests import Request
from .wire import Command, Error

_log = logging.getLogger("cowstore.nbd")
_ZEROS = bytes(256 << 10)
_PARTS = 512  # of a batch of replies, before it is sent
_BREATH = 0.0002  # seconds: without it, who waits for the lock would not get it before it is taken again
_ALLOWED: dict[int, int] = {
    Command.READ: wire.FUA | wire.DF,
    Command.WRITE: wire.FUA,
    Command.FLUSH: wire.FUA,
    Command.TRIM: wire.FUA,
    Command.CACHE: wire.FUA,
    Command.WRITE_ZEROES: wire.FUA | wire.NO_HOLE | wire.FAST_ZERO,
    Command.BLOCK_STATUS: wire.FUA | wire.REQ_ONE,
}
_CHANGES = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))


class Refused(Exception):  # noqa: N818 - an answer to the client, not a failure
    """A request that is answered with an error.

    Attributes:
        error: The protocol's number.
    """

    def __init__(self, error: Error, message: str) -> None:
        super().__init__(message)
        self.error = error


class Transmission:
    """One connection after its handshake.

    Args:
        chosen: The export, and what was agreed.
        channel: Where replies go.
        limits: What a client may ask.
        metrics: Where everything is counted.
    """

    def __init__(self, chosen: Chosen, channel: Channel, limits: Limits, metrics: Metrics) -> None:
        self._export = chosen.export
        self._disk = chosen.export.disk
        self._size = chosen.export.disk.size
        self._structured = chosen.structured
        self._contexts = chosen.contexts
        self._channel = channel
        self._limits = limits
        self._metrics = metrics
        self._counters = metrics.counters()
        self._durable = metrics.counters()  # of what the flusher's thread answers
        self._out: list[wire.Buffer] = []
        self._out_bytes = 0
        self._asked: list[Request] = []  # what is done, and is answered when it is durable
        self._complained = -1.0  # when it last did
        self._free = threading.Semaphore(limits.flushes)
        self._handlers: dict[int, Callable[[Request], None]] = {
            Command.READ: self._read,
            Command.WRITE: self._write,
            Command.FLUSH: self._flush,
            Command.TRIM: self._zero,
            Command.CACHE: self._cache,
            Command.WRITE_ZEROES: self._zero,
            Command.BLOCK_STATUS: self._status,
        }

    def handle(self, requests: list[Request]) -> bool:
        """Does and answers requests; False when the client has said that it is leaving.

        Raises:
            OSError: The client is gone, or does not read its replies.
        """
        begun = time.perf_counter()
        position = 0
        while position < len(requests):
            if self._channel.is_dropped:
                raise ConnectionAbortedError("the connection was dropped")
            with self._disk.steady():
                stop = self._do_recorded(requests, position)
                rest = self._channel.start(self._out) if self._out else ()
                if rest and self._export.writable:
                    rest = [b"".join(rest)]  # without the lock views change, and a slow client must not keep it
            if rest:
                self._channel.finish(rest)
            self._out, self._out_bytes = [], 0
            asked, self._asked = self._asked, []
            self._counters.took(time.perf_counter() - begun, stop - position - len(asked))
            for request in asked:
                self._ask(request, begun)
            self._export.relieve(self._limits.journal_bytes)
            if stop < len(requests) and time.perf_counter() - begun > self._limits.batch_seconds:
                time.sleep(_BREATH)
            position = stop
            if requests[stop - 1].type == Command.DISC:
                return False
        return True

    def _do_recorded(self, requests: list[Request], position: int) -> int:
        """Does requests, and records what they changed in one go before any of them is answered.

        Where there is no room for all, they are done again one by one, so that each gets an answer of its own.
        """
        if not self._export.writable:
            return self._do(requests, position)
        self._disk.defer_records(True)
        before = self._counters.copy()
        try:
            stop = self._do(requests, position)
            self._disk.record()
        except (StoreError, OSError):
            self._out, self._out_bytes, self._asked = [], 0, []
            self._counters.restore(before)
        else:
            return stop
        finally:
            self._disk.defer_records(False)
        return self._do(requests, position)

    def _do(self, requests: list[Request], position: int) -> int:
        """Does requests until their replies, or the time they took, are enough; returns where it stopped."""
        handlers, counts = self._handlers, self._counters.requests
        clock = time.perf_counter
        until = clock() + self._limits.batch_seconds
        for at in range(position, len(requests)):
            request = requests[at]
            kind = request.type
            if kind == Command.DISC:
                counts[kind] += 1
                return at + 1
            handler = handlers.get(kind)
            if handler is None:
                self._fail(request, Error.EINVAL, f"command {kind} is not known here")
                continue
            counts[kind] += 1
            try:
                handler(request)
            except Exception as error:  # noqa: BLE001 - the client gets its answer, whatever it is
                self._fail(request, *self._told(error))
            if self._out_bytes > self._limits.batch_bytes or len(self._out) > _PARTS or clock() > until:
                return at + 1
        return len(requests)

    def end(self) -> None:
        """Waits for the answers that are still to come, and counts no more."""
        for _ in range(self._limits.flushes):
            self._free.acquire()
        self._metrics.retire(self._counters)
        self._metrics.retire(self._durable)

    # Answers.

    def _succeed(self, request: Request) -> None:
        """Done; where durability was asked for, the answer waits for it."""
        if request.flags & wire.FUA and self._export.flusher is not None and request.type in _CHANGES:
            self._asked.append(request)
        else:
            self._out.append(wire.simple_reply(request.cookie))

    def _fail(self, request: Request, error: Error, message: str) -> None:
        self._counters.errors += 1
        self._out.append(self._failure(request.cookie, error, message))

    def _failure(self, cookie: int, error: Error, message: str) -> bytes:
        return wire.error_chunk(cookie, error, message) if self._structured else wire.simple_reply(cookie, error)

    def _ask(self, request: Request, begun: float) -> None:
        """Has the flusher answer when everything done so far is durable."""
        flusher = self._export.flusher
        assert flusher is not None
        self._free.acquire()
        cookie = request.cookie  # and nothing more of it: what it wrote need not be kept until then

        def told(failure: Exception | None) -> None:
            reply = wire.simple_reply(cookie)
            if failure is not None:
                self._durable.errors += 1
                reply = self._failure(cookie, *self._told(failure))
            self._durable.took(time.perf_counter() - begun)
            self._channel.post(reply, self._free.release)

        try:
            flusher.ask(told)
        except BaseException:  # no thread can be had: the client is dropped, but must not be waited for
            self._free.release()
            raise

    def _told(self, error: Exception) -> tuple[Error, str]:
        """What the client is told of a failure; what it cannot be blamed for goes to the log, once a second."""
        if isinstance(error, Refused):
            return error.error, str(error)
        number, now = _number(error), time.monotonic()
        if number in (Error.EIO, Error.ENOSPC) and now - self._complained > 1:
            self._complained = now
            _log.error("a request failed: %s", error, exc_info=not isinstance(error, (StoreError, OSError)))
        return number, str(error)

    # Commands. Each is called under the disk's lock.

    def _check(self, request: Request, beyond: Error = Error.EINVAL) -> None:
        """Refuses flags and ranges that no such command may have.

        Args:
            request: The request.
            beyond: The error for a range that reaches beyond the end.
        """
        if request.flags & ~_ALLOWED[request.type] or (request.flags & wire.DF and not self._structured):
            raise Refused(Error.EINVAL, f"flags {request.flags:#x} do not go with this command")
        if request.type in _CHANGES and not self._export.writable:
            raise Refused(Error.EPERM, "the export is read-only")
        if request.offset + request.length > self._size:
            raise Refused(beyond, f"{request.length} bytes at {request.offset} of {self._size}")

    def _read(self, request: Request) -> None:
        flags, _, cookie, offset, length, _ = request
        if flags or offset + length > self._size or not 0 < length <= self._limits.payload_bytes:
            self._check(request)
            if length > self._limits.payload_bytes:
                raise Refused(Error.EINVAL, f"at most {self._limits.payload_bytes} bytes a read")
        pieces = self._disk.views(length, offset)
        self._counters.read_bytes += length
        self._out_bytes += length
        if not self._structured:
            self._out.append(wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie))
            self._append(pieces)
        elif len(pieces) == 1 and not isinstance(pieces[0], int):
            self._out.append(_data_chunk(wire.DONE, cookie, length, offset))
            self._out.append(pieces[0])
        elif not length:
            self._out.append(wire.CHUNK.pack(wire.CHUNK_MAGIC, wire.DONE, wire.CHUNK_NONE, cookie, 0))
        elif flags & wire.DF:
            self._out.append(_data_chunk(wire.DONE, cookie, length, offset))
            self._append(pieces)
        else:
            self._append_chunks(cookie, offset, pieces)

    def _append(self, pieces: list[Piece]) -> None:
        """Bytes as they are, zeros included."""
        for piece in pieces:
            if isinstance(piece, int):
                whole, part = divmod(piece, len(_ZEROS))
                self._out += [_ZEROS] * whole
                if part:
                    self._out.append(memoryview(_ZEROS)[:part])
            else:
                self._out.append(piece)

    def _append_chunks(self, cookie: int, offset: int, pieces: list[Piece]) -> None:
        """A structured reply: a chunk for each run of data, and one for each hole."""
        at = 0
        while at < len(pieces):
            end, length = _run_of_data(pieces, at)
            piece = pieces[at]
            if isinstance(piece, int):
                end, length = at + 1, piece
            done = wire.DONE if end == len(pieces) else 0
            if isinstance(piece, int):
                head = (wire.CHUNK_MAGIC, done, wire.CHUNK_HOLE, cookie, 12, offset, length)
                self._out.append(wire.HOLE_CHUNK.pack(*head))
            else:
                self._out.append(_data_chunk(done, cookie, length, offset))
                self._append(pieces[at:end])
            offset, at = offset + length, end

    def _write(self, request: Request) -> None:
        self._check(request, Error.ENOSPC)
        self._disk.pwrite(request.payload, request.offset)
        self._counters.written_bytes += request.length
        self._succeed(request)

    def _zero(self, request: Request) -> None:
        """TRIM and WRITE_ZEROES: whole blocks of zeros take no space here, whatever is asked for."""
        self._check(request, Error.ENOSPC if request.type == Command.WRITE_ZEROES else Error.EINVAL)
        self._disk.zero(request.length, request.offset)
        self._succeed(request)

    def _flush(self, request: Request) -> None:
        self._check(request)
        if request.offset or request.length:
            raise Refused(Error.EINVAL, "a flush has no range")
        if self._export.flusher is None:
            self._out.append(wire.simple_reply(request.cookie))
        else:
            self._asked.append(request)

    def _cache(self, request: Request) -> None:
        self._check(request)
        self._disk.prefetch(request.length, request.offset)
        self._succeed(request)

    def _status(self, request: Request) -> None:
        self._check(request)
        if not self._contexts or not request.length:
            raise Refused(Error.EINVAL, "no metadata context was selected, or no range given")
        most = 1 if request.flags & wire.REQ_ONE else self._limits.extents
        found: list[list[tuple[int, int]]] = [[] for _ in self._contexts]
        for extent in self._disk.extents(request.offset, request.length):
            grown = [
                _grow(descriptors, extent, context, most)
                for context, descriptors in zip(self._contexts, found, strict=True)
            ]
            if not all(grown):
                break  # what one context has no room for, none describes beyond
        for context, descriptors in zip(self._contexts, found, strict=True):
            body = b"".join(wire.DESCRIPTOR.pack(*one) for one in descriptors)
            done = wire.DONE if context == self._contexts[-1] else 0
            head = (wire.CHUNK_MAGIC, done, wire.CHUNK_STATUS, request.cookie, 4 + len(body))
            self._out.append(wire.CHUNK.pack(*head) + wire.NUMBER.pack(context) + body)
            self._out_bytes += len(body)


def _data_chunk(flags: int, cookie: int, length: int, offset: int) -> bytes:
    return wire.DATA_CHUNK.pack(wire.CHUNK_MAGIC, flags, wire.CHUNK_DATA, cookie, length + 8, offset)


def _run_of_data(pieces: list[Piece], at: int) -> tuple[int, int]:
    """Where a run of pieces that are no holes ends, and its length in bytes."""
    end, length = at, 0
    while end < len(pieces):
        piece = pieces[end]
        if isinstance(piece, int):
            break
        end, length = end + 1, length + len(piece)
    return end, length


def _grow(descriptors: list[tuple[int, int]], extent: Extent, context: int, most: int) -> bool:
    """Adds an extent to the descriptors of one context; False where there are enough."""
    if context == CONTEXTS[OWN]:
        flags = int(extent.own)
    else:
        flags = 0 if extent.data else wire.STATE_HOLE | wire.STATE_ZERO
    if descriptors and descriptors[-1][1] == flags:
        descriptors[-1] = descriptors[-1][0] + extent.length, flags
    elif len(descriptors) == most:
        return False
    else:
        descriptors.append((extent.length, flags))
    return True


def _number(error: Exception) -> Error:
    """The protocol's number for a failure."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return Error.ENOSPC
    return next((number for kind, number in _NUMBERS if isinstance(error, kind)), Error.EIO)


_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_NUMBERS: tuple[tuple[type[Exception], Error], ...] = (
    (NoSpaceError, Error.ENOSPC),
    (ReadOnlyError, Error.EPERM),
    (InvalidError, Error.EINVAL),
    (ClosedError, Error.ESHUTDOWN),
    (MemoryError, Error.ENOMEM),
)
