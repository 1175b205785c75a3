"""The keeper: whoever ends is told, once, whatever the listener makes of it."""

from __future__ import annotations

import os
import queue
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from cowstore.machines.keeper import Keeper

from .children import opened

SOON_S = 20


@contextmanager
def kept(told: queue.Queue[str]) -> Iterator[Keeper]:
    keeper = Keeper(told.put, lambda: None)
    try:
        yield keeper
    finally:
        keeper.close()


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "1000"])


def test_each_end_is_told_once():
    told: queue.Queue[str] = queue.Queue()
    children = {str(number): sleeper() for number in range(5)}
    with kept(told) as keeper:
        for name, child in children.items():
            keeper.watch(child.pid, name)
        for name in "31402":
            children[name].kill()
            assert told.get(timeout=SOON_S) == name
        assert told.empty()
    for child in children.values():
        assert child.wait() in (0, -9), "it may have been waited for by the keeper"


def test_one_that_is_gone_already():
    told: queue.Queue[str] = queue.Queue()
    with sleeper() as child:
        child.kill()
    with kept(told) as keeper:
        keeper.watch(child.pid, "gone")
        assert told.get(timeout=SOON_S) == "gone"


def test_a_process_of_somebody_else():
    told: queue.Queue[str] = queue.Queue()
    words = ["sh", "-c", "sleep 1000 & echo $!; wait"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as parent, kept(told) as keeper:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        keeper.watch(pid, "grandchild")
        os.kill(pid, 9)
        assert told.get(timeout=SOON_S) == "grandchild"


def test_a_listener_that_fails_is_told_of_the_next(caplog):
    told: queue.Queue[str] = queue.Queue()

    def listen(name: str) -> None:
        told.put(name)
        raise RuntimeError("planted")

    keeper = Keeper(listen, lambda: None)
    try:
        for name in ("one", "two"):
            with sleeper() as child:
                keeper.watch(child.pid, name)
                child.kill()
                assert told.get(timeout=SOON_S) == name
    finally:
        keeper.close()
    assert "could not be removed" in caplog.text


def test_closed_it_has_nothing_open():
    before = opened()
    with sleeper() as child:
        with kept(queue.Queue()) as keeper:
            keeper.watch(child.pid, "one")
            keeper.watch(os.getpid(), "this one")
        left = {number: target for number, target in opened().items() if number not in before}
        child.kill()
    assert not left
