"""The demonstration's proofs: what a disk is, against what it should be.

Two disks are compared byte by byte, but pieces that are holes in both are not read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

import cowstore
from cowstore_cli.demo_disk import BLOCK, data_ranges

PIECE = 1 << 20  # bytes compared at once


class ProofError(click.ClickException):
    """A disk is not what it should be."""


@dataclass
class Disk:
    """Something to compare.

    Attributes:
        size: Bytes.
        read: Takes a length and an offset.
        solid: The numbers of the pieces that may hold something else than zeros.
    """

    size: int
    read: Callable[[int, int], bytes]
    solid: set[int]


def of_file(fd: int) -> Disk:
    """A file, open for reading."""
    size = os.fstat(fd).st_size
    solid: set[int] = set()
    for start, end in data_ranges(fd, size):
        solid.update(range(start // PIECE, -(-end // PIECE)))
    return Disk(size, lambda length, offset: os.pread(fd, length, offset), solid)


def of_device(device: cowstore.Device) -> Disk:
    """A device of the store, read through the library."""
    solid: set[int] = set()
    for extent in device.extents():
        if extent.data:
            solid.update(range(extent.offset // PIECE, -(-(extent.offset + extent.length) // PIECE)))
    return Disk(device.size, device.pread, solid)


def differing(one: Disk, other: Disk) -> list[int]:
    """The offsets of all blocks that differ between two disks of one size."""
    found = []
    for piece in sorted(one.solid | other.solid):
        offset = piece * PIECE
        length = min(PIECE, one.size - offset)
        first, second = one.read(length, offset), other.read(length, offset)
        if first != second:
            found += [
                offset + at for at in range(0, length, BLOCK) if first[at : at + BLOCK] != second[at : at + BLOCK]
            ]
    return found


def prove_equal(name: str, found: Disk, expected: Path) -> None:
    """Compares a disk with the file that it should equal.

    Raises:
        ProofError: They differ.
    """
    with open(expected, "rb") as file:
        wanted = of_file(file.fileno())
        if found.size != wanted.size:
            raise ProofError(f"{name} has {found.size} bytes and should have {wanted.size}")
        blocks = differing(found, wanted)
    if blocks:
        counted = "1 block differs" if len(blocks) == 1 else f"{len(blocks)} blocks differ"
        raise ProofError(f"{name} is not what it should be: {counted}, the first at offset {blocks[0]}")


def prove_file_equal(name: str, path: Path, expected: Path) -> None:
    """The same for an exported file."""
    with open(path, "rb") as file:
        prove_equal(name, of_file(file.fileno()), expected)


def bring_back(copy: Path, clone: cowstore.Clone) -> int:
    """Writes to a clone the blocks in which a changed copy of its disk differs; returns how many they are."""
    with open(copy, "rb") as file:
        changed = differing(of_file(file.fileno()), of_device(clone))
        for offset in changed:
            clone.pwrite(os.pread(file.fileno(), BLOCK, offset), offset)
    clone.flush()
    return len(changed)
