"""Running guests are forked: all go on from one moment, each by itself. One boot serves all tests here."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowstore.errors import InUseError, InvalidError, MachineError
from cowstore.machines import Wish
from cowstore.machines import identity as identity_module

from .channel import Channel
from .desk import SAME, Desk, desk, processes, wait
from .guestkit import Parts
from .tracing import START, Trace, check_forked, check_unbroken, parsed, shared

pytestmark = pytest.mark.program("qemu-system-x86_64", "mke2fs")

FACTS = """\
hostname; cat /etc/machine-id /sys/class/net/e*/address; echo --
for i in 1 2 3 4 5; do cat /proc/sys/kernel/random/uuid; done; echo --
cat /run/mine /data/mine 2>/dev/null; echo; echo --; cat /run/trace
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


def test_a_fork_of_a_fork_of_a_fork(place):
    names = ["parent"]
    try:
        for _ in range(3):
            names += place.fork(names[-1])
            place.said(names[-1], f"echo {names[-1]} >>/run/line; echo {names[-1]} >>/data/line")
            place.said(names[-1], f"echo mine-{names[-1]} | tee /run/mine >/data/mine")
        assert names == ["parent", "parent-1", "parent-1-1", "parent-1-1-1"]
        place.said(
            "parent", "echo mine-parent | tee /run/mine >/data/mine; ! cat /run/line /data/line 2>/dev/null"
        )
        for number in (1, 2, 3):
            assert place.said(names[number], "cat /run/line /data/line").split() == names[1 : number + 1] * 2
        facts = [Facts(place, name) for name in names]
        check_identities(place, facts)
        check_apart(facts)
        check_lineage([trace(place, name, len(facts[-1].trace) + 1) for name in names])
        for name in names[1:]:
            pages = place.manager.info(name).memory["private_bytes"] // 4096
            assert pages < 20_000, "it has taken its parent's pages over"
    finally:
        for name in names[:0:-1]:
            place.manager.stop(name)


def check_lineage(traces: list[Trace]) -> None:
    """Each has gone on from the one before it, and later than that from the one before."""
    points = [check_forked(pair) for pair in itertools.pairwise(traces)]
    assert points == sorted(points)
    for later in traces[2:]:
        assert shared(traces[0], later) == points[0]


def test_the_second_checkpoint_of_a_child_takes_its_own_pages_only(place):
    with place.forked("parent") as (child,):
        first = place.manager.checkpoint(child, "first")
        place.said(child, "echo second >/run/second")
        second = place.manager.checkpoint(child, "second")
        size = place.manager.info("parent").configuration["memory"] // 4096
        assert 0 < first.pages < size // 8
        assert 0 < second.pages < size // 8
        with place.forked("second", wish=SAME) as (grandchild,):
            assert place.said(grandchild, "cat /run/second") == "second"
    place.manager.delete_checkpoints("first")
    with place.forked("second", wish=SAME) as (grandchild,):
        assert place.said(grandchild, "cat /run/second") == "second", "what it is laid on is gone"
    place.manager.delete_checkpoints("second")


def test_without_an_identity_it_is_an_exact_copy(place):
    whole = "hostname; cat /etc/hostname /etc/machine-id /sys/class/net/e*/address"
    with place.forked("parent", 2, SAME) as children:
        for name in children:
            assert place.said(name, whole) == place.said("parent", whole)
            assert place.said(name, "echo thawed >/data/thawed; sync; cat /data/thawed") == "thawed"
            info = place.manager.info(name)
            assert info.identity is None
            assert (info.parent, info.disposable, info.state) == ("parent", True, "running")


def test_the_clocks_of_children_are_right_where_the_parents_is_wrong(place):
    off = 3600
    place.said("parent", f"date -s @{int(time.time()) - off}")
    try:
        with place.forked("parent", 2) as children:
            for name in children:
                assert abs(int(place.said(name, "date +%s")) - time.time()) < 5
        with place.forked("parent", 1, SAME) as (child,):
            wrong = int(place.said(child, "date +%s")) - time.time()
            assert abs(wrong + off) < 30, "an exact copy has its parent's time: or the test sees nothing"
        assert abs(int(place.said("parent", "date +%s")) - time.time() + off) < 30
    finally:
        place.said("parent", f"date -s @{int(time.time())}")


def test_refresh_goes_back_to_the_parents_moment(place):
    with place.forked("parent") as (child,):
        before = Facts(place, child)
        start = len(before.trace)
        place.said(
            child, "echo gone >/run/gone; echo gone >/data/gone; echo mine-x | tee /run/mine >/data/mine; sync"
        )
        pid, identity = place.manager.info(child).pid, place.manager.info(child).identity
        assert not place.manager.refresh(child).error
        assert place.manager.info(child).identity["generation"] != identity["generation"], "it woke up once more"
        after = Facts(place, child)
        assert place.manager.info(child).pid != pid
        assert (after.hostname, after.machine_id, after.macs) == (before.hostname, before.machine_id, before.macs)
        check_identities(place, [after])
        place.said(child, "cat /run/gone /data/gone 2>/dev/null", status=1)
        check_lineage([before.trace, trace(place, child, start + 1)])
        assert not set(before.uuids) & set(after.uuids)
        with pytest.raises(InvalidError, match="was started and not forked"):
            place.manager.refresh("parent")


def test_a_machine_that_stands_still_goes_on_when_it_is_told_to(place):
    with place.forked("parent", 1, SAME) as (child,):
        running = place.manager._host.running(place.manager._host.registry.get(child))
        running.stop()
        assert place.manager.info(child).state == "paused"
        with pytest.raises(MachineError, match="is paused, and not running"):
            place.manager.checkpoint(child, "never")
        before = place.manager._host.store.checkpoints.all()
        place.manager.resume(child)
        assert place.manager.info(child).state == "running"
        assert place.said(child, "echo back") == "back"
        assert place.manager._host.store.checkpoints.all() == before


def test_keep_makes_a_checkpoint_of_a_child(place):
    (child,) = place.fork("parent")
    place.said(child, "echo kept >/run/kept; echo kept >/data/kept")
    moment = place.manager.keep(child)
    assert moment.checkpoint.name == child
    assert child not in [one.name for one in place.manager.machines()]
    assert child not in [one.name for one in place.store.devices()]
    with place.forked(child, 2) as grandchildren:
        assert grandchildren == [f"{child}-1", f"{child}-2"]
        for name in grandchildren:
            assert place.said(name, "cat /run/kept /data/kept") == "kept\nkept"
        with pytest.raises(InUseError) as refused:
            place.manager.delete_checkpoints(child)
        assert f"{child}-1" in refused.value.hint
    place.manager.delete_checkpoints(child)


# Hooks.


def test_a_hook_runs_in_each_child_with_its_names(place):
    hook = b'echo "$COWSTORE_NAME $COWSTORE_PARENT $COWSTORE_HOSTNAME $COWSTORE_MAC" >/run/hooked'
    with place.forked("parent", 2, Wish(hook=hook)) as children:
        for name in children:
            mac = place.said(name, "cat /sys/class/net/e*/address")
            assert place.said(name, "cat /run/hooked") == f"{name} parent {name} {mac}"
        place.said("parent", "cat /run/hooked 2>/dev/null", status=1)


def test_two_of_five_fail_in_their_hook_and_three_stay(place):
    hook = b'case "$COWSTORE_NAME" in *-2|*-4) echo broken >&2; exit 3 ;; esac'
    children = place.manager.fork("parent", 5, wish=Wish(hook=hook))
    failed = {child.name: child.error for child in children if child.error}
    try:
        assert sorted(failed) == ["parent-2", "parent-4"]
        for name, error in failed.items():
            assert error == f"the guest of {name}: hook: it ended with status 3: broken"
        there = ["parent", "parent-1", "parent-3", "parent-5"]
        assert [one.name for one in place.manager.machines()] == there
        assert sorted(one.name for one in place.store.devices() if one.kind == "clone") == there
        assert len(processes(place.folder)) == 4
    finally:
        for name in ("parent-1", "parent-3", "parent-5"):
            place.manager.stop(name)


def test_a_hook_that_takes_too_long(place, monkeypatch):
    monkeypatch.setattr(identity_module, "HOOK_SECONDS", 0.5)
    (child,) = place.manager.fork("parent", wish=Wish(hook=b"sleep 100"))
    assert "hook" in child.error or "/bin/sh: it has not ended within 0.5 s" in child.error
    assert "0.5 s" in child.error


def test_an_exact_copy_has_hooks_too(place):
    with place.forked("parent", 1, Wish(identity=False, hook=b"echo hooked >/run/hooked")) as (child,):
        assert place.said(child, "cat /run/hooked; hostname") == "hooked\nparent"


# What guests do by themselves.


def test_a_child_that_turns_itself_off_leaves_nothing(place):
    (child,) = place.fork("parent")
    place.manager.run(child, ["/bin/sh", "-c", "(sleep 0.2; poweroff -f) >/dev/null 2>&1 &"])
    wait(lambda: child not in [one.name for one in place.manager.machines()], f"{child} is cleaned up")


def test_a_child_that_reboots_boots_from_its_own_disk(place):
    with place.forked("parent") as (child,):
        place.said(child, "echo before >/run/before; echo before >/data/before; sync")
        pid = place.manager.info(child).pid
        place.manager.run(child, ["/bin/sh", "-c", "(sleep 0.2; reboot -f) >/dev/null 2>&1 &"])
        running = place.manager._host.running(place.manager._host.registry.get(child))
        wait(lambda: not running.has_agent(), "its agent is gone")
        place.wait_for_agent(child)
        assert (
            place.said(child, "ls /run/before 2>/dev/null; cat /data/before /etc/hostname") == f"before\n{child}"
        )
        assert place.manager.info(child).pid == pid


def test_somebody_elses_monitor_keeps_nobody_waiting(place):
    with place.forked("parent") as (child,):
        other = Channel.monitor(Path(place.manager.info(child).qmp_socket))
        try:
            assert other.run("query-status")["running"]
            place.manager.checkpoint(child, "watched")
            assert [event["event"] for event in other.events] == []
            assert other.run("query-status")["running"]
            assert [event["event"] for event in other.events] == ["STOP", "RESUME"]
            assert place.said(child, "echo here") == "here"
            other.run("stop")
            assert place.manager.info(child).state == "paused"
            with pytest.raises(MachineError, match=f"machine {child} is paused, and not running"):
                place.manager.fork(child)
            assert place.manager.info(child).state == "paused", "whoever stopped it has it go on"
            other.run("cont")
        finally:
            other.close()
    place.manager.delete_checkpoints("watched")
