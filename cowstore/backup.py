"""Backups: a consistent copy of a whole store while it is in use.

All roots of one moment are held by hidden images. What they reach is copied, verified, to the same places in
new segment files, so that no id changes; the catalog comes last, and the copy gets its name when all of it
is durable. Ephemeral devices stay behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from . import catalog, layout, slots
from .checkpoint import CheckpointRecord
from .digest import BLOCK_SIZE, Hasher
from .environment import Environment, Snapshot, Writer
from .errors import BlockCorruptError, ExistsError, NotFoundError, StoreError
from .files import Disk
from .layout import CHUNK_SLOTS, CHUNKS_PER_SEGMENT, DELETED, FREE, SLOT_BITS, USED, DeviceRecord, Identity
from .marks import Marks
from .segments import Segments

Progress = Callable[[str, int, int], None]
_PIECE = 1024  # slots copied at once, 4 MiB


class Backup:
    """One backup.

    Args:
        disk: Writes the copy.
        source: The segments to copy from.
        hasher: Both stores have one seed.
        target: The directory to be made.
    """

    def __init__(self, disk: Disk, source: Segments, hasher: Hasher, target: Path) -> None:
        if os.path.lexists(target):
            raise ExistsError("file", str(target), hint="a backup makes a new directory")
        if not os.path.isdir(target.parent):
            raise NotFoundError("directory", str(target.parent), hint="make it first")
        self._disk = disk
        self._source = source
        self._hasher = hasher
        self._target = target
        self._aside = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        self._identity = Identity(os.urandom(16), hasher.seed)
        self._checkpoints: list[CheckpointRecord] = []

    def choose(self, snapshot: Snapshot) -> list[DeviceRecord]:
        """What is to be copied: the devices, and the checkpoints of the same moment."""
        self._checkpoints = list(catalog.checkpoints(snapshot))
        return records_to_keep(snapshot)

    def write(self, records: list[DeviceRecord], progress: Progress) -> None:
        """Copies what these devices reach, and the chosen checkpoints; all of it or nothing."""
        marks = Marks(self._source)
        marks.mark(root for record in records for root in (record.base, record.root))
        try:
            self._make_directories()
            kinds = self._copy_segments(marks, progress)
            self._make_catalog(records, marks, kinds)
            self._disk.write_whole(self._aside / "store.json", layout.encode_identity(self._identity))
            self._disk.rename(self._aside, self._target)
            self._disk.sync_directory(self._target.parent)
        except BaseException as error:
            self._disk.remove_tree(self._aside)
            if isinstance(error, OSError):
                raise StoreError(f"cannot write {self._target}: {error.strerror}") from error
            raise

    def _make_directories(self) -> None:
        self._disk.make_directory(self._aside)
        for name in ("segments", "index", "leases"):
            self._disk.make_directory(self._aside / name)

    def _copy_segments(self, marks: Marks, progress: Progress) -> dict[int, int]:
        copy = Segments(
            self._disk, self._aside / "segments", self._hasher, self._identity.store_id, lambda: 0, writable=True
        )
        try:
            kinds, done = {}, 0
            for number in marks.numbers():
                kinds[number] = self._source.get(number).kind
                copy.create(number, kinds[number])
                for first, count in slots.array_runs(marks.reached(number)):
                    for start in range(first, first + count, _PIECE):
                        length = min(_PIECE, first + count - start)
                        self._copy_run(copy, (number << SLOT_BITS) + start, length)
                        done += length
                        progress("backup", done * BLOCK_SIZE, marks.count * BLOCK_SIZE)
                copy.sync([number])
            return kinds
        finally:
            copy.close()

    def _copy_run(self, copy: Segments, first: int, count: int) -> None:
        data = memoryview(bytearray(count * BLOCK_SIZE))
        self._source.read_raw(first, data)
        stored = self._source.digests(first, count)
        found = self._hasher.digests([data[at : at + BLOCK_SIZE] for at in range(0, len(data), BLOCK_SIZE)])
        for position, digest in enumerate(found):
            expected = stored[position * 16 : position * 16 + 16]
            if digest != expected:
                raise BlockCorruptError(first + position, "its bytes do not match its digest", expected=expected)
        copy.write(first, [data], stored)

    def _make_catalog(self, records: list[DeviceRecord], marks: Marks, kinds: dict[int, int]) -> None:
        path, gate = self._aside / "catalog", self._aside / "leases" / "writer"
        Environment.create(path, self._disk, gate)
        environment = Environment.open(path, self._disk, gate, readonly=False)
        try:
            with environment.write() as writer:
                taken = [*kinds, *(one.number for one in records), *(one.number for one in self._checkpoints)]
                writer.state.next_number = max(taken, default=0) + 1
                writer.state.sequence = max((record.sequence for record in records), default=0)
                for record in records:
                    catalog.restore(writer, record)
                for checkpoint in self._checkpoints:
                    catalog.save_checkpoint(writer, checkpoint)
                for number, kind in kinds.items():
                    _save_slots(writer, number, kind, marks)
        finally:
            environment.close()


def _save_slots(writer: Writer, number: int, kind: int, marks: Marks) -> None:
    states = marks.reached(number) * np.uint8(USED)
    for chunk in range(CHUNKS_PER_SEGMENT):
        slots.store(writer, number, chunk, states[chunk * CHUNK_SLOTS : (chunk + 1) * CHUNK_SLOTS])
    catalog.save_segment(writer, number, kind, int((states == FREE).sum()))


def records_to_keep(snapshot: Snapshot) -> list[DeviceRecord]:
    """Every device that outlives a reboot and the images of checkpoints.

    Their ancestors come too, as names only where they stay behind.
    """
    everything = {record.number: record for record in catalog.devices(snapshot)}
    owners = {one.number for one in catalog.checkpoints(snapshot)}
    kept = {
        number: record for number, record in everything.items()
        if (record.visible and not record.ephemeral) or record.owner in owners
    }  # fmt: skip
    children = dict.fromkeys(everything, 0)
    todo = list(kept.values())
    while todo:
        parent = todo.pop().parent
        if parent:
            children[parent] += 1
            if parent not in kept:
                nothing = layout.Root(layout.HOLE, 1, 0)
                kept[parent] = replace(everything[parent], base=nothing, root=nothing, flags=DELETED, owner=0)
                todo.append(kept[parent])
    return [replace(record, children=children[number]) for number, record in kept.items()]
