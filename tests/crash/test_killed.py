"""Real processes on one store, killed without warning while others go on."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cowstore
from cowstore.clones import Clone

from .checking import audit, difference
from .hunting import DEEP, SECONDS
from .victim import CLONES, content

ROOT = Path(__file__).parents[2]
ROUNDS = 4
SIDES = 2  # processes at a time

pytestmark = pytest.mark.timeout(900 + SECONDS)


class Victim:
    """A process that writes, and what it has said."""

    def __init__(self, store: Path, prefix: str) -> None:
        self.prefix = prefix
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.victim", str(store), prefix], cwd=ROOT, stdout=subprocess.PIPE
        )

    def kill(self) -> list[str]:
        """Ends it at once; returns its lines."""
        assert self._process.poll() is None, "it ended by itself"
        self._process.send_signal(signal.SIGKILL)
        said, _ = self._process.communicate()
        return said.decode().splitlines()


def check(store: cowstore.Store, prefix: str, said: list[str]) -> int:
    """Every flush that was done is there, whole; one more may be. Returns how many were done."""
    flushes = 0
    words = [line.split() for line in said]
    for name in (prefix + clone for clone in CLONES):
        if ["made", name] not in words:
            continue
        counts = {"begun": 0, "done": 0}
        counts |= {word: int(number) for word, of, *rest in words if of == name for number in rest}
        flushes += counts["done"]
        with store.device(name) as clone:
            assert isinstance(clone, Clone)
            reasons = [difference(clone, content(name, number)) for number in {counts["done"], counts["begun"]}]
            assert "" in reasons, (name, counts, reasons)
    return flushes


def test_killed(arena):
    dice = random.Random(7)
    path = arena / "store"
    cowstore.open(path, create=True).close()
    names = (f"v{number}-" for number in range(1 << 30))
    victims = [Victim(path, next(names)) for _ in range(SIDES)]
    flushes = rounds = 0
    end = time.monotonic() + SECONDS
    while rounds < ROUNDS or (DEEP and time.monotonic() < end):
        time.sleep(1 + dice.random())
        victim = victims.pop(0)
        said = victim.kill()
        with cowstore.open(path) as store:
            flushes += check(store, victim.prefix, said)
            store.delete(*[info.name for info in store.devices() if info.name.startswith(victim.prefix)])
        victims.append(Victim(path, next(names)))
        rounds += 1
    last = [(victim.prefix, victim.kill()) for victim in victims]
    with cowstore.open(path) as store:
        flushes += sum(check(store, *one) for one in last)
        audit(store)
        collection = store.collect()
        assert not collection.waiting
        audit(store, collected=True)
    print(f"{rounds} rounds, {flushes} flushes")
    assert flushes > 3 * ROUNDS
