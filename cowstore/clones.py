"""Clones: the write path. Unflushed blocks stay in memory, bounded, until a flush publishes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol, Self

from .catalog import DeviceInfo, check_size
from .devices import Device
from .digest import BLOCK_SIZE
from .errors import PoisonedError
from .files import boot_id
from .journal import Change, Journal
from .layout import JOURNAL_DATA, JOURNAL_ZEROS, DeviceRecord, Root
from .publisher import Publisher, Workshop

_DIRTY_LIMIT = 4096  # blocks, 16 MiB: beyond that they are interned before the flush


class Lineage(Protocol):
    """What a clone asks of its store, by its number: its name may have been changed meanwhile."""

    def fork_number(self, number: int, names: tuple[str, ...]) -> list[DeviceInfo]:
        """New clones that start from the last flushed moment."""
        ...

    def seal_number(self, number: int, name: str) -> DeviceInfo:
        """Publishes the last flushed moment as an image."""
        ...


class Clone(Device):
    """A writable device, held exclusively by this handle.

    Any number of threads may use it: each write, and each read of more than a block, is done as a whole under
    the device's lock, in the order in which the threads get it. A flush covers every write that returned
    before it was called; reads and writes go on while it waits for the disk.

    Writes are in memory, or on the disk but unpublished, until flush(). What is not flushed is lost with the
    process, and nobody else sees it.
    """

    def __init__(
        self, info: DeviceInfo, record: DeviceRecord, workshop: Workshop, lineage: Lineage,
        release: Callable[[], None], journal: Journal | None = None,
    ) -> None:  # fmt: skip
        self._publisher = Publisher(workshop, record)
        self._journal = journal
        super().__init__(
            info, record.base, self._publisher.draft, workshop.environment, workshop.segments, release
        )
        self._lineage = lineage
        self._dirty: dict[int, bytes] = {}
        self._flushing = threading.Lock()
        self._ending = False
        self._broken: PoisonedError | None = None

    # Writing.

    def pwrite(self, data: Any, offset: int) -> int:
        """Writes bytes; returns how many, which is all of them.

        Raises:
            RangeError: Some of it would lie outside the device.
        """
        view = memoryview(data).cast("B")
        with self._lock:
            self._admit(len(view), offset)
            if len(view) == BLOCK_SIZE and not offset % BLOCK_SIZE:  # as most of a guest's writes
                self._dirty[offset // BLOCK_SIZE] = bytes(view)
            else:
                self._put(view, offset)
            if self._journal is not None:
                self._journal.wrote(view, offset, self._size)
        return len(view)

    def zero(self, length: int, offset: int) -> None:
        """Makes a range read as zeros. Whole blocks of it take no space any more."""
        with self._lock:
            self._admit(length, offset)
            self._zero(length, offset)
            if self._journal is not None:
                self._journal.zeroed(length, offset, self._size)

    def _zero(self, length: int, offset: int) -> None:
        """Whole blocks become holes, and the rest is written."""
        end = offset + length
        first, last = -(-offset // BLOCK_SIZE), end // BLOCK_SIZE
        if end == self._size:
            last = -(-end // BLOCK_SIZE)
        if first >= last:
            self._put(memoryview(bytes(length)), offset)
            return
        self._put(memoryview(bytes(first * BLOCK_SIZE - offset)), offset)
        self._clear(first, last)
        if last * BLOCK_SIZE < end:
            self._put(memoryview(bytes(end - last * BLOCK_SIZE)), last * BLOCK_SIZE)

    def trim(self, length: int, offset: int) -> None:
        """Gives a range's whole blocks back; all of the range reads as zeros afterwards."""
        self.zero(length, offset)

    def resize(self, size: int) -> None:
        """Changes the size in bytes; durable with the next flush.

        What is cut off is gone: growing again shows zeros.
        """
        check_size(size)
        with self._lock:
            self._admit(0, 0)
            if size < self._size:
                keep = -(-size // BLOCK_SIZE)
                self._clear(keep, max(keep, -(-self._size // BLOCK_SIZE)))
                cut = min(keep * BLOCK_SIZE, self._size) - size
                if cut:
                    self._put(memoryview(bytes(cut)), size)
            self._publisher.draft.resize(size)
            self._set_size(size)
            if self._journal is not None:
                self._journal.resized(size)

    def _admit(self, length: int, offset: int) -> None:
        """Whether a range may be written now; makes room in memory first.

        Not afterwards: on a full disk that fails, and then nothing more may be taken into memory.
        """
        self._checked(length, offset)
        self._check_sound()
        if len(self._dirty) > _DIRTY_LIMIT:
            self._stage()
        if self._publisher.draft.is_large():
            self._publisher.emit()

    def _check_sound(self) -> None:
        self._segments.check_writable()
        if self._broken is not None:
            raise PoisonedError(self._broken.reason) from self._broken

    def _put(self, view: memoryview, offset: int) -> None:
        number, skip = divmod(offset, BLOCK_SIZE)
        done, end = 0, len(view)
        while done < end:
            part = min(BLOCK_SIZE - skip, end - done)
            if part == BLOCK_SIZE:
                self._dirty[number] = bytes(view[done : done + BLOCK_SIZE])
            else:
                block = self._block(number)
                block[skip : skip + part] = view[done : done + part]
                self._dirty[number] = bytes(block)
            done, number, skip = done + part, number + 1, 0
            if len(self._dirty) > 4 * _DIRTY_LIMIT:
                self._stage()

    def _clear(self, first: int, end: int) -> None:
        """Makes holes of whole blocks."""
        if first >= end:
            return
        self._publisher.draft.clear(first, end)  # before the blocks go: see Device.pread
        inside = range(first, end)
        for number in [n for n in self._dirty if n in inside] if len(self._dirty) < len(inside) else inside:
            self._dirty.pop(number, None)

    def _stage(self) -> None:
        """Moves unflushed blocks from memory to slots."""
        if self._dirty:
            self._publisher.stage_scattered(self._dirty)
            self._dirty.clear()  # after the leaves name them: see Device.pread

    # The journal.

    def keep_journal(self) -> None:
        """From now on what is written survives the death of this process, though not of the host.

        Whoever opens the clone for writing next finds it there. A write costs a copy more; one that cannot be
        recorded raises NoSpaceError.
        """
        if self._journal is not None and any(boot_id()):  # where boots look alike, an old one could be done again
            self._journal.is_kept = True

    def defer_records(self, deferred: bool) -> None:
        """Has the journal wait for record(), for who answers many writes at once and holds the clone steady."""
        if self._journal is not None:
            self._journal.is_deferred = deferred

    def record(self) -> None:
        """Records the writes that waited, all or none.

        Raises:
            NoSpaceError: There is no room; none of them may be answered as done.
        """
        if self._journal is not None:
            self._journal.record()

    @property
    def journal_size(self) -> int:
        """Bytes that the journal holds of writes since the last flush began."""
        return 0 if self._journal is None else self._journal.size

    def recovered(self) -> Self:
        """Does again, and flushes, what a process that died had written and not flushed; called once, at opening.

        Where that fails the clone is given back, and the journal stays.
        """
        try:
            if self._journal is not None and self._journal.is_left:
                if self._do_again(self._journal.left()):
                    self.flush()
                self._journal.drop()
        except BaseException:
            self._give_back()
            raise
        return self

    def _do_again(self, changes: Iterator[Change]) -> int:
        """Makes changes; returns how many."""
        count = 0
        for kind, offset, length, data in changes:
            count += 1
            if kind == JOURNAL_DATA:
                self.pwrite(data, offset)
            elif kind == JOURNAL_ZEROS:
                self.zero(length, offset)
            else:
                self.resize(offset)
        return count

    # Flushing.

    def flush(self) -> None:
        """Makes every write that has returned durable, and the clone's present moment with them.

        Raises:
            PoisonedError: A sync failed; nothing more can be written until the store is opened anew.
            NoSpaceError: The disk is full. Nothing is lost: free some space and flush again.
            ClosedError: The clone is closed, and its unflushed writes are gone.
        """
        if self._ending:
            return  # io.IOBase.close() flushes once more
        self._check_open()
        with self._flushing:
            try:
                self._publisher.flush(self._lock, self._before_flush)
            except PoisonedError as error:
                self._broken = error
                raise
            if self._journal is not None:
                self._journal.covered()

    def _before_flush(self) -> None:
        self._epoch += 1  # see Device.pread
        self._check_open()
        self._check_sound()
        if self._journal is not None:
            self._journal.turn()
        self._stage()

    def _moment(self) -> Root:
        super()._moment()
        self._stage()
        self._publisher.emit()
        return self._publisher.draft.root

    # Lineage.

    def fork(self, *names: str) -> list[DeviceInfo]:
        """Flushes, then gives the present moment to new clones; they and this one go on apart."""
        self._check_open()
        self.flush()
        return self._lineage.fork_number(self.info.number, names)

    def seal(self, name: str) -> DeviceInfo:
        """Flushes, then publishes the present moment as an image."""
        self._check_open()
        self.flush()
        return self._lineage.seal_number(self.info.number, name)

    def reset(self) -> None:
        """Goes back to the parent's moment: everything written since is dropped, flushed or not."""
        with self._flushing, self._lock:
            self._check_open()
            self._check_sound()
            if self._journal is not None:
                self._journal.drop()
            given_up = self._publisher
            self._publisher = given_up.restarted(self._base)
            self._adopt(self._base.size)
            self._dirty.clear()
            self._epoch += 1  # after nobody finds the old tree, before its slots are given up
            given_up.close()
        self.flush()

    def _adopt(self, size: int) -> None:
        self._tree = self._publisher.draft
        self._leaves = self._tree.leaves
        self._set_size(size)

    def _set_size(self, size: int) -> None:
        self._size = size
        self.info = replace(self.info, size=size)

    # As a file, and the end.

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any) -> int:
        """Writes at the file position; fewer bytes at the end of the device, whose size does not grow.

        Raises:
            RangeError: The position is at the end or behind it; a buffered writer would try for ever.
        """
        view = memoryview(data).cast("B")
        with self._lock:
            count = min(len(view), max(self._size - self._position, 0)) or len(view)
            self.pwrite(view[:count], self._position)
            self._position += count
        return count

    def truncate(self, size: int | None = None) -> int:
        """Sets the size in bytes, by default to the file position."""
        with self._lock:
            size = self._position if size is None else size
            self.resize(size)
            return size

    def close(self) -> None:
        """Flushes and gives the clone back, also where the flush fails; harmless when done twice.

        Where it fails, what was not flushed is lost, unless a journal was kept: then it is there when the clone is
        opened again.
        """
        try:
            if self._release is not None:
                self.flush()
        finally:
            self._give_back()

    def discard(self) -> None:
        """Gives the clone back without a flush: it stays as it was last flushed."""
        with self._flushing, self._lock:
            if self._release is not None and self._journal is not None:
                self._journal.drop()
        self._give_back()

    def _give_back(self) -> None:
        with self._flushing, self._lock:
            release, self._release = self._release, None
            self._leaves = {}
            self._epoch += 1
            if release is not None:
                self._dirty.clear()
                try:
                    if self._journal is not None:
                        self._journal.close()
                    self._publisher.close()
                finally:
                    release()
        self._ending = True
        try:
            super().close()
        finally:
            self._ending = False

    def abandon(self) -> None:
        """In a child made by os.fork(): nothing may be used or released, the parent owns it."""
        self._flushing = threading.Lock()
        if self._journal is not None:
            self._journal.close()
        super().abandon()
