"""BLOCK_STATUS without a socket: extents of both metadata contexts, merged and bounded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cowstore.nbd import CONTEXTS, Limits
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_lines import Line
from tests.unit.nbd_memory import BLOCK, MemoryDisk
from tests.unit.nbd_messages import Request

ALLOCATION, OWN = CONTEXTS["base:allocation"], CONTEXTS["cowstore:own"]
BOTH = (ALLOCATION, OWN)
DATA, HOLE = 0, 3
COUNT = 64


def disk() -> MemoryDisk:
    """Blocks in groups of four: inherited data, own data, own zeros, inherited zeros."""
    made = MemoryDisk((b"x" * 2 * BLOCK + bytes(2 * BLOCK)) * (COUNT // 4))
    for group in range(0, COUNT, 4):
        made.pwrite(b"y" * BLOCK, (group + 1) * BLOCK)
        made.zero(BLOCK, (group + 2) * BLOCK)
    return made


@pytest.fixture
def line() -> Iterator[Line]:
    one = Line(disk(), contexts=BOTH)
    yield one
    one.close()


def status(line: Line, offset: int, length: int, flags: int = 0) -> dict[int, list[tuple[int, int]]]:
    (answer,) = line.ask(Request(nbd.BLOCK_STATUS, 1, offset, length, flags))
    assert not answer.error
    return answer.extents


def test_both_contexts_in_one_answer_each_merged_on_its_own(line):
    assert status(line, 0, 8 * BLOCK) == {
        ALLOCATION: [(2 * BLOCK, DATA), (2 * BLOCK, HOLE)] * 2,
        OWN: [(BLOCK, 0), (2 * BLOCK, 1), (2 * BLOCK, 0), (2 * BLOCK, 1), (BLOCK, 0)],
    }


def test_range_that_is_not_aligned(line):
    assert status(line, BLOCK + 5, BLOCK + 10) == {
        ALLOCATION: [(BLOCK - 5, DATA), (15, HOLE)],
        OWN: [(BLOCK + 10, 1)],
    }


@pytest.mark.parametrize("context", BOTH)
def test_only_what_was_selected(context):
    line = Line(disk(), contexts=(context,))
    assert status(line, 0, COUNT * BLOCK).keys() == {context}
    line.close()


@pytest.mark.parametrize("offset", [0, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, (COUNT - 1) * BLOCK])
@pytest.mark.parametrize("length", [1, BLOCK, 3 * BLOCK + 1, COUNT * BLOCK])
def test_one_extent_within_the_range_where_one_is_asked_for(line, offset, length):
    length = min(length, COUNT * BLOCK - offset)
    found = status(line, offset, length, nbd.REQ_ONE)  # the client holds it against the specification
    whole = status(line, offset, length)
    for context in BOTH:
        assert found[context][0][1] == whole[context][0][1]
        assert found[context][0][0] <= whole[context][0][0]


def contents(extents: list[tuple[int, int]], offset: int) -> list[int]:
    """The status of each block that is covered as a whole."""
    assert offset % BLOCK == 0
    return [flags for length, flags in extents for _ in range(length // BLOCK)]


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_more_extents_than_an_answer_holds(most):
    """A client that asks on from where each answer ends sees everything, in either context."""
    line = Line(disk(), contexts=BOTH, limits=Limits(extents=most))
    for context in BOTH:
        seen: list[int] = []
        while len(seen) < COUNT:
            extents = status(line, len(seen) * BLOCK, (COUNT - len(seen)) * BLOCK)
            assert all(len(one) <= most for one in extents.values())
            seen += contents(extents[context], 0)
        kinds = {ALLOCATION: [DATA, DATA, HOLE, HOLE], OWN: [0, 1, 1, 0]}
        assert seen == kinds[context] * (COUNT // 4)
    line.close()


def test_default_bound_of_an_answer():
    line = Line(MemoryDisk((b"x" * BLOCK + bytes(BLOCK)) * 5000), contexts=(ALLOCATION,))
    assert len(status(line, 0, 10_000 * BLOCK)[ALLOCATION]) == 8192
    line.close()


def test_many_answers_are_sent_in_batches():
    line = Line(MemoryDisk((b"x" * BLOCK + bytes(BLOCK)) * 500), contexts=BOTH, limits=Limits(batch_bytes=20_000))
    starts: list[str] = []
    line.channel.watch = starts.append
    answers = line.ask(*(Request(nbd.BLOCK_STATUS, number, 0, 1000 * BLOCK) for number in range(20)))
    assert len(answers) == 20
    assert len(starts) >= 5
    line.close()


@pytest.mark.parametrize("structured", [True, False])
def test_nothing_was_selected(structured):
    line = Line(structured=structured)
    assert line.error(Request(nbd.BLOCK_STATUS, 1, 0, BLOCK)) == nbd.EINVAL
    line.close()


@pytest.mark.parametrize("offset", [0, BLOCK, COUNT * BLOCK])
def test_no_range_is_given(line, offset):
    assert line.error(Request(nbd.BLOCK_STATUS, 1, offset, 0)) == nbd.EINVAL
