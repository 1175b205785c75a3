"""FLUSH and FUA without a socket: answered when it is durable, not before, and by whom."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import pytest

from cowstore.errors import ClosedError, NoSpaceError, PoisonedError
from cowstore.nbd import Limits
from cowstore.nbd import Request as Incoming
from cowstore.nbd.exports import Export
from cowstore.nbd.flusher import Flusher
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_lines import Line, until
from tests.unit.nbd_memory import BLOCK, MemoryDisk
from tests.unit.nbd_messages import Request

changing = pytest.mark.parametrize("kind", [nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES])


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk(b"A" * 16 * BLOCK)


@pytest.fixture
def line(disk: MemoryDisk) -> Iterator[Line]:
    one = Line(disk)
    yield one
    disk.may_flush.set()
    disk.failures.clear()
    one.close()


def change(kind: int, cookie: int = 1, flags: int = nbd.FUA) -> Request:
    return Request(kind, cookie, 0, BLOCK, flags, b"w" * BLOCK if kind == nbd.WRITE else b"")


# ------------------------------------------------------------------------------------------- not before it is so


@changing
def test_fua_is_answered_after_the_flush_has_returned(line, disk, kind):
    disk.may_flush.clear()
    line.send(change(kind))
    assert disk.flushing.wait(60)
    assert line.answers() == []
    disk.may_flush.set()
    until(lambda: line.channel.late)
    assert [answer.error for answer in line.answers()] == [0]
    assert disk.durable == disk.content


@changing
def test_change_without_fua_is_answered_at_once(line, disk, kind):
    disk.may_flush.clear()
    line.send(change(kind, flags=0))
    assert len(line.answers()) == 1
    assert disk.count("flush") == 0


def test_flush_is_answered_after_it_has_returned(line, disk):
    disk.may_flush.clear()
    line.send(change(nbd.WRITE, 1, 0), Request(nbd.FLUSH, 2))
    assert [answer.request.cookie for answer in line.answers()] == [1]
    assert disk.flushing.wait(60)
    assert line.answers() == []
    disk.may_flush.set()
    until(lambda: line.channel.late)
    assert [answer.request.cookie for answer in line.answers()] == [2]


@pytest.mark.parametrize("kind", [nbd.READ, nbd.CACHE])
def test_fua_means_nothing_where_nothing_changes(line, disk, kind):
    assert line.error(Request(kind, 1, 0, 10, nbd.FUA)) == 0
    assert disk.count("flush") == 0


@pytest.mark.parametrize("last", [change(nbd.WRITE, 9), Request(nbd.FLUSH, 9)], ids=["fua", "flush"])
def test_flush_covers_what_was_answered_before(line, disk, last):
    for number in range(1, 9):
        assert line.error(nbd.write(number * BLOCK, bytes([number]) * BLOCK, cookie=number)) == 0
    assert line.error(last) == 0
    assert disk.durable == disk.content


def test_flush_that_runs_does_not_count_for_what_comes_meanwhile(line, disk):
    disk.may_flush.clear()
    line.send(Request(nbd.FLUSH, 1))
    assert disk.flushing.wait(60)
    line.send(*(change(nbd.WRITE, cookie) for cookie in range(2, 52)))
    disk.may_flush.set()
    until(lambda: len(line.channel.late) == 51)
    assert disk.count("flush") == 2
    assert disk.durable == disk.content


def test_other_requests_go_on_during_a_flush(line, disk):
    disk.may_flush.clear()
    line.send(Request(nbd.FLUSH, 1))
    assert disk.flushing.wait(60)
    line.send(Request(nbd.READ, 2, 0, 10), change(nbd.WRITE, 3, 0))
    assert [answer.request.cookie for answer in line.answers()] == [2, 3]


def test_flush_on_one_connection_covers_the_other(disk):
    export = Export(1, disk, writable=True)
    one, other = Line(export=export), Line(export=export)
    assert one.error(change(nbd.WRITE, 1, 0)) == 0
    assert other.error(Request(nbd.FLUSH, 1)) == 0
    assert disk.durable == disk.content
    one.close()
    other.close()


# ------------------------------------------------------------------------------------------------------ failures

FAILURES = [
    (NoSpaceError("/srv/store/segments"), nbd.ENOSPC, "no space left"),
    (PoisonedError("fsync said EIO"), nbd.EIO, "fsync said EIO"),
    (OSError(5, "Input/output error"), nbd.EIO, "Input/output error"),
    (ClosedError("closed"), nbd.ESHUTDOWN, "closed"),
    (ZeroDivisionError("a bug"), nbd.EIO, "a bug"),
]


@pytest.mark.parametrize(("failure", "error", "words"), FAILURES)
@pytest.mark.parametrize("structured", [True, False])
def test_flush_that_fails_is_told_to_everybody_who_waits(disk, failure, error, words, structured):
    line = Line(disk, structured=structured)
    disk.failures["flush"] = failure
    answers = line.ask(Request(nbd.FLUSH, 1), change(nbd.WRITE, 2), change(nbd.TRIM, 3))
    assert [answer.error for answer in answers] == [error] * 3
    assert all((words in answer.message) == structured for answer in answers)
    del disk.failures["flush"]
    assert line.error(Request(nbd.FLUSH, 4)) == 0
    assert line.metrics.sum().errors == 3
    line.close()


@pytest.mark.parametrize("failure", [PoisonedError("fsync said EIO"), OSError(5, "Input/output error")])
def test_disk_that_fails_is_logged(line, disk, caplog, failure):
    disk.failures["flush"] = failure
    assert line.error(Request(nbd.FLUSH, 1)) == nbd.EIO
    assert str(failure) in caplog.text


def test_full_disk_is_logged(line, disk, caplog):
    disk.failures["flush"] = NoSpaceError("/srv/store/segments")
    assert line.error(Request(nbd.FLUSH, 1)) == nbd.ENOSPC
    assert "no space left" in caplog.text


def test_client_that_is_gone_when_its_answer_comes_is_dropped(line, disk):
    disk.may_flush.clear()
    line.send(Request(nbd.FLUSH, 1), Request(nbd.FLUSH, 2))
    line.channel.broken = BrokenPipeError()
    disk.may_flush.set()
    until(lambda: line.channel.dropped == 2)


# -------------------------------------------------------------------------------------------------------- bounds


def test_further_flushes_wait_where_too_many_are_unanswered(disk):
    line = Line(disk, limits=Limits(flushes=3))
    disk.may_flush.clear()
    sender = threading.Thread(target=line.send, args=[Request(nbd.FLUSH, number) for number in range(4)])
    sender.start()
    assert disk.flushing.wait(60)
    sender.join(0.2)
    assert sender.is_alive()
    disk.may_flush.set()
    sender.join()
    until(lambda: len(line.channel.late) == 4)
    line.close()


def test_the_end_waits_for_every_answer(line, disk):
    disk.may_flush.clear()
    line.send(*(Request(nbd.FLUSH, number) for number in range(10)))
    threading.Timer(0.1, disk.may_flush.set).start()
    line.end()
    assert len(line.answers()) == 10


class Payload(bytearray):
    """What a client writes; unlike bytearray it can be referred to weakly."""


def test_what_was_written_is_not_kept_until_the_flush(line, disk):
    disk.may_flush.clear()
    kept = []
    for cookie in range(20):
        payload = Payload(BLOCK)
        kept.append(weakref.ref(payload))
        line.transmission.handle([Incoming(nbd.FUA, nbd.WRITE, cookie, 0, BLOCK, memoryview(payload))])
        del payload
    assert disk.flushing.wait(60)
    assert sum(one() is not None for one in kept) <= 2


def test_clone_whose_journal_grows_is_flushed_though_nobody_asks(disk):
    line = Line(disk, limits=Limits(journal_bytes=10 * BLOCK))
    for cookie in range(10):
        assert line.error(change(nbd.WRITE, cookie, 0)) == 0
    assert disk.count("flush") == 0
    disk.may_flush.clear()
    for cookie in range(10, 30):
        assert line.error(change(nbd.WRITE, cookie, 0)) == 0
    disk.may_flush.set()
    until(lambda: disk.count("flush"))
    line.close()
    assert disk.count("flush") <= 3  # and not one for each write that came while it ran
    assert line.channel.late == []


def test_flush_that_nobody_asked_for_and_that_fails_is_logged_and_tried_again(disk, caplog):
    line = Line(disk, limits=Limits(journal_bytes=BLOCK))
    disk.failures["flush"] = NoSpaceError("/srv/store")
    for cookie in range(3):
        assert line.error(change(nbd.WRITE, cookie, 0)) == 0
        disk.journal_size = 2 * BLOCK
    until(lambda: "no space left" in caplog.text)
    del disk.failures["flush"]
    tried = disk.count("flush")
    until(lambda: line.error(change(nbd.WRITE, 9, 0)) == 0 and disk.count("flush") > tried)
    line.close()


# ------------------------------------------------------------------------------------------------------ flushers


def test_flusher_has_no_thread_before_it_is_asked_and_none_after_its_end():
    Flusher(lambda: None).close()
    before = set(threading.enumerate())
    flusher = Flusher(lambda: None)
    assert set(threading.enumerate()) == before
    told: list[object] = []
    flusher.ask(told.append)
    (thread,) = set(threading.enumerate()) - before
    flusher.close()
    assert told == [None]
    assert not thread.is_alive()


def test_flusher_answers_everything_before_it_ends():
    told: list[object] = []
    flusher = Flusher(lambda: None)
    for _ in range(100):
        flusher.ask(told.append)
    flusher.close()
    assert told == [None] * 100


def test_flusher_that_is_asked_after_its_end_says_so():
    told: list[object] = []
    flusher = Flusher(lambda: None)
    flusher.close()
    flusher.ask(told.append)
    flusher.close()
    assert [type(one) for one in told] == [ClosedError]


def test_many_ask_at_the_same_time_and_each_is_answered_by_a_flush_that_began_later():
    begun, wrong = [0], []

    def flush() -> None:
        begun[0] += 1

    flusher = Flusher(flush)

    def ask() -> None:
        for _ in range(200):
            before, done = begun[0], threading.Event()
            flusher.ask(lambda failure, done=done: done.set())  # type: ignore[misc]
            assert done.wait(60)
            if begun[0] == before:
                wrong.append(before)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flusher.close()
    assert not wrong


# ------------------------------------------------------------------------------------------------- the journal


def test_what_a_batch_writes_is_recorded_before_it_is_answered(line, disk):
    seen = []
    disk.on_record = lambda: seen.append((disk.count("pwrite"), bytes(line.channel.everything)))
    line.send(change(nbd.WRITE, 1, flags=0), change(nbd.WRITE, 2, flags=0))
    assert seen == [(2, b"")]
    assert [answer.error for answer in line.answers()] == [0, 0]


def test_where_they_cannot_be_recorded_together_each_has_its_own_answer(line, disk):
    """They are done again, one by one; what was to be answered before is forgotten."""
    disk.failures["record"] = NoSpaceError("/srv/store/journals")
    line.send(change(nbd.WRITE, 1, flags=0), Request(nbd.READ, 2, 0, BLOCK), change(nbd.TRIM, 3, flags=0))
    assert len(line.answers()) == 3
    assert disk.count("pwrite") == 2
    assert disk.deferred is False


@pytest.mark.parametrize("structured", [True, False])
def test_changes_that_cannot_be_recorded_together_are_done_one_by_one(disk, structured):
    """Each request is answered once; those for which there is room succeed."""
    line = Line(disk, structured=structured)
    disk.failures["record"] = NoSpaceError("/srv/store/journals")
    write, failures = disk.pwrite, disk.failures

    def write_alone(data: bytes, offset: int) -> int:
        if not disk.deferred and offset >= 8 * BLOCK:
            raise NoSpaceError("/srv/store/journals")
        return write(data, offset)

    disk.pwrite = write_alone
    asked = [nbd.write(number * BLOCK, b"w" * BLOCK, cookie=number) for number in range(16)]
    asked += [Request(nbd.READ, 20, 0, BLOCK), change(nbd.TRIM, 21), Request(nbd.FLUSH, 22)]
    answers = line.ask(*asked)
    assert [answer.request.cookie for answer in answers] == [*range(16), 20, 21, 22]
    assert [answer.error for answer in answers[:16]] == [0] * 8 + [nbd.ENOSPC] * 8
    assert [answer.error for answer in answers[16:]] == [0, 0, 0]
    assert answers[16].data == b"w" * BLOCK
    failures.clear()
    line.close()


def test_what_is_done_again_is_counted_once(line, disk):
    disk.failures["record"] = NoSpaceError("/srv/store/journals")
    line.ask(change(nbd.WRITE, 1, 0), Request(nbd.READ, 2, 0, 10), Request(nbd.READ, 3, 1 << 40, 10))
    total = line.metrics.sum()
    assert (total.requests[nbd.WRITE], total.requests[nbd.READ], total.errors) == (1, 2, 1)
    assert (total.written_bytes, total.read_bytes) == (BLOCK, 10)
