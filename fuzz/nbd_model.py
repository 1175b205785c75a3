"""What an NBD server has to answer: the specification over a bytearray, for the fuzzer to compare with.

It shares no code with the server. Where the specification leaves a choice, every answer that it allows is right.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.unit import nbd_messages as nbd
from tests.unit.nbd_messages import Answer, Request, demand

BLOCK = 4096
CONTEXTS = ("base:allocation", "cowstore:own")
ACCEPTED, ENDED, REFUSED = "accepted", "ended", "refused"


@dataclass(frozen=True)
class Rules:
    """The limits that hold, and what is offered.

    Attributes:
        exports: Content and whether it may be written, by name.
        options: In one handshake.
        option_bytes: Of one option.
        payload_bytes: Of one request.
        tls: Whether nothing goes on before TLS.
    """

    exports: dict[str, tuple[bytes, bool]]
    options: int
    option_bytes: int
    payload_bytes: int
    tls: bool = False


@dataclass
class Handshake:
    """What a client's bytes have to lead to.

    Attributes:
        verdict: ACCEPTED, when an export is chosen; ENDED, when the client ends it or more is to come; REFUSED.
        options: The options that are answered, each with its data.
        position: Where what follows begins, in bytes.
        name: The export that is chosen.
        structured: Whether replies are structured.
        contexts: The names of the contexts that count.
    """

    verdict: str = ENDED
    options: list[tuple[int, bytes]] = field(default_factory=list)
    position: int = 0
    name: str = ""
    structured: bool = False
    contexts: tuple[str, ...] = ()


class Client:
    """Follows a client's handshake, option by option, and holds the server's replies against it."""

    def __init__(self, rules: Rules, data: bytes, said: bytes) -> None:
        self._rules = rules
        self._data = data
        self._take = nbd.taking(said)
        self._secure = not rules.tls
        self._no_zeroes = False
        self._selected: tuple[bytes, tuple[str, ...]] = (b"", ())
        self.found = Handshake()

    def follow(self) -> Handshake:
        """Follows it to its end."""
        demand(nbd.read_greeting(self._take) == nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES, "other handshake flags")
        self.found.verdict = self._follow()
        rest = b""
        try:
            while True:
                rest += self._take(1)
        except EOFError:
            demand(not rest, f"{len(rest)} bytes too many in the handshake")
        return self.found

    def _next(self, count: int) -> bytes | None:
        start = self.found.position
        if start + count > len(self._data):
            return None
        self.found.position += count
        return self._data[start : start + count]

    def _follow(self) -> str:
        flags = self._next(4)
        if flags is None:
            return ENDED
        number = int.from_bytes(flags, "big")
        if number & ~(nbd.FIXED_NEWSTYLE | nbd.NO_ZEROES):
            return REFUSED
        self._no_zeroes = bool(number & nbd.NO_ZEROES)
        for _ in range(self._rules.options):
            verdict = self._option()
            if verdict is not None:
                return verdict
        return REFUSED

    def _option(self) -> str | None:
        """One option; the verdict, where it is the last."""
        head = self._next(16)
        if head is None:
            return ENDED
        magic, code, length = struct.unpack(">8sII", head)
        if magic != nbd.OPTION_MAGIC:
            return REFUSED
        if length > self._rules.option_bytes:
            if code != nbd.EXPORT_NAME:  # to which nothing may be answered
                self._expect(code, {nbd.TOO_BIG})
            return REFUSED
        data = self._next(length)
        if data is None:
            return ENDED
        if code == nbd.ABORT:
            self._expect(code, {nbd.ACK})
            return ENDED
        if not self._secure and code != nbd.STARTTLS:
            if code == nbd.EXPORT_NAME:
                return REFUSED
            self._expect(code, {nbd.TLS_REQD})
            return None
        return self._handle(code, data)

    def _handle(self, code: int, data: bytes) -> str | None:
        if code == nbd.EXPORT_NAME:
            return self._export_name(data)
        if code in (nbd.INFO, nbd.GO):
            return self._go(code, data)
        if code in (nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT):
            self._contexts(code, data)
        elif code == nbd.LIST:
            replies = self._expect(code, {nbd.INVALID} if data else {nbd.ACK})
            demand(data or nbd.exports_of(replies) == sorted(self._rules.exports), "other exports are listed")
        elif code == nbd.STRUCTURED_REPLY:
            self._expect(code, {nbd.INVALID} if data else {nbd.ACK})
            self.found.structured |= not data
        elif code == nbd.STARTTLS:
            self._start_tls(data)
        else:
            self._expect(code, {nbd.UNSUP})
        return None

    def _expect(self, code: int, allowed: set[int]) -> list[nbd.OptionReply]:
        replies = nbd.read_option_replies(self._take, code)
        demand(replies[-1].kind in allowed, f"option {code} is answered {replies[-1].kind:#x}")
        return replies

    def _start_tls(self, data: bytes) -> None:
        if data or (self._rules.tls and self._secure):
            self._expect(nbd.STARTTLS, {nbd.INVALID})
        elif not self._rules.tls:
            self._expect(nbd.STARTTLS, {nbd.POLICY, nbd.UNSUP})
        else:
            self._expect(nbd.STARTTLS, {nbd.ACK})
            self._secure = True
            self.found.structured, self._selected = False, (b"", ())

    def _chosen(self, raw: bytes) -> str:
        self.found.name = raw.decode()
        self.found.contexts = self._selected[1] if self._selected[0] == raw else ()
        return ACCEPTED

    def _flags(self, name: str) -> int:
        flags = nbd.HAS_FLAGS | nbd.SEND_FLUSH | nbd.SEND_FUA | nbd.MULTI_CONN | nbd.SEND_CACHE
        if self.found.structured:
            flags |= nbd.SEND_DF
        if not self._rules.exports[name][1]:
            return flags | nbd.READ_ONLY
        return flags | nbd.SEND_TRIM | nbd.SEND_WRITE_ZEROES | nbd.SEND_FAST_ZERO

    def _known(self, raw: bytes) -> bool:
        return raw in {name.encode() for name in self._rules.exports}

    def _export_name(self, raw: bytes) -> str:
        if not self._known(raw):
            return REFUSED
        size, flags = struct.unpack(">QH", self._take(10))
        self._check_export(raw.decode(), size, flags)
        demand(self._no_zeroes or self._take(124) == bytes(124), "no zeroes behind the flags")
        return self._chosen(raw)

    def _check_export(self, name: str, size: int, flags: int) -> None:
        demand(size == len(self._rules.exports[name][0]), f"a size of {size} bytes")
        demand(flags == self._flags(name), f"the flags {flags:#x}")

    def _go(self, code: int, data: bytes) -> str | None:
        try:
            take = _all_of(data)
            raw = _string(take)
            wanted = {int.from_bytes(take(2), "big") for _ in range(int.from_bytes(take(2), "big"))}
            take(-1)
            raw.decode()
        except (EOFError, UnicodeDecodeError):
            self._expect(code, {nbd.INVALID})
            return None
        if not self._known(raw):
            self._expect(code, {nbd.UNKNOWN})
            return None
        export = nbd.export_of(self._expect(code, {nbd.ACK}))
        self._check_export(raw.decode(), export.size, export.flags)
        if nbd.INFO_BLOCK_SIZE in wanted:
            demand(export.block_sizes == (1, BLOCK, self._rules.payload_bytes), "other block sizes")
        demand(export.name == (raw.decode() if nbd.INFO_NAME in wanted else None), "another name")
        return self._chosen(raw) if code == nbd.GO else None

    def _contexts(self, code: int, data: bytes) -> None:
        setting = code == nbd.SET_META_CONTEXT
        if setting:
            self._selected = b"", ()
        try:
            demand_structured(self.found.structured)
            take = _all_of(data)
            raw = _string(take)
            queries = [_string(take) for _ in range(_count(take, len(data)))]
            take(-1)
            for one in (raw, *queries):
                one.decode()
        except (EOFError, UnicodeDecodeError):
            self._expect(code, {nbd.INVALID})
            return
        if not self._known(raw):
            self._expect(code, {nbd.UNKNOWN})
            return
        asked = [query.decode() for query in queries]
        expected = tuple(name for name in CONTEXTS if _asks_for(asked, name, setting=setting))
        found = nbd.contexts_of(self._expect(code, {nbd.ACK}))
        demand(set(found) == set(expected), f"the contexts {sorted(found)} for {asked}")
        if setting:
            demand(len(set(found.values())) == len(found), "contexts that share a number")
            self._selected = raw, expected


def demand_structured(structured: bool) -> None:
    """Contexts want structured replies first; EOFError stands for every option that is not well formed."""
    if not structured:
        raise EOFError


def _asks_for(queries: Sequence[str], name: str, *, setting: bool) -> bool:
    wildcard = name.partition(":")[0] + ":"
    return name in queries or (not setting and (not queries or wildcard in queries))


def _all_of(data: bytes) -> nbd.Take:
    """Takes from data; -1 bytes say that there must be no more."""
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if position + count > len(data) or (count < 0 and position != len(data)):
            raise EOFError
        part = data[position : position + max(count, 0)]
        position += max(count, 0)
        return part

    return take


def _string(take: nbd.Take) -> bytes:
    length = int.from_bytes(take(4), "big")
    if length > nbd.STRING_LIMIT:
        raise EOFError
    return take(length)


def _count(take: nbd.Take, most: int) -> int:
    """A number of strings; more than there can be is as wrong as one more."""
    return min(int.from_bytes(take(4), "big"), most)


# ---------------------------------------------------------------------------------------------------- transmission


@dataclass
class Sent:
    """The requests of a client.

    Attributes:
        requests: Those that are whole, up to DISC or to what is no request, each with the position behind it.
        verdict: ACCEPTED, when more may come; ENDED by DISC; REFUSED.
    """

    requests: list[tuple[Request, int]] = field(default_factory=list)
    verdict: str = ACCEPTED


def requests_in(data: bytes, position: int, payload_bytes: int) -> Sent:
    """Takes apart what follows a handshake."""
    sent = Sent()
    while position + 28 <= len(data):
        magic, flags, kind, cookie, offset, length = struct.unpack_from(">4sHHQQI", data, position)
        position += 28
        payload = length if kind == nbd.WRITE else 0
        if magic != nbd.REQUEST_MAGIC or payload > payload_bytes:
            sent.verdict = REFUSED
            return sent
        if position + payload > len(data):
            return sent
        body = data[position : position + payload]
        position += payload
        sent.requests.append((Request(kind, cookie, offset, length, flags, body), position))
        if kind == nbd.DISC:
            sent.verdict = ENDED
            return sent
    return sent


_FLAGS = {
    nbd.READ: nbd.FUA | nbd.DF,
    nbd.WRITE: nbd.FUA,
    nbd.FLUSH: nbd.FUA,
    nbd.TRIM: nbd.FUA,
    nbd.CACHE: nbd.FUA,
    nbd.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE | nbd.FAST_ZERO,
    nbd.BLOCK_STATUS: nbd.FUA | nbd.REQ_ONE,
}
_CHANGES = (nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES)


class Disk:
    """The bytes that an export must have after each request, and which of its blocks are its own."""

    def __init__(self, rules: Rules, found: Handshake) -> None:
        content, self._writable = rules.exports[found.name]
        self.content = bytearray(content)
        self._own: set[int] = set()
        self._rules = rules
        self._found = found

    def errors(self, request: Request) -> set[int]:
        """The errors of which one has to be answered; none where it has to succeed."""
        kind, found = request.kind, set()
        if kind not in _FLAGS:
            return {nbd.EINVAL}
        if request.flags & ~_FLAGS[kind] or (request.flags & nbd.DF and not self._found.structured):
            found.add(nbd.EINVAL)
        if kind in _CHANGES and not self._writable:
            found.add(nbd.EPERM)
        if request.offset + request.length > len(self.content):
            found.add(nbd.ENOSPC if kind in (nbd.WRITE, nbd.WRITE_ZEROES) else nbd.EINVAL)
        if kind == nbd.READ and request.length > self._rules.payload_bytes:
            found.add(nbd.EINVAL)
        if kind == nbd.FLUSH and (request.offset or request.length):
            found.add(nbd.EINVAL)
        if kind == nbd.BLOCK_STATUS and not (self._found.contexts and request.length):
            found.add(nbd.EINVAL)
        return found

    def is_late(self, request: Request) -> bool:
        """Whether its answer waits for a flush, and may come after others."""
        if not self._writable or self.errors(request):
            return False
        return request.kind == nbd.FLUSH or (request.kind in _CHANGES and bool(request.flags & nbd.FUA))

    def change(self, request: Request) -> None:
        """Does what a request asks for."""
        if request.kind in _CHANGES and not self.errors(request):
            first, end = request.offset, request.offset + request.length
            self.content[first:end] = request.data or bytes(request.length)
            if request.length:
                self._own.update(range(first // BLOCK, -(-end // BLOCK)))

    def check(self, answer: Answer) -> None:
        """Holds an answer against the present content."""
        request, allowed = answer.request, self.errors(answer.request)
        if allowed:
            demand(answer.error in allowed, f"{request} is answered {answer.error}, and not {allowed}")
            return
        demand(answer.error == 0, f"{request} is answered {answer.error}: {answer.message}")
        if request.kind == nbd.READ:
            expected = self.content[request.offset : request.offset + request.length]
            demand(answer.data == expected, f"{request} is answered with other bytes")
        for number, extents in answer.extents.items():
            self._check_extents(request, CONTEXTS[number - 1], extents)

    def _check_extents(self, request: Request, context: str, extents: list[tuple[int, int]]) -> None:
        start = request.offset
        for length, flags in extents:
            for block in range(start // BLOCK, -(-(start + length) // BLOCK)):
                stored = self.content[block * BLOCK : (block + 1) * BLOCK].strip(b"\0")
                allocation = 0 if stored else 3
                expected = allocation if context == "base:allocation" else int(block in self._own)
                demand(flags == expected, f"{context} of block {block} is {flags}")
            start += length
