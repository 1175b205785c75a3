"""The parser of requests: bytes come in any pieces, requests come out whole."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowstore.nbd import Limits, ProtocolError, Requests
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_messages import Request

KIB, MIB = 1 << 10, 1 << 20
BUFFER = 512 * KIB
HEADER = 28
LIMIT = 32 * MIB


def whole(_: int) -> int:
    return 1 << 30


def feed(data: bytes, piece: Callable[[int], int] = whole, limits: Limits | None = None) -> list[Request]:
    """Feeds bytes in pieces; the requests are copied at once, since their payloads are valid so long only."""
    requests, found, view = Requests(limits), [], memoryview(data)
    while len(view):
        space = requests.space()
        assert len(space) > 0
        count = min(len(space), len(view), piece(len(view)))
        space[:count], view = view[:count], view[count:]
        found += [
            Request(one.type, one.cookie, one.offset, one.length, one.flags, bytes(one.payload))
            for one in requests.received(count)
        ]
    return found


def in_pieces(seed: int, most: int) -> Callable[[int], int]:
    dice = random.Random(seed)
    return lambda _: dice.randint(1, most)


def one_by_one(_: int) -> int:
    return 1


def stream(*requests: Request) -> bytes:
    return b"".join(request.encode() for request in requests)


def written(length: int, cookie: int = 1, seed: int = 0) -> Request:
    return nbd.write(cookie << 20, random.Random(seed).randbytes(length), cookie=cookie)


@pytest.mark.parametrize("kind", [0, *range(2, 9), 255, 65535])
def test_header_says_everything(kind):
    request = Request(kind, 0x1122334455667788, (1 << 64) - 1, (1 << 32) - 1, 0xFFFF)
    assert feed(request.encode()) == [request]


def test_write_carries_its_bytes():
    assert feed(written(5000).encode()) == [written(5000)]


def test_write_of_nothing():
    assert feed(stream(written(0), Request(nbd.READ, 7, 1, 2))) == [written(0), Request(nbd.READ, 7, 1, 2)]


def test_many_requests_in_one_buffer():
    requests = [Request(nbd.READ, number, number, 1) for number in range(50_000)]
    assert len(stream(*requests)) > 2 * BUFFER
    assert feed(stream(*requests)) == requests


EDGES = [BUFFER - HEADER - 1, BUFFER - HEADER, BUFFER - HEADER + 1, BUFFER, BUFFER + 1, MIB, 3 * MIB + 5]


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize("before", [0, 1, 100])
def test_writes_about_as_large_as_the_buffer_and_larger(length, before):
    requests = [Request(nbd.READ, number, 0, 9) for number in range(before)] + [
        written(length, 1, 1),
        Request(nbd.FLUSH, 2),
        written(length, 3, 2),
        written(100, 4),
    ]
    data = stream(*requests)
    assert feed(data) == requests
    assert feed(data, in_pieces(length, 70_000)) == requests


def test_write_of_the_greatest_length():
    limits = Limits(payload_bytes=MIB)
    assert feed(written(MIB).encode(), limits=limits) == [written(MIB)]
    with pytest.raises(ProtocolError, match=f"a write of {MIB + 1} bytes"):
        feed(written(MIB + 1).encode()[:HEADER], limits=limits)


def test_default_limit_is_that_of_the_specification():
    assert feed(Request(nbd.WRITE, 1, 0, LIMIT).encode()) == []
    with pytest.raises(ProtocolError):
        feed(Request(nbd.WRITE, 1, 0, LIMIT + 1).encode())


@pytest.mark.parametrize("kind", [nbd.READ, nbd.TRIM, nbd.WRITE_ZEROES, nbd.BLOCK_STATUS, 99])
def test_length_of_what_carries_no_bytes_has_no_limit(kind):
    requests = [Request(kind, 1, 0, (1 << 32) - 1), Request(nbd.READ, 2, 3, 4)]
    assert feed(stream(*requests)) == requests


@pytest.mark.parametrize(
    "magic", [bytes(4), nbd.SIMPLE_MAGIC, bytes.fromhex("12560953"), bytes.fromhex("25609514")]
)
def test_request_without_its_magic(magic):
    with pytest.raises(ProtocolError, match="magic"):
        feed(magic + Request(nbd.READ).encode()[4:])


def test_every_beginning_of_a_request_is_waited_on():
    data = written(50).encode()
    for length in range(len(data)):
        assert feed(data[:length]) == []


def test_large_write_leaves_those_before_it_alone():
    """Payloads of requests that came with the beginning of a large write are still in the buffer."""
    requests = [written(1000, number, number) for number in range(1, 200)]
    large = written(2 * MIB, 500, 500)
    data = stream(*requests) + large.encode()
    assert feed(data, in_pieces(1, 300_000)) == [*requests, large]
    assert feed(data) == [*requests, large]


def mixture(seed: int) -> list[Request]:
    dice = random.Random(seed)
    lengths = [0, 1, 100, 4096, 4096, 4096, 65_536, 300_000, dice.choice(EDGES)]
    return [
        written(dice.choice(lengths), number, number)
        if dice.random() < 0.3
        else Request(dice.choice([0, 3, 4, 5, 6, 7]), number, dice.getrandbits(64), dice.getrandbits(32))
        for number in range(1, 80)
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("most", [100, 5000, 200_000, 2_000_000])
def test_pieces_make_no_difference(seed, most):
    requests = mixture(seed)
    data = stream(*requests)
    if most == 100:
        requests = [request for request in requests if request.length < 10_000 or request.kind != nbd.WRITE]
        data = stream(*requests)
    assert feed(data, in_pieces(seed, most)) == requests


SHORT = st.builds(
    lambda kind, cookie, data: Request(kind, cookie, 0, len(data), 0, data if kind == nbd.WRITE else b""),
    st.integers(0, 9),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=300),
)


@given(st.lists(SHORT, max_size=12))
def test_one_byte_at_a_time_makes_no_difference(requests):
    assert feed(stream(*requests), one_by_one) == requests
