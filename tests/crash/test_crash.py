"""Crashes at every kind of place, in every manner: nothing flushed is lost, nothing dangles, nothing comes back.

`COWSTORE_CRASH_SECONDS=600` has each of these tests go on with other seeds for so long. What a failure says is
enough to do it again: the seed, the place in the log and the manner.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import cowstore
from cowstore.environment import LEASES

from .checking import check_world, compare
from .driver import Driver
from .hunting import SECONDS, STORE, Recording, hunt, record, run, seeds
from .model import BLOCK, Book, Shelf
from .recording import Recorder, recorded
from .surroundings import LAST_BOOT, LATER_BOOT, booted, small
from .workloads import story, walk
from .worlds import MANNERS, History

pytestmark = pytest.mark.timeout(900 + SECONDS)


def test_story(arena):
    worlds = sum(hunt(arena, story, seed, points=70, manners_each=3) for seed in seeds(1))
    print(f"{worlds} worlds")


def test_walks(arena):
    workload = partial(walk, steps=60)
    worlds = sum(hunt(arena, workload, seed, points=14, manners_each=3) for seed in seeds(*range(10)))
    print(f"{worlds} worlds")


def test_threads(arena):
    """Flushes that share a sync, forks, imports and collections, all at once."""
    worlds = sum(hunt(arena, together, seed, points=40, manners_each=3, threads=True) for seed in seeds(1, 2))
    print(f"{worlds} worlds")


def together(driver: Driver) -> None:
    driver.found()
    driver.import_image("image", driver.content(80 * BLOCK))
    errors: list[BaseException] = []

    def safely(work: Callable[[Driver], None], hands: Driver) -> None:
        try:
            work(hands)
        except BaseException as error:  # noqa: BLE001 - raised again by the main thread
            errors.append(error)

    everybody = [(writing, f"w{number}") for number in range(3)] + [(importing, "i"), (collecting, "c")]
    threads = []
    for work, name in everybody:
        hands = driver.companion()
        threads.append(threading.Thread(target=safely, args=(work, hands), name=name))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    driver.close_store()


def writing(driver: Driver) -> None:
    d, name = driver, threading.current_thread().name
    d.clone("image", name)
    for number in range(8):
        d.write(name, d.blocks(d.rng.randint(1, 9)), d.rng.randrange(60) * BLOCK)
        d.flush(name)
        if number == 4:
            d.fork(name, [f"{name}-child"])
            d.delete(f"{name}-child")
    d.look(name)
    d.write(name, d.blocks(3), 0)
    d.discard(name)


def importing(driver: Driver) -> None:
    for number in range(4):
        driver.import_image(f"i{number}", driver.content(50 * BLOCK + 3))
        if number % 2:
            driver.delete(f"i{number}")


def collecting(driver: Driver) -> None:
    for _ in range(4):
        driver.collect()


def test_crash_while_recovering(arena):
    """The world that a crash has left is opened, collected and written to, and crashes once more."""
    worlds = 0
    for seed in seeds(3):
        place = arena / f"seed-{seed}"
        place.mkdir()
        first = record(place / "live", story, seed)
        history = History(first.recorder.log, first.recorder.hints)
        for at in sorted(first.points(10, "recovering")):
            history.advance(at)
            worlds += crash_again(place / f"at-{at}", first, history, at)
        shutil.rmtree(place)
    print(f"{worlds} worlds")


def crash_again(place: Path, first: Recording, history: History, at: int) -> int:
    dice = random.Random(f"{first.seed} {at} again")
    manner = dice.choice([manner for manner in MANNERS if manner.power])
    place.mkdir()
    history.make(place / "live", manner, dice)
    if not (place / "live" / STORE / "store.json").exists():
        return 0
    recorder = Recorder(place / "live")
    recorder.adopt()
    start = len(recorder.log)
    book = Book(recorder)
    book.littered = manner.garbage
    with booted(LATER_BOOT), small(dice), recorded(recorder) as disk:
        run(partial(recover, first=first, at=at), Driver(place / "live" / STORE, disk, book, dice))
    second = Recording(recorder, book, first.seed, start, (LATER_BOOT, LAST_BOOT))
    return second.crash(place, second.points(6), 3)


def recover(driver: Driver, first: Recording, at: int) -> None:
    driver.open_store()
    driver.book.founded = 0
    promises = {}
    for name in first.book.names():
        fates = first.book.allowed(name, at)
        promises[name] = [None if fate is not None and fate.ephemeral else fate for fate in fates]
    for name, fate in compare(driver.store, promises).items():
        driver.book.known(name, fate)
        if fate is not None:
            driver.shelf[name] = Shelf(fate, fate, driver.store.info(name).kind)
    driver.collect()
    driver.create("afterwards-too", 90 * BLOCK)
    driver.write("afterwards-too", driver.blocks(12), 3 * BLOCK)
    driver.flush("afterwards-too")
    driver.collect()
    driver.close_store()


def test_length_of_the_catalog(arena):
    """LMDB leaves last pages unwritten that nothing uses. A crash right after such a commit loses no catalog."""

    def churning(driver: Driver) -> None:
        driver.found()
        driver.create("a", 9 * BLOCK)
        for number in range(40):
            with driver.store._environment.write() as writer:
                for _ in range(driver.rng.randint(1, 4)):
                    key = b"%08d" % driver.rng.randrange(4)
                    writer.put(LEASES, key, driver.rng.randbytes(driver.rng.randrange(100, 30_000)))
                for unit in range(4):
                    writer.delete(LEASES, b"%08d" % unit)
            driver.write("a", driver.blocks(1), number % 9 * BLOCK)
            driver.flush("a")

    print(f"{hunt(arena, churning, 1, points=90, manners_each=1)} worlds")


def test_names_and_content_of_a_world(arena):
    """The harness itself: what a world must hold, and that it is a store at all."""
    recording = record(arena / "live", story, 2)
    end = len(recording.recorder.log)
    history = History(recording.recorder.log, recording.recorder.hints)
    history.advance(end)
    for manner in MANNERS[1:4]:
        world = arena / manner.name
        history.make(world, manner, random.Random(0))
        with booted(LATER_BOOT):
            found = check_world(world, STORE, recording.book, end, manner, random.Random(0))
        assert {"a", "golden", "kept", "large", "m2", "taker"} <= {name for name in found if found[name]}
        assert found["gone"] is None
        assert "debian" in found
        assert found["debian"] is None
        with cowstore.open(world / "copy", readonly=True) as backup:
            assert "golden" in [info.name for info in backup.devices()]


def test_index_of_a_world_is_one_that_is_used(arena):
    """The harness itself: what it keeps or scrambles is not thrown away unread."""
    recording = record(arena / "live", story, 2)
    end = len(recording.recorder.log)
    history = History(recording.recorder.log, recording.recorder.hints)
    history.advance(end)
    entries = {}
    for manner in MANNERS:
        world = arena / str(MANNERS.index(manner))
        history.make(world, manner, random.Random(0))
        with booted(LATER_BOOT), cowstore.open(world / STORE) as store:
            entries[manner.index] = len(store._engine.index)
    assert entries.pop("gone") == 0
    assert len(entries) == 3
    assert min(entries.values()) > 20
