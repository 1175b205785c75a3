"""The collector: mark, doom, erase, free. Nothing else makes a used slot free.

Mark walks every root under a pin. Doom, in short transactions, takes what was used at the mark, is still
used, and is reached neither by the mark nor by a root that came since. Erase waits until no pin is older than
the last doom, copies the catalog, stamps the segments and wipes the slots. Free gives them back. A crash in
between leaves slots doomed, and whoever runs next erases them again. Damage met by the mark ends the run with
nothing doomed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import catalog, slots
from .copies import Copies
from .digest import DIGEST_SIZE
from .environment import Environment, Snapshot, Writer
from .files import Disk
from .index import Index
from .layout import (
    CHUNK_SLOTS,
    CHUNKS_PER_SEGMENT,
    DATA,
    DOOMED,
    FREE,
    RESERVED,
    SLOT_BITS,
    SLOTS_PER_SEGMENT,
    USED,
    Root,
    Run,
)
from .leases import Leases, turn
from .marks import Marks
from .segments import Segments

Progress = Callable[[str, int, int], None]
Mask = npt.NDArray[np.bool_]
_PATIENCE = 5.0  # seconds to wait for old pins
_KEEP_RUN = 16  # slots: shorter runs keep their space on the disk, punching costs more than it gives
_BREATH = 0.006  # seconds between two of them: longer than anybody who waits for the write lock pauses
_SLICE = 0.02  # seconds that one transaction may take before the next one begins


@dataclass(frozen=True)
class Collection:
    """What a run of the collector did.

    Attributes:
        dry_run: Whether it only looked.
        marked: Blocks that are reached.
        doomed: Blocks found dead in this run.
        erased: Blocks wiped, those of interrupted runs included.
        freed: Blocks that can be written again.
        waiting: Doomed blocks left for a later run, because of an old pin.
        pins: The processes whose pins held it up.
        seconds: How long it took.
    """

    dry_run: bool
    marked: int
    doomed: int
    erased: int
    freed: int
    waiting: int
    pins: tuple[int, ...]
    seconds: float


class Collector:
    """One run of the collector over one store."""

    def __init__(
        self, environment: Environment, segments: Segments, leases: Leases, index: Index, copies: Copies,
        disk: Disk, progress: Progress,
    ) -> None:  # fmt: skip
        self._environment = environment
        self._segments = segments
        self._leases = leases
        self._index = index
        self._copies = copies
        self._disk = disk
        self._progress = progress
        self._marks = Marks(segments)

    def run(self, lock: Path, *, dry_run: bool) -> Collection:
        """Collects, or only says what there is to collect.

        Raises:
            InUseError: Another run is under way.
            CorruptError: Something in use does not verify; nothing was doomed.
        """
        begun = time.monotonic()
        with turn(self._disk, lock, "the collector", 0):
            self._segments.refresh()
            if not dry_run:
                self._reap()
            garbage = self._mark()
            dead = sum(int(np.count_nonzero(mask)) for mask in garbage.values())
            if dry_run:
                return Collection(True, self._marks.count, dead, 0, 0, 0, (), time.monotonic() - begun)
            doomed = self._doom(garbage)
            runs, total = self._doomed_runs()
            pins = self._wait_for_pins() if runs else ()
            if pins:
                seconds = time.monotonic() - begun
                return Collection(False, self._marks.count, doomed, 0, 0, total, pins, seconds)
            if runs:
                self._erase(runs)
            freed = self._free(runs)
            if self._index.stale:
                self._rebuild_index()
            return Collection(False, self._marks.count, doomed, total, freed, 0, (), time.monotonic() - begun)

    # What the dead have left.

    def _reap(self) -> None:
        """Dooms what dead processes had reserved and removes their hidden devices."""
        with self._environment.read() as snapshot:
            dead = [lease.number for lease in catalog.leases(snapshot) if not self._leases.is_held(lease.number)]
        for number in dead:
            with self._environment.write() as writer:
                self._reap_lease(writer, number)
            self._leases.forget(number)

    def _reap_lease(self, writer: Writer, number: int) -> None:
        lease = next((one for one in catalog.leases(writer) if one.number == number), None)
        if lease is None:
            return  # its process has ended in good order meanwhile, and removed it
        if lease.runs:
            slots.change(writer, lease.runs, RESERVED, DOOMED)
            writer.state.dooms += 1
        for device in [device for device in catalog.devices(writer) if device.owner == number]:
            catalog.remove(writer, device)
        catalog.remove_lease(writer, number)

    # Mark.

    def _mark(self) -> dict[int, Mask]:
        """Marks all roots; returns for each segment the slots that are used and were not reached."""
        with self._environment.read() as pin:
            roots = live_roots(pin)
            for position, root in enumerate(roots):
                self._marks.mark([root])
                self._progress("mark", position + 1, len(roots))
            return {
                number: mask
                for number in catalog.segments(pin)
                if (mask := (slots.load_segment(pin, number) == USED) & ~self._marks.reached(number)).any()
            }

    # Doom.

    def _doom(self, garbage: dict[int, Mask]) -> int:
        """Dooms, in short transactions; returns how many slots."""
        doomed, known = 0, -1
        todo = [(number, chunk) for number in garbage for chunk in range(CHUNKS_PER_SEGMENT)]
        while todo:
            known = self._catch_up(known)
            with self._environment.write() as writer:
                if writer.state.revision != known:
                    self._marks.mark(live_roots(writer))
                begun = time.monotonic()
                while todo:  # one chunk at the least: however long the mark took, each transaction gets on
                    number, chunk = todo.pop()
                    doomed += self._doom_chunk(writer, number, chunk, garbage[number])
                    if time.monotonic() - begun >= _SLICE:
                        break
                writer.state.dooms += 1
                known = writer.state.revision + 1
            self._progress("doom", doomed, 0)
            time.sleep(_BREATH)
        return doomed

    def _catch_up(self, known: int) -> int:
        """Marks roots that came since a revision, outside any transaction; returns the revision that is marked."""
        with self._environment.read() as pin:
            if pin.state.revision != known:
                self._marks.mark(live_roots(pin))
            return pin.state.revision

    def _doom_chunk(self, writer: Writer, number: int, chunk: int, garbage: Mask) -> int:
        part = slice(chunk * CHUNK_SLOTS, (chunk + 1) * CHUNK_SLOTS)
        dead = garbage[part] & ~self._marks.reached(number)[part]
        return slots.change_masked(writer, number, chunk, dead, USED, DOOMED) if dead.any() else 0

    # Erase.

    def _doomed_runs(self) -> tuple[list[Run], int]:
        """All doomed slots, those of interrupted runs included."""
        runs = []
        with self._environment.read() as snapshot:
            self._moment = snapshot.txnid
            for number in sorted(catalog.segments(snapshot)):
                for first, count in slots.array_runs(slots.load_segment(snapshot, number) == DOOMED):
                    runs.append(((number << SLOT_BITS) + first, count))
        return runs, sum(count for _, count in runs)

    def _wait_for_pins(self) -> tuple[int, ...]:
        """Waits until no pin is older than the doomed slots; the processes that still hold one."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            old = tuple(sorted({pid for pid, txnid in self._environment.pins() if txnid < self._moment}))
            if not old or time.monotonic() > deadline:
                return old
            time.sleep(0.01)

    def _erase(self, runs: list[Run]) -> None:
        with self._environment.write() as writer:
            writer.state.erasure += 1
            erasure = writer.state.erasure
        self._copies.make()
        done, total = 0, sum(count for _, count in runs)
        for number, part in _by_segment(runs):
            self._unlist(number, part)
            self._segments.erase(part, erasure, _KEEP_RUN)
            done += sum(count for _, count in part)
            self._progress("erase", done, total)

    def _unlist(self, number: int, runs: list[Run]) -> None:
        """Removes the slots from the index. Hygiene only: a hint to a slot that is not used is not followed."""
        if self._segments.get(number).kind != DATA:
            return
        first = number << SLOT_BITS
        digests = np.frombuffer(self._segments.digests(first, SLOTS_PER_SEGMENT), np.uint8).reshape(
            -1, DIGEST_SIZE
        )
        ids = np.concatenate([np.arange(start, start + count, dtype=np.uint64) for start, count in runs])
        self._index.remove(digests[(ids - np.uint64(first)).astype(np.intp)].tobytes(), ids)

    def _free(self, runs: list[Run]) -> int:
        """Frees erased slots, in short transactions."""
        pieces = _pieces(runs)
        freed = 0
        while pieces:
            with self._environment.write() as writer:
                begun = time.monotonic()
                while pieces:
                    number, chunk, mask = pieces.pop()
                    freed += slots.change_masked(writer, number, chunk, mask, DOOMED, FREE)
                    if time.monotonic() - begun >= _SLICE:
                        break
            time.sleep(_BREATH)
        return freed

    def _rebuild_index(self) -> None:
        """Makes the index anew from the digests in the segments."""
        with self._environment.read() as snapshot:
            rebuild_index(self._index, self._segments, snapshot)


def live_roots(snapshot: Snapshot) -> list[Root]:
    """Every root that something may be read from, each once."""
    roots = {}
    for device in catalog.devices(snapshot):
        if not catalog.is_gone(device):
            roots[device.base.node] = device.base
            roots[device.root.node] = device.root
    roots.pop(0, None)
    return list(roots.values())


def rebuild_index(index: Index, segments: Segments, snapshot: Snapshot) -> None:
    """Fills the index with all used slots of the data segments."""
    states = {
        number: slots.load_segment(snapshot, number) == USED
        for number, (kind, _) in catalog.segments(snapshot).items() if kind == DATA
    }  # fmt: skip

    def batches() -> Iterator[tuple[bytes, npt.NDArray[np.uint64]]]:
        for number, used in states.items():
            first = number << SLOT_BITS
            digests = np.frombuffer(segments.digests(first, SLOTS_PER_SEGMENT), np.uint8).reshape(-1, DIGEST_SIZE)
            at = np.flatnonzero(used)
            yield digests[at].tobytes(), at.astype(np.uint64) + np.uint64(first)

    index.rebuild(batches(), sum(int(np.count_nonzero(used)) for used in states.values()))


def _by_segment(runs: list[Run]) -> Iterator[tuple[int, list[Run]]]:
    part: list[Run] = []
    for run in runs:
        if part and part[0][0] >> SLOT_BITS != run[0] >> SLOT_BITS:
            yield part[0][0] >> SLOT_BITS, part
            part = []
        part.append(run)
    if part:
        yield part[0][0] >> SLOT_BITS, part


def _pieces(runs: list[Run]) -> list[tuple[int, int, Mask]]:
    """The runs as masks of chunks."""
    pieces = []
    for number, part in _by_segment(runs):
        mask = np.zeros((CHUNKS_PER_SEGMENT, CHUNK_SLOTS), np.bool_)
        flat = mask.reshape(-1)
        for first, count in part:
            start = first - (number << SLOT_BITS)
            flat[start : start + count] = True
        pieces += [(number, chunk, mask[chunk]) for chunk in np.flatnonzero(mask.any(axis=1)).tolist()]
    return pieces
