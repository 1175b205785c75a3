"""Calls that fail: at every place, once or for ever, with an error of the disk or for want of space.

Nothing that returned is lost, nothing that failed is claimed later, every error is one of the store's own, and
once there is room again what failed can be done.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import cowstore
from cowstore.errors import NoSpaceError, PoisonedError, StoreError
from cowstore.files import Disk
from cowstore.gate import WriteGate
from cowstore.segments import Segments

from .checking import BrokenPromiseError, difference
from .driver import Driver
from .hunting import DEEP, record
from .model import BLOCK
from .recording import Fault, Recorder, RecordingFile, recorded, replaced

Step = Callable[[Driver], object]
KINDS = ("write", "sync", "create", "rename", "directory sync", "allocate", "punch", "commit", "committed")
FLUSHING = ("write", "sync")  # kinds that fail before a flush's transaction, so that it certainly did nothing
SAMPLES = 10_000 if DEEP else 9  # places at which each kind of call fails

# What is done while calls fail, with the devices that it needs; one in capitals must be open.
STEPS: list[tuple[str, Step]] = [
    ("", lambda d: d.import_image("image", d.content(60 * BLOCK))),
    ("image", lambda d: d.clone("image", "a")),
    ("A", lambda d: d.write("a", d.blocks(20), 5 * BLOCK)),
    ("A", lambda d: d.flush("a")),
    ("A", lambda d: d.write("a", d.blocks(3), 0)),
    ("A", lambda d: d.flush("a")),
    ("A", lambda d: d.fork("a", ["b", "c"])),
    ("A", lambda d: d.write("a", d.blocks(30), 20 * BLOCK)),
    ("A", lambda d: d.flush("a")),
    ("", lambda d: d.create("e", 700 * BLOCK)),
    ("E", lambda d: d.write("e", d.blocks(9), 600 * BLOCK)),
    ("E", lambda d: d.flush("e")),
    ("E", lambda d: d.reset("e")),
    ("b c", lambda d: d.delete("b", "c")),
    ("", lambda d: d.collect()),
    ("A", lambda d: d.write("a", d.blocks(12), 40 * BLOCK)),
    ("A", lambda d: d.flush("a")),
    ("A", lambda d: d.seal("a", "sealed")),
    ("E", lambda d: d.write("e", d.blocks(2), 0)),
    ("E", lambda d: d.flush("e")),
    ("A", lambda d: d.close("a")),
]


def possible(driver: Driver, needs: str) -> bool:
    return all(name.lower() in (driver.hands if name.isupper() else driver.shelf) for name in needs.split())


def calls_of(place: Path, kind: str) -> int:
    """How many calls of a kind there are where none fails."""
    counter = Fault(frozenset([kind]), 1 << 60, 0)

    def workload(driver: Driver) -> None:
        driver.found()
        driver.recorder.fault = counter
        for _, step in STEPS:
            step(driver)
        driver.recorder.fault = None

    record(place, workload, 1)
    return counter.seen


def go_on_regardless(driver: Driver, fault: Fault) -> None:
    """All steps, whatever fails, and nothing is claimed by a clone once it is poisoned."""
    driver.found()
    driver.recorder.fault = fault
    poisoned = False
    for needs, step in STEPS:
        if not possible(driver, needs):
            continue
        before = {name: model.moment() for name, (_, model) in driver.hands.items()}
        flushed = {name: shelf.flushed for name, shelf in driver.shelf.items()}
        try:
            step(driver)
        except PoisonedError:
            poisoned = True
        except StoreError:
            pass
        else:
            claimed = [
                name for name, moment in before.items()
                if moment.blocks != flushed[name].blocks and driver.shelf[name].flushed is not flushed[name]
            ]  # fmt: skip
            if poisoned and claimed:
                raise BrokenPromiseError(f"a flush of {claimed} succeeded after one had failed")


def try_again(driver: Driver, fault: Fault) -> None:
    """All steps; what fails for want of space is done again when there is some."""
    driver.found()
    driver.recorder.fault = fault
    for _, step in STEPS:
        try:
            step(driver)
        except NoSpaceError:
            driver.recorder.fault = None
            step(driver)
    driver.recorder.fault = None
    for name, (clone, model) in driver.hands.items():
        assert not difference(clone, model.moment()), name
    driver.close_store()


def search(arena: Path, kind: str, code: int, workload: Callable[[Driver, Fault], None], *, lasting: bool) -> int:
    """Has each of some calls of a kind fail, and checks what the disk holds then; returns how many worlds."""
    calls = calls_of(arena / "live", kind)
    places = random.Random(kind).sample(range(1, calls + 1), min(SAMPLES, calls))
    worlds = 0
    for nth in places:
        place = arena / f"{kind}-{nth}"
        place.mkdir()
        fault = Fault(frozenset([kind]), nth, code, lasting=lasting)

        def failing(driver: Driver, fault: Fault = fault) -> None:
            driver.sure = kind in FLUSHING
            workload(driver, fault)

        try:
            recording = record(place / "live", failing, 1)
            assert fault.hits
            end = len(recording.recorder.log)
            worlds += recording.crash(place, sorted({end, *recording.points(2, "fault")}), 2)
        except Exception as error:
            error.add_note(f"the {nth}th {kind} failed{' for ever' if lasting else ''}")
            raise
    print(f"{worlds} worlds")
    return worlds


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for-ever"])
@pytest.mark.parametrize("kind", KINDS)
def test_error_of_the_disk(arena, kind, lasting):
    search(arena, kind, errno.EIO, go_on_regardless, lasting=lasting)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "until-there-is-room"])
@pytest.mark.parametrize("kind", ["write", "create", "allocate", "commit"])
def test_full_disk(arena, kind, lasting):
    search(arena, kind, errno.ENOSPC, try_again, lasting=lasting)


def test_swallowed_sync_error_would_be_found(arena):
    def careless(self: Segments, numbers: list[int]) -> None:
        for number in numbers:
            try:
                self.get(number).file.sync()
            except OSError:
                pass

    with replaced((Segments, "sync", careless)), pytest.raises(BrokenPromiseError):
        search(arena, "sync", errno.EIO, go_on_regardless, lasting=False)


def test_repeated_sync_would_be_found(arena):
    sync = RecordingFile.sync

    def stubborn(self: RecordingFile) -> None:
        try:
            sync(self)
        except OSError:
            sync(self)

    with replaced((RecordingFile, "sync", stubborn)), pytest.raises(BrokenPromiseError):
        search(arena, "sync", errno.EIO, go_on_regardless, lasting=False)


@pytest.fixture
def recorder(arena):
    return Recorder(arena)


@pytest.fixture
def store(arena, recorder):
    with recorded(recorder) as disk, cowstore.open(arena / "store", create=True, _disk=disk) as store:
        yield store
        recorder.fault = None


def fails_once(recorder: Recorder, kind: str) -> None:
    recorder.fault = Fault(frozenset([kind]), 1, errno.ENOSPC)


def test_write_lock_is_given_up_on_a_full_disk(arena, store, recorder):
    """Its holder is noted in it for people; that there is no room for that keeps nobody from anything."""
    recorder.fault = Fault(frozenset(["write"]), 1, errno.ENOSPC, lasting=True)
    store.create("a", BLOCK).close()
    with WriteGate(Disk(), arena / "store" / "leases" / "writer", timeout=0.2).held():
        pass


def test_lease_is_tried_again(store, recorder):
    fails_once(recorder, "commit")
    with pytest.raises(NoSpaceError):
        _ = store._engine.reservations.lease_number
    assert store._engine.reservations.lease_number > 0


def test_sequence_numbers_are_ours_before_they_are_used(store, recorder):
    reservations = store._engine.reservations
    fails_once(recorder, "commit")
    with pytest.raises(NoSpaceError):
        reservations.sequence(0)
    number = reservations.sequence(0)
    with store._environment.read() as snapshot:
        assert number <= snapshot.state.sequence


def test_device_that_cannot_be_opened_is_not_made(store, recorder):
    store.create("parent", BLOCK).close()
    for make in (partial(store.create, "a", BLOCK), partial(store.clone, "parent", "a")):
        fails_once(recorder, "create")
        with pytest.raises(NoSpaceError):
            make()
        assert [info.name for info in store.devices()] == ["parent"]


def test_sync_beside_one_that_fails_is_no_success(store, monkeypatch):
    """The kernel tells one caller of the failure. The other, who is told nothing, must not succeed before him."""
    with store.create("a", BLOCK) as clone:
        clone.pwrite(b"x", 0)
    (number, *_) = store._engine.segments.opened
    told, second_done = threading.Event(), threading.Event()

    def sync(_file: RecordingFile) -> None:
        if not told.is_set():
            told.set()
            second_done.wait(0.3)
            raise OSError(errno.EIO, "told once")

    monkeypatch.setattr(RecordingFile, "sync", sync)
    outcomes: list[str] = []

    def attempt() -> None:
        try:
            store._engine.segments.sync([number])
            outcomes.append("success")
            second_done.set()
        except PoisonedError:
            outcomes.append("poisoned")

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    threads[0].start()
    assert told.wait(5)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert outcomes == ["poisoned", "poisoned"]
