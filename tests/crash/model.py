"""What a store must hold after a crash: plain bytes, and the moments between which they count.

Nothing here is shared with the store. A disk is a dict of blocks; the book says for every name which content is
promised after which operation of the log, and which is allowed while a call is under way.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from .recording import Recorder

BLOCK = 4096
ZERO = bytes(BLOCK)


@dataclass(frozen=True, eq=False)
class Moment:
    """What a device holds: its size in bytes, and its blocks by number without those of zeros."""

    size: int
    blocks: Mapping[int, bytes]
    ephemeral: bool = False

    @lru_cache(maxsize=64)  # noqa: B019 - few of them, and all of a test's moments go together
    def bytes(self) -> bytes:
        """All of it."""
        count = -(-self.size // BLOCK)
        return b"".join(self.blocks.get(number, ZERO) for number in range(count))[: self.size]


class Model:
    """A disk as plain bytes."""

    def __init__(self, moment: Moment) -> None:
        self.size = moment.size
        self.blocks = dict(moment.blocks)
        self.ephemeral = moment.ephemeral

    def write(self, data: bytes, offset: int) -> None:
        done = 0
        while done < len(data):
            number, skip = divmod(offset + done, BLOCK)
            part = data[done : done + BLOCK - skip]
            old = self.blocks.get(number, ZERO)
            self._set(number, old[:skip] + part + old[skip + len(part) :])
            done += len(part)

    def resize(self, size: int) -> None:
        if size < self.size:
            last, keep = divmod(size, BLOCK)
            for number in [number for number in self.blocks if number >= last + bool(keep)]:
                del self.blocks[number]
            if keep:
                self._set(last, self.blocks.get(last, ZERO)[:keep] + bytes(BLOCK - keep))
        self.size = size

    def _set(self, number: int, block: bytes) -> None:
        if block.strip(b"\0"):
            self.blocks[number] = block
        else:
            self.blocks.pop(number, None)

    def moment(self) -> Moment:
        return Moment(self.size, dict(self.blocks), self.ephemeral)


Fate = Moment | None  # None: there is no device of that name


@dataclass
class Step:
    """A change of what a name stands for: from `start` on it may have happened, from `end` on it must have.

    Attributes:
        start: The length of the log when the call began.
        end: The length of the log when it returned; infinite where it failed.
        after: What it leads to.
        passing: What may be seen on the way.
    """

    start: int
    end: float
    after: Fate
    passing: Sequence[Moment] = ()
    until: float = math.inf  # the length of the log at which it is known not to happen any more


class Book:
    """What is promised of every name.

    Attributes:
        together: Changes of several names that a single transaction makes.
        backups: Names of backups: when each was begun and done, and what it must hold.
        founded: From where on in the log the store must be there.
        copied: From where on there must be a copy of its catalog.
        littered: Whether an earlier crash has left garbage where nothing was synced.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.founded: float = math.inf
        self.copied: float = math.inf
        self.littered = False
        self.together: list[tuple[int, float, tuple[str, ...]]] = []
        self.backups: dict[str, tuple[int, float, dict[str, Fate]]] = {}
        self._recorder = recorder
        self._steps: dict[str, list[Step]] = defaultdict(list)

    def known(self, name: str, fate: Fate) -> None:
        """What a name stood for before the recording began."""
        self._steps[name].insert(0, Step(0, 0, fate))

    @property
    def now(self) -> int:
        return len(self._recorder.log)

    @contextmanager
    def change(
        self,
        after: Mapping[str, Fate],
        *,
        together: bool = False,
        passing: Sequence[Moment] = (),
        sure: bool = False,
    ) -> Iterator[None]:
        """A call that changes what names stand for.

        If it raises, either may be seen from then on; where that is `sure` to mean that nothing was done, nothing.
        """
        start, end = self.now, math.inf
        try:
            yield
            end = self.now
        finally:
            until = self.now if sure and end == math.inf else math.inf
            for name, fate in after.items():
                self._steps[name].append(Step(start, end, fate, passing, until))
            if together:
                self.together.append((start, end, tuple(after)))

    @contextmanager
    def backup(self, name: str) -> Iterator[None]:
        start, held = self.now, {known: self.promised(known) for known in self._steps}
        kept = {known: fate for known, fate in held.items() if fate is not None and not fate.ephemeral}
        self.backups[name] = (start, math.inf, dict(kept))
        yield
        self.backups[name] = (start, self.now, dict(kept))

    def promised(self, name: str) -> Fate:
        """What a name stands for now, where nothing is under way."""
        fates = self.allowed(name, self.now)
        assert len(fates) == 1, name
        return fates[0]

    def names(self) -> list[str]:
        return sorted(self._steps)

    def allowed(self, name: str, at: int) -> list[Fate]:
        """What may be found after the first so many operations; the first of them is what was last promised."""
        fates: list[Fate] = [None]
        for step in self._steps[name]:
            if step.end <= at:
                fates = [step.after]
            elif step.start < at <= step.until:
                fates += [*step.passing, step.after]
        return fates


@dataclass
class Shelf:
    """A device as the workload knows it: the moment last flushed, and the one its reset leads to."""

    flushed: Moment
    base: Moment
    kind: str
