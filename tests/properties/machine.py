"""The state machine: everything that the public surface can do, against plain bytearrays."""

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
from tests.properties.world import NAMES, World, assert_holds, clones, closed, holding, room, some


class Machine(World):
    """Rules that anybody who has a store can follow."""

    # Making things.

    @room
    @rule(data=st.data(), way=st.sampled_from(["file", "open file", "stream"]))
    def import_image(self, data, way):
        content = Content(data.draw(shapes.small_sizes if way == "stream" else shapes.sizes))
        for _ in range(data.draw(st.integers(0, 3))):
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
        thing = Thing(name, False, Content(size), Content(size))
        self.add(thing)
        self.hold(thing, self.store.create(name, size))

    @room
    @some
    @rule(data=st.data(), size=st.none() | shapes.sizes, ephemeral=st.sampled_from([False, False, True]))
    def clone(self, data, size, ephemeral):
        parent, (name,) = self.any_thing(data), self.free_names(data)
        if size is not None and size < parent.flushed.size:
            with pytest.raises(cowstore.InvalidError):
                self.store.clone(parent.name, name, size=size)
            return
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
    @holding
    @rule(data=st.data())
    def fork_open(self, data):
        (thing, handle), names = self.any_open(data), self.free_names(data, 2)
        handle.fork(*names)
        self.flushed(thing)
        self.add(*map(thing.child, names))

    @room
    @clones
    @rule(data=st.data(), by_neighbour=st.booleans())
    def fork_by_name(self, data, by_neighbour):
        thing, (name,) = self.any_thing(data, "clone"), self.free_names(data)
        if by_neighbour:
            self.ask("fork", thing.name, name)
        else:
            self.store.fork(thing.name, name)
        self.add(thing.child(name))

    @room
    @holding
    @rule(data=st.data())
    def seal_open(self, data):
        (thing, handle), (name,) = self.any_open(data), self.free_names(data)
        handle.seal(name)
        self.flushed(thing)
        self.add(thing.sealed(name))

    @room
    @clones
    @rule(data=st.data(), by_neighbour=st.booleans())
    def seal_by_name(self, data, by_neighbour):
        thing, (name,) = self.any_thing(data, "clone"), self.free_names(data)
        if by_neighbour:
            self.ask("seal", thing.name, name)
        else:
            self.store.seal(thing.name, name)
        self.add(thing.sealed(name))

    # Opening and closing.

    @closed
    @rule(data=st.data())
    def open_clone(self, data):
        thing = self.any_thing(data, "closed")
        self.hold(thing, self.store.device(thing.name))

    @some
    @rule(data=st.data())
    def open_reader(self, data):
        thing = self.any_thing(data)
        if len(self.readers) < 3:
            self.readers.append((thing, self.store.device(thing.name, readonly=True), thing.flushed.copy()))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), leave=st.booleans())
    def use_reader(self, data, leave):
        at = data.draw(st.integers(0, len(self.readers) - 1))
        _, device, content = self.readers[at]
        assert_holds(device, content)
        if leave:
            device.close()
            del self.readers[at]

    @clones
    @rule(data=st.data())
    def open_what_is_held(self, data):
        thing = self.any_thing(data, "clone")
        if self.is_used(thing):
            with pytest.raises(cowstore.InUseError) as caught:
                self.store.device(thing.name)
            assert (caught.value.holder == os.getpid()) == thing.is_open
            with pytest.raises(cowstore.InUseError):
                self.store.reset(thing.name)

    @holding
    @rule(data=st.data(), flush=st.booleans())
    def close_clone(self, data, flush):
        thing, handle = self.any_open(data)
        if flush:
            handle.close()
            self.flushed(thing)
        else:
            handle.discard()
        self.let_go(thing)

    @rule(flush=st.booleans())
    def reopen_store(self, flush):
        self.drop_store(flush=flush)

    # Names, resets and deletes.

    @room
    @some
    @rule(data=st.data())
    def rename(self, data):
        thing, (name,) = self.any_thing(data), self.free_names(data)
        self.store.rename(thing.name, name)
        if thing.name == self.away:
            self.away = name
        self.things[name] = self.things.pop(thing.name)
        if thing.name in self.handles:
            self.handles[name] = self.handles.pop(thing.name)
        if thing.name in self.written:
            self.written = self.written - {thing.name} | {name}
        thing.name = name

    @closed
    @rule(data=st.data())
    def reset_by_name(self, data):
        thing = self.any_thing(data, "closed")
        self.store.reset(thing.name)
        thing.reset()

    @some
    @rule(data=st.data())
    def delete(self, data):
        things = {thing.name: thing for thing in (self.any_thing(data), self.any_thing(data))}
        if any(map(self.is_used, things.values())):
            with pytest.raises(cowstore.InUseError):
                self.store.delete(*things)
            return
        self.store.delete(*things)
        for name in things:
            del self.things[name]

    # Upkeep and ways out.

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
    @rule(data=st.data())
    def delete_frees_what_was_said(self, data):
        things = {thing.name: thing for thing in (self.any_thing(data), self.any_thing(data))}
        if any(map(self.is_used, things.values())):
            return
        self.store.collect()
        expected, before = self.store.exclusive(*things), self.store.stats().used
        if len(things) == 1:
            assert self.store.usage(*things).exclusive == expected
        self.store.delete(*things)
        self.store.collect()
        assert before - self.store.stats().used == expected
        for name in things:
            del self.things[name]

    @some
    @rule()
    def usage(self):
        own = self.store.own_bytes()
        assert own.keys() == self.things.keys()
        stats, allocated = self.store.stats(), 0
        for name, thing in self.things.items():
            found, blocks, before = self.store.usage(name), thing.flushed.blocks(), thing.base.blocks()
            same = sum(before.get(number) == block for number, block in blocks.items())
            assert (found.virtual, found.allocated) == (thing.flushed.size, len(blocks) * BLOCK)
            assert found.own + found.inherited == found.allocated
            assert found.inherited <= same * BLOCK
            assert found.own == own[name]
            allocated += found.allocated
        assert (stats.allocated, stats.images + stats.clones) == (allocated, len(self.things))

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

    @some
    @rule(data=st.data())
    def export(self, data):
        thing, path = self.any_thing(data), self.directory / "exported"
        self.store.export(thing.name, path, overwrite=path.exists())
        blocks = thing.flushed.blocks()
        assert path.stat().st_size == thing.flushed.size
        assert path.stat().st_blocks * 512 <= len(blocks) * BLOCK
        with open(path, "rb") as file:
            for number, block in blocks.items():
                assert os.pread(file.fileno(), BLOCK, number * BLOCK).ljust(BLOCK, b"\0") == block
        room = sorted(set(NAMES) - set(self.things))
        if room and data.draw(st.booleans()):
            self.store.import_image(path, room[0])
            self.add(Thing(room[0], True, Content(), thing.flushed.copy()))

    @some
    @rule(data=st.data())
    def diff(self, data):
        old, new = self.any_thing(data), self.any_thing(data)
        found = [(change.offset, change.length) for change in self.store.diff(old.name, new.name)]
        size = max(old.flushed.size, new.flushed.size)
        assert found == ranges(differing(old.flushed, new.flushed), size)

    # The open clones.

    @holding
    @rule(data=st.data())
    def read(self, data):
        thing, handle = self.any_open(data)
        length, offset = data.draw(shapes.places(thing.live.size))
        expected = thing.live.read(length, offset)
        for _ in range(2):  # the second time from the mapping
            assert handle.pread(length, offset) == expected
            buffer = bytearray(b"?" * length)
            assert handle.preadinto(buffer, offset) == length
            assert buffer == expected

    @holding
    @rule(data=st.data())
    def write(self, data):
        thing, handle = self.any_open(data)
        length, offset = data.draw(shapes.places(thing.live.size))
        filling = data.draw(shapes.fillings(length, offset))
        assert handle.pwrite(filling, offset) == length
        thing.live.write(filling, offset)
        self.written.add(thing.name)
        assert handle.pread(length, offset) == filling

    @holding
    @rule(data=st.data(), way=st.sampled_from(["zero", "trim"]))
    def zero(self, data, way):
        thing, handle = self.any_open(data)
        length, offset = data.draw(shapes.places(thing.live.size, shapes.RANGES))
        getattr(handle, way)(length, offset)
        thing.live.zero(length, offset)
        self.written.add(thing.name)

    @holding
    @rule(data=st.data(), size=shapes.sizes)
    def resize(self, data, size):
        thing, handle = self.any_open(data)
        handle.resize(size)
        thing.live.resize(size)
        self.written.add(thing.name)
        assert handle.size == size

    @holding
    @rule(data=st.data())
    def flush(self, data):
        thing, handle = self.any_open(data)
        handle.flush()
        self.flushed(thing)

    @holding
    @rule(data=st.data())
    def reset_open(self, data):
        thing, handle = self.any_open(data)
        handle.reset()
        thing.now = thing.base.copy()
        self.flushed(thing)
        assert_holds(handle, thing.live)

    @holding
    @rule(data=st.data())
    def outside(self, data):
        thing, handle = self.any_open(data)
        size = thing.live.size
        offset, length = data.draw(
            st.sampled_from([(size, 1), (size + 1, 0), (-1, 1), (0, -1), (0, size + 1), (1, size)])
        )
        calls = [handle.pread, handle.zero, handle.trim]
        for call in calls if offset >= 0 or length else calls[:1]:
            with pytest.raises(cowstore.RangeError):
                call(length, offset)
        if 0 <= length <= 4097:
            with pytest.raises(cowstore.RangeError):
                handle.pwrite(bytes(length), offset)

    @holding
    @rule(data=st.data())
    def extents_and_delta(self, data):
        thing, handle = self.any_open(data)
        assert_holds(handle, thing.live, thing.base)
        seed = int(json.loads((self.path / "store.json").read_text())["seed"], 16)
        blocks, expected = thing.live.blocks(), {}
        for number in differing(thing.base, thing.live):
            digest = HASHES[self.function](blocks[number], seed) if number in blocks else bytes(16)
            expected[number] = digest if any(digest) or number not in blocks else bytes(15) + b"\1"
        found = list(handle.delta())
        assert found == sorted(expected.items())

    # The neighbour.

    @some
    @rule(data=st.data())
    def neighbour_reads(self, data):
        thing = self.any_thing(data)
        size, found = self.ask("read", thing.name)
        assert size == thing.flushed.size
        runs = ranges(sorted(thing.flushed.blocks()), size)
        assert found == [(offset, thing.flushed.read(length, offset)) for offset, length in runs]

    @precondition(lambda self: not self.away)
    @closed
    @rule(data=st.data())
    def neighbour_writes(self, data):
        thing = self.any_thing(data, "closed")
        length, offset = data.draw(shapes.places(thing.flushed.size))
        filling = data.draw(shapes.fillings(length, offset))
        self.ask("write", thing.name, filling, offset)
        self.away, self.borrowed = thing.name, thing.flushed.copy()
        self.borrowed.write(filling, offset)

    @precondition(lambda self: self.away)
    @rule(end=st.sampled_from(["stage", "flush", "flush", "discard", "close", "die"]))
    def neighbour_ends(self, end):
        if end == "stage":
            self.ask("stage")
            return
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

    @holding
    @rule(data=st.data())
    def neighbour_is_refused(self, data):
        thing, _ = self.any_open(data)
        with pytest.raises(RefusedError, match="InUseError"):
            self.ask("write", thing.name, b"", 0)


class CollidingMachine(Machine):
    """The same with eight digests for all blocks."""

    function = "few"
