"""What the blocks of a clone may be after a crash, told by what its clients have sent and what was answered.

Every block that is written carries a label: of which clone it is, which block, which generation, and a checksum
of all that. A ledger keeps every change of every block, and three times of each: when it was sent, when it was
answered, and when it was promised, which is when a flush that was sent after the answer was answered itself, or
when the change was, if it had asked for FUA. A block may be as the last promised change left it, or as a later
one did that had been sent: not torn, not older, not another block's.

That much the protocol promises. The store promises more: what is found is one moment of the clone. So nothing
is there that was sent after something that is missing was answered, and of no request only a part.

Nothing here knows the store, and time is a count of events.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b, shake_128

BLOCK = 4096
_LABEL = struct.Struct(">8sIQQ")  # magic, clone, block, generation
_MAGIC = b"labelled"
_SUM = 16  # bytes, at the end of a block
_ZEROS = bytes(BLOCK)
_LONGEST = 6  # blocks of one change
_HOT = 0.1  # of the blocks, to which half of the changes go


class IntegrityError(AssertionError):
    """A block is not what it must be."""


def labelled(clone: int, block: int, generation: int) -> bytes:
    """A block that says what it is."""
    label = _LABEL.pack(_MAGIC, clone, block, generation)
    text = label + shake_128(label).digest(BLOCK - len(label) - _SUM)
    return text + blake2b(text, digest_size=_SUM).digest()


def label_of(data: bytes) -> tuple[int, int, int]:
    """The clone, the block and the generation that a block says it is.

    Raises:
        IntegrityError: It is not a whole one.
    """
    magic, clone, block, generation = _LABEL.unpack_from(data)
    whole = magic == _MAGIC and blake2b(data[:-_SUM], digest_size=_SUM).digest() == data[-_SUM:]
    if not whole:
        raise IntegrityError(f"is torn: it begins with {data[:28].hex()} and ends with {data[-4:].hex()}")
    return clone, block, generation


@dataclass(eq=False)
class Change:
    """A run of blocks that one request changes, and when; what it was in the beginning is a change, too."""

    blocks: range
    generation: int
    zero: bool
    sent: float = 0
    answered: float = math.inf


@dataclass
class Loss:
    """What a crash took that nobody had promised, in blocks, and what it left though nobody had."""

    missing: int = 0
    kept: int = 0

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.missing + other.missing, self.kept + other.kept)


class Ledger:
    """Every change of one clone since the last crash."""

    def __init__(self, clone: int, data: Sequence[bool], *, keeps_answered: bool = False) -> None:
        """Begins with generation 0.

        Args:
            clone: The number in its labels.
            data: Of each block, whether it is labelled or zero.
            keeps_answered: Whether an answer is a promise already, as it is where only the process may die.
        """
        self.clone = clone
        self._keeps_answered = keeps_answered
        everything = range(len(data))
        first = {zero: Change(everything, 0, zero, answered=0) for zero in (False, True)}
        self._histories = [[first[not full]] for full in data]
        self._floors = [0] * len(data)  # of each block, the newest generation that was promised
        self._unpromised: set[Change] = set()
        self._busy: set[int] = set()
        self._clock = self._generation = 0

    def start(self) -> bytes:
        """What all blocks were in the beginning."""
        return b"".join(self.content(history[0], [block]) for block, history in enumerate(self._histories))

    # While clients write.

    @contextmanager
    def alone(self, dice: random.Random) -> Iterator[range]:
        """Some blocks that nobody else touches meanwhile, since of two changes at once either may be the last."""
        blocks = self._pick(dice)
        self._busy.update(blocks)
        try:
            yield blocks
        finally:
            self._busy.difference_update(blocks)

    def _pick(self, dice: random.Random) -> range:
        while True:
            count = len(self._histories)
            within = max(int(count * _HOT), 2 * _LONGEST) if dice.random() < 0.5 else count
            first = dice.randrange(within)
            blocks = range(first, min(first + dice.choice((1, 1, 2, _LONGEST)), count))
            if self._busy.isdisjoint(blocks):
                return blocks

    def send(self, blocks: range, *, zero: bool = False) -> Change:
        """A change is about to be sent."""
        self._generation += 1
        change = Change(blocks, self._generation, zero, sent=self._tick())
        for block in blocks:
            self._histories[block].append(change)
        return change

    def content(self, change: Change, blocks: Iterable[int] | None = None) -> bytes:
        """The bytes of a change, or of some blocks of it."""
        if change.zero:
            return _ZEROS * len(list(blocks or change.blocks))
        return b"".join(labelled(self.clone, block, change.generation) for block in blocks or change.blocks)

    def answer(self, change: Change) -> None:
        """It was answered."""
        change.answered = self._tick()
        if self._keeps_answered:
            self.promise([change])
        else:
            self._unpromised.add(change)

    def coverage(self) -> list[Change]:
        """What a flush that is sent now promises when it is answered."""
        return list(self._unpromised)

    def promise(self, changes: Iterable[Change]) -> None:
        """They are promised."""
        self._unpromised.difference_update(changes)
        for change in changes:
            for block in change.blocks:
                self._floors[block] = max(self._floors[block], change.generation)

    def check_read(self, blocks: range, data: bytes) -> None:
        """What was read while nobody else was there is the newest, from whatever connection it came.

        Raises:
            IntegrityError: It is not.
        """
        for block, piece in zip(blocks, _pieces(data), strict=True):
            newest = self._histories[block][-1]
            if piece != self.content(newest, [block]):
                self._complain(block, piece, f"is read instead of {_named(newest)}")

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    # After a crash.

    def settle(self, content: bytes) -> Loss:
        """Checks all blocks after a crash, and goes on from what is there.

        Raises:
            IntegrityError: Something is not what it must be.
        """
        found = [self._find(block, piece) for block, piece in enumerate(_pieces(content))]
        self._check_moment(found)
        self._check_requests(found)
        loss = Loss()
        for block, positions in enumerate(found):
            history, position = self._histories[block], positions[-1]
            loss.missing += len(history) - 1 - position
            loss.kept += history[position].generation > self._floors[block]
            self._histories[block] = [replace(history[position], sent=0, answered=0)]
            self._floors[block] = history[position].generation
        self._unpromised.clear()
        return loss

    def _find(self, block: int, data: bytes) -> list[int]:
        """Where in its history a block may be; zeros may be several changes'."""
        history, floor = self._histories[block], self._floors[block]
        if data == _ZEROS:
            same = [position for position, change in enumerate(history) if change.zero]
        else:
            label = self._label(block, data)
            same = [position for position, change in enumerate(history) if self._labels(change, block) == label]
        allowed = [position for position in same if history[position].generation >= floor]
        if allowed:
            return allowed
        if same:
            self._complain(block, data, f"is older than the promised generation {floor}")
        self._complain(block, data, "is none of its changes")
        raise AssertionError

    def _labels(self, change: Change, block: int) -> tuple[int, int, int] | None:
        return None if change.zero else (self.clone, block, change.generation)

    def _label(self, block: int, data: bytes) -> tuple[int, int, int]:
        try:
            return label_of(data)
        except IntegrityError as error:
            raise IntegrityError(f"clone {self.clone}, block {block}: {error}") from None

    def _complain(self, block: int, data: bytes, what: str) -> None:
        label = "zeros"
        if data != _ZEROS:
            clone, number, generation = self._label(block, data)
            label = f"generation {generation}"
            if (clone, number) != (self.clone, block):
                label = f"foreign, {label} of block {number} of clone {clone},"
        history = ", ".join(map(_named, self._histories[block]))
        raise IntegrityError(f"clone {self.clone}, block {block}: {label} {what}; since the last crash: {history}")

    def _check_moment(self, found: list[list[int]]) -> None:
        """There is a time at which everything was as it is found: a change was done between sent and answered."""
        windows = [
            [self._window(block, position) for position in positions] for block, positions in enumerate(found)
        ]
        sure = [options[0] for options in windows if len(options) == 1]
        unsure = [options for options in windows if len(options) > 1]
        earliest = max((low for low, _ in sure), default=0)
        latest = min((high for _, high in sure), default=math.inf)
        times = {earliest, *(low for options in unsure for low, _ in options if low > earliest)}
        for time in times:
            if time < latest and all(any(low <= time < high for low, high in options) for options in unsure):
                return
        raise IntegrityError(
            f"clone {self.clone} was never like this: something is there that was sent at {earliest}, "
            f"something is missing that was answered at {latest}"
        )

    def _window(self, block: int, position: int) -> tuple[float, float]:
        """After when, and before when, a block can have been as a change left it."""
        history = self._histories[block]
        end = history[position + 1].answered if position + 1 < len(history) else math.inf
        return history[position].sent, end

    def _check_requests(self, found: list[list[int]]) -> None:
        """A request was done as a whole or not at all."""
        done: dict[Change, bool] = {}
        for block, positions in enumerate(found):
            if len(positions) > 1:
                continue
            for position, change in enumerate(self._histories[block]):
                there = position <= positions[0]
                if done.setdefault(change, there) != there:
                    raise IntegrityError(f"clone {self.clone}: only a part of {_named(change)} is there")


def _pieces(data: bytes) -> Iterator[bytes]:
    return (data[at : at + BLOCK] for at in range(0, len(data), BLOCK))


def _named(change: Change) -> str:
    kind = "zeros of generation" if change.zero else "generation"
    return f"{kind} {change.generation} in {change.blocks} (sent {change.sent}, answered {change.answered})"
