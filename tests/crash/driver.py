"""The driver: does each thing twice, to the store and to plain bytes, and notes in the book what is promised."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import cowstore
from cowstore.clones import Clone

from .model import BLOCK, ZERO, Book, Model, Moment, Shelf
from .recording import RecordingDisk

MIB = 1 << 20


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

    def companion(self) -> Driver:
        """Another thread's hands on the same open store, with chance and devices of its own."""
        other = Driver(self.path, self._disk, self.book, random.Random(self.rng.random()))
        other.shelf = dict(self.shelf)
        other._store, other._pool = self._store, self._pool
        return other

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
            self.store.import_image(BytesIO(moment.bytes()), name)
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
