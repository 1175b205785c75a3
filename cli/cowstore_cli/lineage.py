"""The lineage of images and clones, as branches that can be drawn.

A store with a thousand fresh clones of one image would be a thousand lines that say nothing, so clones with
nothing of their own and no children are told in one line where many have the same name but for a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cowstore import DeviceInfo
from cowstore_cli import sizes

MANY = 6


@dataclass
class Branch:
    """One line of the tree and what hangs below it.

    Attributes:
        title: The device's name.
        remark: What is said about it.
        style: ``image``, ``clone``, ``deleted``, or ``rest`` for a line that stands for many.
        plain: Nothing would be lost by not naming it.
        children: The branches below.
    """

    title: str
    remark: str
    style: str
    plain: bool = False
    children: list[Branch] = field(default_factory=list)


def grow(devices: Sequence[DeviceInfo], own: Mapping[str, int], *, every: bool) -> list[Branch]:
    """The roots of the lineage, with all that descends from them.

    Args:
        devices: All devices, deleted ancestors included.
        own: Bytes that each living device has and its base has not.
        every: Name every clone, however many are alike.
    """
    branches = {one.number: _branch(one, own) for one in devices}
    roots: list[Branch] = []
    for one in sorted(devices, key=_numbers_in_order):
        parent = branches.get(one.parent_number)
        (parent.children if parent else roots).append(branches[one.number])
    if not every:
        for branch in branches.values():
            branch.children = _gather(branch.children)
        roots = _gather(roots)
    return roots


def _numbers_in_order(device: DeviceInfo) -> list[tuple[int, str]]:
    """A sort key under which desk-2 comes before desk-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", device.name)]


def _branch(device: DeviceInfo, own: Mapping[str, int]) -> Branch:
    if device.deleted:
        return Branch(device.name, "deleted", "deleted")
    bytes_own = own.get(device.name, 0)
    remark = f"{'ephemeral ' if device.ephemeral else ''}{device.kind}, {sizes.show(bytes_own)} own"
    return Branch(device.name, remark, device.kind, plain=device.kind == "clone" and not bytes_own)


def _gather(branches: list[Branch]) -> list[Branch]:
    """The branches in their order; those that are alike but for a number come last, as one for each kind."""
    alike: dict[str, list[Branch]] = {}
    for branch in branches:
        if branch.plain and not branch.children:
            alike.setdefault(re.sub(r"\d+", "#", branch.title), []).append(branch)
    many = [group for group in alike.values() if len(group) >= MANY]
    gone = {id(branch) for group in many for branch in group}
    return [branch for branch in branches if id(branch) not in gone] + [_rest(group) for group in many]


def _rest(group: list[Branch]) -> Branch:
    remark = f"{len(group):,} clones with nothing of their own (--all names them)"
    return Branch(f"{group[0].title} ... {group[-1].title}", remark, "rest")


def lines(roots: Sequence[Branch]) -> Iterator[str]:
    """The tree in plain characters. Walked with a list, not by recursion, whatever its depth."""
    waiting = [(root, "", "") for root in reversed(roots)]
    while waiting:
        branch, lead, below = waiting.pop()
        yield f"{lead}{branch.title}  {branch.remark}"
        last = len(branch.children) - 1
        for position in range(last, -1, -1):
            fork, rail = ("`-- ", "    ") if position == last else ("|-- ", "|   ")
            waiting.append((branch.children[position], below + fork, below + rail))
