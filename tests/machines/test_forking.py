"""Running guests are forked: all go on from one moment, and every one by itself. One boot serves all tests here."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from cowstore.machines import Wish

from .desk import SAME, Desk, desk, wait
from .guestkit import Parts
from .tracing import START, Trace, check_forked, check_unbroken, parsed, shared

pytestmark = pytest.mark.program("qemu-system-x86_64", "mke2fs")

FACTS = """\
hostname; cat /etc/machine-id /sys/class/net/e*/address; echo --
for i in 1 2 3 4 5; do cat /proc/sys/kernel/random/uuid; done; echo --
cat /run/mine /data/mine; echo --; cat /run/trace
"""


@pytest.fixture(scope="module")
def place(machine_parts: Parts) -> Iterator[Desk]:
    with desk() as made:
        made.boot(machine_parts)
        made.said("parent", START)
        yield made


@pytest.fixture(autouse=True)
def _nothing_left(place: Desk) -> Iterator[None]:
    with place.nothing_left():
        yield


def trace(place: Desk, name: str, least: int = 0) -> Trace:
    """The trace in a guest's memory, once it is so long; that on its disk is the same."""

    def found() -> tuple[Trace, Trace] | None:
        both = place.said(name, "cat /run/trace; echo; cat /data/trace; echo").split("\n\n")
        memory, disk = (parsed(text + "\n") for text in both)
        return (memory, disk) if len(memory) >= least else None

    memory, disk = wait(found, f"{name} has counted to {least}")
    check_unbroken(memory)
    # The disk's line comes after the memory's, and was read after it.
    assert shared(memory, disk) >= len(memory) - 1, "memory and disk are of different moments"
    return memory


def test_five_children_go_on_from_one_moment_and_each_by_itself(place):
    with place.forked("parent", 5) as children:
        names = ["parent", *children]
        assert children == [f"parent-{number}" for number in range(1, 6)]
        for name in names:
            place.said(name, f"echo mine-{name} >/run/mine; echo mine-{name} >/data/mine; sync")
        facts = [Facts(place, name) for name in names]
        check_identities(place, facts)
        check_apart(facts)
        longest = len(facts[-1].trace)
        check_forked([trace(place, name, longest + 1) for name in names])


class Facts:
    """What a guest says of itself, asked all at once."""

    def __init__(self, place: Desk, name: str) -> None:
        self.name = name
        said = place.said(name, FACTS).split("\n--\n")
        self.hostname, self.machine_id, *self.macs = said[0].split()
        self.uuids, self.mine = said[1].split(), said[2].split()
        self.trace = parsed(said[3] + "\n")


def check_identities(place: Desk, facts: list[Facts]) -> None:
    """Each guest itself says that it has its own name, id and address, those that the manager tells."""
    for one in facts:
        assert one.hostname == one.name
        assert re.fullmatch("[0-9a-f]{32}", one.machine_id)
        assert len(one.macs) == 1
        told = place.manager.info(one.name).identity
        if told is not None:
            assert (told["hostname"], told["machine_id"], told["mac"]) == (
                one.hostname, one.machine_id, one.macs[0],
            )  # fmt: skip
    for what in ("hostname", "machine_id", "macs"):
        values = [str(getattr(one, what)) for one in facts]
        assert len(set(values)) == len(facts), f"two have the same {what}: {values}"
    uuids = [uuid for one in facts for uuid in one.uuids]
    assert len(set(uuids)) == len(uuids), "two have the same randomness"


def check_apart(facts: list[Facts]) -> None:
    """What each has written to its memory and to its disk is there, and nothing of another."""
    for one in facts:
        assert one.mine == [f"mine-{one.name}"] * 2
