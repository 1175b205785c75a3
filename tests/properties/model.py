"""What a store should hold, as plain bytearrays. Nothing here is shared with the store, its block size included.

A content is a size and the pieces of it that were ever written, each a bytearray of PIECE bytes: a prime, so
that no boundary of the model is one of the store's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

PIECE = 100_003  # bytes
BLOCK = 4096  # bytes that the store promises to share, used only to ask which of them differ


class Content:
    """The bytes of one device at one moment."""

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self._pieces: dict[int, bytearray] = {}

    def copy(self) -> Content:
        twin = Content(self.size)
        twin._pieces = {number: bytearray(piece) for number, piece in self._pieces.items()}
        return twin

    def _spans(self, length: int, offset: int) -> Iterator[tuple[int, int, int, int]]:
        """A range cut at the pieces: piece, first byte within it, first byte within the range, length."""
        done = 0
        while done < length:
            number, start = divmod(offset + done, PIECE)
            part = min(PIECE - start, length - done)
            yield number, start, done, part
            done += part

    def read(self, length: int, offset: int) -> bytes:
        """Bytes, zeros where nothing was written; also beyond the end."""
        found = bytearray(length)
        for number, start, done, part in self._spans(length, offset):
            if number in self._pieces:
                found[done : done + part] = self._pieces[number][start : start + part]
        return bytes(found)

    def write(self, data: bytes, offset: int) -> None:
        assert 0 <= offset <= offset + len(data) <= self.size
        for number, start, done, part in self._spans(len(data), offset):
            piece = self._pieces.setdefault(number, bytearray(PIECE))
            piece[start : start + part] = data[done : done + part]

    def zero(self, length: int, offset: int) -> None:
        for number, piece in self._pieces.items():
            low, high = max(offset - number * PIECE, 0), min(offset + length - number * PIECE, PIECE)
            if low < high:
                piece[low:high] = bytes(high - low)

    def resize(self, size: int) -> None:
        if size < self.size:
            self.zero(self.size - size, size)
        self.size = size

    def whole(self) -> bytes:
        return self.read(self.size, 0)

    def blocks(self) -> dict[int, bytes]:
        """Every block that is not all zeros, by its number; the last one padded."""
        found = {}
        for number, piece in self._pieces.items():
            if any(piece):
                for block in range(number * PIECE // BLOCK, (number * PIECE + PIECE - 1) // BLOCK + 1):
                    if block not in found and any(data := self.read(BLOCK, block * BLOCK)):
                        found[block] = data
        return found


def differing(old: Content, new: Content) -> list[int]:
    """The numbers of the blocks in which two contents differ; what lies beyond an end counts as zeros."""
    before, after = old.blocks(), new.blocks()
    return sorted(number for number in before.keys() | after.keys() if before.get(number) != after.get(number))


def ranges(numbers: list[int], size: int) -> list[tuple[int, int]]:
    """Numbers of blocks as ranges of bytes, neighbours joined, cut at a size."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        start, end = number * BLOCK, min((number + 1) * BLOCK, size)
        if found and sum(found[-1]) == start:
            start = found.pop()[0]
        found.append((start, end - start))
    return found


@dataclass
class Thing:
    """An image or a clone.

    Attributes:
        name: Its present name.
        image: Whether it is an image.
        base: Its parent's moment.
        flushed: What a power cut would leave.
        now: What its writer sees; None where nobody has it open.
        parent: What it was made from.
        ephemeral: Whether a reboot removes it.
    """

    name: str
    image: bool
    base: Content
    flushed: Content
    parent: Thing | None = None
    ephemeral: bool = False
    now: Content | None = field(default=None, repr=False)

    @property
    def is_open(self) -> bool:
        return self.now is not None

    @property
    def live(self) -> Content:
        """The content that its writer sees."""
        assert self.now is not None
        return self.now

    def open(self) -> None:
        self.now = self.flushed.copy()

    def flush(self) -> None:
        self.flushed = self.live.copy()

    def child(self, name: str, *, ephemeral: bool = False) -> Thing:
        moment = self.flushed
        return Thing(name, False, moment.copy(), moment.copy(), self, ephemeral or self.ephemeral)

    def sealed(self, name: str) -> Thing:
        return Thing(name, True, self.base.copy(), self.flushed.copy(), self.parent)

    def reset(self) -> None:
        self.flushed = self.base.copy()
