"""The handshake, server's side: bytes in, bytes and events out, until an export is chosen.

Read from top to bottom like the specification: each step asks for so many bytes with ``yield`` and goes on
when they are there. What it knows of exports it is handed; it opens none but the one that is chosen.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from cowstore.errors import NotFoundError, StoreError

from . import wire
from .exports import Description, Export, Exports
from .limits import Limits
from .wire import Answer, Info, Option

_OUTPUT_BYTES = 64 << 10  # answers that are gathered before the next option is read

ALLOCATION, OWN = "base:allocation", "cowstore:own"
CONTEXTS = {ALLOCATION: 1, OWN: 2}
"""The metadata contexts and the numbers they go by."""

_Steps = Generator[int, bytes, None]


class ProtocolError(Exception):
    """The client broke the protocol, or a limit, in a way that leaves nothing but to hang up."""


@dataclass(frozen=True)
class Chosen:
    """What the handshake led to.

    Attributes:
        export: The export, open; whoever gets this releases it.
        structured: Whether replies are structured.
        contexts: The numbers of the metadata contexts that were selected.
    """

    export: Export
    structured: bool
    contexts: tuple[int, ...]


@dataclass
class _Agreed:
    """What was agreed so far; nothing of it outlives the start of TLS."""

    structured: bool = False
    context_name: bytes | None = None
    contexts: tuple[int, ...] = ()


@dataclass
class Handshake:
    """One client's handshake.

    Attributes:
        exports: What is offered.
        limits: What a client may ask.
        tls_required: Whether nothing goes on before TLS.
        stopping: Whether the server is about to end; asked at each option.
        output: Bytes for the client; the caller takes them.
        chosen: The result, once there is one.
        wants_tls: Set when the client is to be led into TLS; the caller does so, and calls secured().
        ended: Whether the client ended it.
    """

    exports: Exports
    limits: Limits = field(default_factory=Limits)
    tls_required: bool = False
    stopping: Callable[[], bool] = lambda: False
    output: bytearray = field(default_factory=bytearray)
    chosen: Chosen | None = None
    wants_tls: bool = False
    ended: bool = False

    def __post_init__(self) -> None:
        self._secure = False
        self._agreed = _Agreed()
        self._no_zeroes = False
        self._pending = bytearray()
        self._steps = self._run()
        self._wanted = next(self._steps)

    @property
    def backlog(self) -> bool:
        """Whether more options are there than were answered: send the output, and call receive() with nothing."""
        return not (self.chosen or self.ended or self.wants_tls) and len(self._pending) >= self._wanted

    def receive(self, data: wire.Buffer) -> bytes:
        """Takes bytes from the client; returns those that belong to what comes after.

        Options are answered until their answers are as much as one wants to hold; the rest are the backlog.

        Raises:
            ProtocolError: The client is to be dropped; output may hold a last answer.
        """
        self._pending += data
        while self.backlog and len(self.output) < _OUTPUT_BYTES:
            part = bytes(self._pending[: self._wanted])
            del self._pending[: self._wanted]
            try:
                self._wanted = self._steps.send(part)
            except StopIteration:
                break
        if not (self.chosen or self.wants_tls):
            return b""
        rest = bytes(self._pending)
        self._pending.clear()
        return rest

    def secured(self) -> None:
        """TLS has begun: everything that was agreed in the clear is forgotten."""
        self.wants_tls = False
        self._secure = True
        self._agreed = _Agreed()

    def _run(self) -> _Steps:
        """The handshake as the specification tells it."""
        flags = wire.FLAG_FIXED_NEWSTYLE | wire.FLAG_NO_ZEROES
        self.output += wire.GREETING.pack(wire.GREETING_MAGIC, wire.OPTION_MAGIC, flags)
        (client,) = wire.CLIENT_FLAGS.unpack((yield wire.CLIENT_FLAGS.size))
        if client & ~flags:
            raise ProtocolError(f"unknown client flags {client:#x}")
        if self.tls_required and not client & wire.FLAG_FIXED_NEWSTYLE:
            raise ProtocolError("TLS is required here, and the client's handshake is too old for it")
        self._no_zeroes = bool(client & wire.FLAG_NO_ZEROES)
        for _ in range(self.limits.options):
            magic, option, length = wire.OPTION_HEADER.unpack((yield wire.OPTION_HEADER.size))
            if magic != wire.OPTION_MAGIC:
                raise ProtocolError("an option does not begin with its magic")
            if length > self.limits.option_bytes:
                self._refuse(option, Answer.ERR_TOO_BIG, f"at most {self.limits.option_bytes} bytes an option")
                raise ProtocolError(f"an option of {length} bytes")
            self._handle(option, (yield length) if length else b"")
            if self.chosen or self.ended:
                return
        raise ProtocolError(f"more than {self.limits.options} options")

    def _handle(self, option: int, data: bytes) -> None:
        """Answers one option."""
        if option == Option.ABORT:
            self._answer(option, Answer.ACK)
            self.ended = True
        elif self.tls_required and not self._secure and option != Option.STARTTLS:
            self._refuse_in_the_clear(option)
        elif self.stopping():
            self._refuse(option, Answer.ERR_SHUTDOWN, "the server is about to end")
        elif (handler := _HANDLERS.get(option)) is None:
            self._answer(option, Answer.ERR_UNSUP, f"option {option} is not known here")
        else:
            handler(self, option, data)

    def _refuse_in_the_clear(self, option: int) -> None:
        self._refuse(option, Answer.ERR_TLS_REQD, "TLS is required here")

    def _refuse(self, option: int, answer: Answer, message: str) -> None:
        """Says no; EXPORT_NAME cannot be told, and ends the session."""
        if option == Option.EXPORT_NAME:
            raise ProtocolError(message)
        self._answer(option, answer, message)

    def _answer(self, option: int, answer: Answer, data: bytes | str = b"") -> None:
        self.output += wire.option_reply(option, answer, wire.text(data) if isinstance(data, str) else data)

    # The options.

    def _start_tls(self, option: int, data: bytes) -> None:
        if data or self._secure:
            self._answer(option, Answer.ERR_INVALID, "TLS has begun already" if self._secure else "no data here")
        elif not self.tls_required:
            self._answer(option, Answer.ERR_POLICY, "this server has no certificate")
        else:
            self._answer(option, Answer.ACK)
            self.wants_tls = True

    def _structured_reply(self, option: int, data: bytes) -> None:
        if data:
            self._answer(option, Answer.ERR_INVALID, "no data here")
            return
        self._agreed.structured = True
        self._answer(option, Answer.ACK)

    def _list(self, option: int, data: bytes) -> None:
        if data:
            self._answer(option, Answer.ERR_INVALID, "no data here")
            return
        try:
            names = self.exports.names()
        except (StoreError, OSError) as error:
            self._answer(option, Answer.ERR_POLICY, str(error))
            return
        for name in names:
            encoded = name.encode()
            self._answer(option, Answer.SERVER, wire.NUMBER.pack(len(encoded)) + encoded)
        self._answer(option, Answer.ACK)

    def _export_name(self, _option: int, data: bytes) -> None:
        try:
            export = self.exports.acquire(self._name(data))
        except (StoreError, OSError, ValueError) as error:
            raise ProtocolError(f"no export for EXPORT_NAME: {error}") from error
        flags = transmission_flags(writable=export.writable, structured=self._agreed.structured)
        self.output += wire.EXPORT.pack(export.disk.size, flags)
        if not self._no_zeroes:
            self.output += bytes(wire.EXPORT_NAME_PADDING)
        self._choose(export, data)

    def _info(self, option: int, data: bytes) -> None:
        """INFO and GO: the same answers, and GO goes on to the transmission."""
        try:
            raw, wanted = _decode_info(data, self.limits.name_bytes)
            name = self._name(raw)
        except ValueError as error:
            self._answer(option, Answer.ERR_INVALID, str(error))
            return
        export = None
        try:
            found = self.exports.describe(name)
            if option == Option.GO:
                export = self.exports.acquire(name)
        except NotFoundError as error:
            self._answer(option, Answer.ERR_UNKNOWN, str(error))
        except (StoreError, OSError) as error:
            self._answer(option, Answer.ERR_POLICY, str(error))
        else:
            self._describe(option, found, wanted, export)
            self._answer(option, Answer.ACK)
            if export is not None:
                self._choose(export, raw)

    def _describe(self, option: int, found: Description, wanted: set[int], export: Export | None) -> None:
        size = found.size if export is None else export.disk.size
        flags = transmission_flags(writable=found.kind == "clone", structured=self._agreed.structured)
        self._answer(option, Answer.INFO, wire.INFO_EXPORT.pack(Info.EXPORT, size, flags))
        if Info.NAME in wanted:
            self._answer(option, Answer.INFO, wire.SHORT.pack(Info.NAME) + found.name.encode())
        if Info.DESCRIPTION in wanted:
            self._answer(option, Answer.INFO, wire.SHORT.pack(Info.DESCRIPTION) + found.kind.encode())
        if Info.BLOCK_SIZE in wanted:
            sizes = wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, 4096, self.limits.payload_bytes)
            self._answer(option, Answer.INFO, sizes)

    def _meta_context(self, option: int, data: bytes) -> None:
        """LIST and SET of metadata contexts; SET replaces what was selected, also where it fails."""
        if option == Option.SET_META_CONTEXT:
            self._agreed.context_name, self._agreed.contexts = None, ()
        try:
            if not self._agreed.structured:
                raise ValueError("negotiate structured replies first")
            raw, queries = _decode_queries(data, self.limits.name_bytes)
            self.exports.describe(self._name(raw))
        except ValueError as error:
            self._answer(option, Answer.ERR_INVALID, str(error))
            return
        except StoreError as error:
            self._answer(option, Answer.ERR_UNKNOWN, str(error))
            return
        listing = option == Option.LIST_META_CONTEXT
        found = [name for name in CONTEXTS if _matches(name, queries, listing=listing)]
        for name in found:
            number = 0 if listing else CONTEXTS[name]
            self._answer(option, Answer.META_CONTEXT, wire.NUMBER.pack(number) + name.encode())
        if not listing:
            self._agreed.context_name, self._agreed.contexts = raw, tuple(CONTEXTS[name] for name in found)
        self._answer(option, Answer.ACK)

    def _choose(self, export: Export, raw: bytes) -> None:
        """Contexts count only where they were selected for the export that is chosen now."""
        agreed = self._agreed
        contexts = agreed.contexts if agreed.context_name == raw else ()
        self.chosen = Chosen(export, agreed.structured, contexts)

    def _name(self, raw: bytes) -> str:
        """An export's name as it came.

        Raises:
            ValueError: It is too long, or no text.
        """
        if len(raw) > self.limits.name_bytes:
            raise ValueError(f"a name of more than {self.limits.name_bytes} bytes")
        return raw.decode()


_Handler = Callable[[Handshake, int, bytes], None]
_HANDLERS: dict[int, _Handler] = {
    Option.EXPORT_NAME: Handshake._export_name,
    Option.LIST: Handshake._list,
    Option.STARTTLS: Handshake._start_tls,
    Option.INFO: Handshake._info,
    Option.GO: Handshake._info,
    Option.STRUCTURED_REPLY: Handshake._structured_reply,
    Option.LIST_META_CONTEXT: Handshake._meta_context,
    Option.SET_META_CONTEXT: Handshake._meta_context,
}


def transmission_flags(*, writable: bool, structured: bool) -> int:
    """What an export can do, for the client."""
    flags = wire.HAS_FLAGS | wire.SEND_FLUSH | wire.SEND_FUA | wire.CAN_MULTI_CONN | wire.SEND_CACHE
    if structured:
        flags |= wire.SEND_DF
    if not writable:
        return flags | wire.READ_ONLY
    return flags | wire.SEND_TRIM | wire.SEND_WRITE_ZEROES | wire.SEND_FAST_ZERO


def _decode_info(data: bytes, limit: int) -> tuple[bytes, set[int]]:
    """An export's name and the pieces of information that are asked for."""
    try:
        name, at = _string(data, 0, limit)
        (count,) = wire.SHORT.unpack_from(data, at)
        wanted = struct.unpack_from(f">{count}H", data, at + wire.SHORT.size)
    except struct.error as error:
        raise ValueError("the data is cut off") from error
    if len(data) != at + wire.SHORT.size * (1 + count):
        raise ValueError("there is more data than it says")
    return name, set(wanted)


def _decode_queries(data: bytes, limit: int) -> tuple[bytes, list[str]]:
    """An export's name and the queries for metadata contexts."""
    queries = []
    try:
        name, at = _string(data, 0, limit)
        (count,) = wire.NUMBER.unpack_from(data, at)
        at += wire.NUMBER.size
        for _ in range(count):
            query, at = _string(data, at, limit)
            queries.append(query.decode())
    except struct.error as error:
        raise ValueError("the data is cut off") from error
    if at != len(data):
        raise ValueError("there is more data than it says")
    return name, queries


def _string(data: bytes, at: int, limit: int) -> tuple[bytes, int]:
    """A string behind its length, and where the next thing begins."""
    (length,) = wire.NUMBER.unpack_from(data, at)
    at += wire.NUMBER.size
    if length > limit:
        raise ValueError(f"a string of more than {limit} bytes")
    if at + length > len(data):
        raise ValueError("the data is cut off")
    return data[at : at + length], at + length


def _matches(name: str, queries: list[str], *, listing: bool) -> bool:
    """Whether queries ask for a context; a bare namespace lists all in it and selects none."""
    if listing and not queries:
        return True
    return any(query == name or (listing and query == name.partition(":")[0] + ":") for query in queries)
