"""Digests: what stands for a block's content.

A digest is the XXH3-128 of a block under the store's seed, 16 bytes, big-endian as xxhash prints it. It
is fast and well spread but not collision resistant, so nothing in the store trusts equal digests: bytes
are compared before a block is shared. The seed only makes collisions a nuisance to prepare.

The all-zero digest means "never written" in a segment, so a block that happens to hash to it is filed
under the number one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat

import xxhash

BLOCK_SIZE = 4096
DIGEST_SIZE = 16
ZERO_BLOCK = bytes(BLOCK_SIZE)
UNWRITTEN = bytes(DIGEST_SIZE)
_FILED_UNDER_ONE = (1).to_bytes(DIGEST_SIZE, "big")

Buffer = bytes | bytearray | memoryview
HashFunction = Callable[[Buffer, int], bytes]


class Hasher:
    """Hashes blocks under one seed.

    Args:
        seed: The store's seed, an unsigned 64-bit number.
        function: Takes a block and a seed, returns 16 bytes. Tests pass a poor one, so that different
            blocks collide all the time.
    """

    def __init__(self, seed: int, function: HashFunction = xxhash.xxh3_128_digest) -> None:
        self.seed = seed
        self._function = function

    def digest(self, block: Buffer) -> bytes:
        """The digest of one block of 4,096 bytes."""
        found = self._function(block, self.seed)
        return found if found != UNWRITTEN else _FILED_UNDER_ONE

    def digests(self, blocks: Iterable[Buffer]) -> list[bytes]:
        """The digests of many blocks, in their order."""
        found = list(map(self._function, blocks, repeat(self.seed)))
        if UNWRITTEN in found:
            found = [_FILED_UNDER_ONE if one == UNWRITTEN else one for one in found]
        return found


def checksum(data: Buffer, seed: int = 0) -> int:
    """An unsigned 64-bit XXH3 of a record or header, for damage only, not for identity."""
    return xxhash.xxh3_64_intdigest(data, seed)
