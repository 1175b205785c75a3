"""Opens what a crash has left and compares it with what was promised.

Found must be: every name that was promised and none that was not, of every device a content that the book
allows, sound trees of used slots, accounts that agree. After a collection the same, with nothing dead left. And
the store goes on: a write is flushed and read back.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import cowstore
from cowstore import catalog, environment, layout, slots
from cowstore.clones import Clone
from cowstore.collector import live_roots
from cowstore.devices import Device
from cowstore.errors import FormatError
from cowstore.files import Disk
from cowstore.layout import DATA_KINDS, DELETED, DOOMED, FREE, RESERVED, USED
from cowstore.marks import Marks

from .model import BLOCK, Book, Fate, Model, Moment
from .recording import stored_ranges
from .worlds import Manner

COPIES_CHECKED = 0.3  # of the worlds
RESERVE = 4 << 20  # bytes
SMALL = 8 << 20  # bytes; larger devices are compared where they or the model have data


class BrokenPromiseError(AssertionError):
    """The store broke a promise."""


Promises = Mapping[str, Sequence[Fate]]
Found = dict[str, Fate]


def check_world(top: Path, name: str, book: Book, at: int, manner: Manner, rng: random.Random) -> Found:
    """Checks the store, its copies and the backups in a crashed world; returns what the store holds."""
    for backup, (_, end, held) in book.backups.items():
        if (top / backup).exists():
            check_backup(top / backup, held)
        elif end <= at:
            raise BrokenPromiseError(f"backup {backup} is not there")
    if not (top / name / "store.json").exists():
        if book.founded <= at:
            raise BrokenPromiseError("there is no store")
        with cowstore.open(top / name, create=True) as store:  # whatever is in the way
            _go_on(store, {}, rng)
        return {}
    promises = {name: _survivors(book.allowed(name, at), manner) for name in book.names()}
    if rng.random() < COPIES_CHECKED:
        check_copies(top / name, rng, wanted=book.copied <= at)
    blank = not manner.garbage and not book.littered
    with cowstore.open(top / name) as store:
        found = compare(store, promises)
        _check_together(book, at, promises, found)
        settled = {name: [fate] for name, fate in found.items()}
        audit(store, erased=blank)
        store.collect()
        compare(store, settled)
        audit(store, collected=True, erased=blank)
        if (top / name / "reserve").stat().st_size < RESERVE:
            raise BrokenPromiseError("there is no reserve after a collection")
        changed = _go_on(store, found, rng)
        for backup, (begun, _, _) in book.backups.items():
            if begun <= at and not (top / backup).exists():
                store.backup(top / backup)  # whatever is in the way
    with cowstore.open(top / name) as store:
        compare(store, {name: [fate] for name, fate in changed.items()}, others=found)
    return found | changed


def check_backup(path: Path, held: Mapping[str, Fate]) -> None:
    """A backup that has its name is complete."""
    with cowstore.open(path) as store:
        compare(store, {name: [fate] for name, fate in held.items()})
        audit(store)


def check_copies(path: Path, rng: random.Random, *, wanted: bool) -> None:
    """Every copy of the catalog verifies, and one put in the catalog's place leads to sound blocks."""
    copies = [copy for copy in (path / "catalog.copy.0", path / "catalog.copy.1") if copy.exists()]
    if wanted and not copies:
        raise BrokenPromiseError("there is no copy of the catalog")
    for copy in copies:
        environment.verify_copy(copy, Disk())
    if not copies:
        return
    aside, refused = path / "aside", 0
    os.rename(path / "catalog", aside)
    for copy in copies:
        shutil.copytree(copy, path / "catalog")
        try:
            with cowstore.open(path, readonly=True) as store:
                audit(store, erased=False)
        except FormatError:  # something was erased since it was made
            refused += 1
        shutil.rmtree(path / "catalog")
    os.rename(aside, path / "catalog")
    if refused == len(copies):
        raise BrokenPromiseError("no copy of the catalog is as new as the last erasure")


def _survivors(fates: Sequence[Fate], manner: Manner) -> list[Fate]:
    """What a reboot leaves: no ephemeral devices."""
    return [None if manner.power and fate is not None and fate.ephemeral else fate for fate in fates]


def _check_together(book: Book, at: int, promises: Promises, found: Found) -> None:
    """What one transaction changes is all there or not at all; told by what is there, while it is under way."""
    for start, end, names in book.together:
        if start < at < end:
            done = set()
            for name in names:
                before, after = promises[name][0], promises[name][-1]
                if (before is None) != (after is None):
                    done.add((found.get(name) is None) == (after is None))
            if len(done) > 1:
                raise BrokenPromiseError(f"only some of {', '.join(names)} were changed")


def compare(store: cowstore.Store, promises: Promises, *, others: Found | None = None) -> Found:
    """What each name stands for, which must be one of what it may; others are not looked at."""
    names = {info.name for info in store.devices()} - ((others or {}).keys() - promises.keys())
    if names - promises.keys():
        raise BrokenPromiseError(f"{sorted(names - promises.keys())} were never made")
    found: Found = {}
    for name, fates in promises.items():
        if name in names:
            found[name] = _matching(store, name, fates)
        elif None in fates:
            found[name] = None
        else:
            raise BrokenPromiseError(f"{name} is lost")
    return found


def _matching(store: cowstore.Store, name: str, fates: Sequence[Fate]) -> Moment:
    device = store.device(name)
    try:
        reasons = []
        for fate in fates:
            reason = "is there" if fate is None else difference(device, fate)
            if fate is not None and not reason:
                return fate
            reasons.append(reason)
        raise BrokenPromiseError(f"{name} {'; '.join(reasons)}")
    finally:
        if isinstance(device, Clone):
            device.discard()
        else:
            device.close()


def difference(device: Device, moment: Moment) -> str:
    """Where a device is not what it must be; empty where it is."""
    if device.size != moment.size:
        return f"has {device.size} bytes instead of {moment.size}"
    if moment.size <= SMALL:
        data, expected = device.pread(moment.size, 0), moment.bytes()
        if data == expected:
            return ""
        wrong = [at for at in range(0, moment.size, BLOCK) if data[at : at + BLOCK] != expected[at : at + BLOCK]]
        return f"differs in blocks {[at // BLOCK for at in wrong]}"
    left = dict(moment.blocks)
    for extent in device.extents():
        if extent.data:
            for offset in range(extent.offset, extent.offset + extent.length, BLOCK):
                data = device.pread(min(BLOCK, device.size - offset), offset)
                expected = left.pop(offset // BLOCK, bytes(BLOCK))[: len(data)]
                if data != expected:
                    return f"differs in block {offset // BLOCK}"
    return f"lacks blocks {sorted(left)}" if left else ""


def audit(store: cowstore.Store, *, collected: bool = False, erased: bool = True) -> None:
    """The trees, the states of the slots, and the accounts of the catalog.

    Args:
        store: The store.
        collected: Whether nothing dead may be left.
        erased: Whether free slots must be blank. Otherwise they are looked at when they are reserved.
    """
    segments = store._engine.segments
    with store._environment.read() as pin:
        pin.verify()
        marks = Marks(segments)
        marks.mark(live_roots(pin))
        reserved = _lease_masks(pin)
        for number, (kind, free) in catalog.segments(pin).items():
            states = slots.load_segment(pin, number)
            reached = marks.reached(number)
            where = f"segment {number}"
            _demand(states[reached] == USED, f"{where}: reached slots are not used")
            leased = reserved.pop(number, False)
            _demand((states == RESERVED) == leased, f"{where}: reserved slots and leases differ")
            _demand(np.count_nonzero(states == FREE) == free, f"{where}: its free slots are miscounted")
            if kind in DATA_KINDS:
                _read(store, number, reached)
            if collected:
                _demand((states == USED) == reached, f"{where}: used slots are not reached after a collection")
                _demand(states != DOOMED, f"{where}: doomed slots are left after a collection")
            if erased and (collected or not (states == DOOMED).any()):
                _demand(~_written(store, number)[states == FREE], f"{where}: free slots are not erased")
        if reserved:
            raise BrokenPromiseError(f"leases hold slots of unknown segments {sorted(reserved)}")
        _audit_devices(pin)


def _demand(good: object, what: str) -> None:
    if not np.all(good):  # type: ignore[call-overload]
        raise BrokenPromiseError(what)


def _lease_masks(pin: environment.Snapshot) -> dict[int, slots.Mask]:
    masks: dict[int, slots.Mask] = {}
    for lease in catalog.leases(pin):
        for first, count in lease.runs:
            number, slot = first >> layout.SLOT_BITS, first & layout.SLOT_MASK
            mask = masks.setdefault(number, np.zeros(layout.SLOTS_PER_SEGMENT, np.bool_))
            mask[slot : slot + count] = True
    return masks


def _read(store: cowstore.Store, number: int, reached: slots.Mask) -> None:
    """Every block that is named anywhere against its digest."""
    ids = np.flatnonzero(reached).astype(np.uint64) + np.uint64(number << layout.SLOT_BITS)
    if len(ids):
        store._engine.segments.read(ids, memoryview(bytearray(len(ids) * BLOCK)))


def _written(store: cowstore.Store, number: int) -> slots.Mask:
    """Which slots of a segment have a digest."""
    raw = bytearray(layout.SLOTS_OFFSET)
    for offset, data in stored_ranges(store._engine.segments.path(number), layout.SLOTS_OFFSET):
        raw[offset : offset + len(data)] = data
    words = np.frombuffer(raw, np.uint64, offset=layout.DIGESTS_OFFSET)
    return np.asarray((words[0::2] | words[1::2]) != 0)


def _audit_devices(pin: environment.Snapshot) -> None:
    records = {record.number: record for record in catalog.devices(pin)}
    named = {layout.key_number(payload): key.decode() for key, payload in pin.items(environment.NAMES)}
    visible = {number: record.name for number, record in records.items() if record.visible}
    if named != visible:
        raise BrokenPromiseError(f"names {named} and devices {visible} do not agree")
    for number, record in records.items():
        children = sum(child.parent == number for child in records.values())
        if children != record.children:
            raise BrokenPromiseError(f"device {number} counts {record.children} children and has {children}")
        if record.flags & DELETED and not children:
            raise BrokenPromiseError(f"device {number} is kept without a child")
        if record.number >= pin.state.next_number or record.sequence > pin.state.sequence:
            raise BrokenPromiseError(f"device {number} has numbers that will be given again")


def _go_on(store: cowstore.Store, found: Found, rng: random.Random) -> Found:
    """Writes to a clone, there already or new, and flushes."""
    clones = sorted(info.name for info in store.devices() if info.kind == "clone" and info.size)
    name = rng.choice([*clones, "afterwards"])
    before = found.get(name) or Moment(100 * BLOCK, {})
    model = Model(before)
    clone = store.device(name) if name in clones else store.create(name, model.size)
    assert isinstance(clone, Clone)
    with clone:
        for _ in range(3):
            data = rng.randbytes(rng.randint(1, 3 * BLOCK))[: model.size]
            offset = rng.randrange(model.size - len(data) + 1)
            clone.pwrite(data, offset)
            model.write(data, offset)
        clone.flush()
        reason = difference(clone, model.moment())
        if reason:
            raise BrokenPromiseError(f"{name}, written after the crash, {reason}")
    return {name: model.moment()}
