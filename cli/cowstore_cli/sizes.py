"""Sizes as people write them: 20G, 512M, 4KiB, 1.5T; the letters are powers of 1024, as in disk tools."""

from __future__ import annotations

import re

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_WRITTEN = re.compile(r"(\d+)(?:\.(\d+))?\s*(?:([kmgtpe])(?:ib)?|b)?", re.IGNORECASE)


def parse(text: str) -> int:
    """Bytes from a size as a person writes it.

    Raises:
        ValueError: It is not a size, or not a whole number of bytes. ``20GB`` is refused too: to some it is
            20 x 1000^3, to others 20 x 1024^3, and a disk must not be a guess.
    """
    match = _WRITTEN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes, or a number and K, M, G, T, P or E (20G, 4KiB)")
    whole, fraction, letter = match[1], match[2] or "", match[3]
    scale: int = 1024 ** (1 + "kmgtpe".index(letter.lower())) if letter else 1
    parts: int = 10 ** len(fraction)
    count, rest = divmod(int(whole + fraction) * scale, parts)
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return count


def show(count: int) -> str:
    """A size for people, one decimal at most: ``0B``, ``1.5GiB``. Without a space, so that it stays one word."""
    value, unit = float(count), 0
    while value >= 1023.95 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.1f}".removesuffix(".0") + UNITS[unit]


def exact(count: int) -> str:
    """A size for people that keeps every byte: ``1.5KiB (1,536 bytes)``, ``12 bytes``."""
    every = f"{count:,} byte{'' if count == 1 else 's'}"
    return every if count < 1024 else f"{show(count)} ({every})"
