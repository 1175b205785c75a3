"""Requests of the transmission phase: bytes in, requests out, in whatever pieces the bytes come.

The caller receives straight into the memory that space() gives, and hands on how much it was: what a client
writes is copied once, from the socket, before it reaches the device.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

from . import wire
from .handshake import ProtocolError
from .limits import Limits
from .wire import Command

_HEADER = wire.REQUEST.size
_BUFFER = 512 << 10  # bytes: a deep queue of small writes in one piece
_ROOM = 64 << 10  # bytes that must be free behind a partial request, else it moves to the front


class Request(NamedTuple):
    """One request.

    Attributes:
        flags: Command flags.
        type: The command, perhaps an unknown one.
        cookie: What its reply has to carry.
        offset: Bytes.
        length: Bytes.
        payload: What is to be written; valid until space() is called again.
    """

    flags: int
    type: int
    cookie: int
    offset: int
    length: int
    payload: memoryview


_NOTHING = memoryview(b"")


class Requests:
    """The parser of one connection.

    Args:
        limits: How large a write may be.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limit = (limits or Limits()).payload_bytes
        self._buffer = _memory(_BUFFER)
        self._start = self._end = 0  # what was received and not yet taken
        self._large: memoryview | None = None  # the payload of a write that the buffer cannot hold
        self._filled = 0
        self._broken: ProtocolError | None = None  # found behind requests that were still to be done
        self._header: tuple[int, int, int, int, int] | None = None  # of that write

    def space(self) -> memoryview:
        """Where the next bytes go; never empty.

        Raises:
            ProtocolError: The frame was lost behind the requests that were taken last.
        """
        if self._broken is not None:
            raise self._broken
        if self._large is not None:
            return self._large[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif _BUFFER - self._end < _ROOM or self._cut_off():
            count = self._end - self._start
            self._buffer[:count] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, count
        return self._buffer[self._end :]

    def _cut_off(self) -> bool:
        """Whether the write that is under way would not fit where it begins."""
        if self._end - self._start < _HEADER:
            return False
        length: int = wire.REQUEST.unpack_from(self._buffer, self._start)[5]
        return self._start + _HEADER + length > _BUFFER

    def received(self, count: int) -> list[Request]:
        """So many bytes have come into the space; returns the requests that are complete.

        Raises:
            ProtocolError: The frame is lost, or a write is larger than any may be. Where requests came before,
                they are returned, and the next space() raises it.
        """
        if self._large is not None:
            return self._received_large(count)
        self._end += count
        requests: list[Request] = []
        buffer, start, end = self._buffer, self._start, self._end
        unpack = wire.REQUEST.unpack_from
        while end - start >= _HEADER:
            magic, flags, kind, cookie, offset, length = unpack(buffer, start)
            if magic != wire.REQUEST_MAGIC:
                return self._break(requests, "a request does not begin with its magic")
            payload = _NOTHING
            after = start + _HEADER
            if kind == Command.WRITE:
                if length > self._limit:
                    return self._break(requests, f"a write of {length} bytes, where {self._limit} are allowed")
                if after + length > end:
                    if _HEADER + length > _BUFFER:
                        self._begin_large((flags, kind, cookie, offset, length), after)
                        return requests
                    break
                payload = buffer[after : after + length]
                after += length
            requests.append(Request(flags, kind, cookie, offset, length, payload))
            start = after
        self._start = start
        return requests

    def _break(self, requests: list[Request], reason: str) -> list[Request]:
        """Whatever comes now makes no sense; what came before it does."""
        self._broken = ProtocolError(reason)
        if not requests:
            raise self._broken
        return requests

    def _begin_large(self, header: tuple[int, int, int, int, int], after: int) -> None:
        self._header = header
        self._large = _memory(header[4])
        self._filled = self._end - after
        self._large[: self._filled] = self._buffer[after : self._end]
        self._start = self._end = 0

    def _received_large(self, count: int) -> list[Request]:
        assert self._large is not None
        assert self._header is not None
        self._filled += count
        if self._filled < len(self._large):
            return []
        request = Request(*self._header, self._large)
        self._large = self._header = None
        return [request]


def _memory(length: int) -> memoryview:
    """Memory that is touched, and so taken, only as bytes come: a header alone must not cost what it announces."""
    return memoryview(mmap.mmap(-1, length))
