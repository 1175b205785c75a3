"""Interning: bytes in, block ids out, equal blocks stored once.

Hash, look up, compare, and write what is new to reserved slots, a batch at a time with array operations. A
hit is always compared byte by byte with published content: XXH3 is fast, not collision resistant, and guests
choose their bytes. Different bytes under one digest are listed together up to a limit and then stored
unshared, so that the work stays bounded.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Protocol

import numpy as np
import numpy.typing as npt

from . import slots
from .digest import BLOCK_SIZE, DIGEST_SIZE, ZERO_BLOCK, Buffer, Hasher
from .environment import Environment, Snapshot
from .errors import CorruptError
from .layout import DATA, EPHEMERAL_DATA, SLOT_BITS, USED, Run
from .reservations import Reservations
from .segments import Segments

Ids = npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint64]
Positions = npt.NDArray[np.intp]
BATCH_BLOCKS = 1024  # 4 MiB: small enough for the processor's cache, large enough for array operations
SAME_DIGEST_LIMIT = 8
_RECENT_LIMIT = 1 << 18
_FEW = 4
_COMPARED = 256  # blocks compared at once: they and their counterparts stay in the processor's cache
_log = logging.getLogger("cowstore")


class _Scratch(threading.local):
    """Memory to compare blocks in, made once a thread: touching fresh pages costs more than the comparison."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, _COMPARED * BLOCK_SIZE))
        self.stored = np.frombuffer(self.view, np.uint64).reshape(-1, BLOCK_SIZE // 8)
        self.wanted = np.empty_like(self.stored)
        self.same = np.empty(self.stored.shape, np.bool_)


_scratch = _Scratch()


class Index(Protocol):
    """What interning needs of the index: a hint, never the truth."""

    def lookup(self, digests: bytes) -> Ids:
        """One candidate for each digest, 0 for none."""
        ...

    def candidates(self, digest: bytes) -> list[int]:
        """All candidates for one digest."""
        ...

    def insert(self, digests: bytes, ids: Ids) -> int:
        """Adds entries; returns how many were new."""
        ...


class Interner:
    """One writer's stream of blocks, from the lookups to the commit that publishes them.

    Holds a pin from its first lookup until renew() or close(), so that a block found by a lookup is not erased
    before the commit has checked that it is still used. Not safe to use from several threads at once.

    Attributes:
        written: Slots written since the last renew(), to be published.
        hits: Ids taken from the index since then, to be checked by the commit.
    """

    def __init__(
        self, environment: Environment, segments: Segments, reservations: Reservations, index: Index,
        hasher: Hasher, *, ephemeral: bool = False,
    ) -> None:  # fmt: skip
        self.written: list[Run] = []
        self.hits: list[Ids] = []
        self._environment = environment
        self._segments = segments
        self._reservations = reservations
        self._index = index
        self._hasher = hasher
        self._kind = EPHEMERAL_DATA if ephemeral else DATA
        self._pin: Snapshot | None = None
        self._states: slots.StateReader | None = None
        self._fresh: list[tuple[bytes, Ids]] = []
        self._recent: dict[bytes, int] = {}
        self._collided: dict[bytes, list[int]] = {}

    @property
    def dooms(self) -> int:
        """How often slots had been doomed when the pin was taken; -1 where nothing was looked up."""
        return self._pin.state.dooms if self._pin else -1

    def intern(self, data: memoryview) -> Ids:
        """Stores blocks that are not there yet.

        Args:
            data: N whole blocks, 4,096 * N bytes.

        Returns:
            N block ids, 0 for blocks of zeros. They are durable once a commit has published them.
        """
        count = len(data) // BLOCK_SIZE
        if count <= _FEW:
            return self._intern_few(data)
        ids = np.zeros(count, np.uint64)
        for start in range(0, count, BATCH_BLOCKS):
            part = data[start * BLOCK_SIZE : (start + BATCH_BLOCKS) * BLOCK_SIZE]
            ids[start : start + BATCH_BLOCKS] = self._intern_batch(part)
        return ids

    def _intern_few(self, data: memoryview) -> Ids:
        """The same without array operations, which cost more than they save where there are few blocks."""
        ids = np.zeros(len(data) // BLOCK_SIZE, np.uint64)
        for position in range(len(ids)):
            block = data[position * BLOCK_SIZE : (position + 1) * BLOCK_SIZE]
            if block.tobytes() != ZERO_BLOCK:
                ids[position] = self._settle(self._hasher.digest(block), block)
        return ids

    def _intern_batch(self, data: memoryview) -> Ids:
        words = np.frombuffer(data, np.uint64).reshape(-1, BLOCK_SIZE // 8)
        ids = np.zeros(len(words), np.uint64)
        solid = np.flatnonzero(~zero_blocks(data, words))
        if not len(solid):
            return ids
        blocks = [data[at : at + BLOCK_SIZE] for at in (solid * BLOCK_SIZE).tolist()]
        digests = self._hasher.digests(blocks)
        found = self._candidates(digests)
        equal = self._equal(words, solid, found)
        ids[solid[equal]] = found[equal]
        self._note_hits(found[equal])
        missing = np.flatnonzero(~equal)
        if len(missing):
            # What is new is written in one go; equal or colliding blocks within the batch come behind it.
            new, late = self._first_of_each(digests, missing, found)
            ids[solid[new]] = self._write(data, solid[new], [digests[at] for at in new.tolist()])
            for at in late:
                ids[solid[at]] = self._settle(digests[at], blocks[at])
        return ids

    def _candidates(self, digests: list[bytes]) -> Ids:
        """For each digest an id that may hold its block, 0 for none."""
        found = np.fromiter(map(self._recent.get, digests, repeat(0)), np.uint64, len(digests))
        unknown = np.flatnonzero(found == 0)
        if len(unknown):
            joined = b"".join(
                digests if len(unknown) == len(digests) else [digests[at] for at in unknown.tolist()]
            )
            hints = self._index.lookup(joined)
            known = np.flatnonzero(hints)
            if len(known):
                used = self._published(hints[known], _as_words(joined)[known])
                found[unknown[known[used]]] = hints[known[used]]
        return found

    def _published(self, ids: Ids, digests: Words) -> slots.Mask:
        """Which ids are of used data slots that carry these digests.

        Slots that are not used may be written by somebody at this moment, or be erased. One that is used, but
        carries another digest, is damaged or was hinted at wrongly.
        """
        if self._states is None:
            self._pin = self._environment.read()
            self._states = slots.StateReader(self._pin)
        published = self._states.are(ids, USED)
        at = np.flatnonzero(published)
        published[at] = (self._stored_digests(ids[at]) == digests[at]).all(axis=1)
        return published

    def _stored_digests(self, ids: Ids) -> Words:
        """The digests of slots, two words each; zeros where they are not data's."""
        found = bytearray(len(ids) * DIGEST_SIZE)
        if len(ids):
            for position, first, count in slots.split_at_holes(ids):
                with self._forgiven(first):
                    if self._segments.get(first >> SLOT_BITS).kind == DATA:
                        digests = self._segments.digests(first, count)
                        found[position * DIGEST_SIZE : position * DIGEST_SIZE + len(digests)] = digests
        return _as_words(found)

    @contextmanager
    def _forgiven(self, block_id: int) -> Iterator[None]:
        """A block that cannot be read is damage elsewhere, and no reason not to store this one anew."""
        try:
            yield
        except (OSError, CorruptError) as error:
            _log.error("block %#x cannot be compared, and is not used again: %s", block_id, error)

    def _equal(self, words: Words, rows: Positions, ids: Ids) -> slots.Mask:
        """For each row of words whether the slot named by its id holds the same bytes; false for id 0."""
        equal = np.zeros(len(ids), np.bool_)
        named = np.flatnonzero(ids)
        for start in range(0, len(named), _COMPARED):
            part = named[start : start + _COMPARED]
            equal[part] = self._equal_part(words, rows[part], ids[part])
        return equal

    def _equal_part(self, words: Words, rows: Positions, ids: Ids) -> slots.Mask:
        count = len(rows)
        for position, first, length in slots.split_at_holes(ids):
            target = _scratch.view[position * BLOCK_SIZE : (position + length) * BLOCK_SIZE]
            done = 0
            with self._forgiven(first):
                done = self._segments.read_raw(first, target)
            target[done:] = bytes(len(target) - done)  # zeros are no block that anybody looks for
        if int(rows[-1]) - int(rows[0]) + 1 == count:
            wanted = words[int(rows[0]) : int(rows[0]) + count]
        else:
            wanted = np.take(words, rows, axis=0, out=_scratch.wanted[:count], mode="clip")
        same = np.equal(_scratch.stored[:count], wanted, out=_scratch.same[:count])
        return np.asarray(same.all(axis=1))

    def _note_hits(self, ids: Ids) -> None:
        if len(ids) and self._pin is not None:
            self.hits.append(ids)

    def _first_of_each(self, digests: list[bytes], missing: Positions, found: Ids) -> tuple[Positions, list[int]]:
        """Parts what has no equal into blocks to be written now, and those that need a closer look."""
        new: dict[bytes, int] = {}
        late = []
        for at in missing.tolist():
            if found[at] or new.setdefault(digests[at], at) != at:
                late.append(at)  # noqa: PERF401 - the condition has an effect
        return np.fromiter(new.values(), np.intp, len(new)), late

    def _write(self, data: memoryview, rows: Positions, digests: list[bytes], *, listed: bool = True) -> Ids:
        """Writes blocks to reserved slots; rows are positions in the data, ascending."""
        ids = np.empty(len(rows), np.uint64)
        done = 0
        if not len(rows):
            return ids
        for first, count in self._reservations.take(self._kind, len(rows)):
            joined = b"".join(digests[done : done + count])
            self._write_run((first, count), _gather(data, rows[done : done + count]), joined)
            ids[done : done + count] = np.arange(first, first + count, dtype=np.uint64)
            if listed:
                self._list(digests[done : done + count], joined, ids[done : done + count])
            done += count
        return ids

    def _write_run(self, run: Run, buffers: list[memoryview], digests: bytes) -> None:
        try:
            self._segments.write(run[0], buffers, digests)
        except BaseException:
            self._reservations.doom_later([run])
            raise
        self.written.append(run)

    def _list(self, digests: list[bytes], joined: bytes, ids: Ids) -> None:
        if len(self._recent) > _RECENT_LIMIT:
            self._recent.clear()
        self._recent.update(zip(digests, ids.tolist(), strict=True))
        if self._kind == DATA:
            self._fresh.append((joined, ids))

    def _settle(self, digest: bytes, block: memoryview) -> int:
        """The id for one block, whatever is known under its digest."""
        known = self._known(digest)
        for block_id in known:
            if self._holds(block_id, digest, block):
                self._note_hits(np.array([block_id], np.uint64))
                return block_id
        listed = len(known) < SAME_DIGEST_LIMIT
        block_id = int(self._write(block, np.zeros(1, np.intp), [digest], listed=listed)[0])
        if listed and known:
            self._collided[digest] = [*known, block_id]
        return block_id

    def _known(self, digest: bytes) -> list[int]:
        hints = self._index.candidates(digest)
        if hints:
            used = self._published(np.array(hints, np.uint64), _as_words(digest * len(hints)))
            hints = [hint for hint, good in zip(hints, used.tolist(), strict=True) if good]
        recent = self._recent.get(digest)
        own = self._collided.get(digest, [recent] if recent else [])
        return list(dict.fromkeys([*own, *hints]))[:SAME_DIGEST_LIMIT]

    def _holds(self, block_id: int, digest: bytes, block: memoryview) -> bool:
        stored = bytearray(BLOCK_SIZE)
        with self._forgiven(block_id):
            self._segments.read_raw(block_id, memoryview(stored))
        if stored == block:
            return True
        if self._segments.digests(block_id, 1) == digest and self._hasher.digest(stored) != digest:
            _log.error("block %#x does not match its digest; it is not used again", block_id)
        return False

    def store(self, data: memoryview) -> Ids:
        """Writes whole blocks to slots of their own, without looking anything up."""
        rows = np.arange(len(data) // BLOCK_SIZE)
        digests = self._hasher.digests([data[at : at + BLOCK_SIZE] for at in range(0, len(data), BLOCK_SIZE)])
        return self._write(data, rows, digests)

    def forget_hits(self, ids: Ids) -> None:
        """Ids that are no longer shared."""
        self.hits = [hits[~np.isin(hits, ids)] for hits in self.hits]

    def publish(self) -> None:
        """After the commit: tells the index what is new, and starts afresh without a pin."""
        for digests, ids in self._fresh:
            self._index.insert(digests, ids)
        self.renew()

    def renew(self) -> None:
        """Forgets everything since the last commit."""
        self.written, self.hits, self._fresh = [], [], []
        self._recent.clear()
        self._collided.clear()
        pin, self._pin, self._states = self._pin, None, None
        if pin is not None:
            pin.close()

    def close(self) -> None:
        """Ends it; what was written and not published is given up."""
        self._reservations.doom_later(self.written)
        self.renew()


def _as_words(digests: Buffer) -> Words:
    """Digests as rows of two words."""
    return np.frombuffer(digests, np.uint64).reshape(-1, 2)


def zero_blocks(data: memoryview, words: Words) -> slots.Mask:
    """Which blocks are all zero.

    Three words of each are looked at; only where they are zero the whole block is.
    """
    zero = (words[:, 0] | words[:, 256] | words[:, 511]) == 0
    for at in np.flatnonzero(zero).tolist():
        zero[at] = data[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE].tobytes() == ZERO_BLOCK
    return np.asarray(zero)


def _gather(data: memoryview, rows: Positions) -> list[memoryview]:
    """The blocks at these positions as few slices: neighbours in one."""
    if len(rows) == 1:
        at = int(rows[0]) * BLOCK_SIZE
        return [data[at : at + BLOCK_SIZE]]
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(rows)]))
    return [
        data[first * BLOCK_SIZE : (last + 1) * BLOCK_SIZE]
        for first, last in zip(rows[starts].tolist(), rows[ends - 1].tolist(), strict=True)
    ]
