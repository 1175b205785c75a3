"""What the machine writes, and where: few different blocks, and places at the store's edges."""

from __future__ import annotations

import random

from hypothesis import strategies as st

MIB, GIB = 1 << 20, 1 << 30
BLOCK, LEAF = 4096, 2 * MIB

# A tree is one level higher beyond 2 MiB, 1 GiB and 512 GiB.
SIZES = [
    0, 1, 4095, 4096, 4097, 5 * BLOCK + 17, 64 * BLOCK, LEAF - 1, LEAF, LEAF + 1, LEAF + BLOCK, 3 * LEAF + 5,
    GIB - 1, GIB, GIB + BLOCK + 1, 512 * GIB, 512 * GIB + 1, 1 << 40, (1 << 40) + 4097,
]  # fmt: skip
SMALL_SIZES = [size for size in SIZES if size <= 3 * LEAF + 5]
EDGES = [0, BLOCK, 16 * BLOCK, LEAF, 2 * LEAF, GIB, 512 * GIB, 1 << 40]
SHIFTS = [0, 1, -1, BLOCK, -BLOCK, BLOCK - 1, 1 - BLOCK, BLOCK + 1, -BLOCK - 1, 100, -100, 3 * BLOCK]
LENGTHS = [1, 4096, 2, 511, 4095, 4097, 2 * BLOCK, 5 * BLOCK, 12 * BLOCK + 100, 40 * BLOCK]
RANGES = [*LENGTHS, LEAF - 1, LEAF, LEAF + 1, 3 * LEAF, GIB, 512 * GIB, 1 << 40]

POOL = 60


def _pool() -> list[bytes]:
    """Blocks that differ much, hardly, or not at all from zeros."""
    blocks = [bytearray(BLOCK) for _ in range(4)]
    for block, at in zip(blocks[1:], (1000, BLOCK - 1, 0), strict=True):
        block[at] = 1
    return [*map(bytes, blocks), *(random.Random(number).randbytes(BLOCK) for number in range(POOL - 4))]


_BLOCKS = _pool()

sizes = st.sampled_from(SIZES)
small_sizes = st.sampled_from(SMALL_SIZES)


@st.composite
def places(draw: st.DrawFn, size: int, lengths: list[int] = LENGTHS) -> tuple[int, int]:
    """Length and offset of a range within a device."""
    edge = draw(st.sampled_from([edge for edge in [*EDGES, size] if edge <= size]))
    offset = min(max(edge + draw(st.sampled_from(SHIFTS)), 0), size)
    length = draw(st.sampled_from([*lengths, 0]))
    return min(length, size - offset), offset


@st.composite
def fillings(draw: st.DrawFn, length: int, offset: int) -> bytes:
    """Bytes for a place: blocks of the pool, lying as the store's blocks do, so that many are equal."""
    start, stride = draw(st.integers(0, POOL - 1)), draw(st.sampled_from([0, 1, 7]))
    first, skip = divmod(offset, BLOCK)
    count = -(-(skip + length) // BLOCK)
    data = b"".join(_BLOCKS[(start + (first + step) * stride) % POOL] for step in range(count))
    return data[skip : skip + length]
