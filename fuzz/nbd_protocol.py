"""Arbitrary bytes as an NBD client, through the handshake and the requests behind it, over disks in memory.

check() is the whole test: whatever it raises is a bug. `python -m fuzz.nbd_protocol -max_total_time=600 CORPUS`
runs it under atheris, with libFuzzer's options; tests/unit/test_fuzz_nbd.py runs it under Hypothesis.
"""

from __future__ import annotations

import random
import re
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from cowstore.nbd import Handshake, Limits, ProtocolError, Server
from fuzz import nbd_model as model
from fuzz.nbd_model import ACCEPTED, ENDED, REFUSED
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_memory import BLOCK, MemoryChannel, MemoryDevices, MemoryDisk

KIB, MIB = 1 << 10, 1 << 20
LIMITS = Limits(options=16, option_bytes=8 * KIB, payload_bytes=MIB, batch_bytes=64 * KIB, extents=5)
IMAGE = (b"I" * BLOCK + bytes(BLOCK)) * 4 + b"tail"
CLONE = (b"C" * 2 * BLOCK + bytes(3 * BLOCK)) * 3
MEMORY = 4 * MIB  # bytes, beside the input: a buffer of requests, one large write, and what the harness keeps

DOCUMENTED = re.compile(
    r"unknown client flags 0x[0-9a-f]+"
    r"|an option does not begin with its magic"
    r"|an option of \d+ bytes"
    r"|at most \d+ bytes an option"
    r"|more than 16 options"
    r"|no export for EXPORT_NAME: .*"
    r"|TLS is required here(, and the client's handshake is too old for it)?"
    r"|a request does not begin with its magic"
    r"|a write of \d+ bytes, where 1048576 are allowed",
    re.DOTALL,
)


class BugError(AssertionError):
    """The server has done what it must not."""


def check(data: bytes, *, tls: bool = False) -> str:
    """Plays a client that sends these bytes, and holds everything that comes back against the model.

    Args:
        data: Everything that the client sends, from its flags on.
        tls: Whether TLS is required; the bytes are then what comes out of it.

    Returns:
        "accepted", "ended", or "refused: " and the error.

    Raises:
        Exception: A bug.
    """
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    session = Session(data, tls=tls)
    try:
        verdict = session.play()
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        session.close()
        if started:
            tracemalloc.stop()
    if peak > MEMORY + 4 * len(data):
        raise BugError(f"{peak} bytes of memory for {len(data)} bytes")
    return verdict


class Session:
    """One client, played once."""

    def __init__(self, data: bytes, *, tls: bool) -> None:
        self._data = data
        self._devices = MemoryDevices({"base": IMAGE}, {"desk": CLONE})
        self._server = Server(self._devices, [], limits=LIMITS)
        exports = {"base": (IMAGE, False), "desk": (CLONE, True)}
        self._rules = model.Rules(exports, LIMITS.options, LIMITS.option_bytes, LIMITS.payload_bytes, tls)
        self._handshake = Handshake(self._server.exports, LIMITS, tls_required=tls)
        self._said = bytearray()
        self._dice = random.Random(zlib.crc32(data))
        self._fed = 0  # bytes that the server has got
        self._piece = 0  # where the last piece began

    def _pieces(self) -> Iterator[bytes]:
        """The rest of the data, as it might come from a socket."""
        most = max(self._dice.choice([1, 7, 40, 1000, 1 << 20]), len(self._data) // 200)
        while self._fed < len(self._data):
            count = self._dice.randint(1, most)
            self._piece = self._fed
            piece = self._data[self._fed : self._fed + count]
            self._fed += len(piece)
            yield piece

    def play(self) -> str:
        """The verdict, and what led to it."""
        if self._rules.tls and not int.from_bytes(self._data[:4], "big") & nbd.FIXED_NEWSTYLE:
            return ENDED  # of such a client the specification says too little: see test_nbd_contexts
        error = self._shake_hands()
        found = model.Client(self._rules, self._data, bytes(self._said)).follow()
        verdict = REFUSED if error else ACCEPTED if self._handshake.chosen else ENDED
        if verdict != found.verdict:
            raise BugError(f"the handshake is {verdict} {error!r}, and has to be {found.verdict}")
        if self._handshake.chosen is not None:
            verdict, error = self._transmit(found)
        if self._devices.open_names:
            raise BugError("a device is left open")
        if not error:
            return verdict
        if not DOCUMENTED.fullmatch(error):
            raise BugError(f"an error that is not documented: {error}")
        return f"{verdict}: {error}"

    def close(self) -> None:
        """Closes what the server has open."""
        self._server.stop()

    def _shake_hands(self) -> str:
        """Feeds the handshake until it has ended; what follows it goes back."""
        handshake = self._handshake
        self._take_output()
        for piece in self._pieces():
            try:
                self._feed(piece)
            except ProtocolError as error:
                return str(error)
            finally:
                self._take_output()
            if handshake.chosen or handshake.ended:
                break
        return ""

    def _feed(self, piece: bytes) -> None:
        rest = self._handshake.receive(piece)
        while self._handshake.wants_tls:
            self._handshake.secured()
            rest = self._handshake.receive(rest)
        self._fed -= len(rest)

    def _take_output(self) -> None:
        self._said += self._handshake.output
        self._handshake.output.clear()

    def _transmit(self, found: model.Handshake) -> tuple[str, str]:
        """Feeds the transmission; the verdict and the error."""
        chosen = self._handshake.chosen
        assert chosen is not None
        if self._fed != found.position:
            raise BugError(f"the requests begin at {self._fed}, and not at {found.position}")
        channel, disk = MemoryChannel(coming=self._pieces()), chosen.export.disk
        error = ""
        try:
            self._server._transmit(channel, chosen, b"")
        except ProtocolError as failure:
            error = str(failure)
        finally:
            self._server.exports.release(chosen.export)
        sent = model.requests_in(self._data, found.position, LIMITS.payload_bytes)
        ended = sent.verdict == ENDED and self._fed >= sent.requests[-1][1]
        verdict = REFUSED if error else ENDED if ended else ACCEPTED
        # Behind DISC nothing may come; what does may end the connection in any way.
        follows_disc = sent.verdict == ENDED and sent.requests[-1][1] < len(self._data)
        if verdict != sent.verdict and not (follows_disc and verdict == REFUSED):
            raise BugError(f"the transmission is {verdict} {error!r}, and has to be {sent.verdict}")
        sent.verdict = verdict
        self._compare(found, sent, channel, disk)
        return verdict, error

    def _compare(self, found: model.Handshake, sent: model.Sent, channel: MemoryChannel, disk: MemoryDisk) -> None:
        """Goes through requests and answers side by side."""
        mine = model.Disk(self._rules, found)
        numbers = [model.CONTEXTS.index(name) + 1 for name in found.contexts]
        replies = nbd.Replies(structured=found.structured, contexts=numbers)
        own, late = Stream(bytes(channel.own)), iter(channel.late)
        for request, end in sent.requests:
            # What came whole in the same piece as something broken may be left undone.
            if not own.left and sent.verdict == REFUSED and end > self._piece and not mine.is_late(request):
                break
            if request.kind == nbd.DISC:
                break
            replies.expect(request)
            if mine.is_late(request):
                reply = next(late, b"")
                if not reply and sent.verdict == REFUSED and end > self._piece:
                    break
                stream = Stream(reply)
                answer = replies.read(stream.take)
                if stream.left:
                    raise BugError("more than an answer behind a flush")
            else:
                answer = replies.read(own.take)
            mine.check(answer)
            mine.change(request)
        if own.left or next(late, None):
            raise BugError("more answers than requests")
        if disk.content != mine.content:
            raise BugError("the disk holds other bytes than it has to")


class Stream:
    """Bytes to be taken."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes that nobody has taken."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """Exactly so many."""
        if count > self.left:
            raise BugError(f"an answer of which {count - self.left} bytes are missing")
        self._at += count
        return bytes(self._data[self._at - count : self._at])


def seeds() -> Iterator[bytes]:
    """Sessions that are right, from which a fuzzer learns the magics."""
    both = nbd.context_data("desk", "base:allocation", "cowstore:own")
    structured = nbd.option(nbd.STRUCTURED_REPLY) + nbd.option(nbd.SET_META_CONTEXT, both)
    go = nbd.option(nbd.GO, nbd.info_data("desk", nbd.INFO_NAME, nbd.INFO_BLOCK_SIZE))
    kinds = (nbd.READ, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES, nbd.BLOCK_STATUS)
    asked = [nbd.write(100, b"data", cookie=1), nbd.Request(nbd.FLUSH, 2)]
    asked += [nbd.Request(kind, kind, 0, 5000, nbd.FUA) for kind in kinds]
    requests = b"".join(request.encode() for request in asked)
    begun = nbd.client_flags()
    yield begun + structured + go + requests + nbd.Request(nbd.DISC).encode()
    yield begun + nbd.option(nbd.STARTTLS) + nbd.option(nbd.LIST) + structured + go + requests
    yield begun + nbd.option(nbd.EXPORT_NAME, b"base") + requests
    yield begun + nbd.option(nbd.LIST_META_CONTEXT, both) + nbd.option(nbd.INFO, nbd.info_data("gone")) + go
    yield begun + nbd.option(nbd.ABORT)


def main() -> None:
    """Runs check() under atheris; of each input the first byte says whether TLS is required.

    The last argument is a directory for what it learns; where it is empty it gets the seeds first.
    """
    atheris: Any = import_module("atheris")
    atheris.instrument_all()
    corpus = Path(sys.argv[-1])
    if corpus.is_dir() and not any(corpus.iterdir()):
        for number, data in enumerate(seeds()):
            for tls in (b"\0", b"\xff"):
                (corpus / f"seed-{number}-{tls.hex()}").write_bytes(tls + data)

    tracemalloc.start()  # once: the interpreter loses some memory at each start

    def one(data: bytes) -> None:
        check(data[1:], tls=data[:1] > b"\x7f")

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
