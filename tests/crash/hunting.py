"""Records a workload and crashes it: at sampled operations, in several manners, each world opened and checked."""

from __future__ import annotations

import math
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cowstore.errors import StoreError

from .checking import BrokenPromiseError, Found, check_world
from .driver import Driver
from .model import Book
from .recording import DirectorySynced, Recorder, Renamed, recorded
from .surroundings import FIRST_BOOT, LATER_BOOT, booted, small
from .worlds import MANNERS, History, Manner

STORE = "store"
SECONDS = float(os.environ.get("COWSTORE_CRASH_SECONDS") or 0)  # how long each hunt goes on, with other seeds
DEEP = SECONDS > 0
Workload = Callable[[Driver], None]


class Recording:
    """A workload that was done once.

    Attributes:
        start: From where on in the log a crash makes sense.
        boots: The host's boot, and the one after a loss of power.
    """

    def __init__(
        self,
        recorder: Recorder,
        book: Book,
        seed: int,
        start: int = 0,
        boots: tuple[bytes, bytes] = (FIRST_BOOT, LATER_BOOT),
    ) -> None:
        self.recorder = recorder
        self.book = book
        self.seed = seed
        self.start = start
        self.boots = boots
        book.copied = min(book.copied, self._first_copy())

    def _first_copy(self) -> float:
        """Where in the log the first copy of the catalog got its name for good."""
        named = -1
        for position, operation in enumerate(self.recorder.log):
            if isinstance(operation, Renamed) and operation.name in ("catalog.copy.0", "catalog.copy.1"):
                named = operation.directory
            elif isinstance(operation, DirectorySynced) and operation.directory == named:
                return position + 1
        return math.inf

    def crash(self, top: Path, points: Sequence[int], manners_each: int) -> int:
        """Checks worlds of these points; returns how many.

        Raises:
            BrokenPromiseError: In one of them the store broke a promise. The message says which.
        """
        history = History(self.recorder.log, self.recorder.hints)
        worlds = 0
        for at in sorted(points):
            history.advance(at)
            dice = random.Random(f"{self.seed} {at}")
            for manner in dice.sample(MANNERS, manners_each):
                with self.world(history, top, at, manner, dice) as (world, _):
                    shutil.rmtree(world)
                worlds += 1
        return worlds

    @contextmanager
    def world(
        self, history: History, top: Path, at: int, manner: Manner, dice: random.Random
    ) -> Iterator[tuple[Path, Found]]:
        """One crashed world, checked."""
        world = top / f"{at}-{MANNERS.index(manner)}"
        history.make(world, manner, dice)
        try:
            with booted(self.boots[manner.power]):
                found = check_world(world, STORE, self.book, at, manner, dice)
        except (StoreError, BrokenPromiseError, AssertionError, OSError) as error:
            shutil.rmtree(world)
            raise BrokenPromiseError(self._told(at, manner, error)) from error
        yield world, found

    def _told(self, at: int, manner: Manner, error: BaseException) -> str:
        last = [f"  {position}: {_short(self.recorder.log[position])}" for position in range(max(at - 6, 0), at)]
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return "\n".join(
            [
                f"seed {self.seed}, crash after {at} of {len(self.recorder.log)} operations, {manner.name}:",
                f"{type(error).__name__}: {error} ({Path(frame.filename).name}, {frame.name})",
                "the last operations:",
                *last,
            ]
        )

    def points(self, count: int, salt: object = "") -> list[int]:
        """Crash points by dice; all there are, if they are fewer."""
        everything = range(self.start, len(self.recorder.log) + 1)
        return random.Random(f"{self.seed} {salt}").sample(everything, min(count, len(everything)))


def _short(operation: object) -> str:
    text = repr(operation)
    return text if len(text) < 110 else f"{text[:100]}..."


def record(top: Path, workload: Workload, seed: int, *, threads: bool = False) -> Recording:
    """Does a workload on a new store below a directory."""
    top.mkdir()
    rng = random.Random(seed)
    recorder = Recorder(top)
    book = Book(recorder)
    with booted(FIRST_BOOT), small(rng, threads=threads), recorded(recorder) as disk:
        run(workload, Driver(top / STORE, disk, book, rng))
    return Recording(recorder, book, seed)


def run(workload: Workload, driver: Driver) -> None:
    try:
        workload(driver)
    finally:
        driver.give_up()


def hunt(
    top: Path, workload: Workload, seed: int, points: int, manners_each: int, *, threads: bool = False
) -> int:
    """Records a workload and checks worlds of it; returns how many."""
    place = top / f"seed-{seed}"
    place.mkdir()
    recording = record(place / "live", workload, seed, threads=threads)
    worlds = recording.crash(place, recording.points(points), manners_each)
    shutil.rmtree(place)
    return worlds


def seeds(*first: int) -> Iterator[int]:
    """These seeds; with COWSTORE_CRASH_SECONDS, others until they are over."""
    deadline = time.monotonic() + SECONDS
    yield from first
    seed = random.randrange(1 << 30)  # a message about what was found names it
    while time.monotonic() < deadline:
        yield seed
        seed += 1
