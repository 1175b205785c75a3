"""Forked processes that do something with their memory and then stand still, and what this one has open."""

from __future__ import annotations

import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NUMBER = struct.Struct("<q")


class Child:
    """A process that stands still, stopped by a signal.

    Attributes:
        pid: Its number.
        said: What it yielded last.
    """

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe = pipe
        self._wait()

    def _wait(self) -> None:
        data = os.read(self._pipe, _NUMBER.size)
        assert data, "the child failed; see above"
        (self.said,) = _NUMBER.unpack(data)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def go_on(self) -> int:
        """Lets it run to its next yield; returns what that was."""
        os.kill(self.pid, signal.SIGCONT)
        self._wait()
        return self.said

    def kill(self) -> None:
        """Ends it, and leaves it to be waited for."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


@contextmanager
def standing(work: Callable[[], Iterator[int]]) -> Iterator[Child]:
    """A child that does some work, and stands still at each yield of it. It ends with the block."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _work(work, writing)
    os.close(writing)
    try:
        yield Child(pid, reading)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)


def _work(work: Callable[[], Iterator[int]], pipe: int) -> None:
    status = 1
    try:
        for number in work():
            os.write(pipe, _NUMBER.pack(number))
            os.kill(os.getpid(), signal.SIGSTOP)
        status = 0
    except BaseException:  # noqa: BLE001 - nothing of a test may go on in the child
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(status)


def in_child(action: Callable[[], object]) -> None:
    """Does something in a forked child; what it raises there fails the test."""

    def work() -> Iterator[int]:
        action()
        yield 0

    with standing(work):
        pass


def opened() -> dict[str, str]:
    """What this process has open, by descriptor. The folder itself is left out."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the descriptor by which the folder was read
    return found
