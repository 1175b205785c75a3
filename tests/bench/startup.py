"""How long commands take that look at names only, from the shell's point of view."""

from __future__ import annotations

import itertools
import sys

import cowstore
from tests.bench import ground, measure
from tests.bench.measure import Bench

LIMIT = 0.150


def run(bench: Bench) -> None:
    path = bench.folder / "store"
    with cowstore.open(path, create=True) as store:
        store.create("desk", ground.GIB).close()
        store.clone_many("desk", [f"clone-{number}" for number in range(100)])
    program, number = [*ground.command(), "-s", str(path)], itertools.count()

    def once(*words: str) -> measure.Action:
        return lambda: ground.run([*program, *(word.format(next(number)) for word in words)])

    def rename() -> float:
        return sum(ground.run([*program, "rename", *pair]) for pair in (("desk", "table"), ("table", "desk"))) / 2

    actions = {
        "python -c pass": lambda: ground.run([sys.executable, "-c", "pass"]),
        "cowstore --help": once("--help"),
        "cowstore ls": once("ls"),
        "cowstore ls --json": once("ls", "--json"),
        "cowstore rename": rename,
        "cowstore clone": once("clone", "desk", "more-{}"),
        "cowstore fork": once("fork", "desk", "child-{}"),
        "cowstore seal": once("seal", "desk", "image-{}"),
        "cowstore create": once("create", "blank-{}", "1G"),
    }
    found = measure.in_turn(bench.pick(9, 3), actions, warm=1)
    for name, sample in found.items():
        if name in ("python -c pass", "cowstore create"):  # create opens the clone: that needs NumPy
            bench.fact(name, sample)
        else:
            bench.within(name, sample, LIMIT)
