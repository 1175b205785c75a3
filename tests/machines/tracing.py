"""A process in a guest that counts in memory and on the disk, and what its traces say of how guests are related.

Each line is a number and the nanoseconds of processor time that the process has had. Two machines that go on from
one moment have the same lines up to it, and can hardly have the same line ever after.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

# Two files: in memory, and on the disk. It sleeps on the fifo of guestdisk's counter, which nobody writes to.
TRACER = """\
exec 3<>/run/never 5>>/run/trace 6>>/data/trace >/dev/null 2>&1 </dev/null
n=0
while :; do
    n=$((n + 1))
    read -r spent _ </proc/self/schedstat
    echo "$n $spent" >&5
    echo "$n $spent" >&6
    read -r -t 0.05 -u 3
done
"""
START = f"(setsid sh -c '{TRACER}' &) >/dev/null 2>&1"

Trace = list[tuple[int, int]]


def parsed(text: str) -> Trace:
    """The lines of a trace; one that is being written is left out."""
    lines = [line.split() for line in text.split("\n")[:-1]]
    return [(int(number), int(spent)) for number, spent in lines]


def check_unbroken(trace: Trace) -> None:
    """Every number is there once, in order: nothing was lost, and nothing done twice."""
    assert [number for number, _ in trace] == list(range(1, len(trace) + 1))


def shared(one: Trace, other: Trace) -> int:
    """How many lines they have in common before they differ."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def check_forked(traces: Sequence[Trace]) -> int:
    """All go on from the same number, and no two have a line in common behind it; returns the number."""
    for trace in traces:
        check_unbroken(trace)
    points = {shared(one, other) for one, other in itertools.combinations(traces, 2)}
    assert len(points) == 1, f"they go on from different numbers: {points}"
    (point,) = points
    assert point > 0
    assert all(len(trace) > point for trace in traces), "one of them does not go on"
    own = [set(trace[point:]) for trace in traces]
    assert len(set().union(*own)) == sum(len(one) for one in own), "one has lines of another"
    return point
