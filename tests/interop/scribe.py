"""A scribe: commands for qemu-io, made by chance."""

from __future__ import annotations

import random
from collections.abc import Iterator


class Scribe:
    """Makes qemu-io's commands by chance, and beside them the bytes that must come of them."""

    def __init__(self, disk: bytes, dice: random.Random) -> None:
        self.content = bytearray(disk)
        self._dice = dice
        self._grain = 1

    def commands(self, count: int, grain: int) -> list[str]:
        """So many changes of ranges in multiples of a grain; then a flush, and reads of all of them."""
        self._grain, ranges = grain, []
        changes = []
        for _ in range(count):
            at, length = self._range()
            ranges.append((at, length))
            changes.append(self._dice.choice(self.KINDS)(self, at, length))
        return [*changes, "flush", *(check for one in ranges for check in self._reads(*one))]

    def _range(self) -> tuple[int, int]:
        dice, grain = self._dice, self._grain
        most = min(40_000, (256 << 10) // grain)
        length = dice.choice([1, 2, 3, 5, dice.randint(1, most)]) * grain
        at = dice.randrange((len(self.content) - length) // grain + 1) * grain
        if dice.random() < 0.1:
            at = (len(self.content) - length) // grain * grain
        return at, length

    def _fill(self, at: int, length: int, byte: int) -> None:
        self.content[at : at + length] = bytes([byte]) * length

    def _write(self, at: int, length: int) -> str:
        byte = self._dice.randint(1, 255)
        self._fill(at, length, byte)
        return f"write {self._dice.choice(['', '-f '])}-P {byte} {at} {length}"

    def _writev(self, at: int, length: int) -> str:
        """The same from several buffers, which qemu-io wants in whole sectors."""
        if self._grain % 512:
            return self._write(at, length)
        byte = self._dice.randint(1, 255)
        self._fill(at, length, byte)
        return f"writev -P {byte} {at} 512 {length - 512}" if length > 512 else f"writev -P {byte} {at} {length}"

    def _zeros(self, at: int, length: int) -> str:
        self._fill(at, length, 0)
        return f"write -z {self._dice.choice(['', '-u ', '-f ', '-n ', '-u -f '])}{at} {length}"

    def _discard(self, at: int, length: int) -> str:
        """What is trimmed reads as zeros, here."""
        self._fill(at, length, 0)
        return f"discard {at} {length}"

    KINDS = (_write, _write, _writev, _zeros, _discard)

    def _reads(self, at: int, length: int) -> Iterator[str]:
        """Of what is there in the end, in runs of equal bytes; very short ones only at the end."""
        end = at + length
        while at < end:
            byte, start = self.content[at], at
            rest = self.content[at:end].lstrip(bytes([byte]))
            at = end - len(rest)
            if at - start >= 16 or not rest:
                yield f"read -P {byte} {start} {at - start}"
