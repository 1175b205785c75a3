"""The committer: flushes of many devices, made durable by one sync and published by one transaction.

Whoever comes first takes everybody's flush along; who comes meanwhile goes in the next group. A device whose
record is not what its flush was built upon is left out, and the others go on.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from . import catalog, slots
from .environment import Environment, Writer
from .errors import ExistsError, NotFoundError, StoreError
from .layout import HIDDEN, RESERVED, SLOT_BITS, USED, DeviceRecord, Run
from .reservations import Reservations
from .segments import Segments

Ids = npt.NDArray[np.uint64]


class StaleHits(Exception):  # noqa: N818 - no failure: the flush stores those blocks anew and goes on
    """Blocks that a flush shares were doomed since it looked them up; it has to store them anew.

    Attributes:
        ids: Their block ids, sorted.
    """

    def __init__(self, ids: Ids) -> None:
        super().__init__(f"{len(ids)} blocks were doomed meanwhile")
        self.ids = ids


@dataclass(eq=False)
class Flush:
    """What one flush wants to publish.

    Attributes:
        before: The device's record that it was built upon.
        after: The record it is to have.
        written: Slots that become used.
        hits: Ids taken from the index, which must still be used.
        dooms: How often slots had been doomed when those were looked up.
        durable: Whether the slots are to be synced first; ephemeral devices do without.
    """

    before: DeviceRecord
    after: DeviceRecord
    written: tuple[Run, ...]
    hits: list[Ids] = field(default_factory=list)
    dooms: int = -1
    durable: bool = True
    error: BaseException | None = None
    done: bool = False

    @property
    def names(self) -> bool:
        """Whether it gives a hidden device its name."""
        return bool(self.before.flags & HIDDEN) and self.after.visible


class Committer:
    """Groups the flushes of one process."""

    def __init__(self, environment: Environment, segments: Segments, reservations: Reservations) -> None:
        self._environment = environment
        self._segments = segments
        self._reservations = reservations
        self._queue: list[Flush] = []
        self._queue_lock = threading.Lock()
        self._turn = threading.Lock()

    def commit(self, flush: Flush) -> DeviceRecord:
        """Makes a flush durable and published; returns the device's new record.

        Raises:
            StaleHits: Shared blocks were doomed meanwhile; nothing of this flush is published.
            PoisonedError: A sync failed. Nothing of it is published, now or later.
            StoreError: The device's record is not what the flush was built upon.
        """
        try:
            with self._queue_lock:
                self._queue.append(flush)
            with self._turn:
                if not flush.done:
                    with self._queue_lock:
                        group, self._queue = self._queue, []
                    self._commit_group(group)
        except BaseException:
            self._leave(flush)
            raise
        if flush.error is not None:
            raise flush.error
        return flush.after

    def _leave(self, flush: Flush) -> None:
        """After an interrupt: nobody takes the flush along any more, or whoever has taken it is done with it."""
        with self._queue_lock:
            if flush in self._queue:
                self._queue.remove(flush)
        with self._turn:
            pass

    def _commit_group(self, group: list[Flush]) -> None:
        try:
            durable = [run for flush in group if flush.durable for run in flush.written]
            self._segments.sync(sorted({first >> SLOT_BITS for first, _ in durable}))
            with self._environment.write() as writer:
                self._publish(writer, group)
        except Exception as error:  # noqa: BLE001 - handed to every caller, each raises it
            for flush in group:
                flush.error = flush.error or error
        except BaseException:
            for flush in group:
                flush.error = flush.error or StoreError("the flush was interrupted", hint="flush again")
            raise
        finally:
            for flush in group:
                flush.done = True

    def _publish(self, writer: Writer, group: list[Flush]) -> None:
        accepted: list[Flush] = []
        for flush in group:
            flush.error = self._refusal(writer, flush, [other.after.name for other in accepted if other.names])
            if flush.error is None:
                accepted.append(flush)
        self._reservations.publish(writer, [run for flush in accepted for run in flush.written])
        for flush in accepted:
            flush.after = catalog.move(writer, self._current(writer, flush), flush.after)

    def _current(self, writer: Writer, flush: Flush) -> DeviceRecord:
        """The device's record, which must still be what the flush was built upon."""
        current = catalog.by_number(writer, flush.before.number)
        if current is None or (current.root, current.sequence) != (flush.before.root, flush.before.sequence):
            raise StoreError(
                f"device {flush.before.name!r} was changed by somebody else", hint="close it and open it again"
            )
        return current

    def _refusal(self, writer: Writer, flush: Flush, names: list[str]) -> Exception | None:
        """Why a flush cannot be taken along; asked before anything is changed.

        Args:
            writer: The group's transaction.
            flush: The flush.
            names: Those that the group gives to others.
        """
        try:
            self._current(writer, flush)
            if flush.names:
                catalog.check_free(writer, flush.after.name)
                if flush.after.name in names:
                    raise ExistsError(
                        catalog.KINDS[flush.after.kind], flush.after.name, hint="choose another name"
                    )
                if flush.after.parent and catalog.by_number(writer, flush.after.parent) is None:
                    raise NotFoundError("device", f"number {flush.after.parent}", hint="the parent was deleted")
        except StoreError as error:
            return error
        stale = stale_hits(writer, flush)
        return StaleHits(stale) if len(stale) else None


def stale_hits(writer: Writer, flush: Flush) -> Ids:
    """The ids that a flush shares and that are no longer used, sorted."""
    if not flush.hits or writer.state.dooms == flush.dooms:
        return np.empty(0, np.uint64)
    ids = np.unique(np.concatenate(flush.hits))
    states = slots.StateReader(writer)
    gone = ids[~states.are(ids, USED)]
    own = [(gone >= np.uint64(first)) & (gone < np.uint64(first + count)) for first, count in flush.written]
    if own:
        gone = gone[~(np.any(own, axis=0) & states.are(gone, RESERVED))]
    return gone
