"""Random changes of a clone, and of plain bytes beside it; for the process that is killed."""

from __future__ import annotations

import random

import cowstore

BLOCK = 4096
SIZE = 64 * BLOCK + 100


def change(clone: cowstore.Clone, model: bytearray, dice: random.Random) -> None:
    """One change, or a flush."""
    offset = dice.randrange(SIZE)
    length = min(dice.choice((1, 100, BLOCK, 3 * BLOCK)), SIZE - offset)
    what = dice.randrange(8)
    if what == 0:
        clone.flush()
    elif what == 1:
        clone.zero(length, offset)
        model[offset : offset + length] = bytes(length)
    else:
        data = dice.randbytes(length)
        clone.pwrite(data, offset)
        model[offset : offset + length] = data
