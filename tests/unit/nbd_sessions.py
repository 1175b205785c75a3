"""What NBD clients may send, as Hypothesis strategies: mostly right, and sometimes not."""

from __future__ import annotations

import zlib
from base64 import b85decode, b85encode
from typing import Self

from hypothesis import strategies as st

from fuzz.nbd_protocol import CLONE
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_messages import Request

# The handshake.

NAMES = st.sampled_from(
    [b"desk"] * 10 + [b"base"] * 5 + [b"gone", b"", b"desk\0", b"\xff", b"d" * 300, b"d" * 4096, b"d" * 4097]
)
QUERIES = st.lists(
    st.sampled_from(
        [b"base:allocation", b"cowstore:own", b"base:", b"cowstore:", b"x-a:b", b"nocolon", b"\xff:a"]
    ),
    max_size=3,
)
WANTED = st.lists(st.integers(0, 5), max_size=4)
STRUCTURED = nbd.option(nbd.STRUCTURED_REPLY)
STARTTLS = nbd.option(nbd.STARTTLS)
PLAIN = [nbd.option(code) for code in (nbd.LIST, nbd.STRUCTURED_REPLY, nbd.STARTTLS, nbd.PEEK_EXPORT)]


def info(code: int, name: bytes, wanted: list[int]) -> bytes:
    return nbd.option(code, nbd.info_data(name, *wanted))


def contexts(code: int, name: bytes, queries: list[bytes]) -> bytes:
    return nbd.option(code, nbd.context_data(name, *queries))


def boasting(code: int, length: int) -> bytes:
    """An option that announces more than it brings."""
    return nbd.option(code, length=length)


OPTIONS = st.one_of(
    st.sampled_from(PLAIN),
    st.builds(info, st.just(nbd.INFO), NAMES, WANTED),
    st.builds(contexts, st.sampled_from([nbd.LIST_META_CONTEXT, nbd.SET_META_CONTEXT]), NAMES, QUERIES),
    st.builds(nbd.option, st.integers(0, 12), st.binary(max_size=40)),
    st.builds(boasting, st.integers(0, 12), st.integers(0, (1 << 32) - 1)),
)
PREPARED = st.sampled_from(
    [
        b"",
        STRUCTURED,
        STRUCTURED + contexts(nbd.SET_META_CONTEXT, b"desk", [b"base:allocation", b"cowstore:own"]),
        STRUCTURED + contexts(nbd.SET_META_CONTEXT, b"desk", [b"cowstore:own"]),
        STRUCTURED + contexts(nbd.SET_META_CONTEXT, b"base", [b"base:allocation"]),
    ]
)
LAST = st.one_of(
    st.builds(info, st.just(nbd.GO), NAMES, WANTED),
    st.just(info(nbd.GO, b"desk", [])),
    st.just(info(nbd.GO, b"desk", [])),
    st.builds(nbd.option, st.just(nbd.EXPORT_NAME), NAMES),
    st.just(nbd.option(nbd.ABORT)),
)

# The requests.

EDGES = [0, 1, 4095, 4096, 8192, len(CLONE) - 1, len(CLONE), len(CLONE) + 1, 1 << 20, (1 << 20) + 1, (1 << 32) - 1]
PLACES = st.one_of(
    st.integers(0, len(CLONE)), st.integers(0, len(CLONE)), st.sampled_from(EDGES), st.integers(0, (1 << 64) - 1)
)
LENGTHS = st.one_of(st.integers(0, 9000), st.integers(0, 9000), st.sampled_from(EDGES))
FLAGS = st.sampled_from([0] * 8 + [nbd.FUA] * 4 + [nbd.DF, nbd.REQ_ONE, nbd.NO_HOLE, nbd.FAST_ZERO, 1 << 7, 65535])
KINDS = st.sampled_from([nbd.READ, nbd.WRITE, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES, nbd.BLOCK_STATUS, 8])


def request(kind: int, cookie: int, place: int, length: int, flags: int) -> bytes:
    """A request; a write that is larger than any may be brings less than it announces."""
    data = (cookie.to_bytes(8, "big") * 1125)[: min(length, 9000)] if kind == nbd.WRITE else b""
    length = len(data) if kind == nbd.WRITE and length < (1 << 20) else length
    return Request(kind, cookie, place, length, flags, data).encode()


def up_to_the_end(kind: int, cookie: int, length: int, beyond: int) -> bytes:
    """A request that ends where the clone does, or a little later."""
    return request(kind, cookie, max(len(CLONE) - length, 0) + beyond, length, 0)


def flush(cookie: int, flags: int) -> bytes:
    return Request(nbd.FLUSH, cookie, flags=flags).encode()


COOKIES = st.integers(0, 9)
REQUESTS = st.one_of(
    st.builds(request, KINDS, COOKIES, PLACES, LENGTHS, FLAGS),
    st.builds(request, KINDS, COOKIES, st.integers(0, len(CLONE) - 9000), st.integers(0, 9000), FLAGS),
    st.builds(up_to_the_end, KINDS, COOKIES, st.integers(1, 5000), st.integers(0, 1)),
    st.builds(flush, COOKIES, FLAGS),
)


# Whole sessions.


class Sent:
    """What a client sends; shown in few words, from which it can be made again.

    Attributes:
        data: All its bytes.
        tls: Whether the server requires TLS.
    """

    def __init__(self, data: bytes, tls: bool) -> None:
        self.data = data
        self.tls = tls

    def __repr__(self) -> str:
        return f"Sent.packed({b85encode(zlib.compress(self.data)).decode()!r}, {self.tls})"

    @classmethod
    def packed(cls, text: str, tls: bool) -> Self:
        return cls(zlib.decompress(b85decode(text)), tls)


BEGINNINGS = st.sampled_from([3] * 12 + [0, 1, 2, 7, 1 << 31])
TOO_LARGE = Request(nbd.WRITE, 1, 0, (1 << 20) + 1).encode()
ENDS = st.sampled_from([b"", Request(nbd.DISC).encode(), bytes(30), nbd.REQUEST_MAGIC, TOO_LARGE])
HAGGLING: st.SearchStrategy[list[bytes]] = st.one_of(st.just([]), st.lists(OPTIONS, max_size=4))
MUTATIONS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=2
)
ANY_MUTATIONS: st.SearchStrategy[list[tuple[int, int, int]]] = st.one_of(st.just([]), st.just([]), MUTATIONS)


def mutate(sent: Sent, mutations: list[tuple[int, int, int]]) -> Sent:
    """Changes a byte, leaves one out, adds one, or cuts the rest off; or TLS is required all of a sudden."""
    data, tls = sent.data, sent.tls
    for kind, place, byte in mutations:
        at = place % (len(data) + 1)
        if kind == 0:
            data = data[:at] + bytes([byte]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + 1 :]
        elif kind == 2:
            data = data[:at] + bytes([byte]) + data[at:]
        elif kind == 3:
            data = data[:at]
        else:
            tls = not tls
    return Sent(data, tls)


@st.composite
def sessions(draw: st.DrawFn) -> Sent:
    """Right ones, two of three; the others with one or two mutations."""
    tls = draw(st.sampled_from([False, False, True]))
    begun = [nbd.client_flags(draw(BEGINNINGS)), STARTTLS if tls else b"", draw(PREPARED), *draw(HAGGLING)]
    requests = draw(st.lists(REQUESTS, min_size=1, max_size=12))
    data = b"".join([*begun, draw(LAST), *requests, draw(ENDS)])
    return mutate(Sent(data, tls), draw(ANY_MUTATIONS))


SESSIONS = sessions()
