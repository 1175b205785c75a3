"""What is done to a store while it is recorded: a story that meets everything once, and walks by dice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from .driver import MIB, Driver
from .model import BLOCK, Model


def story(driver: Driver) -> None:
    """Everything once, in an order in which most things meet."""
    d = driver
    d.found()
    d.import_image("debian", d.content(MIB + 700))
    first = d.shelf["debian"].flushed
    changed = Model(first)
    changed.write(d.blocks(12), 20 * BLOCK)
    d.import_image("debian-2", changed.moment())  # nearly all of it is there already
    d.clone("debian", "a")
    d.clone("debian", "b", size=2 * MIB + 33)
    d.write("a", d.blocks(9), 3 * BLOCK)
    d.write("b", d.rng.randbytes(10_000), 2 * MIB - 9_990)
    d.flush("a")
    d.flush("a")  # nothing to do
    d.flush("b")
    d.write("a", d.rng.randbytes(3), 17)
    d.fork("a", ["c", "d"])
    d.write("a", d.blocks(30), 90 * BLOCK)
    d.zero("a", 77 * BLOCK + 5, 60 * BLOCK - 3)
    d.look("a")
    d.flush("a")
    d.clone("a", "gone", ephemeral=True)
    d.write("gone", d.blocks(7), BLOCK)
    d.flush("gone")
    d.seal("gone", "kept")
    d.seal("a", "golden")
    d.open("d")
    d.write("d", d.blocks(6), 0)
    d.close("d")
    d.reset("d")
    d.clone_many("golden", ["m1", "m2", "m3"])
    garbage(d, "debian-2", ["b", "c"])
    d.write("a", d.blocks(40), 100 * BLOCK)  # into slots that were freed
    d.flush("a")
    d.reset("a")
    d.backup("copy")
    d.rename("d", "renamed")
    d.write("a", d.blocks(3), 0)
    d.reopen()
    d.create("large", 5 << 30)
    d.write("large", d.blocks(3), (5 << 30) - 3 * BLOCK)
    d.write("large", b"x", 1 << 30)
    d.flush("large")
    d.resize("large", MIB // 2)
    d.flush("large")
    d.delete("m1", "m3", "debian")
    d.collect()
    d.open("m2")
    d.write("m2", d.blocks(60), 0)
    d.flush("m2")
    d.write("m2", d.blocks(20), 8 * BLOCK)
    d.stage("m2")
    d.write("large", d.blocks(20), 0)
    d.discard("m2")
    d.discard("large")
    d.close_store()


def garbage(d: Driver, image: str, clones: Sequence[str]) -> None:
    """Shared blocks that die after a clone has taken them and before it is flushed."""
    unique = d.rng.randbytes(5 * BLOCK)
    d.create("last-holder", MIB)
    d.write("last-holder", unique, 0)
    d.flush("last-holder")
    d.create("taker", MIB)
    d.write("taker", unique, 64 * BLOCK)
    d.stage("taker")
    d.delete(image, *clones, "last-holder")
    d.collect()  # has to wait: the taker has a pin
    d.flush("taker")
    d.look("taker")
    d.collect()
    d.look("taker")


def walk(driver: Driver, steps: int) -> None:
    """Steps by dice."""
    d = driver
    d.found()
    d.import_image(d.fresh_name("i"), d.content(MIB // 2 + 5))
    d.create(d.fresh_name(), 300 * BLOCK)
    for _ in range(steps):
        weights = [weight for weight, _ in _STEPS]
        (step,) = d.rng.choices([step for _, step in _STEPS], weights)
        step(d)
    for name in list(d.hands):
        d.discard(name)
    d.close_store()


def _pick(d: Driver, *, hands: bool = False, kind: str = "", closed: bool = False) -> str:
    """A device of that sort; empty where there is none."""
    names = list(d.hands) if hands else [name for name in d.shelf if d.shelf[name].kind == kind or not kind]
    names = [name for name in names if not (closed and name in d.hands)]
    return d.rng.choice(sorted(names)) if names else ""


def _write(d: Driver) -> None:
    if name := _pick(d, hands=True):
        size = d.hands[name][1].size
        data = d.blocks(d.rng.randint(1, 24)) if d.rng.random() < 0.8 else d.rng.randbytes(d.rng.randint(1, 9999))
        offset = d.rng.randrange(max(size, 1))
        offset -= offset % BLOCK if d.rng.random() < 0.7 else 0
        d.write(name, data[: max(size - offset, 0)], offset)


def _flush(d: Driver) -> None:
    if name := _pick(d, hands=True):
        d.flush(name)


def _zero(d: Driver) -> None:
    if name := _pick(d, hands=True):
        start, end = sorted(d.rng.randrange(d.hands[name][1].size + 1) for _ in range(2))
        d.zero(name, end - start, start)


def _resize(d: Driver) -> None:
    if name := _pick(d, hands=True):
        size = d.rng.choice((0, 1, 100, 511, 512, 513, 600)) * BLOCK + d.rng.choice((0, 1, 2000))
        d.resize(name, size)


def _stage(d: Driver) -> None:
    if name := _pick(d, hands=True):
        d.stage(name)
        d.look(name)


def _open(d: Driver) -> None:
    if name := _pick(d, kind="clone", closed=True):
        d.open(name)


def _close(d: Driver) -> None:
    if name := _pick(d, hands=True):
        d.rng.choice((d.close, d.discard))(name)


def _reset(d: Driver) -> None:
    if name := _pick(d, kind="clone"):
        d.reset(name)


def _clone(d: Driver) -> None:
    if len(d.shelf) < 14:
        d.clone(_pick(d), d.fresh_name(), ephemeral=d.rng.random() < 0.2)


def _fork(d: Driver) -> None:
    if len(d.shelf) < 14 and (name := _pick(d, kind="clone")):
        d.fork(name, [d.fresh_name("f") for _ in range(d.rng.randint(1, 3))])


def _seal(d: Driver) -> None:
    if len(d.shelf) < 14 and (name := _pick(d, kind="clone")):
        d.seal(name, d.fresh_name("s"))


def _import(d: Driver) -> None:
    if len(d.shelf) < 14:
        known = Model(d.shelf[_pick(d)].flushed)
        known.write(d.blocks(4)[: known.size], 0)
        moment = known.moment() if d.rng.random() < 0.5 else d.content(d.rng.randrange(1, MIB))
        d.import_image(d.fresh_name("i"), replace(moment, ephemeral=False))


def _delete(d: Driver) -> None:
    if len(d.shelf) > 3:
        d.delete(*d.rng.sample(sorted(d.shelf), d.rng.randint(1, 2)))


def _rename(d: Driver) -> None:
    if name := _pick(d, closed=True):
        d.rename(name, d.fresh_name("r"))


def _collect(d: Driver) -> None:
    d.collect()


def _reopen(d: Driver) -> None:
    d.reopen()


def _backup(d: Driver) -> None:
    d.backup(d.fresh_name("backup"))


_STEPS: tuple[tuple[int, Callable[[Driver], None]], ...] = (
    (30, _write), (22, _flush), (5, _zero), (3, _resize), (5, _stage), (8, _open), (6, _close), (3, _reset),
    (5, _clone), (5, _fork), (3, _seal), (3, _import), (6, _delete), (2, _rename), (5, _collect), (2, _reopen),
    (1, _backup),
)  # fmt: skip
