"""Imports: bytes from outside, and what ephemeral devices leave behind, become images.

An import publishes slice after slice as a hidden image, so that neither its memory nor what a crash costs
depends on its length; the last slice gives the image its name. The disk syncs one slice while the next one is
read and hashed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from . import layout, tree
from .catalog import DeviceInfo
from .clones import Clone
from .clones import Lineage as Handles
from .digest import BLOCK_SIZE, ZERO_BLOCK
from .environment import Snapshot
from .errors import InvalidError
from .layout import FANOUT_BITS, IMAGE, MAP, DeviceRecord, Root
from .lineage import Lineage
from .publisher import Publisher, Workshop
from .segments import Segments
from .sources import Source

Progress = Callable[[str, int, int], None]
_Job = TypeVar("_Job", "Import", "Intake")
_SLICE = 16384  # blocks, 64 MiB: after so many the slice is published
_GATHERED = 1024  # blocks that are taken in together, wherever they belong
_LONG = 64  # blocks in a row that are taken in as they come


class Import:
    """One import under way.

    Args:
        workshop: Writers' tools.
        hidden: The hidden image to fill.
        final: What its record is to be in the end.
    """

    def __init__(self, workshop: Workshop, hidden: DeviceRecord, final: DeviceRecord) -> None:
        self._publisher = Publisher(workshop, hidden)
        self._final = final
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "cowstore-import")
        self._flushing: Future[None] | None = None
        self._staged = 0

    def read(self, source: Source, progress: Progress) -> DeviceRecord:
        """Takes everything in; returns the published record."""
        total = source.size
        for offset, piece in source.pieces():
            self._grow(source.size)
            self._stage(offset // BLOCK_SIZE, piece)
            progress("import", offset + len(piece), total)
        return self._finish()

    def lay(self, pages: Source, progress: Progress) -> DeviceRecord:
        """Lays pages over what is there; returns the published record. Scattered ones are taken in together."""
        self._grow(pages.size)
        gathered, numbers = memoryview(bytearray(_GATHERED * BLOCK_SIZE)), list[int]()
        for offset, piece in pages.pieces():
            first, count = offset // BLOCK_SIZE, len(piece) // BLOCK_SIZE
            if count >= _LONG:
                self._stage(first, piece)
            else:
                if len(numbers) + count > _GATHERED:
                    self._stage_gathered(gathered, numbers)
                    progress("import", offset, pages.size)
                start = len(numbers) * BLOCK_SIZE
                gathered[start : start + len(piece)] = piece
                numbers += range(first, first + count)
        self._stage_gathered(gathered, numbers)
        progress("import", pages.size, pages.size)
        return self._finish()

    def _stage_gathered(self, gathered: memoryview, numbers: list[int]) -> None:
        """Stages blocks by their numbers, and forgets them."""
        if not numbers:
            return
        with self._lock:
            self._publisher.stage_blocks(np.array(numbers, np.int64), gathered[: len(numbers) * BLOCK_SIZE])
            if self._publisher.draft.is_large():
                self._publisher.emit()
        self._count(len(numbers))
        numbers.clear()

    def copy(self, segments: Segments, base: Root, root: Root) -> DeviceRecord:
        """Makes what stands on a base equal to a root of another device; blocks are stored anew or shared."""
        self._publisher.draft.resize(root.size)
        for index, _, ids in tree.diff(segments, base, root):
            data = memoryview(bytearray(len(ids) * BLOCK_SIZE))
            segments.read(ids, data)
            self._stage(index << FANOUT_BITS, data)
        return self._finish()

    def _grow(self, size: int) -> None:
        if size > layout.MAX_SIZE:
            raise InvalidError(f"an image cannot have {size} bytes", hint=f"at most {layout.MAX_SIZE}")
        if size > self._publisher.draft.root.size:
            with self._lock:
                self._publisher.draft.resize(size)

    def _stage(self, first: int, piece: memoryview) -> None:
        whole = len(piece) - len(piece) % BLOCK_SIZE
        with self._lock:
            if whole:
                self._publisher.stage(first, piece[:whole])
            if whole < len(piece):
                tail = bytes(piece[whole:]) + ZERO_BLOCK[len(piece) - whole :]
                self._publisher.stage(first + whole // BLOCK_SIZE, memoryview(tail))
            if self._publisher.draft.is_large():
                self._publisher.emit()
        self._count(len(piece) // BLOCK_SIZE)

    def _count(self, staged: int) -> None:
        """Publishes what is staged where it is enough for a slice."""
        self._staged += staged
        if self._staged >= _SLICE:
            self._publish_slice()

    def _publish_slice(self) -> None:
        self._wait()
        self._staged = 0
        self._flushing = self._pool.submit(self._publisher.flush, self._lock, lambda: None)

    def _wait(self) -> None:
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()

    def _finish(self) -> DeviceRecord:
        self._wait()
        self._publisher.final = replace(self._final, number=self._publisher.record.number)
        self._publisher.flush(self._lock, lambda: None)
        return self._publisher.record

    def close(self) -> None:
        """Ends it; what is not published is given up."""
        self._pool.shutdown()
        self._publisher.close()


class Intake(Clone):
    """A hidden image that is filled like a clone, in any order, and gets its name in the end.

    Attributes:
        unpublished: Bytes written since the last flush.
    """

    def __init__(
        self, workshop: Workshop, lineage: Lineage, handles: Handles, hidden: DeviceRecord, final: DeviceRecord
    ) -> None:
        super().__init__(lineage.describe(hidden), hidden, workshop, handles, lambda: None)
        self._final = final
        self.unpublished = 0

    def pwrite(self, data: Any, offset: int) -> int:
        """See Clone."""
        count = super().pwrite(data, offset)
        self.unpublished += count
        return count

    def flush(self) -> None:
        """See Clone."""
        self.unpublished = 0
        super().flush()

    def publish(self) -> DeviceRecord:
        """Makes everything durable and gives the image its name; returns the published record."""
        self._publisher.final = replace(self._final, number=self._publisher.record.number)
        self.flush()
        return self._publisher.record

    def close(self) -> None:
        """Ends it; what is not published is given up."""
        self.discard()


def is_durable(segments: Segments, root: Root) -> bool:
    """Whether a root outlives a reboot: whether its top node lies in an ordinary map segment."""
    return not root.node or segments.get(root.node >> layout.SLOT_BITS).kind == MAP


def import_source(
    workshop: Workshop, lineage: Lineage, source: Source, name: str, progress: Progress
) -> DeviceInfo:
    """Takes a source in as an image. What fails leaves nothing behind."""
    blank = Root(layout.HOLE, layout.height_for(source.size), source.size)
    image = DeviceRecord(0, name, IMAGE, Root(layout.HOLE, 1, 0), blank)
    return _make_image(workshop, lineage, image, Import, lambda job: job.read(source, progress))


def import_disk(
    workshop: Workshop, lineage: Lineage, handles: Handles, size: int, name: str, fill: Callable[[Intake], None]
) -> DeviceInfo:
    """Makes an image of so many bytes by writing to it. What fails leaves nothing behind.

    Args:
        workshop: Writers' tools.
        lineage: The records.
        handles: What a clone asks of its store.
        size: Bytes.
        name: The image's name.
        fill: Writes it.
    """
    image = DeviceRecord(0, name, IMAGE, Root(layout.HOLE, 1, 0), Root(layout.HOLE, layout.height_for(size), size))

    def start(_: Workshop, hidden: DeviceRecord, final: DeviceRecord) -> Intake:
        return Intake(workshop, lineage, handles, hidden, final)

    def filled(intake: Intake) -> DeviceRecord:
        fill(intake)
        return intake.publish()

    return _make_image(workshop, lineage, image, start, filled)


def seal_ephemeral(workshop: Workshop, lineage: Lineage, record: DeviceRecord, name: str) -> DeviceInfo:
    """Makes an image of an ephemeral clone's moment, which the caller holds, in ordinary segments."""
    base = record.base if is_durable(workshop.segments, record.base) else Root(layout.HOLE, 1, 0)
    image = DeviceRecord(0, name, IMAGE, base, base, parent=record.parent)
    copy = workshop.segments, base, record.root
    return _make_image(workshop, lineage, image, Import, lambda job: job.copy(*copy))


def copy_hidden(workshop: Workshop, lineage: Lineage, record: DeviceRecord) -> DeviceRecord:
    """Makes a hidden image of an ephemeral device's moment in ordinary segments; the caller holds its roots."""
    base = record.base if is_durable(workshop.segments, record.base) else Root(layout.HOLE, 1, 0)
    return fill_hidden(
        workshop, lineage, lambda _: base, lambda job: job.copy(workshop.segments, base, record.root)
    )


def fill_hidden(
    workshop: Workshop, lineage: Lineage, start: Callable[[Snapshot], Root], fill: Callable[[Import], DeviceRecord]
) -> DeviceRecord:
    """Makes a hidden image that stays with the process lease. What fails leaves nothing behind.

    Args:
        workshop: Writers' tools.
        lineage: The records.
        start: What it starts from, found in the transaction that makes it.
        fill: Writes it.
    """
    hidden = lineage.start_hidden(start, workshop.reservations.lease_number)
    return _filled(lineage, hidden, Import(workshop, hidden, hidden), fill)


def _filled(
    lineage: Lineage, hidden: DeviceRecord, job: _Job, fill: Callable[[_Job], DeviceRecord]
) -> DeviceRecord:
    """What a job makes of a hidden image, which goes where it fails."""
    try:
        record = fill(job)
    except BaseException:
        job.close()
        lineage.drop_hidden([hidden.number])
        raise
    job.close()
    return record


def _make_image(
    workshop: Workshop,
    lineage: Lineage,
    image: DeviceRecord,
    start: Callable[[Workshop, DeviceRecord, DeviceRecord], _Job],
    fill: Callable[[_Job], DeviceRecord],
) -> DeviceInfo:
    lineage.check_free(image.name)
    hidden = lineage.start_image(image, workshop.reservations.lease_number)
    job = start(workshop, hidden, replace(image, created=hidden.created))
    return lineage.describe(_filled(lineage, hidden, job, fill))
