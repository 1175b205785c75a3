"""The state machine: everything that the public surface can do, against plain bytearrays.

Few rules, each of several ways: Hypothesis chooses among rules alike, and most steps should change a device.
"""

from __future__ import annotations

import io
import json
import os
import shutil

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import cowstore
from tests.properties import shapes
from tests.properties.model import BLOCK, Content, Thing, differing, ranges
from tests.properties.neighbour import HASHES, RefusedError
from tests.properties.world import NAMES, World, assert_holds, clones, idle, room, seldom, some, usable

OUTSIDE = [(1, 0), (0, 1), (1, -1), (BLOCK, -BLOCK), (1 << 62, 0)]  # bytes beyond the end, and the offset from it


class Machine(World):
    """Rules that anybody who has a store can follow."""

    # Making devices.

    @room
    @rule(data=st.data(), way=st.sampled_from(["file", "open file", "stream"]))
    def import_image(self, data, way):
        content = Content(data.draw(shapes.small_sizes if way == "stream" else shapes.sizes))
        for _ in range(data.draw(st.integers(0, 4))):
            length, offset = data.draw(shapes.places(content.size))
            content.write(data.draw(shapes.fillings(length, offset)), offset)
        (name,) = self.free_names(data)
        if way == "stream":
            self.store.import_image(io.BytesIO(content.whole()), name)
        else:
            source = self.directory / "source"
            with open(source, "wb+") as file:
                for number, block in content.blocks().items():
                    os.pwrite(file.fileno(), block, number * BLOCK)
                file.truncate(content.size)
                file.seek(0)
                self.store.import_image(source if way == "file" else file, name)
        self.add(Thing(name, True, Content(), content))

    @room
    @rule(data=st.data(), size=shapes.sizes)
    def create(self, data, size):
        (name,) = self.free_names(data)
        self.add(thing := Thing(name, False, Content(size), Content(size)))
        self.hold(thing, self.store.create(name, size))

    @room
    @some
    @rule(data=st.data(), size=st.none() | shapes.sizes, ephemeral=st.sampled_from([False, False, True]))
    def clone(self, data, size, ephemeral):
        parent, (name,) = self.any_thing(data), self.free_names(data)
        if size is not None and size < parent.flushed.size:
            with pytest.raises(cowstore.InvalidError):
                self.store.clone(parent.name, name, size=size)
            size = None
        thing = parent.child(name, ephemeral=ephemeral)
        thing.flushed.resize(size or thing.flushed.size)
        self.add(thing)
        self.hold(thing, self.store.clone(parent.name, name, size=size, ephemeral=ephemeral))

    @room
    @some
    @rule(data=st.data(), ephemeral=st.sampled_from([False, False, True]))
    def clone_many(self, data, ephemeral):
        parent, names = self.any_thing(data), self.free_names(data, 3)
        with pytest.raises(cowstore.ExistsError):
            self.store.clone_many(parent.name, [*names, parent.name])
        self.store.clone_many(parent.name, names, ephemeral=ephemeral)
        self.add(*(parent.child(name, ephemeral=ephemeral) for name in names))

    @room
    @clones
    @rule(data=st.data(), who=st.sampled_from(["store", "neighbour", "clone"]), seal=st.booleans())
    def fork_or_seal(self, data, who, seal):
        thing, (name,) = self.any_thing(data, "clone"), self.free_names(data)
        if who == "neighbour":
            self.ask("seal" if seal else "fork", thing.name, name)
        elif who == "clone" and thing.is_open:
            handle = self.handles[thing.name]
            (handle.seal if seal else handle.fork)(name)
            self.flushed(thing)
        else:
            (self.store.seal if seal else self.store.fork)(thing.name, name)
        self.add(thing.sealed(name) if seal else thing.child(name))

    # Working with a clone.

    @usable
    @rule(data=st.data(), times=st.integers(1, 5))
    def write(self, data, times):
        thing, handle = self.any_open(data)
        for _ in range(times):
            length, offset = data.draw(shapes.places(thing.live.size))
            filling = data.draw(shapes.fillings(length, offset))
            assert handle.pwrite(filling, offset) == length
            thing.live.write(filling, offset)
            assert handle.pread(length, offset) == filling
        self.written.add(thing.name)

    @usable
    @rule(data=st.data(), times=st.integers(1, 3))
    def write_and_flush(self, data, times):
        for _ in range(times):
            self.write(data, 1)
            self.flush(data)

    @usable
    @rule(data=st.data(), ways=st.lists(st.sampled_from(["zero", "trim", "resize"]), min_size=1, max_size=3))
    def reshape(self, data, ways):
        thing, handle = self.any_open(data)
        for way in ways:
            if way == "resize":
                size = data.draw(shapes.sizes)
                handle.resize(size)
                thing.live.resize(size)
                assert handle.size == size
            else:
                length, offset = data.draw(shapes.places(thing.live.size, shapes.RANGES))
                getattr(handle, way)(length, offset)
                thing.live.zero(length, offset)
        self.written.add(thing.name)

    @usable
    @rule(data=st.data(), times=st.integers(1, 3))
    def read(self, data, times):
        thing, handle = self.any_open(data)
        for _ in range(times):
            length, offset = data.draw(shapes.places(thing.live.size))
            expected = thing.live.read(length, offset)
            for _ in range(2):  # the second time from the mapping
                assert handle.pread(length, offset) == expected
                buffer = bytearray(b"?" * length)
                assert handle.preadinto(buffer, offset) == length
                assert buffer == expected

    @usable
    @rule(data=st.data())
    def read_all_and_delta(self, data):
        thing, handle = self.any_open(data)
        assert_holds(handle, thing.live, thing.base)
        seed = int(json.loads((self.path / "store.json").read_text())["seed"], 16)
        blocks, expected = thing.live.blocks(), {}
        for number in differing(thing.base, thing.live):
            digest = HASHES[self.function](blocks[number], seed) if number in blocks else bytes(16)
            expected[number] = digest if any(digest) or number not in blocks else bytes(15) + b"\1"
        assert list(handle.delta()) == sorted(expected.items())

    @usable
    @rule(data=st.data())
    def flush(self, data):
        thing, handle = self.any_open(data)
        handle.flush()
        self.flushed(thing)

    @usable
    @rule(data=st.data(), way=st.sampled_from(["close", "discard", "reset"]))
    def end(self, data, way):
        thing, handle = self.any_open(data)
        getattr(handle, way)()
        if way == "reset":
            thing.now = thing.base.copy()
            assert_holds(handle, thing.live)
        if way != "discard":
            self.flushed(thing)
        if way != "reset":
            self.let_go(thing)

    @seldom
    @rule(flush=st.booleans())
    def reopen_store(self, flush):
        self.drop_store(flush=flush)

    # What is refused changes nothing.

    @usable
    @rule(data=st.data(), outside=st.sampled_from(OUTSIDE))
    def outside(self, data, outside):
        thing, handle = self.any_open(data)
        length, offset = outside[0] + max(-outside[1], 0), thing.live.size + outside[1]
        for call in (handle.pread, handle.zero, handle.trim):
            with pytest.raises(cowstore.RangeError):
                call(length, offset)
            with pytest.raises(cowstore.RangeError):
                call(0, -1)
        for data, at in ((b"a", thing.live.size), (bytes(2 * BLOCK), thing.live.size - BLOCK), (b"", -1)):
            with pytest.raises(cowstore.RangeError):
                handle.pwrite(data, at)

    @seldom
    @clones
    @rule(data=st.data())
    def use_what_is_held(self, data):
        thing = self.any_thing(data, "clone")
        if self.is_used(thing):
            with pytest.raises(cowstore.InUseError) as caught:
                self.store.device(thing.name)
            assert (caught.value.holder == os.getpid()) == thing.is_open
            with pytest.raises(cowstore.InUseError):
                self.store.reset(thing.name)
            with pytest.raises(RefusedError, match="InUseError"):
                self.ask("write", thing.name, b"", 0)

    # Names, resets and deletes.

    @seldom
    @some
    @rule(data=st.data())
    def rename(self, data):
        thing = self.any_thing(data)
        name = data.draw(st.sampled_from(NAMES))
        if name in self.things and name != thing.name:
            with pytest.raises(cowstore.ExistsError):
                self.store.rename(thing.name, name)
            return
        self.store.rename(thing.name, name)
        if thing.name == self.away:
            self.away = name
        self.things[name] = self.things.pop(thing.name)
        if thing.name in self.handles:
            self.handles[name] = self.handles.pop(thing.name)
        if thing.name in self.written:
            self.written = self.written - {thing.name} | {name}
        thing.name = name

    @idle
    @rule(data=st.data())
    def reset_by_name(self, data):
        thing = self.any_thing(data, "idle")
        self.store.reset(thing.name)
        thing.reset()

    @some
    @rule(data=st.data(), check=st.booleans())
    def delete(self, data, check):
        things = {thing.name: thing for thing in (self.any_thing(data), self.any_thing(data))}
        if any(map(self.is_used, things.values())):
            with pytest.raises(cowstore.InUseError):
                self.store.delete(*things)
            return
        if check:
            self.store.collect()
            expected, before = self.store.exclusive(*things), self.store.stats().used
            assert len(things) > 1 or self.store.usage(*things).exclusive == expected
        self.store.delete(*things)
        for name in things:
            del self.things[name]
        if check:
            self.store.collect()
            assert before - self.store.stats().used == expected

    # Upkeep, facts, and ways out.

    @seldom
    @rule(by_neighbour=st.booleans())
    def collect(self, by_neighbour):
        if by_neighbour:
            waiting = self.ask("collect")
        else:
            collection = self.store.collect()
            waiting, stats = collection.waiting, self.store.stats()
            assert stats.used == collection.marked * BLOCK
            assert stats.doomed == waiting * BLOCK
        assert not waiting or self.written or self.away

    @some
    @rule(data=st.data(), leave=st.booleans())
    def reader(self, data, leave):
        """Moments and images that are open for long keep what they have."""
        thing = self.any_thing(data)
        if len(self.readers) < 3:
            self.readers.append((thing, self.store.device(thing.name, readonly=True), thing.flushed.copy()))
        at = data.draw(st.integers(0, len(self.readers) - 1))
        _, device, content = self.readers[at]
        assert_holds(device, content)
        if leave:
            device.close()
            del self.readers[at]

    @seldom
    @some
    @rule(data=st.data())
    def facts(self, data):
        own = self.store.own_bytes()
        assert own.keys() == self.things.keys()
        stats, usages, allocated = self.store.stats(), self.store.usages(), 0
        for name, thing in self.things.items():
            found, blocks, before = self.store.usage(name), thing.flushed.blocks(), thing.base.blocks()
            same = sum(before.get(number) == block for number, block in blocks.items())
            assert (found.virtual, found.allocated) == (thing.flushed.size, len(blocks) * BLOCK)
            assert found.own + found.inherited == found.allocated
            assert found.inherited <= same * BLOCK
            assert found.own == own[name]
            assert found == usages[name]
            allocated += found.allocated
        assert (stats.allocated, stats.images + stats.clones) == (allocated, len(self.things))
        old, new = self.any_thing(data), self.any_thing(data)
        changes = [(change.offset, change.length) for change in self.store.diff(old.name, new.name)]
        size = max(old.flushed.size, new.flushed.size)
        assert changes == ranges(differing(old.flushed, new.flushed), size)

    @seldom
    @some
    @rule(data=st.data(), again=st.booleans())
    def export(self, data, again):
        thing, path = self.any_thing(data), self.directory / "exported"
        self.store.export(thing.name, path, overwrite=path.exists())
        blocks = thing.flushed.blocks()
        assert path.stat().st_size == thing.flushed.size
        assert path.stat().st_blocks * 512 <= len(blocks) * BLOCK
        with open(path, "rb") as file:
            for number, block in blocks.items():
                assert os.pread(file.fileno(), BLOCK, number * BLOCK).ljust(BLOCK, b"\0") == block
        free = sorted(set(NAMES) - set(self.things))
        if again and free:
            self.store.import_image(path, free[0])
            self.add(Thing(free[0], True, Content(), thing.flushed.copy()))

    @seldom
    @some
    @rule()
    def backup(self):
        path = self.directory / "backup"
        self.store.backup(path)
        with self.opened(path=path) as copy:
            kept = sorted(name for name, thing in self.things.items() if not thing.ephemeral)
            assert [info.name for info in copy.devices()] == kept
            assert copy.collect().doomed == 0
            for name in kept:
                with copy.device(name, readonly=True) as device:
                    assert_holds(device, self.things[name].flushed, self.things[name].base)
                assert copy.info(name).parent == self.store.info(name).parent
        shutil.rmtree(path)

    # The neighbour.

    @some
    @rule(data=st.data())
    def neighbour_reads(self, data):
        thing = self.any_thing(data)
        size, pieces = self.ask("read", thing.name)
        found = Content(size)
        for offset, piece in pieces:
            found.write(piece, offset)
        assert (size, found.blocks()) == (thing.flushed.size, thing.flushed.blocks())

    @precondition(lambda self: not self.away)
    @idle
    @rule(data=st.data(), stage=st.booleans())
    def neighbour_writes(self, data, stage):
        thing = self.any_thing(data, "idle")
        length, offset = data.draw(shapes.places(thing.flushed.size))
        filling = data.draw(shapes.fillings(length, offset))
        self.ask("write", thing.name, filling, offset)
        if stage:
            self.ask("stage")
        self.away, self.borrowed = thing.name, thing.flushed.copy()
        self.borrowed.write(filling, offset)

    @precondition(lambda self: self.away)
    @rule(end=st.sampled_from(["flush", "flush", "flush", "discard", "close", "die"]))
    def neighbour_ends(self, end):
        if end == "die":
            self.neighbour.die()
        elif end == "close":
            self.ask("close")
        else:
            self.ask("release", end == "flush")
        self.neighbour_is_in = end not in ("die", "close")
        if end in ("flush", "close"):
            self.things[self.away].flushed = self.borrowed
        self.away = ""


class CollidingMachine(Machine):
    """The same with eight digests for all blocks."""

    function = "few"
