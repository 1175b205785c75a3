"""The collector: what is dead goes, what is held waits, what is damaged stops it, and nobody else is disturbed."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cowstore
import cowstore.collector
from cowstore import catalog, slots
from cowstore.collector import Collector
from cowstore.environment import Environment
from cowstore.layout import DOOMED, RESERVED, SLOT_BITS, SLOT_MASK, SLOTS_OFFSET, SLOTS_PER_SEGMENT, USED

ROOT = Path(__file__).parents[2]
BLOCK, LEAF = 4096, 2 << 20


def content(seed: object, blocks: int = 1) -> bytes:
    return random.Random(repr(seed)).randbytes(blocks * BLOCK)


def held(store: cowstore.Store, name: str) -> bytes:
    with store.device(name, readonly=True) as device:
        return device.pread(device.size, 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits for nobody's pin."""
    monkeypatch.setattr(cowstore.collector, "_PATIENCE", 0)


@pytest.fixture
def stocked(store: cowstore.Store) -> cowstore.Store:
    """An image of 50 blocks and a leaf; and 100 blocks, a leaf and two commit blocks that are dead."""
    store.import_image(io.BytesIO(content("kept", 50)), "kept")
    store.import_image(io.BytesIO(content("dead", 100)), "dead")
    store.delete("dead")
    return store


def slots_in(store: cowstore.Store, state: int) -> dict[int, slots.Mask]:
    with store._environment.read() as snapshot:
        return {
            number: slots.load_segment(snapshot, number) == state for number in catalog.segments(snapshot)
        }  # fmt: skip


def count(store: cowstore.Store, state: int) -> int:
    return sum(int(mask.sum()) for mask in slots_in(store, state).values())


# --------------------------------------------------------------------------------------------- what is dead


def test_what_is_dead_is_erased_and_used_again(stocked):
    before = stocked.stats()
    expected = stocked.collect(dry_run=True)
    assert (expected.dry_run, expected.erased, expected.freed) == (True, 0, 0)
    assert stocked.stats() == before
    found = stocked.collect()
    assert (found.marked, found.doomed) == (expected.marked, expected.doomed) == (51, 103)
    assert (found.erased, found.freed, found.waiting, found.pins) == (103, 103, 0, ())
    after = stocked.stats()
    assert (after.used, after.doomed) == (51 * BLOCK, 0)
    assert after.file_bytes <= before.file_bytes - 100 * BLOCK
    assert after.index_entries == 50
    again = stocked.collect()
    assert (again.marked, again.doomed, again.erased) == (51, 0, 0)
    stocked.import_image(io.BytesIO(content("new", 100)), "new")
    assert stocked.stats().segments == before.segments
    assert held(stocked, "new") == content("new", 100)
    assert held(stocked, "kept") == content("kept", 50)


def test_erased_slots_have_no_digest_and_long_runs_of_them_no_bytes(stocked):
    before = slots_in(stocked, USED)
    stocked.collect()
    lengths = []
    for number, used in slots_in(stocked, USED).items():
        segment = stocked._engine.segments.get(number)
        digests = stocked._engine.segments.digests(number << SLOT_BITS, SLOTS_PER_SEGMENT)
        assert (np.frombuffer(digests, np.uint64).reshape(-1, 2).any(axis=1) == used).all()
        for first, length in slots.array_runs(before[number] & ~used):
            data = segment.file.read_at(length * BLOCK, SLOTS_OFFSET + first * BLOCK)
            assert any(data) == (length < 16)  # those are written again first
            lengths.append(length)
    assert min(lengths) < 16 <= max(lengths)


def test_progress_is_told(stocked):
    told: list[tuple[str, int, int]] = []
    stocked.collect(progress=lambda *step: told.append(step))
    assert list(dict.fromkeys(step for step, _, _ in told)) == ["mark", "doom", "erase"]
    assert all(0 <= done <= (total or done) for _, done, total in told)
    assert told[-1][1:] == (103, 103)


@pytest.mark.parametrize("after", ["_doom", "_wait_for_pins", "_erase", "_free"])
def test_an_interrupted_run_is_finished_by_the_next(stocked, monkeypatch, after):
    original = getattr(Collector, after)

    def interrupted(self, *given):
        original(self, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Collector, after, interrupted)
    with pytest.raises(KeyboardInterrupt):
        stocked.collect()
    monkeypatch.undo()
    assert count(stocked, DOOMED) == (0 if after == "_free" else 103)
    stocked.collect()
    assert (count(stocked, DOOMED), count(stocked, USED)) == (0, 51)
    assert held(stocked, "kept") == content("kept", 50)


# ------------------------------------------------------------------------------------- who works meanwhile


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on whenever it is looked at, so that a chunk of slots or two fill a transaction."""
    clock = SimpleNamespace(monotonic=itertools.count(0, 0.015).__next__, sleep=lambda _: None)
    monkeypatch.setattr(cowstore.collector, "time", clock)


def test_long_work_is_cut_into_short_transactions_and_others_have_theirs_between(stocked, slow):
    names: list[str] = []

    def create(step: str, _done: int, _total: int) -> None:
        if step == "doom":
            names.append(f"disk-{len(names)}")
            stocked.create(names[-1], BLOCK).close()

    assert stocked.collect(progress=create).freed == 103
    assert len(names) > 50
    assert {info.name for info in stocked.devices()} == {"kept", *names}


def test_what_is_shared_anew_between_two_transactions_stays(stocked, slow):
    taken: list[str] = []

    def share(step: str, _done: int, _total: int) -> None:
        if step == "doom" and not taken:
            taken.append(stocked.import_image(io.BytesIO(content("dead", 100)), "dead").name)

    assert stocked.collect(progress=share).doomed == 3
    assert taken
    assert held(stocked, "dead") == content("dead", 100)


@pytest.mark.parametrize("after", ["_mark", "_catch_up"])
def test_what_is_shared_anew_before_a_transaction_stays(stocked, monkeypatch, after):
    """A root that is published after the last look at the roots, and before the write lock is had, counts."""
    original = getattr(Collector, after)

    def overtaken(self, *given):
        result = original(self, *given)
        stocked.import_image(io.BytesIO(content("dead", 100)), "dead")
        monkeypatch.undo()
        return result

    monkeypatch.setattr(Collector, after, overtaken)
    assert stocked.collect().doomed == 3
    assert held(stocked, "dead") == content("dead", 100)


@contextmanager
def process(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", program, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as found:
        try:
            yield found
        finally:
            found.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


WORKING = """
import hashlib, random, select, sys, cowstore
store = cowstore.open(sys.argv[1])
source = random.Random(sys.argv[2])
blocks = [random.Random(f"block {number}").randbytes(4096) for number in range(40)]
name = f"w{sys.argv[2]}"
clone = store.clone("kept", name)
expected = bytearray(clone.pread(clone.size, 0))
turn = 0
while not select.select([sys.stdin], [], [], 0.005)[0]:
    for _ in range(source.randrange(12)):
        at, block = source.randrange(50) * 4096, source.choice(blocks)
        clone.pwrite(block, at)
        expected[at : at + 4096] = block
    assert clone.pread(clone.size, 0) == expected
    clone.flush()
    if turn % 5 == 0:
        clone.fork(f"{name}-{turn}")
        with store.device(f"{name}-{turn}", readonly=True) as child:
            assert child.pread(child.size, 0) == expected
        print("turn", flush=turn == 0)
    if turn % 5 == 3:
        store.delete(f"{name}-{turn - 3}")
    if turn % 20 == 9:
        clone.discard()
        clone = store.device(name)
        assert clone.pread(clone.size, 0) == expected
    turn += 1
clone.close()
store.close()
print(hashlib.sha256(expected).hexdigest())
"""


def test_writers_in_other_processes_are_not_disturbed(path, stocked):
    """They share blocks with each other and with what is being deleted, all the time."""
    with process(WORKING, path, 1) as one, process(WORKING, path, 2) as two:
        others = {"w1": one, "w2": two}
        assert [line(other) for other in others.values()] == ["turn", "turn"]
        for number in range(3):
            with stocked.clone("kept", "mine") as mine:
                mine.pwrite(random.Random(f"block {number}").randbytes(BLOCK), 0)
            stocked.delete("mine")
            found = stocked.collect()
            assert found.freed
            assert found.waiting == 0
        digests = {name: other.communicate()[0].split()[-1] for name, other in others.items()}
        assert (one.returncode, two.returncode) == (0, 0)
    stocked.collect()
    for name, digest in digests.items():
        assert hashlib.sha256(held(stocked, name)).hexdigest() == digest
    assert held(stocked, "kept") == content("kept", 50)
    marked = stocked.collect(dry_run=True)
    assert (marked.doomed, marked.marked) == (0, count(stocked, USED))


DYING = """
import random, sys, cowstore
store = cowstore.open(sys.argv[1])
clone = store.clone("kept", "desk", size=300 * 4096)
clone.pwrite(random.Random(1).randbytes(300 * 4096), 0)
clone.flush()
clone.pwrite(random.Random(2).randbytes(300 * 4096), 0)
list(clone.extents())
moment = store.device("desk", readonly=True)
print("ready", flush=True)
sys.stdin.readline()
"""


def test_what_the_dead_have_left_is_collected_and_what_the_living_have_is_not(path, stocked):
    def left() -> tuple[int, int, int]:
        with stocked._environment.read() as snapshot:
            hidden = [record for record in catalog.devices(snapshot) if not record.visible]
            return count(stocked, RESERVED), len(hidden), len(list(catalog.leases(snapshot)))

    before = left()
    assert before[1:] == (0, 1)
    with process(DYING, path) as other:
        assert line(other) == "ready"
        living = left()
        assert living[0] >= before[0] + 300
        assert living[1:] == (2, 2)  # the base and the root of its moment
        stocked.collect()
        assert left() == living
        other.kill()
        other.wait()
        stocked.collect()
        assert left() == before
    assert (count(stocked, DOOMED), count(stocked, USED)) == (0, 51 + 301)
    assert held(stocked, "desk") == random.Random(1).randbytes(300 * BLOCK)


def test_what_was_verified_is_verified_anew_after_an_erasure_by_another(path, stocked):
    """The slot may hold another block by now, which nobody here has looked at."""
    with cowstore.open(path) as other:
        assert held(other, "kept") == content("kept", 50)
        stocked.collect()
        with stocked.device("kept") as kept:
            damage(stocked, int(kept._tree.ids(0, 1)[0]))
        with other.device("kept") as kept, pytest.raises(cowstore.BlockCorruptError, match="match its digest"):
            kept.pread(BLOCK, 0)


# ----------------------------------------------------------------------------------------------- what waits


def test_a_pin_holds_the_erasure(stocked, impatient):
    with stocked.clone("kept", "disk") as disk:
        disk.pwrite(content("old", 20), 0)
        disk.flush()
        delta = disk.delta()  # keeps a pin until its end
        first = next(delta)
        disk.pwrite(content("new", 20), 0)
        disk.flush()
        found = stocked.collect()
        assert (found.erased, found.freed, found.pins) == (0, 0, (os.getpid(),))
        assert found.waiting == found.doomed >= 120
        assert stocked.stats().doomed == found.waiting * BLOCK
        assert [first[0], *(number for number, _ in delta)] == list(range(20))
        found = stocked.collect()
        assert (found.doomed, found.waiting) == (0, 0)
        assert found.erased >= 120
        assert disk.pread(20 * BLOCK, 0) == content("new", 20)


def test_a_pin_that_is_younger_than_the_doom_holds_nothing(stocked, impatient):
    with stocked.device("kept") as kept:
        older = kept.extents()
        next(older)
        assert stocked.collect().waiting == 103
        younger = kept.extents()
        next(younger)
        older.close()
        assert stocked.collect().freed == 103
        younger.close()


def test_it_waits_a_while(stocked, monkeypatch):
    pins, asked = Environment.pins, itertools.count(1)
    with stocked.device("kept") as kept:
        extents = kept.extents()
        next(extents)

        def patient(environment):
            if next(asked) == 3:
                extents.close()
            return pins(environment)

        monkeypatch.setattr(Environment, "pins", patient)
        assert stocked.collect().freed == 103


@pytest.mark.parametrize("blocks", [1, 40])
def test_a_flush_that_changes_nothing_holds_nothing(stocked, impatient, blocks):
    """The clones have looked blocks up; one finds that it has them already, and one drops what it has stored."""
    stocked.collect()
    with stocked.clone("kept", "same") as same, stocked.create("blank", 80 * BLOCK) as blank:
        same.pwrite(content("kept", blocks), 0)
        same.flush()
        blank.pwrite(content("kept", blocks) + content("new", blocks), 0)
        list(blank.extents())
        blank.zero(80 * BLOCK, 0)
        blank.flush()
        found = stocked.collect()
        assert (found.erased, found.waiting) == (blocks + 1, 0)
        assert stocked.stats().used == 51 * BLOCK


def test_a_moment_holds_what_it_shows_until_it_is_closed(stocked):
    with stocked.clone("kept", "disk") as disk:
        disk.pwrite(content("own", 10), 0)
    stocked.collect()
    assert stocked.exclusive("disk") == 11 * BLOCK
    with stocked.device("disk", readonly=True) as moment:
        assert stocked.exclusive("disk") == 0
        stocked.delete("disk")
        assert stocked.collect().doomed == 0
        assert moment.pread(10 * BLOCK, 0) == content("own", 10)
    with stocked._environment.read() as snapshot:
        assert [record.name for record in catalog.devices(snapshot)] == ["kept"]
    assert stocked.collect().doomed == 11


# ------------------------------------------------------------------------------------------------- damage


def damage(store: cowstore.Store, block_id: int) -> None:
    with open(store._engine.segments.path(block_id >> SLOT_BITS), "r+b") as file:
        file.seek(SLOTS_OFFSET + (block_id & SLOT_MASK) * BLOCK + 3000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def node_of(store: cowstore.Store, name: str) -> int:
    with store.device(name, readonly=True) as device:
        return device._tree.root.node


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_damaged_node_dooms_nothing(path, stocked, dry_run):
    with stocked.create("large", 3 * LEAF) as large:
        large.pwrite(b"a", 2 * LEAF)
    damage(stocked, node_of(stocked, "kept"))
    stocked.close()
    with cowstore.open(path) as store:
        with pytest.raises(cowstore.BlockCorruptError, match="match its digest"):
            store.collect(dry_run=dry_run)
        assert (count(store, DOOMED), count(store, USED)) == (0, 51 + 103 + 4)
        store.delete("kept")
        store.collect()
        assert count(store, USED) == 3
        assert held(store, "large")[2 * LEAF] == ord("a")


def test_a_node_that_names_what_it_cannot_name_dooms_nothing(stocked):
    """It verifies, but a leaf in it is data."""
    with stocked.create("disk", 2 * LEAF) as disk:
        disk.pwrite(b"a" * BLOCK, 0)
        disk.flush()
        disk._publisher.draft.changed_leaf(0)
        disk._publisher.draft._inner[1, 0][1] = int(disk._tree.ids(0, 1)[0])
        disk.flush()
    with pytest.raises(cowstore.BlockCorruptError, match="no place"):
        stocked.collect()
    assert count(stocked, DOOMED) == 0


def test_a_missing_segment_dooms_nothing(path, stocked):
    segment = stocked._engine.segments.path(node_of(stocked, "kept") >> SLOT_BITS)
    stocked.close()
    segment.rename(path / "elsewhere")
    with cowstore.open(path) as store:
        with pytest.raises(cowstore.SegmentCorruptError, match="missing"):
            store.collect()
        assert count(store, DOOMED) == 0
    (path / "elsewhere").rename(segment)
    with cowstore.open(path) as store:
        assert store.collect().freed == 103


def test_a_catalog_older_than_the_last_erasure_is_refused(path, stocked):
    """It names slots that were erased and may hold something else by now."""
    stocked.close()
    shutil.copytree(path / "catalog", path.with_name("older"))
    with cowstore.open(path) as store:
        store.collect()
    shutil.rmtree(path / "catalog")
    path.with_name("older").rename(path / "catalog")
    calls: list[Callable[[cowstore.Store], object]] = [lambda store: held(store, "kept"), cowstore.Store.collect]
    with cowstore.open(path) as store:
        for call in calls:
            with pytest.raises(cowstore.FormatError, match="older than the last erasure"):
                call(store)


def test_each_transaction_dooms_something_however_long_its_mark_takes(store, monkeypatch):
    """A mark of thousands of devices took longer than a slice, and a neighbour's commits asked for one each time.

    The collector went round and doomed nothing, for as long as the neighbour went on.
    """
    store.import_image(io.BytesIO(content("dead", 10)), "dead")
    store.delete("dead")
    store.create("neighbour", BLOCK).close()
    look = Collector._catch_up

    def committed_behind(self, known):
        found = look(self, known)
        store.rename("neighbour", "neighbour")
        return found

    monkeypatch.setattr(Collector, "_catch_up", committed_behind)
    monkeypatch.setattr(cowstore.collector, "_SLICE", 0)
    transactions = []

    def told(step: str, done: int, _: int) -> None:
        transactions.append(step)
        assert transactions.count("doom") <= 200, f"{done} slots doomed"

    assert store.collect(progress=told).freed >= 10


def test_a_process_that_ends_while_it_is_looked_at_is_no_damage(store, path, monkeypatch):
    """Its lease was listed, then removed in good order, and then missed as if the catalog were damaged."""
    other = cowstore.open(path)
    other.import_image(io.BytesIO(content("kept", 10)), "kept")
    ask = store._leases.is_held

    def ends_first(number: int) -> bool:
        other.close()
        return bool(ask(number))

    monkeypatch.setattr(store._leases, "is_held", ends_first)
    store.collect()
    assert store.info("kept").size == 10 * BLOCK
