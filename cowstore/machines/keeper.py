"""The keeper: notices that a machine has ended, whoever started it, and has what it leaves removed."""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

_log = logging.getLogger("cowstore.machines")
_LOOK_SECONDS = 5.0


class Keeper:
    """Watches processes, in a thread of its own.

    Args:
        ended: Called for each that has ended, with what it was watched for.
        look_around: Called every few seconds.
    """

    def __init__(self, ended: Callable[[str], None], look_around: Callable[[], None]) -> None:
        self._ended = ended
        self._look_around = look_around
        self._lock = threading.Lock()
        self._new: list[tuple[int, str]] = []
        self._waker, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="cowstore-keeper", daemon=True)
        self._thread.start()

    def watch(self, pid: int, what: str) -> None:
        """Watches a process; one that is gone already has ended."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            fd = -1
        with self._lock:
            self._new.append((fd, what))
        self._waker.send(b"\0")

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            due = time.monotonic() + _LOOK_SECONDS
            while True:
                gone = []
                for key, _ in selector.select(_LOOK_SECONDS):
                    if key.fileobj is self._wake:
                        if not self._wake.recv(64):
                            _close(selector)
                            return
                        gone += self._take(selector)
                    else:
                        selector.unregister(key.fd)
                        _reap(key.fd)
                        gone.append(key.data)
                for what in gone:
                    self._tell(partial(self._ended, what))
                if time.monotonic() >= due:
                    self._tell(self._look_around)
                    due = time.monotonic() + _LOOK_SECONDS

    def _take(self, selector: selectors.BaseSelector) -> list[str]:
        """Begins to watch those that were added; returns those that are gone."""
        with self._lock:
            new, self._new = self._new, []
        for fd, what in new:
            if fd >= 0:
                selector.register(fd, selectors.EVENT_READ, what)
        return [what for fd, what in new if fd < 0]

    def _tell(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception:  # noqa: BLE001 - the last door of a thread: other machines are still watched
            _log.exception("what a machine leaves could not be removed")

    def close(self) -> None:
        """Watches no more."""
        self._waker.close()
        self._thread.join()
        self._wake.close()


def _close(selector: selectors.BaseSelector) -> None:
    """Closes the descriptors of processes that go on."""
    for key in list(selector.get_map().values()):
        if key.data is not None:
            os.close(key.fd)


def _reap(fd: int) -> None:
    """Takes the exit status of a child; another process's child is not ours to reap."""
    try:
        os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        pass
    finally:
        os.close(fd)
