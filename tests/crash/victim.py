"""A process to be killed: `python -m tests.crash.victim STORE PREFIX`. It says what it begins and what is done.

Every content follows from the clone's name and the number of its flush, so that whoever has read what was said
knows what must be there.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import threading
from contextlib import suppress

import cowstore

from .model import BLOCK, Model, Moment

SIZE = 700 * BLOCK
CLONES = ("x", "y")


def change(name: str, number: int) -> list[tuple[int, bytes]]:
    """What is written before a flush: offsets and bytes."""
    dice = random.Random(f"{name} {number}")
    shared = random.Random(number % 7).randbytes(3 * BLOCK)  # known to the other clones
    return [
        (dice.randrange(SIZE - 40_000), dice.randbytes(dice.randint(1, 30_000))),
        (dice.randrange(600) * BLOCK, shared),
        (dice.randrange(600) * BLOCK, bytes(dice.randint(1, 9) * BLOCK)),
    ]


def content(name: str, flushes: int) -> Moment:
    """What a clone holds after so many flushes."""
    model = Model(Moment(SIZE, {}))
    for number in range(flushes):
        for offset, data in change(name, number):
            model.write(data, offset)
    return model.moment()


def say(*words: object) -> None:
    """One line, in one write."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write(store: cowstore.Store, name: str) -> None:
    """Flush after flush, until the end comes from outside; now and then a fork, deleted again."""
    with store.create(name, SIZE) as clone:
        say("made", name)
        for number in itertools.count():
            for offset, data in change(name, number):
                clone.pwrite(data, offset)
            say("begun", name, number + 1)
            clone.flush()
            say("done", name, number + 1)
            if number % 5 == 4:
                clone.fork(f"{name}-fork{number}")
                store.delete(f"{name}-fork{number}")


def main() -> None:
    """Writes with two threads and collects with a third."""
    path, prefix = sys.argv[1:]
    store = cowstore.open(path)
    for clone in CLONES:
        threading.Thread(target=write, args=(store, prefix + clone)).start()
    while True:
        with suppress(cowstore.InUseError):
            store.collect()


if __name__ == "__main__":
    main()
