"""The traps of forking a running machine, each with the bug planted that it is about: the checks must see it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from cowstore.errors import GuestError
from cowstore.machines import Wish, template
from cowstore.machines import identity as identity_module
from cowstore.machines.pages import PAGE_SIZE, Capture
from cowstore.machines.qemu import RunningQemu
from cowstore.machines.reseed import program

from . import guestkit
from .channel import Channel
from .desk import SAME, Desk, desk, wait
from .guestkit import Parts
from .test_forking import Facts, check_identities

pytestmark = pytest.mark.program("qemu-system-x86_64", "mke2fs")

MARK = "echo mine-{0} | tee /run/mine >/data/mine; [ -s /run/trace ] || echo '1 1' >/run/trace"


@pytest.fixture(scope="module")
def place(machine_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Its guest also has the driver of a balloon, which nobody can give it by `vm start`."""
    with desk() as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(guestkit, "DRIVERS", (*guestkit.DRIVERS, "virtio_balloon"))
        made.boot(Parts.make(tmp_path_factory.mktemp("balloon")))
        made.said("parent", MARK.format("parent"))
        made.said("parent", "dd if=/dev/urandom of=/run/noise bs=1M count=16 2>/dev/null")
        made.manager.checkpoint("parent", "base")
        yield made


@pytest.fixture(autouse=True)
def _nothing_left(place: Desk) -> Iterator[None]:
    with place.nothing_left():
        yield


def digest_of_template(place: Desk, checkpoint: str) -> str:
    """Of the memory that all children of a checkpoint map."""
    number = place.store.checkpoints.info(checkpoint).number
    one = place.manager._host.templates._templates[number]
    with open(one.path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


# What a machine does to the memory of others.


def blow_up(place: Desk, name: str) -> None:
    """Has a guest give most of its memory back, by a device that its owner plugs in behind the manager's back."""
    monitor = Channel.monitor(Path(place.manager.info(name).qmp_socket))
    monitor.run("device_add", driver="virtio-balloon-pci", id="balloon", bus="port1")
    bound = "ls -d /sys/bus/virtio/drivers/virtio_balloon/virtio* 2>/dev/null || true"
    wait(lambda: place.said(name, bound), "the guest has its balloon")
    size = place.manager.info(name).memory["size"]
    monitor.run("balloon", value=size - (40 << 20))
    wait(lambda: monitor.run("query-balloon")["actual"] < size - (30 << 20), "the balloon has grown")
    monitor.close()


def test_a_balloon_takes_nothing_from_other_children(place):
    noise = place.said("parent", "md5sum </run/noise")
    with place.forked("base", 2, SAME) as (blown, other):
        before = digest_of_template(place, "base")
        blow_up(place, blown)
        assert digest_of_template(place, "base") == before
        for name in (blown, other):
            assert place.said(name, "md5sum </run/noise; cat /run/mine") == f"{noise}\nmine-parent"
    with place.forked("base", 1, SAME) as (later,):
        assert place.said(later, "md5sum </run/noise") == noise


def test_planted_without_seals_the_balloon_is_seen(place, monkeypatch):
    monkeypatch.setattr(template, "SEALS", 0)
    place.manager.checkpoint("parent", "open")
    try:
        with place.forked("open", 1, SAME) as (blown,):
            before = digest_of_template(place, "open")
            blow_up(place, blown)
            assert digest_of_template(place, "open") != before
    finally:
        place.manager.delete_checkpoints("open")


def test_the_parent_that_goes_on_changes_nothing_that_its_children_read(place):
    before = digest_of_template(place, "base")
    place.said("parent", "echo changed >/run/mine; dd if=/dev/urandom of=/run/more bs=1M count=8; rm /run/more")
    try:
        assert digest_of_template(place, "base") == before
        with place.forked("base", 1, SAME) as (child,):
            assert place.said(child, "cat /run/mine") == "mine-parent"
    finally:
        place.said("parent", MARK.format("parent"))


# Who a child is.


def test_each_child_has_a_generation_of_its_own(place):
    with place.forked("base", 2) as children:
        told = {place.manager.info(name).identity["generation"] for name in children}
        seen = {generation(place, name) for name in children}
        assert seen == told
        assert len(seen | {generation(place, "parent")}) == 3


def generation(place: Desk, name: str) -> str:
    monitor = Channel.monitor(Path(place.manager.info(name).qmp_socket))
    guid = monitor.run("query-vm-generation-id")["guid"]
    monitor.close()
    return str(guid)


def test_planted_a_parents_address_is_seen(place, monkeypatch):
    """Children get no card of their own, while the records say so: the product sees it, and these tests do."""
    monkeypatch.setattr(RunningQemu, "replace_nic", lambda *_: None)
    monkeypatch.setattr(RunningQemu, "remove_nic", lambda *_: None)
    real, refusals = identity_module.check_told, []

    def check_told(*arguments: Any) -> None:
        with pytest.raises(GuestError, match="identity: it has ") as refused:
            real(*arguments)
        refusals.append(refused.value)

    monkeypatch.setattr(identity_module, "check_told", check_told)
    with place.forked("base") as (child,), pytest.raises(AssertionError):
        check_identities(place, [Facts(place, child)])
    assert [error.machine for error in refusals] == [child]


def test_planted_a_hostname_that_is_not_set_is_seen(place, monkeypatch):
    monkeypatch.setattr(identity_module, "check_told", lambda *_: None)
    monkeypatch.setattr(identity_module, "_SCRIPT", "exit 0")
    with place.forked("base") as (child,), pytest.raises(AssertionError):
        check_identities(place, [Facts(place, child)])


# The shell reads them by itself: a program more would take from the generator, too.
FIRST = """\
n=0
while [ $((n += 1)) -le 200 ]; do read -r one </proc/sys/kernel/random/uuid; echo $one; done >/run/first
"""


def have_numbers_in_common(place: Desk) -> bool:
    """Whether two children have, among the first random numbers of each.

    Their parent reseeds just before: where that was due, the children would do it by themselves, each in its way.
    """
    words = ["/bin/sh", "-c", "cat >/run/reseed; chmod 700 /run/reseed; /run/reseed"]
    assert place.manager.run("parent", words, program(os.urandom(16))).status == 0
    with place.forked("parent", 2, Wish(hook=FIRST.encode())) as children:
        one, other = (set(place.said(name, "cat /run/first").split()) for name in children)
    assert len(one) == len(other) == 200
    return bool(one & other)


def test_children_have_randomness_of_their_own_at_once(place):
    assert not have_numbers_in_common(place)


def test_planted_randomness_that_is_the_parents_is_seen(place, monkeypatch):
    monkeypatch.setattr(identity_module, "program", lambda _: b"#!/bin/sh\nexit 0\n")
    assert any(have_numbers_in_common(place) for _ in range(5))


# What is taken of it.


PLANTED = b"planted-memory"


def test_planted_a_page_that_is_not_captured_is_seen(place, monkeypatch):
    real, left_out = Capture.take, []

    def take(self: Capture) -> None:
        real(self)
        with memoryview(self._map) as view:
            starts = ((number, number * PAGE_SIZE) for number in self.pages.tolist())
            mine = [number for number, start in starts if view[start : start + len(PLANTED)] == PLANTED]
        left_out.extend(mine)
        self.pages = np.setdiff1d(self.pages, mine)

    with place.forked("base", 1, SAME) as (child,):
        place.said(child, f"echo {PLANTED.decode()} >/run/planted")
        monkeypatch.setattr(Capture, "take", take)
        place.manager.checkpoint(child, "holed")
        monkeypatch.undo()
        place.manager.checkpoint(child, "whole")
    assert left_out
    whole, holed = (copied(place, name, "cat /run/planted 2>/dev/null || true") for name in ("whole", "holed"))
    assert whole == PLANTED.decode()
    assert holed != whole


def copied(place: Desk, checkpoint: str, script: str) -> str:
    """What a child of a checkpoint says to a script; the checkpoint is gone then."""
    with place.forked(checkpoint, 1, SAME) as (child,):
        said = place.said(child, script)
    place.manager.delete_checkpoints(checkpoint)
    return said


# Many at once.


def test_forks_of_one_checkpoint_at_the_same_time(place):
    together = Barrier(3)

    def fork() -> list[str]:
        together.wait()
        return [child.name for child in place.manager.fork("base", 2, wish=SAME) if not child.error]

    with ThreadPoolExecutor() as pool:
        work = [pool.submit(fork) for _ in range(3)]
    names = [name for one in work if not one.exception() for name in one.result()]
    for name in names:
        place.manager.stop(name)
    assert not [str(one.exception()) for one in work if one.exception()]
    assert len(set(names)) == 6


def test_who_looks_while_children_are_made_disturbs_nothing(place):
    seen: list[Any] = []
    with ThreadPoolExecutor() as pool:
        work = pool.submit(place.manager.fork, "base", 4)
        while not work.done():
            seen += place.manager.machines()
    for child in work.result():
        if not child.error:
            assert place.manager._host.registry.get(child.name).nic.port == 1
            place.manager.stop(child.name)
    assert not [child.error for child in work.result() if child.error]
    assert {"starting", "running"} & {one.state for one in seen}


def test_two_who_ask_for_a_machine_that_nobody_knew_yet(place):
    """As the first two commands after the server was started anew: QEMU's monitor talks to one at a time."""
    host = place.manager._host
    key = host.registry.get("parent").key
    host._running.pop(key).close()
    together = Barrier(2)

    def ask() -> str:
        together.wait()
        return place.manager.info("parent").state

    begun = time.monotonic()
    with ThreadPoolExecutor() as pool:
        states = [one.result() for one in [pool.submit(ask) for _ in range(2)]]
    host._running.pop(key).close()
    assert states == ["running", "running"]
    assert time.monotonic() - begun < 10
