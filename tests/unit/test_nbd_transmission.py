"""Each request without a socket: what is done, what is answered, and with which error."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from cowstore.errors import BlockCorruptError, ClosedError, InvalidError, NoSpaceError, ReadOnlyError
from cowstore.nbd import Limits
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_lines import Line
from tests.unit.nbd_memory import BLOCK, MemoryDisk
from tests.unit.nbd_messages import Request

SIZE = 4 * BLOCK
READ_LIMIT = 32 << 20
Lines = Callable[..., Line]
structured_or_not = pytest.mark.parametrize("structured", [True, False])


@pytest.fixture
def line() -> Iterator[Lines]:
    """Makes lines, and closes them."""
    made: list[Line] = []

    def make(*arguments: Any, **settings: Any) -> Line:
        made.append(Line(*arguments, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def request(kind: int, offset: int = 0, length: int = BLOCK, flags: int = 0, cookie: int = 1) -> Request:
    return Request(kind, cookie, offset, length, flags, b"w" * length if kind == nbd.WRITE else b"")


# --------------------------------------------------------------------------------------------------------- flags

# From the specification: which flags each command may carry.
ALLOWED = {
    nbd.READ: nbd.FUA | nbd.DF,
    nbd.WRITE: nbd.FUA,
    nbd.TRIM: nbd.FUA,
    nbd.CACHE: nbd.FUA,
    nbd.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE | nbd.FAST_ZERO,
    nbd.BLOCK_STATUS: nbd.FUA | nbd.REQ_ONE,
}


@pytest.mark.parametrize("kind", ALLOWED)
@pytest.mark.parametrize("bit", range(16))
def test_flags_that_go_with_a_command_and_that_do_not(line, kind, bit):
    expected = 0 if ALLOWED[kind] & 1 << bit else nbd.EINVAL
    assert line(contexts=(1,)).error(request(kind, flags=1 << bit)) == expected


@pytest.mark.parametrize("bit", range(16))
def test_flags_of_a_flush(line, bit):
    assert line().error(Request(nbd.FLUSH, 1, flags=1 << bit)) == (0 if bit == 0 else nbd.EINVAL)


@pytest.mark.parametrize("kind", [nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES])
def test_request_with_a_wrong_flag_changes_nothing(line, kind):
    one = line()
    before = bytes(one.disk.content)
    one.ask(request(kind, flags=1 << 7))
    assert one.disk.content == before


def test_do_not_fragment_needs_structured_replies(line):
    assert line(structured=False).error(request(nbd.READ, flags=nbd.DF)) == nbd.EINVAL
    assert line(structured=True).error(request(nbd.READ, flags=nbd.DF)) == 0


# -------------------------------------------------------------------------------------------------------- ranges

BEYOND = {
    nbd.READ: nbd.EINVAL,
    nbd.WRITE: nbd.ENOSPC,
    nbd.TRIM: nbd.EINVAL,
    nbd.CACHE: nbd.EINVAL,
    nbd.WRITE_ZEROES: nbd.ENOSPC,
    nbd.BLOCK_STATUS: nbd.EINVAL,
}


@pytest.mark.parametrize("kind", BEYOND)
@structured_or_not
def test_range_up_to_the_end_and_beyond_it(line, kind, structured):
    one = line(structured=structured, contexts=(1,))
    if structured or kind != nbd.BLOCK_STATUS:
        assert one.error(request(kind, SIZE - 10, 10)) == 0
    for offset, length in [(SIZE - 10, 11), (SIZE, 1), (0, SIZE + 1), ((1 << 64) - 1, 1), ((1 << 64) - 10, 10)]:
        assert one.error(request(kind, offset, length)) == BEYOND[kind]


@pytest.mark.parametrize("kind", [nbd.READ, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES])
def test_longest_range_there_is(line, kind):
    assert line().error(Request(kind, 1, 0, (1 << 32) - 1)) == BEYOND[kind]


@pytest.mark.parametrize("kind", [nbd.READ, nbd.WRITE, nbd.TRIM, nbd.CACHE, nbd.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, nbd.FUA])
@structured_or_not
def test_nothing_at_all_is_well_done(line, kind, flags, structured):
    one = line(structured=structured)
    for offset in (0, 5, SIZE):
        assert one.error(request(kind, offset, 0, flags)) == 0
    assert one.error(request(kind, SIZE + 1, 0, flags)) == BEYOND[kind]


@pytest.mark.parametrize("offset_and_length", [(1, 0), (0, 1), (BLOCK, BLOCK)])
def test_flush_has_no_range(line, offset_and_length):
    assert line().error(Request(nbd.FLUSH, 1, *offset_and_length)) == nbd.EINVAL


@structured_or_not
def test_read_of_the_greatest_length_and_of_one_more(line, structured):
    one = line(MemoryDisk(bytes(READ_LIMIT + 1)), structured=structured)
    assert one.error(request(nbd.READ, 0, READ_LIMIT)) == 0
    assert one.error(Request(nbd.READ, 1, 0, READ_LIMIT + 1)) == nbd.EINVAL
    assert one.disk.count("views") == 1


# ------------------------------------------------------------------------------------------------ what may not be


@pytest.mark.parametrize("kind", [nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES])
@structured_or_not
def test_image_is_not_changed(line, kind, structured):
    one = line(writable=False, structured=structured)
    before = bytes(one.disk.content)
    for flags in (0, nbd.FUA):
        assert one.error(request(kind, flags=flags)) == nbd.EPERM
    assert one.disk.content == before


@pytest.mark.parametrize("flags", [0, nbd.FUA])
def test_image_is_flushed_without_ado(line, flags):
    one = line(writable=False)
    assert one.error(Request(nbd.FLUSH, 1, flags=flags)) == 0
    assert one.disk.count("flush") == 0


@pytest.mark.parametrize("kind", [8, 9, 255, 65535])
@pytest.mark.parametrize("flags", [0, nbd.FUA])
@structured_or_not
def test_unknown_command(line, kind, flags, structured):
    one = line(structured=structured)
    asked = [Request(kind, 1, flags=flags), request(nbd.READ, cookie=2)]
    assert [answer.error for answer in one.ask(*asked)] == [nbd.EINVAL, 0]


def test_error_has_a_message_where_replies_are_structured(line):
    assert "read-only" in line(writable=False).ask(request(nbd.WRITE))[0].message
    assert line(writable=False, structured=False).ask(request(nbd.WRITE))[0].message == ""


# ---------------------------------------------------------------------------------------------------------- READ


def noise(blocks: int) -> bytes:
    """Blocks of data and of zeros by chance."""
    dice = random.Random(blocks)
    return b"".join(dice.randbytes(BLOCK) if dice.random() < 0.5 else bytes(BLOCK) for _ in range(blocks))


@structured_or_not
@pytest.mark.parametrize("flags", [0, nbd.DF])
@pytest.mark.parametrize("writable", [True, False])
def test_reads_are_what_is_there(line, structured, flags, writable):
    content, dice = noise(64) + b"tail", random.Random(1)
    one = line(MemoryDisk(content), structured=structured, writable=writable)
    asked = []
    for cookie in range(200):
        offset = dice.randrange(len(content))
        length = dice.randint(0, min(len(content) - offset, dice.choice([10, BLOCK, 1 << 18])))
        asked.append(request(nbd.READ, offset, length, flags if structured else 0, cookie))
    answers = one.ask(*asked)
    assert [answer.request for answer in answers] == asked
    for answer in answers:
        assert answer.data == content[answer.request.offset :][: answer.request.length]


def test_holes_are_sent_as_holes(line):
    (answer,) = line().ask(request(nbd.READ, 100, SIZE - 150))
    assert answer.chunks == [
        (nbd.DATA, 100, BLOCK - 100),
        (nbd.HOLE, BLOCK, BLOCK),
        (nbd.DATA, 2 * BLOCK, BLOCK),
        (nbd.HOLE, 3 * BLOCK, BLOCK - 50),
    ]


def test_data_in_several_pieces_is_one_chunk(line):
    disk = MemoryDisk(b"x" * SIZE)
    assert len(disk.views(SIZE, 0)) == 4
    assert line(disk).ask(request(nbd.READ, 5, SIZE - 6))[0].chunks == [(nbd.DATA, 5, SIZE - 6)]


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (BLOCK, BLOCK), (BLOCK + 1, 5), (10, 20)])
def test_nothing_is_fragmented_where_the_client_says_so(line, offset, length):
    (answer,) = line().ask(request(nbd.READ, offset, length, nbd.DF))
    assert answer.chunks == [(nbd.DATA, offset, length)]


def test_hole_that_is_larger_than_what_zeros_are_kept_for(line):
    length = (1 << 20) + 77
    for structured, flags in [(True, nbd.DF), (False, 0)]:
        one = line(MemoryDisk(bytes(length)), structured=structured)
        assert one.ask(request(nbd.READ, 0, length, flags))[0].data == bytes(length)


@structured_or_not
def test_read_that_fails_is_answered_with_an_error_and_no_half_of_it(line, structured):
    one = line(structured=structured)
    damaged = BlockCorruptError(5, "its digest differs", name="desk", offset=0)
    one.disk.failures["views"] = damaged
    asked = [request(nbd.READ, cookie=1), request(nbd.WRITE, cookie=2), request(nbd.READ, cookie=3)]
    answers = one.ask(*asked)
    assert [(answer.request.cookie, answer.error) for answer in answers] == [(1, nbd.EIO), (2, 0), (3, nbd.EIO)]
    assert not any(answer.chunks or answer.data for answer in answers)


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (NoSpaceError("/srv/store"), nbd.ENOSPC),
        (ReadOnlyError("store"), nbd.EPERM),
        (InvalidError("no"), nbd.EINVAL),
        (ClosedError("closed"), nbd.ESHUTDOWN),
        (MemoryError(), nbd.ENOMEM),
        (OSError(5, "Input/output error"), nbd.EIO),
        (ZeroDivisionError("a bug"), nbd.EIO),
    ],
)
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (nbd.READ, "views"),
        (nbd.WRITE, "pwrite"),
        (nbd.TRIM, "zero"),
        (nbd.WRITE_ZEROES, "zero"),
        (nbd.CACHE, "prefetch"),
        (nbd.BLOCK_STATUS, "extents"),
    ],
)
def test_failures_of_the_disk_and_their_numbers(line, kind, method, failure, error):
    one = line(contexts=(1, 2))
    one.disk.failures[method] = failure
    assert one.error(request(kind)) == error
    del one.disk.failures[method]
    assert one.error(request(kind)) == 0


@pytest.mark.parametrize("number", [28, 122, 27], ids=["ENOSPC", "EDQUOT", "EFBIG"])
def test_full_disk_by_its_number(line, number):
    one = line()
    one.disk.failures["pwrite"] = OSError(number, "it is full")
    assert one.error(request(nbd.WRITE)) == nbd.ENOSPC


# --------------------------------------------------------------------------------------------------------- changes


@structured_or_not
def test_write_changes_its_range_and_nothing_else(line, structured):
    one = line(structured=structured)
    expected = bytearray(one.disk.content)
    expected[100:5100] = b"w" * 5000
    assert one.error(request(nbd.WRITE, 100, 5000)) == 0
    assert one.disk.content == expected


@pytest.mark.parametrize("kind", [nbd.TRIM, nbd.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, nbd.FUA])
def test_trim_and_write_zeroes_make_zeros(line, kind, flags):
    one = line()
    expected = bytearray(one.disk.content)
    expected[100:5100] = bytes(5000)
    assert one.error(request(kind, 100, 5000, flags)) == 0
    assert one.disk.content == expected


@pytest.mark.parametrize("flags", [nbd.NO_HOLE, nbd.FAST_ZERO, nbd.NO_HOLE | nbd.FAST_ZERO | nbd.FUA])
def test_write_zeroes_is_always_fast(line, flags):
    one = line()
    assert one.error(request(nbd.WRITE_ZEROES, 0, SIZE, flags)) == 0
    assert not any(one.disk.content)


def test_cache_asks_for_the_range_and_sends_nothing(line):
    one = line(writable=False)
    assert one.error(request(nbd.CACHE, 5, 1000)) == 0
    assert one.disk.calls == [("prefetch", 1000, 5)]


def test_requests_are_done_in_their_order(line):
    one = line()
    asked = []
    for cookie in range(0, 300, 3):
        asked += [
            nbd.write(0, cookie.to_bytes(8, "big"), cookie=cookie),
            Request(nbd.READ, cookie + 1, 0, 8),
            Request(nbd.WRITE_ZEROES, cookie + 2, 0, 8),
        ]
    answers = one.ask(*asked)
    assert [answer.request.cookie for answer in answers] == [one.cookie for one in asked]
    assert [answer.data for answer in answers[1::3]] == [number.to_bytes(8, "big") for number in range(0, 300, 3)]


# ------------------------------------------------------------------------------------------------------ the end


def test_client_that_leaves_is_not_answered(line):
    one = line()
    one.send(request(nbd.WRITE, 0, 10, cookie=1), Request(nbd.DISC, 2), request(nbd.WRITE, 50, 10, cookie=3))
    assert not one.stays
    assert [answer.request.cookie for answer in one.answers()] == [1]
    assert one.disk.content[:60] == b"w" * 10 + b"A" * 50


def test_what_was_asked_before_leaving_is_answered(line):
    one = line()
    one.send(request(nbd.WRITE, flags=nbd.FUA), Request(nbd.FLUSH, 2), Request(nbd.DISC, 3))
    one.end()
    assert {answer.request.cookie for answer in one.answers()} == {1, 2}


# ------------------------------------------------------------------------------------------------------- batches


def watched(one: Line) -> list[tuple[str, bool, int]]:
    """Each step of sending, whether the disk was held, and what had been sent before."""
    steps: list[tuple[str, bool, int]] = []

    def watch(step: str) -> None:
        steps.append((step, one.disk.held, len(one.channel.everything)))

    one.channel.watch = watch
    return steps


def test_replies_are_sent_in_batches_while_the_disk_is_held(line):
    one = line(MemoryDisk(b"x" * (1 << 20)), limits=Limits(batch_bytes=1 << 20))
    steps = watched(one)
    one.ask(*(request(nbd.READ, 0, 1 << 18, cookie=number) for number in range(20)))
    assert {(step, held) for step, held, _ in steps} == {("start", True)}
    before = [*(sent for _, _, sent in steps), len(one.channel.everything)]
    assert len(steps) == 4
    assert max(late - early for early, late in pairwise(before)) <= 6 << 18


def test_requests_that_take_long_are_several_batches(line):
    one = line(limits=Limits(batch_seconds=0.0))
    steps = watched(one)
    answers = one.ask(*(request(nbd.READ, number, 1, cookie=number) for number in range(20)))
    assert [answer.request.cookie for answer in answers] == list(range(20))
    assert len(steps) == 20


def test_client_that_was_dropped_is_done_nothing_more_for(line):
    one = line()
    one.channel.drop()
    with pytest.raises(ConnectionError):
        one.send(request(nbd.WRITE))
    assert one.disk.count("pwrite") == 0


def test_many_small_replies_are_several_batches(line):
    one = line()
    steps = watched(one)
    one.ask(*(request(nbd.READ, 0, 1, cookie=number) for number in range(1000)))
    assert len(steps) > 1


@pytest.mark.parametrize("at_once", [0, 1, 27, 5000])
@pytest.mark.parametrize("writable", [True, False])
def test_what_a_slow_client_leaves_is_sent_without_the_disk(line, at_once, writable):
    one = line(writable=writable)
    one.channel.at_once = at_once
    steps = watched(one)
    content = bytes(one.disk.content)
    (answer,) = one.ask(request(nbd.READ, 0, SIZE))
    assert answer.data == content
    assert [(step, held) for step, held, _ in steps] == [("start", True), ("finish", False)]


def test_what_a_slow_client_leaves_is_what_was_there_when_it_was_read(line):
    one = line()
    one.channel.at_once = 100
    content = bytes(one.disk.content)
    one.disk.views = lambda length, offset: [memoryview(one.disk.content)[offset : offset + length]]

    def change(step: str) -> None:
        if step == "finish":
            one.disk.content[:] = b"!" * SIZE

    one.channel.watch = change
    assert one.ask(request(nbd.READ, 0, SIZE))[0].data == content


def test_client_that_is_gone_ends_the_transmission(line):
    one = line()
    one.channel.broken = BrokenPipeError()
    with pytest.raises(BrokenPipeError):
        one.send(request(nbd.READ))
