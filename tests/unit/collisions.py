"""Blocks that differ and have one XXH3-128 digest, by the thousand, for any seed.

XXH3 takes a long input in stripes of 64 bytes, eight lanes of 8 bytes each. In each stripe a lane adds to one
64-bit sum the product of the two halves of (data XOR key), and to its neighbour's sum the data itself. Where
the lower half of (data XOR key) is zero the product is zero, whatever the upper half is, so only the data itself
counts. Let two stripes of one block do so in the same lane, add a number to the upper half of the one and take it
from the other's: all sums are as before. The keys come from a fixed secret of the algorithm and the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

# The first two words of XXH3's default secret. With a seed, the first has it added, the second taken off.
SECRET = 0xBE4BA423396CFEB8, 0x1CAD21F72C81017C
STRIPE, MASK = 64, (1 << 64) - 1


def colliding(seed: int, count: int, content: int = 0) -> Iterator[bytes]:
    """So many different blocks of 4,096 bytes with one digest, random but for 16 bytes of each."""
    block = bytearray(random.Random(content).randbytes(4096))
    first, second = (SECRET[0] + seed) & MASK, (SECRET[1] - seed) & MASK
    for number in range(count):
        block[:8] = _halves(first, number)
        block[STRIPE : STRIPE + 8] = _halves(second, -number)
        yield bytes(block)


def _halves(key: int, upper: int) -> bytes:
    return (key & 0xFFFFFFFF).to_bytes(4, "little") + (upper & 0xFFFFFFFF).to_bytes(4, "little")
