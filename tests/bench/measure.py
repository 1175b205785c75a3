"""The frame of the benchmarks: times that are taken in turn, their medians, and a table with targets.

A figure is a ratio against a peer in the same run wherever there is one, and a plain limit elsewhere. Ours and the
peer's repetitions alternate, so that a slow minute of the machine falls on both. A peer that is not installed is
named as missing; nothing is dropped silently.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Action = Callable[[], float]


@dataclass(frozen=True)
class Sample:
    """Several measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles, as a part of the median."""
        if len(self.values) < 3 or not self.median:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / 2 / self.median

    def scaled(self, factor: float) -> Sample:
        return Sample(tuple(value * factor for value in self.values))


@dataclass
class Clock:
    seconds: float = 0.0


@contextmanager
def clock() -> Iterator[Clock]:
    """Times a block; garbage is collected before it, not in it."""
    gc.collect()
    gc.disable()
    watch = Clock()
    begun = time.perf_counter()
    try:
        yield watch
    finally:
        watch.seconds = time.perf_counter() - begun
        gc.enable()


def timed(action: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    with clock() as watch:
        action()
    return watch.seconds


def in_turn(repetitions: int, actions: Mapping[str, Action], *, warm: int = 0) -> dict[str, Sample]:
    """Runs all actions in turn, again and again; each returns what it measured. Warm rounds are not counted."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(-warm, repetitions):
        for name, action in actions.items():
            value = action()
            if turn >= 0:
                found[name].append(value)
    return {name: Sample(tuple(values)) for name, values in found.items()}


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        topic: The module that measured it.
        figure: What it is.
        ours: Our median, in the unit.
        unit: "s", "B" or "".
        spread: Of ours, a part of the median.
        peer: With what it is compared; empty where it is not.
        theirs: The peer's median; None where it is missing or there is none.
        ratio: What the target is about where there is a peer.
        target: In words; empty where there is none.
        met: Whether it is; None where that cannot be said.
        note: Where the time goes, or whatever a reader should know.
    """

    topic: str
    figure: str
    ours: float
    unit: str = "s"
    spread: float = 0.0
    peer: str = ""
    theirs: float | None = None
    ratio: float | None = None
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass
class Bench:
    """One run.

    Attributes:
        folder: Where data may be put, on a real disk.
        quick: Small data and few repetitions, to see whether everything works; the figures mean nothing.
        rows: What was measured.
    """

    folder: Path
    quick: bool = False
    topic: str = ""
    rows: list[Row] = field(default_factory=list)

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def say(self, text: str) -> None:
        print(f"{self.topic}: {text}", file=sys.stderr, flush=True)

    def at_most(
        self, figure: str, ours: Sample, peer: str, theirs: Sample | None, limit: float | None, note: str = ""
    ) -> None:
        """Ours is to take at most so many times what the peer takes."""
        ratio = ours.median / theirs.median if theirs else None
        met = None if ratio is None or limit is None else ratio <= limit
        target = "" if limit is None else f"<= {limit:g}x"
        self._add(figure, ours, "s", peer, theirs, ratio, target, met, note)

    def faster(
        self, figure: str, ours: Sample, peer: str, theirs: Sample | None, times: float, note: str = ""
    ) -> None:
        """Ours is to be at least so many times as fast as the peer."""
        ratio = theirs.median / ours.median if theirs else None
        met = None if ratio is None else ratio >= times
        self._add(figure, ours, "s", peer, theirs, ratio, f"{times:g}x as fast", met, note)

    def within(self, figure: str, ours: Sample, limit: float, unit: str = "s", note: str = "") -> None:
        """Ours is to be less than a limit."""
        target = f"< {amount(limit, unit)}"
        self._add(figure, ours, unit, "", None, None, target, ours.median < limit, note)

    def fact(self, figure: str, ours: Sample, unit: str = "s", note: str = "") -> None:
        """A figure without a target."""
        self._add(figure, ours, unit, "", None, None, "", None, note)

    def missing(self, figure: str, program: str) -> None:
        """A figure that cannot be had without a program."""
        self._add(figure, Sample((0.0,)), "", program, None, None, "", None, "")

    def _add(
        self, figure: str, ours: Sample, unit: str, peer: str, theirs: Sample | None, ratio: float | None,
        target: str, met: bool | None, note: str,
    ) -> None:  # fmt: skip
        row = Row(
            self.topic, figure, ours.median, unit, ours.spread, peer, theirs.median if theirs else None, ratio,
            target, met, note,
        )  # fmt: skip
        self.rows.append(row)
        print("  " + "  ".join(cell for cell in cells(row) if cell), file=sys.stderr, flush=True)


def amount(value: float, unit: str) -> str:
    """A value for people."""
    if unit == "B":
        for name, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if value >= scale:
                return f"{value / scale:.3g} {name}"
        return f"{value:.0f} B"
    if unit == "s":
        for name, part in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
            if value >= part:
                return f"{value / part:.3g} {name}"
        return f"{value * 1e9:.0f} ns"
    return f"{value:.3g}"


HEAD = ("figure", "ours", "", "peer", "theirs", "ratio", "target", "")


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    theirs = "" if row.theirs is None else amount(row.theirs, row.unit)
    if row.peer and row.theirs is None:
        theirs = "missing"
    return (
        row.figure,
        amount(row.ours, row.unit),
        f"±{row.spread:.0%}" if row.spread else "",
        row.peer,
        theirs,
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        row.target,
        {True: "met", False: "MISSED", None: "-" if row.target else ""}[row.met],
    )


def report(rows: list[Row]) -> str:
    """The table of all figures, the notes below it, and one sentence."""
    head = [HEAD, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*head, strict=True)]
    lines = []
    topic = ""
    for row, texts in zip([None, *rows], head, strict=True):
        if row is not None and row.topic != topic:
            topic = row.topic
            lines += ["", topic]
        lines.append("  " + "  ".join(map(str.ljust, texts, widths)).rstrip())
        if row is not None and row.note:
            lines.append(f"      {row.note}")
    judged = [row for row in rows if row.met is not None]
    missed = [row.figure for row in judged if not row.met]
    absent = sorted({row.peer for row in rows if row.peer and row.theirs is None})
    lines += ["", f"{len(judged) - len(missed)} of {len(judged)} targets met."]
    if missed:
        lines.append("Missed: " + "; ".join(missed) + ".")
    if absent:
        lines.append("Missing peers: " + ", ".join(absent) + ".")
    return "\n".join(lines)


def plain(rows: list[Row]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(row) for row in rows]
