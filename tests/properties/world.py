"""What the machine works on: a store, a second process that uses it too, and what both should find in it."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition

import cowstore
import cowstore.blocks
import cowstore.clones
import cowstore.collector
import cowstore.draft
import cowstore.imports
import cowstore.sources
import cowstore.tree
from tests.properties import shapes
from tests.properties.model import BLOCK, Content, Thing
from tests.properties.neighbour import HASHES, Neighbour

NAMES = [f"{letter}.{number}" for number, letter in enumerate("abcdefgh")]
SHARED_MEMORY = Path("/dev/shm")
WHOLE_READ = 8 << 20  # bytes; larger devices are read where they have data

# Limits that ordinary work reaches seldom, made so low that it reaches them all the time.
TIGHT = {
    (cowstore.clones, "_DIRTY_LIMIT"): 7,
    (cowstore.draft, "CHANGED_LIMIT"): 3,
    (cowstore.tree, "_CACHE_LIMIT"): 2,
    (cowstore.blocks, "BATCH_BLOCKS"): 8,
    (cowstore.blocks, "_RECENT_LIMIT"): 16,
    (cowstore.imports, "_SLICE"): 16,
    (cowstore.sources, "PIECE"): 16 * BLOCK,
}


def holdings(device: cowstore.Device, base: dict[int, bytes] | None, now: dict[int, bytes]) -> dict[int, bytes]:
    """All data of a device, found by its extents; these are checked by the way."""
    found, end, alike = {}, 0, None
    shared = now.keys() if base is None else now.keys() | base.keys()
    for one in device.extents():
        assert one.offset == end
        assert one.length > 0
        assert (one.data, one.own) != alike
        end, alike = end + one.length, (one.data, one.own)
        if one.data:
            data = device.pread(one.length, one.offset)
            for at in range(0, one.length, BLOCK):
                found[(one.offset + at) // BLOCK] = data[at : at + BLOCK].ljust(BLOCK, b"\0")
        if base is not None and not one.own:
            inside = [number for number in shared if one.offset <= number * BLOCK < end]
            assert all(base.get(number) == now.get(number) for number in inside)
    assert end == device.size
    return found


def assert_holds(device: cowstore.Device, content: Content, base: Content | None = None) -> None:
    assert device.size == content.size
    blocks = content.blocks()
    assert holdings(device, None if base is None else base.blocks(), blocks) == blocks
    if content.size <= WHOLE_READ:
        assert device.pread(content.size, 0) == content.whole()


class World(RuleBasedStateMachine):
    """A store, a neighbour who uses it too, and what both should find in it."""

    function = "whole"
    neighbour: Neighbour  # given to the class by the test: one process for all examples

    def __init__(self) -> None:
        super().__init__()
        place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
        self.directory = Path(tempfile.mkdtemp(prefix="cowstore-", dir=place))
        self.path = self.directory / "store"
        self.store = self.opened(create=True)
        self.things: dict[str, Thing] = {}
        self.handles: dict[str, cowstore.Clone] = {}
        self.readers: list[tuple[Thing, cowstore.Device, Content]] = []
        self.written: set[str] = set()  # since the last flush
        self.steps = 0
        self.neighbour_is_in, self.away = False, ""
        self.limits = ExitStack()
        self.limits.enter_context(mock.patch.object(cowstore.collector, "_PATIENCE", 0.02))

    def opened(self, *, create: bool = False, path: Path | None = None) -> cowstore.Store:
        return cowstore.open(path or self.path, create=create, _hash=HASHES[self.function])

    @initialize(data=st.data(), tight=st.booleans(), size=shapes.sizes)
    def start(self, data, tight, size):
        """Chooses the limits, and makes an image with a clone, and a blank clone that is open."""
        for (module, name), value in TIGHT.items() if tight else ():
            self.limits.enter_context(mock.patch.object(module, name, value))
        content = Content(data.draw(shapes.small_sizes))
        length, offset = data.draw(shapes.places(content.size))
        content.write(data.draw(shapes.fillings(length, offset)), offset)
        self.store.import_image(io.BytesIO(content.whole()), NAMES[0])
        self.add(image := Thing(NAMES[0], True, Content(), content))
        self.store.clone_many(NAMES[0], [NAMES[1]])
        self.add(image.child(NAMES[1]), blank := Thing(NAMES[2], False, Content(size), Content(size)))
        self.hold(blank, self.store.create(NAMES[2], size))

    def teardown(self):
        try:
            if sys.exc_info()[0] is None:
                self.check_the_end()
        finally:
            if sys.exc_info()[0] is not None:
                self.neighbour.die()
            elif self.neighbour_is_in:
                self.ask("close")
            self.store.close()
            self.limits.close()
            shutil.rmtree(self.directory)

    def check_the_end(self) -> None:
        self.drop_store(flush=True)
        self.check_everything()
        self.store.collect()
        self.check_everything()
        if self.away:
            self.ask("release")
            self.away = ""
        self.store.delete(*self.things)
        assert self.store.collect().waiting == 0
        assert self.store.stats().used == 0

    # Choosing.

    def free_names(self, data: st.DataObject, most: int = 1) -> list[str]:
        free = [name for name in NAMES if name not in self.things]
        return free[: data.draw(st.integers(1, min(most, len(free))))]

    def any_thing(self, data: st.DataObject, only: str = "") -> Thing:
        found = [name for name, thing in sorted(self.things.items()) if not only or self.is_(only, thing)]
        return self.things[data.draw(st.sampled_from(found))]

    def is_(self, what: str, thing: Thing) -> bool:
        """Whether a thing is a clone, idle (and nobody has it open), or usable: idle, or open here."""
        if what == "clone" or thing.image:
            return not thing.image
        return (what == "usable" and thing.is_open) or not self.is_used(thing)

    def any_open(self, data: st.DataObject) -> tuple[Thing, cowstore.Clone]:
        """A clone that is open here; sometimes, or if there is none, one is opened."""
        thing = self.any_thing(data, "usable")
        if not thing.is_open:
            self.hold(thing, self.store.device(thing.name))
        return thing, self.handles[thing.name]

    def is_used(self, thing: Thing) -> bool:
        read = any(thing is one for one, _, _ in self.readers) and thing.image
        return read or thing.is_open or thing.name == self.away

    def add(self, *things: Thing) -> None:
        self.things.update({thing.name: thing for thing in things})

    def hold(self, thing: Thing, handle: cowstore.Device) -> None:
        assert isinstance(handle, cowstore.Clone)
        thing.open()
        self.handles[thing.name] = handle

    def let_go(self, thing: Thing) -> None:
        del self.handles[thing.name]
        self.written.discard(thing.name)
        thing.now = None

    def flushed(self, thing: Thing) -> None:
        thing.flush()
        self.written.discard(thing.name)

    def ask(self, command: str, *arguments: object) -> Any:
        if not self.neighbour_is_in:
            self.neighbour("open", self.path, self.function)
            self.neighbour_is_in = True
        return self.neighbour(command, *arguments)

    def drop_store(self, *, flush: bool) -> None:
        """Closes the store and everything in it, clones with a flush or without, and opens it again."""
        for handle in self.handles.values() if not flush else ():
            handle.discard()
        self.store.close()
        for name in list(self.handles):
            if flush:
                self.flushed(self.things[name])
            self.let_go(self.things[name])
        self.readers.clear()
        self.store = self.opened()

    # What is always true.

    @invariant()
    def everything_is_listed(self):
        self.steps += 1
        listed = {info.name: info for info in self.store.devices()}
        assert list(listed) == sorted(self.things)
        for name, thing in self.things.items():
            info, parent = listed[name], thing.parent
            assert (info.kind, info.size) == ("image" if thing.image else "clone", thing.flushed.size)
            assert (info.ephemeral, info.parent) == (thing.ephemeral, parent and parent.name)

    def check_everything(self) -> None:
        for name, thing in sorted(self.things.items()):
            with self.store.device(name, readonly=True) as device:
                assert_holds(device, thing.flushed, thing.base)


# When a rule can be used.


some = precondition(lambda self: self.things)
room = precondition(lambda self: len(self.things) < len(NAMES))
clones = precondition(lambda self: any(self.is_("clone", thing) for thing in self.things.values()))
idle = precondition(lambda self: any(self.is_("idle", thing) for thing in self.things.values()))
usable = precondition(lambda self: any(self.is_("usable", thing) for thing in self.things.values()))
seldom = precondition(lambda self: self.steps % 3 == 0)  # what looks at the store as a whole takes long
