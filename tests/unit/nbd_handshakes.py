"""Handshakes played without a socket."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cowstore.nbd import Handshake, ProtocolError
from cowstore.nbd.exports import Exports
from cowstore.nbd.handshake import Chosen
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_memory import MemoryDevices

GREETING = b"NBDMAGICIHAVEOPT\0\3"
IMAGE, CLONE = bytes(5000), bytes(9000)


@dataclass
class Outcome:
    """What a handshake came to."""

    output: bytes
    rest: bytes
    chosen: Chosen | None
    ended: bool
    wants_tls: bool
    error: str

    @property
    def said(self) -> bytes:
        """What the server sent after its greeting."""
        assert self.output.startswith(GREETING)
        return self.output[len(GREETING) :]

    @property
    def replies(self) -> list[nbd.OptionReply]:
        take, left, found = nbd.taking(self.said), len(self.said), []
        while left:
            found.append(nbd.read_option_reply(take))
            left -= 20 + len(found[-1].data)
        return found

    @property
    def kinds(self) -> list[int]:
        return [reply.kind for reply in self.replies]


def devices() -> MemoryDevices:
    return MemoryDevices({"base": IMAGE}, {"desk": CLONE})


def play(
    *parts: bytes, offered: MemoryDevices | None = None, names: tuple[str, ...] = (),
    pieces: list[int] | None = None, flags: int = 3, **settings: Any,
) -> Outcome:  # fmt: skip
    """Feeds a handshake, in pieces where their lengths are given."""
    handshake = Handshake(Exports(offered or devices(), names), **settings)
    data = nbd.client_flags(flags) + b"".join(parts)
    rest, error = b"", ""
    for length in pieces or [len(data)]:
        part, data = data[:length], data[length:]
        if handshake.chosen or handshake.wants_tls:
            rest += part
            continue
        try:
            rest += handshake.receive(part)
        except ProtocolError as failure:
            error = str(failure)
            break
    chosen = handshake.chosen
    return Outcome(bytes(handshake.output), rest, chosen, handshake.ended, handshake.wants_tls, error)


def go(name: str | bytes = "desk", *wanted: int) -> bytes:
    return nbd.option(nbd.GO, nbd.info_data(name, *wanted))


def info(name: str | bytes = "desk", *wanted: int) -> bytes:
    return nbd.option(nbd.INFO, nbd.info_data(name, *wanted))


STRUCTURED = nbd.option(nbd.STRUCTURED_REPLY)
LIST = nbd.option(nbd.LIST)
ABORT = nbd.option(nbd.ABORT)
