"""Hands that write, zero, trim, read and flush a served clone, many at a time, until its server is gone."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.unit.nbd_messages import FUA, NO_HOLE

from .connection import Connection
from .integrity import BLOCK, Ledger

FLUSHES, READS, ZEROS, TRIMS = 0.05, 0.15, 0.06, 0.06  # of the requests
FUAS = 0.05  # of the changes


class Promises:
    """What was promised by answers, counted by kind."""

    def __init__(self) -> None:
        self.count = Counter[str]()
        self._actions: dict[str, Callable[[], None]] = {}

    def after_next(self, kind: str, action: Callable[[], None]) -> None:
        """Has something done right after the next promise of a kind."""
        self._actions[kind] = action

    def made(self, kind: str) -> None:
        """One more."""
        self.count[kind] += 1
        action = self._actions.pop(kind, None)
        if action is not None:
            action()


@dataclass(frozen=True)
class ServedClone:
    """One clone that clients see.

    Attributes:
        name: Its name.
        ledger: What its blocks may be.
        shift: Bytes before the first of them: with some, each lies in two blocks of the store.
        connections: How many clients it has at a time.
        depth: How many requests each of these has under way.
        promises: What was promised so far, of all clones together.
    """

    name: str
    ledger: Ledger
    shift: int
    connections: int
    depth: int
    promises: Promises

    def offset(self, blocks: range) -> int:
        """Where blocks begin, in bytes."""
        return self.shift + blocks.start * BLOCK


async def client(clone: ServedClone, socket: Path, dice: random.Random) -> None:
    """Comes, works for a while, leaves and comes again, until the server is gone.

    Raises:
        AssertionError: The server broke a promise, or refused something.
    """
    try:
        while True:
            connection = await Connection.open(socket, clone.name, structured=dice.random() < 0.5)
            try:
                await visit(connection, clone, dice)
            finally:
                connection.close()
    except ConnectionError:
        return


async def visit(connection: Connection, clone: ServedClone, dice: random.Random) -> None:
    """All hands work for a while, and the client leaves."""
    count = dice.randint(10, 300)
    hands = [work(connection, clone, random.Random(dice.random()), count) for _ in range(clone.depth)]
    ends = await asyncio.gather(*hands, return_exceptions=True)
    failures = [end for end in ends if isinstance(end, BaseException)]
    for failure in sorted(failures, key=lambda one: isinstance(one, ConnectionError)):
        raise failure
    await connection.leave()


async def work(connection: Connection, clone: ServedClone, dice: random.Random, count: int) -> None:
    """One thing after the other, so many."""
    for _ in range(count):
        what = dice.random()
        if what < FLUSHES:
            await flush(connection, clone)
            continue
        with clone.ledger.alone(dice) as blocks:
            if what < FLUSHES + READS:
                data = await connection.read(clone.offset(blocks), len(blocks) * BLOCK)
                clone.ledger.check_read(blocks, data)
            else:
                await change(connection, clone, blocks, dice)


async def flush(connection: Connection, clone: ServedClone) -> None:
    covered = clone.ledger.coverage()
    await connection.flush()
    clone.ledger.promise(covered)
    clone.promises.made("flush")


async def change(connection: Connection, clone: ServedClone, blocks: range, dice: random.Random) -> None:
    what, fua = dice.random(), FUA * (dice.random() < FUAS)
    one = clone.ledger.send(blocks, zero=what < ZEROS + TRIMS)
    offset, length = clone.offset(blocks), len(blocks) * BLOCK
    if what < ZEROS:
        await connection.zero(offset, length, fua | NO_HOLE * (what < ZEROS / 2))
    elif what < ZEROS + TRIMS:
        await connection.trim(offset, length, fua)
    else:
        await connection.write(offset, clone.ledger.content(one), fua)
    clone.ledger.answer(one)
    if fua:
        clone.ledger.promise([one])
        clone.promises.made("fua")
