"""NBD as a client knows it: its numbers, messages to send and messages received, checked as they come.

Written from the specification, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, and from
nothing else: it shares no code with the server. Whatever a server must not send raises ViolationError.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

Take = Callable[[int], bytes]
"""Gives exactly so many bytes of what the server sent."""

GREETING = b"NBDMAGIC" + b"IHAVEOPT"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = bytes.fromhex("0003e889045565a9")
REQUEST_MAGIC = bytes.fromhex("25609513")
SIMPLE_MAGIC = bytes.fromhex("67446698")
CHUNK_MAGIC = bytes.fromhex("668e33ef")
STRING_LIMIT = 4096

# Handshake and client flags.
FIXED_NEWSTYLE, NO_ZEROES = 1, 2

# Options.
EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED_REPLY = range(1, 9)
LIST_META_CONTEXT, SET_META_CONTEXT = 9, 10

# Replies to options.
ACK, SERVER, INFORMATION, META_CONTEXT = range(1, 5)
ERROR_BIT = 1 << 31
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG = (
    ERROR_BIT + number for number in range(1, 10)
)

# Information about an export.
INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)

# Transmission flags.
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF, MULTI_CONN = (
    1 << bit for bit in range(9)
)
SEND_CACHE, SEND_FAST_ZERO = 1 << 10, 1 << 11

# Requests and their flags.
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = (1 << bit for bit in range(5))

# Chunks of structured replies.
DONE = 1
NONE, DATA, HOLE, STATUS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, (1 << 15) + 1, (1 << 15) + 2

# Errors.
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
ERRORS = frozenset((EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN))


class ViolationError(AssertionError):
    """The server has sent what the specification does not allow."""


def demand(condition: object, what: str) -> None:
    """Raises ViolationError where the server does not do as it must."""
    if not condition:
        raise ViolationError(what)


def text(data: bytes) -> str:
    """A string of the specification: UTF-8, without zeros, of at most 4,096 bytes."""
    demand(len(data) <= STRING_LIMIT, f"a string of {len(data)} bytes")
    try:
        decoded = data.decode()
    except UnicodeDecodeError as error:
        raise ViolationError(f"a string that is not UTF-8: {error}") from error
    demand("\0" not in decoded, "a zero in a string")
    return decoded


def taking(data: bytes) -> Take:
    """From bytes in memory; EOFError at their end."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if position + count > len(data):
            raise EOFError(f"{len(data) - position} bytes where {count} should follow")
        position += count
        return data[position - count : position]

    return take


# ------------------------------------------------------------------------------------------ handshake, to be sent


def client_flags(flags: int = FIXED_NEWSTYLE | NO_ZEROES) -> bytes:
    return flags.to_bytes(4, "big")


def option(code: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option; the length may be a lie."""
    return OPTION_MAGIC + struct.pack(">II", code, len(data) if length is None else length) + data


def string(value: str | bytes) -> bytes:
    """A string behind its length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(raw)) + raw


def info_data(name: str | bytes, *wanted: int) -> bytes:
    """What INFO and GO carry."""
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def context_data(name: str | bytes, *queries: str | bytes) -> bytes:
    """What LIST_META_CONTEXT and SET_META_CONTEXT carry."""
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


# ---------------------------------------------------------------------------------------- handshake, as it comes


@dataclass(frozen=True)
class OptionReply:
    """One reply to an option."""

    option: int
    kind: int
    data: bytes = b""

    @property
    def is_error(self) -> bool:
        return bool(self.kind & ERROR_BIT)

    @property
    def is_final(self) -> bool:
        return self.is_error or self.kind == ACK

    @property
    def message(self) -> str:
        return text(self.data)


@dataclass(frozen=True)
class Export:
    """What the server says of an export."""

    size: int
    flags: int
    name: str | None = None
    description: str | None = None
    block_sizes: tuple[int, int, int] | None = None


def read_greeting(take: Take) -> int:
    """The handshake flags."""
    demand(take(16) == GREETING, "no greeting of the newstyle handshake")
    return int.from_bytes(take(2), "big")


def read_option_reply(take: Take) -> OptionReply:
    demand(take(8) == OPTION_REPLY_MAGIC, "a reply to an option without its magic")
    code, kind, length = struct.unpack(">III", take(12))
    reply = OptionReply(code, kind, take(length))
    if reply.is_error:
        text(reply.data)
    demand(kind != ACK or not length, "an acknowledgement with data")
    return reply


def read_option_replies(take: Take, code: int) -> list[OptionReply]:
    """All replies to one option, the final one last."""
    replies = [read_option_reply(take)]
    while not replies[-1].is_final:
        replies.append(read_option_reply(take))
    demand({reply.option for reply in replies} == {code}, f"replies to another option than {code}")
    return replies


def export_of(replies: Sequence[OptionReply]) -> Export:
    """What INFO or GO has been answered."""
    found: dict[int, bytes] = {}
    for reply in replies[:-1]:
        demand(reply.kind == INFORMATION and len(reply.data) >= 2, "not a piece of information")
        kind = int.from_bytes(reply.data[:2], "big")
        demand(kind not in found, f"information {kind} twice")
        found[kind] = reply.data[2:]
    demand(len(found.get(INFO_EXPORT, b"")) == 10, "no size and flags")
    size, flags = struct.unpack(">QH", found[INFO_EXPORT])
    demand(flags & HAS_FLAGS, "flags without HAS_FLAGS")
    sizes = found.get(INFO_BLOCK_SIZE)
    demand(sizes is None or len(sizes) == 12, "block sizes of another length")
    return Export(
        size,
        flags,
        text(found[INFO_NAME]) if INFO_NAME in found else None,
        text(found[INFO_DESCRIPTION]) if INFO_DESCRIPTION in found else None,
        struct.unpack(">III", sizes) if sizes is not None else None,
    )


def exports_of(replies: Sequence[OptionReply]) -> list[str]:
    """The names that LIST has been answered."""
    names = []
    for reply in replies[:-1]:
        length = int.from_bytes(reply.data[:4], "big")
        demand(reply.kind == SERVER and length <= len(reply.data) - 4, "not an export's name")
        names.append(text(reply.data[4 : 4 + length]))
    return names


def contexts_of(replies: Sequence[OptionReply]) -> dict[str, int]:
    """The metadata contexts and their numbers."""
    found = {}
    for reply in replies[:-1]:
        demand(reply.kind == META_CONTEXT and len(reply.data) > 4, "not a metadata context")
        found[text(reply.data[4:])] = int.from_bytes(reply.data[:4], "big")
    demand(len(found) == len(replies) - 1, "a metadata context twice")
    return found


# ---------------------------------------------------------------------------------------------------- transmission


@dataclass(frozen=True)
class Request:
    """A request; offset and length are bytes."""

    kind: int
    cookie: int = 0
    offset: int = 0
    length: int = 0
    flags: int = 0
    data: bytes = b""

    def encode(self) -> bytes:
        head = struct.pack(">HHQQI", self.flags, self.kind, self.cookie, self.offset, self.length)
        return REQUEST_MAGIC + head + self.data


def write(offset: int, data: bytes, *, cookie: int = 0, flags: int = 0) -> Request:
    return Request(WRITE, cookie, offset, len(data), flags, data)


@dataclass
class Answer:
    """The whole reply to one request.

    Attributes:
        request: What it answers.
        error: The protocol's number, 0 for none.
        message: What the server says of the error.
        data: What was read.
        chunks: Of a structured reply: type, offset and length of each.
        extents: By number of the metadata context: length in bytes and status of each.
        pieces: Of each chunk with content the bytes, or the size of a hole.
    """

    request: Request
    error: int = 0
    message: str = ""
    data: bytes = b""
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    pieces: list[bytes | int] = field(default_factory=list, repr=False)


class Replies:
    """Takes replies apart, in whatever order they come, and holds them against the requests.

    Args:
        structured: Whether structured replies were agreed on.
        contexts: The numbers of the selected metadata contexts.
    """

    def __init__(self, *, structured: bool, contexts: Collection[int] = ()) -> None:
        self._structured = structured
        self._contexts = frozenset(contexts)
        self._pending: dict[int, deque[Request]] = {}
        self._begun: dict[int, Answer] = {}

    def expect(self, request: Request) -> None:
        """A request is about to be sent."""
        if request.kind != DISC:
            self._pending.setdefault(request.cookie, deque()).append(request)

    @property
    def missing(self) -> list[Request]:
        """What has not been answered."""
        return [request for same in self._pending.values() for request in same]

    def read(self, take: Take) -> Answer:
        """The next reply that is complete."""
        while True:
            magic = take(4)
            if magic == SIMPLE_MAGIC:
                return self._simple(take)
            demand(magic == CHUNK_MAGIC, f"a reply with the magic {magic.hex()}")
            demand(self._structured, "a structured reply that was not agreed on")
            answer = self._chunk(take)
            if answer is not None:
                return answer

    def _of(self, cookie: int) -> Request:
        demand(self._pending.get(cookie), f"a reply to nothing, with the cookie {cookie:#x}")
        return self._pending[cookie][0]

    def _done(self, cookie: int) -> None:
        same = self._pending[cookie]
        same.popleft()
        if not same:
            del self._pending[cookie]

    def _simple(self, take: Take) -> Answer:
        error, cookie = struct.unpack(">IQ", take(12))
        request = self._of(cookie)
        demand(cookie not in self._begun, "a simple reply amid a structured one")
        demand(error in ERRORS | {0}, f"error {error}, which the protocol does not know")
        with_data = request.kind == READ and not error
        if self._structured:
            demand(request.kind != READ, "a simple reply to a read")
            demand(request.kind != BLOCK_STATUS or error, "a simple reply to a query")
        answer = Answer(request, error, data=take(request.length) if with_data else b"")
        self._done(cookie)
        return answer

    def _chunk(self, take: Take) -> Answer | None:
        flags, kind, cookie, length = struct.unpack(">HHQI", take(16))
        request = self._of(cookie)
        demand(length <= (64 << 20), f"a chunk of {length} bytes")
        payload = taking(take(length))
        if cookie not in self._begun:
            self._begun[cookie] = Answer(request)
        answer = self._begun[cookie]
        reader = {NONE: _none, DATA: _data, HOLE: _hole, STATUS: _status, ERROR: _error}.get(kind)
        demand(reader is not None, f"a chunk of type {kind}")
        demand(flags in (0, DONE), f"a chunk with the flags {flags:#x}")
        demand(kind != NONE or flags == DONE, "a chunk of type NONE that is not the last")
        assert reader is not None
        try:
            reader(answer, payload, length)
        except EOFError as error:
            raise ViolationError(f"a chunk of type {kind} that is cut off") from error
        if flags != DONE:
            return None
        del self._begun[cookie]
        self._done(cookie)
        self._check_whole(answer)
        return answer

    def _check_whole(self, answer: Answer) -> None:
        request = answer.request
        if answer.error:
            return
        if request.kind == READ:
            answer.data = _joined(request, answer.chunks, answer.pieces)
        if request.kind == BLOCK_STATUS:
            demand(answer.extents.keys() == self._contexts, "not one chunk for each metadata context")
            for extents in answer.extents.values():
                _check_extents(request, extents)


def _none(_answer: Answer, _payload: Take, length: int) -> None:
    demand(length == 0, "a chunk of type NONE with data")


def _content(answer: Answer, kind: int, offset: int, data: bytes | int) -> None:
    request, length = answer.request, data if isinstance(data, int) else len(data)
    demand(request.kind == READ, "content for what is no read")
    demand(length, "content of no bytes")
    inside = request.offset <= offset and offset + length <= request.offset + request.length
    demand(inside, f"content at {offset}, outside the request")
    answer.chunks.append((kind, offset, length))
    answer.pieces.append(data)


def _data(answer: Answer, payload: Take, length: int) -> None:
    offset = int.from_bytes(payload(8), "big")
    _content(answer, DATA, offset, payload(length - 8))


def _hole(answer: Answer, payload: Take, length: int) -> None:
    demand(length == 12, f"a hole of {length} bytes in the stream")
    offset, size = struct.unpack(">QI", payload(12))
    _content(answer, HOLE, offset, size)


def _joined(request: Request, chunks: list[tuple[int, int, int]], pieces: list[bytes | int]) -> bytes:
    """Content from its chunks, which may have come in any order."""
    demand(not request.flags & DF or len(chunks) <= 1, "fragments in spite of DF")
    parts, at = [], request.offset
    for (_, offset, length), piece in sorted(zip(chunks, pieces, strict=True), key=lambda one: one[0][1]):
        demand(offset == at, f"content at {offset}, where {at} comes next")
        parts.append(bytes(piece))  # of a hole's size: so many zeros
        at += length
    demand(at == request.offset + request.length, f"content ends at {at}")
    return b"".join(parts)


def _status(answer: Answer, payload: Take, length: int) -> None:
    demand(answer.request.kind == BLOCK_STATUS, "status that nobody asked for")
    demand(length > 4 and (length - 4) % 8 == 0, f"status of {length} bytes")
    context = int.from_bytes(payload(4), "big")
    demand(context not in answer.extents, f"metadata context {context} twice")
    answer.extents[context] = list(struct.iter_unpack(">II", payload(length - 4)))


def _error(answer: Answer, payload: Take, length: int) -> None:
    demand(length >= 6, "an error that is cut off")
    demand(not answer.error, "two errors in one reply")
    answer.error, size = struct.unpack(">IH", payload(6))
    demand(answer.error in ERRORS, f"error {answer.error}, which the protocol does not know")
    demand(size == length - 6, "an error whose message has another length")
    answer.message = text(payload(size))


def _check_extents(request: Request, extents: list[tuple[int, int]]) -> None:
    lengths = [length for length, _ in extents]
    demand(all(lengths), "an extent of no bytes")
    demand(sum(lengths[:-1]) < request.length, "extents beyond what was asked")
    if request.flags & REQ_ONE:
        demand(len(extents) == 1 and lengths[0] <= request.length, "more than REQ_ONE allows")
