"""Publishers: a draft and its new blocks on their way into the catalog.

Stage blocks, and flush: nodes and a commit block are written, the committer syncs and moves the root. Shared
by clones, which are flushed by their users, and by imports, which publish slice after slice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from . import catalog, tree
from .blocks import Interner
from .committer import Flush, StaleHits
from .digest import BLOCK_SIZE, Hasher
from .draft import Draft
from .environment import Environment
from .errors import StoreError
from .layout import DeviceRecord, Root, Run
from .reservations import Reservations
from .segments import Segments

_FLUSH_TRIES = 100


class _Committer(Protocol):
    def commit(self, flush: Flush) -> DeviceRecord: ...


@dataclass(frozen=True)
class Workshop:
    """What every writer of a store works with."""

    environment: Environment
    segments: Segments
    reservations: Reservations
    hasher: Hasher
    committer: _Committer
    interner: Callable[[bool], Interner]


class Publisher:
    """A draft on its way into the catalog: staged blocks in, commits out.

    Shared by clones and imports. One flush() at a time; while it waits for the disk, blocks may be staged for
    the next one under the lock that it was given.

    Attributes:
        record: The device's record as it was last published.
        draft: The tree that is being changed.
        final: What the record becomes with the next flush: a hidden image gets its name with its last one.
    """

    def __init__(self, workshop: Workshop, record: DeviceRecord) -> None:
        self.record = record
        self.draft = Draft(workshop.segments, record.root, ephemeral=record.ephemeral)
        self.final: DeviceRecord | None = None
        self._workshop = workshop
        self._interner = workshop.interner(record.ephemeral)
        self._pending: list[Interner] = []  # detached by a flush that is not published yet
        self._unpublished: list[Run] = []  # map slots of such a flush

    def stage(self, first: int, data: memoryview) -> None:
        """Stores blocks in a row and names them in the draft."""
        self.draft.set_ids(first, self._interner.intern(data))

    def stage_scattered(self, blocks: dict[int, bytes]) -> None:
        """Stores blocks by their numbers and names them in the draft."""
        numbers = sorted(blocks)
        self.stage_blocks(np.array(numbers, np.int64), memoryview(b"".join(map(blocks.__getitem__, numbers))))

    def stage_blocks(self, numbers: npt.NDArray[np.int64], data: memoryview) -> None:
        """The same for blocks that stand together already, in the order of their numbers."""
        ids = self._interner.intern(data)
        if len(numbers) == 1:
            self.draft.set_ids(int(numbers[0]), ids)
        else:
            self.draft.set_scattered(numbers, ids)

    def emit(self) -> None:
        """Writes the changed nodes, so that they need no memory; nothing is published."""
        self.draft.emit(self._workshop.reservations, self._workshop.hasher)

    def flush(self, lock: AbstractContextManager[object], stage: Callable[[], None]) -> None:
        """Makes everything staged so far durable and published.

        Args:
            lock: Held while the draft is used, and not while the disk is waited for.
            stage: Called under the lock, before anything else.
        """
        for _ in range(_FLUSH_TRIES):
            with lock:
                stage()
                flush = self._prepare()
            if flush is None:
                return
            try:
                self._commit(flush)
                return
            except StaleHits as stale:
                with lock:
                    self._replace_stale(stale)
        raise StoreError(f"blocks of {self.record.name!r} were doomed again and again while it was flushed")

    def _prepare(self) -> Flush | None:
        """Writes nodes and commit block; None if there is nothing to publish."""
        self.emit()
        if self.draft.root == self.record.root and self.final is None:
            self.close()  # what was stored on the way is named by nothing, and the pin must not last
            return None
        reservations = self._workshop.reservations
        after = replace(
            self.final or self.record, root=self.draft.root, sequence=reservations.sequence(self.record.sequence)
        )
        self._pending.append(self._interner)
        self._interner = self._workshop.interner(self.record.ephemeral)
        data = [run for interner in self._pending for run in interner.written]
        self.draft.write_commit(reservations, self._workshop.hasher, after, [*data, *self._unpublished])
        self._unpublished += self.draft.written
        self.draft.written = []
        return Flush(
            self.record, after, (*data, *self._unpublished), [ids for one in self._pending for ids in one.hits],
            min((one.dooms for one in self._pending if one.dooms >= 0), default=-1), not self.record.ephemeral,
        )  # fmt: skip

    def _commit(self, flush: Flush) -> None:
        try:
            self.record = self._workshop.committer.commit(flush)
        except StaleHits:
            raise
        except BaseException:
            # An interrupt does not tell whether the transaction was done; the catalog does.
            if self._is_published(flush):
                self._go_on_from(flush.after)
            raise
        self._go_on_from(self.record)

    def _is_published(self, flush: Flush) -> bool:
        try:
            with self._workshop.environment.read() as snapshot:
                current = catalog.by_number(snapshot, flush.before.number)
        except StoreError:
            return False
        return current is not None and current.sequence == flush.after.sequence

    def _go_on_from(self, record: DeviceRecord) -> None:
        self.record = record
        published, self._pending, self._unpublished = self._pending, [], []
        for interner in published:
            interner.publish()

    def _replace_stale(self, stale: StaleHits) -> None:
        """Stores shared blocks that were doomed anew. Their old slots are still there: the pins hold them."""
        self.emit()
        for index, _, ids in tree.diff(self._workshop.segments, self.record.root, self.draft.root):
            at = np.flatnonzero(np.isin(ids, stale.ids))
            if len(at):
                data = memoryview(bytearray(len(at) * BLOCK_SIZE))
                self._workshop.segments.read(ids[at], data)
                changed = tree.ids_of(self.draft.changed_leaf(index))
                changed[at] = self._interner.store(data)
        for interner in self._pending:
            interner.forget_hits(stale.ids)

    def restarted(self, root: Root) -> Publisher:
        """Another publisher for the same device, which goes on from another root."""
        other = Publisher(self._workshop, self.record)
        other.draft = Draft(self._workshop.segments, root, ephemeral=self.record.ephemeral)
        return other

    def close(self) -> None:
        """Gives up what is not published."""
        for interner in [*self._pending, self._interner]:
            interner.close()
        self._workshop.reservations.doom_later([*self._unpublished, *self.draft.written])
        self._pending, self._unpublished, self.draft.written = [], [], []
