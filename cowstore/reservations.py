"""Reservations: slots that this process may write, and the process lease that vouches for them.

Slots are reserved in short transactions and written outside the write lock. Publishing takes them out of the
reservation; what a dead process leaves in one is doomed by the collector. A slot is written only if it is
reserved by the writer and its digest is zero.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict, deque
from dataclasses import replace

from . import catalog, slots
from .digest import DIGEST_SIZE, UNWRITTEN
from .environment import Environment, Writer
from .errors import NoSpaceError
from .files import boot_id
from .layout import DOOMED, FREE, RESERVED, SLOTS_PER_SEGMENT, USED, LeaseRecord, Run
from .leases import Lease, Leases
from .runs import intersect_runs, merge_runs, subtract_runs
from .segments import Segments

_FIRST_REFILL = 256  # slots: 1 MiB
_LARGEST_REFILL = 1 << 14  # slots: 64 MiB
_LONG_RUN = 16  # slots; large reservations leave shorter gaps to small ones
_SEQUENCES = 1024


class Reservations:
    """This process's reserved slots, by kind of segment. Safe to use from several threads."""

    def __init__(self, environment: Environment, segments: Segments, leases: Leases) -> None:
        self._environment = environment
        self._segments = segments
        self._leases = leases
        self._lock = threading.Lock()  # held while waiting for the catalog's write lock, never taken inside it
        self._doomed_later_lock = threading.Lock()
        self._lease: Lease | None = None
        self._number = 0
        self._ready: dict[int, deque[Run]] = defaultdict(deque)
        self._refill: dict[int, int] = {}
        self._barren: dict[tuple[int, int], int] = {}
        self._doomed_later: list[Run] = []
        self._sequence, self._sequence_end = 0, 0

    @property
    def lease_number(self) -> int:
        """The number of this process's lease, taken when it is first asked for."""
        with self._lock:
            return self._ensure_lease()

    def _ensure_lease(self) -> int:
        if self._lease is None:
            lease = None
            try:
                with self._environment.write() as writer:
                    number = writer.number()
                    lease = self._leases.take(number, f"process lease {number}", exclusive=True)
                    catalog.save_lease(writer, LeaseRecord(number, os.getpid(), time.time_ns(), boot_id()))
            except BaseException:
                if lease is not None:
                    lease.close()  # the number was not given out: the next try gets it again
                raise
            self._lease, self._number = lease, number
        return self._number

    def take(self, kind: int, count: int) -> list[Run]:
        """Slots of one kind to write, so many in all, in as few runs as there are."""
        with self._lock:
            ready = self._ready[kind]
            missing = count - sum(length for _, length in ready)
            if missing > 0:
                self._reserve(kind, missing)
            taken = []
            while count:
                first, length = ready.popleft()
                part = min(length, count)
                taken.append((first, part))
                count -= part
                if part < length:
                    ready.appendleft((first + part, length - part))
            return taken

    def give_back(self, kind: int, runs: list[Run]) -> None:
        """Returns slots that were taken but not written."""
        with self._lock:
            self._ready[kind].extendleft(reversed(runs))

    def doom_later(self, runs: list[Run]) -> None:
        """Slots that were written and will not be published; they are doomed at the next occasion."""
        with self._doomed_later_lock:
            self._doomed_later.extend(runs)

    def _reserve(self, kind: int, missing: int) -> None:
        size = self._refill.get(kind, _FIRST_REFILL)
        self._refill[kind] = min(size * 8, _LARGEST_REFILL)
        want = max(missing, size)
        self._segments.check_writable()
        number = self._ensure_lease()
        while missing > 0:
            runs = self._reserve_once(kind, number, want)
            usable = [run for first, count in runs for run in self._clean(first, count)]
            self._ready[kind].extend(usable)
            missing -= sum(count for _, count in usable)

    def _reserve_once(self, kind: int, lease: int, want: int) -> list[Run]:
        shortest = 1 if want <= _FIRST_REFILL else _LONG_RUN
        numbers = self._search(kind, want, shortest)
        fresh = 0 if numbers else self._new_segment(kind)
        with self._environment.write() as writer:
            if fresh:
                catalog.save_segment(writer, fresh, kind, SLOTS_PER_SEGMENT)
            runs: list[Run] = []
            for number in numbers or [fresh]:
                part = slots.find_free(writer, number, want, shortest) if want > 0 else []
                runs += part
                want -= sum(count for _, count in part)
            slots.change(writer, runs, FREE, RESERVED)
            record = catalog.lease(writer, lease)
            catalog.save_lease(writer, replace(record, runs=merge_runs([*record.runs, *runs])))
        return runs

    def _search(self, kind: int, want: int, shortest: int) -> list[int]:
        """Segments with room for so many slots, looked for outside the write lock; none where there are none.

        A segment of which only shorter gaps are left is not looked at again until its free slots change.
        """
        found = []
        with self._environment.read() as snapshot:
            for number, (its_kind, free) in catalog.segments(snapshot).items():
                if its_kind != kind or not free or self._barren.get((number, shortest)) == free:
                    continue
                room = sum(count for _, count in slots.find_free(snapshot, number, want, shortest))
                if room:
                    found.append(number)
                    want -= room
                else:
                    self._barren[number, shortest] = free
                if want <= 0:
                    break
        return found

    def _new_segment(self, kind: int) -> int:
        number = 0
        while not number or self._segments.path(number).exists():  # there it is of a catalog that is lost
            with self._environment.write() as writer:
                number = writer.number()
        self._segments.create(number, kind)
        return number

    def _clean(self, first: int, count: int) -> list[Run]:
        """The slots of a run whose digest is zero. Others were written under a catalog that is lost."""
        digests = self._segments.digests(first, count)
        if digests.count(0) == len(digests):
            return [(first, count)]
        clean: list[Run] = []
        for position in range(count):
            slot = (first + position, 1)
            if digests[position * DIGEST_SIZE : (position + 1) * DIGEST_SIZE] == UNWRITTEN:
                clean.append(slot)
            else:
                self.doom_later([slot])
        return list(merge_runs(clean))

    def sequence(self, after: int) -> int:
        """A sequence number for a commit: never used before, and higher than the given one."""
        with self._lock:
            if self._sequence >= self._sequence_end or self._sequence <= after:
                with self._environment.write() as writer:
                    first = writer.state.sequence + 1
                    writer.state.sequence += _SEQUENCES
                self._sequence, self._sequence_end = first, first + _SEQUENCES  # not before they are ours
            number = self._sequence
            self._sequence += 1
            return number

    def publish(self, writer: Writer, runs: list[Run]) -> None:
        """Makes written slots used, within the transaction that makes them reachable."""
        merged = merge_runs(runs)
        slots.change(writer, merged, RESERVED, USED)
        record = catalog.lease(writer, self._number)
        with self._doomed_later_lock:
            given_up, self._doomed_later = self._doomed_later, []
        writer.on_failure(lambda: self.doom_later(given_up))
        # The record is the truth: an interrupted flush may have been published all the same, and then given up.
        doomed = intersect_runs(subtract_runs(record.runs, merged), given_up)
        self._doom(writer, doomed)
        left = subtract_runs(subtract_runs(record.runs, merged), doomed)
        catalog.save_lease(writer, replace(record, runs=left))

    def doom_now(self) -> None:
        """Dooms what was given up now, rather than with the next commit."""
        if self._doomed_later:
            with self._environment.write() as writer:
                self.publish(writer, [])

    def _doom(self, writer: Writer, runs: tuple[Run, ...]) -> None:
        if runs:
            slots.change(writer, runs, RESERVED, DOOMED)
            writer.state.dooms += 1

    def close(self) -> None:
        """Gives everything back: what was not written is free again, the rest is doomed."""
        with self._lock:
            lease, self._lease = self._lease, None
            if lease is None:
                return
            try:
                if not self._segments.poisoned:
                    self._return_all()
            except NoSpaceError:
                return  # the lease is given up all the same, and the collector finds what it held
            finally:
                lease.close()

    def _return_all(self) -> None:
        unwritten = merge_runs([run for ready in self._ready.values() for run in ready])
        with self._environment.write() as writer:
            record = catalog.lease(writer, self._number)
            slots.change(writer, unwritten, RESERVED, FREE)
            self._doom(writer, subtract_runs(record.runs, unwritten))
            if any(device.owner == self._number for device in catalog.devices(writer)):
                catalog.save_lease(writer, replace(record, runs=()))
                return  # hidden devices are left: the collector removes them with the lease
            catalog.remove_lease(writer, self._number)
        self._leases.forget(self._number)
        self._ready.clear()
