"""What is done to a store while it is recorded: a story that meets everything once, and walks by dice.

The driver does each thing twice, to the store and to plain bytes, and writes down in the book what is promised
from when on.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cowstore
from cowstore import backup, catalog, clones, collector, draft, founding, imports, index, reservations, sources
from cowstore.clones import Clone
from cowstore.reservations import Reservations
from cowstore.segments import Segments

from .model import BLOCK, ZERO, Book, Model, Moment, Shelf
from .recording import RecordingDisk

MIB = 1 << 20
FIRST_BOOT, LATER_BOOT = b"A" * 16, b"B" * 16


class Driver:
    """One process's hands on one store, and the model beside it."""

    def __init__(self, path: Path, disk: RecordingDisk, book: Book, rng: random.Random) -> None:
        self.path = path
        self.recorder = disk.recorder
        self.book = book
        self.rng = rng
        self.shelf: dict[str, Shelf] = {}
        self.hands: dict[str, tuple[Clone, Model]] = {}
        self._disk = disk
        self._store: cowstore.Store | None = None
        self.sure = False  # whether a flush that fails is known to have changed nothing
        self._names = 0
        self._pool = [rng.randbytes(BLOCK) for _ in range(24)]

    @property
    def store(self) -> cowstore.Store:
        assert self._store is not None
        return self._store

    # What to write.

    def fresh_name(self, kind: str = "d") -> str:
        self._names += 1
        return f"{kind}{self._names}"

    def blocks(self, count: int) -> bytes:
        """Blocks of which some are known from elsewhere, some new, some zero."""
        dice = self.rng
        kinds = dice.choices("knz", (5, 4, 1), k=count)
        known = {"k": lambda: dice.choice(self._pool), "n": lambda: dice.randbytes(BLOCK), "z": lambda: ZERO}
        return b"".join(known[kind]() for kind in kinds)

    def content(self, size: int) -> Moment:
        """A disk with data here and there."""
        model = Model(Moment(size, {}))
        for _ in range(self.rng.randint(1, 5)):
            start = self.rng.randrange(-(-size // BLOCK)) * BLOCK
            model.write(self.blocks(self.rng.randint(1, 40))[: size - start], start)
        return model.moment()

    # The store.

    def found(self) -> None:
        self._store = cowstore.open(self.path, create=True, _disk=self._disk)
        self.book.founded = self.book.now

    def open_store(self) -> None:
        self._store = cowstore.open(self.path, _disk=self._disk)

    def close_store(self) -> None:
        """Closes it with its open clones, which flushes them."""
        after = {name: model.moment() for name, (_, model) in self.hands.items()}
        with self.book.change(after):
            store, self._store = self.store, None
            store.close()
        for name, moment in after.items():
            self.shelf[name].flushed = moment
        self.hands.clear()

    def reopen(self) -> None:
        self.close_store()
        self.open_store()

    def give_up(self) -> None:
        """Ends everything, whatever state it is in."""
        for clone, _ in self.hands.values():
            with suppress(cowstore.StoreError, OSError):
                clone.discard()
        store, self._store = self._store, None
        if store is not None:
            with suppress(cowstore.StoreError, OSError):
                store.close()

    # Devices.

    def import_image(self, name: str, moment: Moment) -> None:
        with self.book.change({name: moment}):
            self.store.import_image(io.BytesIO(moment.bytes()), name)
        self.shelf[name] = Shelf(moment, moment, "image")

    def create(self, name: str, size: int) -> None:
        blank = Moment(size, {})
        with self.book.change({name: blank}):
            clone = self.store.create(name, size)
        self.shelf[name] = Shelf(blank, blank, "clone")
        self.hands[name] = clone, Model(blank)

    def clone(self, parent: str, name: str, *, ephemeral: bool = False, size: int | None = None) -> None:
        base = self.shelf[parent].flushed
        base = replace(base, ephemeral=ephemeral or base.ephemeral)
        model = Model(base)
        if size is not None:
            model.resize(size)
        with self.book.change({name: model.moment()}, passing=[base]):
            clone = self.store.clone(parent, name, ephemeral=ephemeral, size=size)
        self.shelf[name] = Shelf(model.moment(), base, "clone")
        self.hands[name] = clone, model

    def clone_many(self, parent: str, names: Sequence[str]) -> None:
        base = self.shelf[parent].flushed
        with self.book.change(dict.fromkeys(names, base), together=True):
            self.store.clone_many(parent, names)
        self.shelf.update({name: Shelf(base, base, "clone") for name in names})

    def open(self, name: str) -> None:
        clone = self.store.device(name)
        assert isinstance(clone, Clone)
        self.hands[name] = clone, Model(self.shelf[name].flushed)

    def write(self, name: str, data: bytes, offset: int) -> None:
        clone, model = self.hands[name]
        clone.pwrite(data, offset)
        model.write(data, offset)

    def zero(self, name: str, length: int, offset: int) -> None:
        clone, model = self.hands[name]
        clone.zero(length, offset)
        model.write(bytes(length), offset)

    def resize(self, name: str, size: int) -> None:
        clone, model = self.hands[name]
        clone.resize(size)
        model.resize(size)

    def stage(self, name: str) -> None:
        """Has the unflushed blocks and nodes written, unpublished."""
        list(self.hands[name][0].extents())

    def look(self, name: str) -> None:
        """The open clone against the model, now."""
        clone, model = self.hands[name]
        assert clone.size == model.size, name
        for number in sorted({*model.blocks, 0} if model.size > 8 * MIB else range(-(-model.size // BLOCK))):
            length = min(BLOCK, model.size - number * BLOCK)
            expected = model.blocks.get(number, ZERO)[:length]
            assert clone.pread(length, number * BLOCK) == expected, f"{name}, block {number}, while it is open"

    def flush(self, name: str) -> None:
        clone, model = self.hands[name]
        moment = model.moment()
        with self.book.change({name: moment}, sure=self.sure):
            clone.flush()
        self.shelf[name].flushed = moment

    def close(self, name: str) -> None:
        clone, model = self.hands.pop(name)
        moment = model.moment()
        with self.book.change({name: moment}):
            clone.close()
        self.shelf[name].flushed = moment

    def discard(self, name: str) -> None:
        self.hands.pop(name)[0].discard()

    # Lineage.

    def fork(self, name: str, children: Sequence[str]) -> None:
        moment = self._flushed_by(name)
        with self.book.change({name: moment}), self.book.change(dict.fromkeys(children, moment), together=True):
            if name in self.hands:
                self.hands[name][0].fork(*children)
            else:
                self.store.fork(name, *children)
        self.shelf[name].flushed = moment
        self.shelf.update({child: Shelf(moment, moment, "clone") for child in children})

    def seal(self, name: str, image: str) -> None:
        moment = self._flushed_by(name)
        sealed = replace(moment, ephemeral=False)
        with self.book.change({name: moment}), self.book.change({image: sealed}):
            if name in self.hands:
                self.hands[name][0].seal(image)
            else:
                self.store.seal(name, image)
        self.shelf[name].flushed = moment
        self.shelf[image] = Shelf(sealed, sealed, "image")

    def _flushed_by(self, name: str) -> Moment:
        return self.hands[name][1].moment() if name in self.hands else self.shelf[name].flushed

    def reset(self, name: str) -> None:
        base = self.shelf[name].base
        with self.book.change({name: base}):
            if name in self.hands:
                clone, _ = self.hands[name]
                clone.reset()
                self.hands[name] = clone, Model(base)
            else:
                self.store.reset(name)
        self.shelf[name].flushed = base

    def delete(self, *names: str) -> None:
        for name in names:
            if name in self.hands:
                self.discard(name)
        with self.book.change(dict.fromkeys(names), together=True):
            self.store.delete(*names)
        for name in names:
            del self.shelf[name]

    def rename(self, old: str, new: str) -> None:
        """Renames a device that is not open."""
        with self.book.change({old: None, new: self.shelf[old].flushed}, together=True):
            self.store.rename(old, new)
        self.shelf[new] = self.shelf.pop(old)

    # Upkeep.

    def collect(self) -> Any:
        return self.store.collect()

    def backup(self, name: str) -> None:
        with self.book.backup(name):
            self.store.backup(self.path.parent / name)


def story(driver: Driver) -> None:
    """Everything once, in an order in which most things meet."""
    d = driver
    d.found()
    d.import_image("debian", d.content(MIB + 700))
    first = d.shelf["debian"].flushed
    changed = Model(first)
    changed.write(d.blocks(12), 20 * BLOCK)
    d.import_image("debian-2", changed.moment())  # nearly all of it is there already
    d.clone("debian", "a")
    d.clone("debian", "b", size=2 * MIB + 33)
    d.write("a", d.blocks(9), 3 * BLOCK)
    d.write("b", d.rng.randbytes(10_000), 2 * MIB - 9_990)
    d.flush("a")
    d.flush("a")  # nothing to do
    d.flush("b")
    d.write("a", d.rng.randbytes(3), 17)
    d.fork("a", ["c", "d"])
    d.write("a", d.blocks(30), 90 * BLOCK)
    d.zero("a", 77 * BLOCK + 5, 60 * BLOCK - 3)
    d.look("a")
    d.flush("a")
    d.clone("a", "gone", ephemeral=True)
    d.write("gone", d.blocks(7), BLOCK)
    d.flush("gone")
    d.seal("gone", "kept")
    d.seal("a", "golden")
    d.open("d")
    d.write("d", d.blocks(6), 0)
    d.close("d")
    d.reset("d")
    d.clone_many("golden", ["m1", "m2", "m3"])
    garbage(d, "debian-2", ["b", "c"])
    d.write("a", d.blocks(40), 100 * BLOCK)  # into slots that were freed
    d.flush("a")
    d.reset("a")
    d.backup("copy")
    d.rename("d", "renamed")
    d.write("a", d.blocks(3), 0)
    d.reopen()
    d.create("large", 5 << 30)
    d.write("large", d.blocks(3), (5 << 30) - 3 * BLOCK)
    d.write("large", b"x", 1 << 30)
    d.flush("large")
    d.resize("large", MIB // 2)
    d.flush("large")
    d.delete("m1", "m3", "debian")
    d.collect()
    d.open("m2")
    d.write("m2", d.blocks(60), 0)
    d.flush("m2")
    d.write("m2", d.blocks(20), 8 * BLOCK)
    d.stage("m2")
    d.write("large", d.blocks(20), 0)
    d.discard("m2")
    d.discard("large")
    d.close_store()


def garbage(d: Driver, image: str, clones: Sequence[str]) -> None:
    """Shared blocks that die after a clone has taken them and before it is flushed."""
    unique = d.rng.randbytes(5 * BLOCK)
    d.create("last-holder", MIB)
    d.write("last-holder", unique, 0)
    d.flush("last-holder")
    d.create("taker", MIB)
    d.write("taker", unique, 64 * BLOCK)
    d.stage("taker")
    d.delete(image, *clones, "last-holder")
    d.collect()  # has to wait: the taker has a pin
    d.flush("taker")
    d.look("taker")
    d.collect()
    d.look("taker")


def walk(driver: Driver, steps: int) -> None:
    """Steps by dice."""
    d = driver
    d.found()
    d.import_image(d.fresh_name("i"), d.content(MIB // 2 + 5))
    d.create(d.fresh_name(), 300 * BLOCK)
    for _ in range(steps):
        weights = [weight for weight, _ in _STEPS]
        (step,) = d.rng.choices([step for _, step in _STEPS], weights)
        step(d)
    for name in list(d.hands):
        d.discard(name)
    d.close_store()


def _pick(d: Driver, *, hands: bool = False, kind: str = "", closed: bool = False) -> str:
    """A device of that sort; empty where there is none."""
    names = list(d.hands) if hands else [name for name in d.shelf if d.shelf[name].kind == kind or not kind]
    names = [name for name in names if not (closed and name in d.hands)]
    return d.rng.choice(sorted(names)) if names else ""


def _write(d: Driver) -> None:
    if name := _pick(d, hands=True):
        size = d.hands[name][1].size
        data = d.blocks(d.rng.randint(1, 24)) if d.rng.random() < 0.8 else d.rng.randbytes(d.rng.randint(1, 9999))
        offset = d.rng.randrange(max(size, 1))
        offset -= offset % BLOCK if d.rng.random() < 0.7 else 0
        d.write(name, data[: max(size - offset, 0)], offset)


def _flush(d: Driver) -> None:
    if name := _pick(d, hands=True):
        d.flush(name)


def _zero(d: Driver) -> None:
    if name := _pick(d, hands=True):
        start, end = sorted(d.rng.randrange(d.hands[name][1].size + 1) for _ in range(2))
        d.zero(name, end - start, start)


def _resize(d: Driver) -> None:
    if name := _pick(d, hands=True):
        size = d.rng.choice((0, 1, 100, 511, 512, 513, 600)) * BLOCK + d.rng.choice((0, 1, 2000))
        d.resize(name, size)


def _stage(d: Driver) -> None:
    if name := _pick(d, hands=True):
        d.stage(name)
        d.look(name)


def _open(d: Driver) -> None:
    if name := _pick(d, kind="clone", closed=True):
        d.open(name)


def _close(d: Driver) -> None:
    if name := _pick(d, hands=True):
        d.rng.choice((d.close, d.discard))(name)


def _reset(d: Driver) -> None:
    if name := _pick(d, kind="clone"):
        d.reset(name)


def _clone(d: Driver) -> None:
    if len(d.shelf) < 14:
        d.clone(_pick(d), d.fresh_name(), ephemeral=d.rng.random() < 0.2)


def _fork(d: Driver) -> None:
    if len(d.shelf) < 14 and (name := _pick(d, kind="clone")):
        d.fork(name, [d.fresh_name("f") for _ in range(d.rng.randint(1, 3))])


def _seal(d: Driver) -> None:
    if len(d.shelf) < 14 and (name := _pick(d, kind="clone")):
        d.seal(name, d.fresh_name("s"))


def _import(d: Driver) -> None:
    if len(d.shelf) < 14:
        known = Model(d.shelf[_pick(d)].flushed)
        known.write(d.blocks(4)[: known.size], 0)
        moment = known.moment() if d.rng.random() < 0.5 else d.content(d.rng.randrange(1, MIB))
        d.import_image(d.fresh_name("i"), replace(moment, ephemeral=False))


def _delete(d: Driver) -> None:
    if len(d.shelf) > 3:
        d.delete(*d.rng.sample(sorted(d.shelf), d.rng.randint(1, 2)))


def _rename(d: Driver) -> None:
    if name := _pick(d, closed=True):
        d.rename(name, d.fresh_name("r"))


def _collect(d: Driver) -> None:
    d.collect()


def _reopen(d: Driver) -> None:
    d.reopen()


def _backup(d: Driver) -> None:
    d.backup(d.fresh_name("backup"))


_STEPS: tuple[tuple[int, Callable[[Driver], None]], ...] = (
    (30, _write), (22, _flush), (5, _zero), (3, _resize), (5, _stage), (8, _open), (6, _close), (3, _reset),
    (5, _clone), (5, _fork), (3, _seal), (3, _import), (6, _delete), (2, _rename), (5, _collect), (2, _reopen),
    (1, _backup),
)  # fmt: skip


class _Clock:
    """Time that passes only when it is asked for, so that short transactions end at the same place each time."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += 0.0007
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


class _Secrets:
    """Random numbers that a seed gives again."""

    def __init__(self, rng: random.Random) -> None:
        self.token_bytes = rng.randbytes
        self.randbits = rng.getrandbits


class _Inline:
    """An executor that does the work at once, so that a seed always gives the same log."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args))
        except BaseException as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        return future

    def shutdown(self) -> None: ...


@contextmanager
def booted(boot: bytes) -> Iterator[None]:
    """The host as it is between two boots."""
    with replaced((catalog, "boot_id", lambda: boot), (reservations, "boot_id", lambda: boot),
                  (index, "boot_id", lambda: boot)):  # fmt: skip
        yield


@contextmanager
def small(rng: random.Random, *, threads: bool = False) -> Iterator[None]:
    """Small limits, so that a small store meets everything that a large one does."""
    search = Reservations._search

    def forgetful(self: Reservations, *args: Any) -> list[int]:
        return [] if rng.random() < 0.03 else search(self, *args)

    limits: list[tuple[Any, str, Any]] = [
        (clones, "_DIRTY_LIMIT", 16), (draft, "CHANGED_LIMIT", 6), (imports, "_SLICE", 48),
        (sources, "PIECE", 16 * BLOCK), (reservations, "_FIRST_REFILL", 8), (reservations, "_LARGEST_REFILL", 64),
        (reservations, "_SEQUENCES", 6), (collector, "_PATIENCE", 0.01), (Reservations, "_search", forgetful),
    ]  # fmt: skip
    if not threads:
        limits += [
            (Segments, "_workers", lambda _: _Inline()), (imports, "ThreadPoolExecutor", _Inline),
            (collector, "time", _Clock()), (founding, "secrets", _Secrets(rng)), (backup, "secrets", _Secrets(rng)),
        ]  # fmt: skip
    with replaced(*limits):
        yield


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Other attributes for a while."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
