"""Flushers: one thread a clone makes writes durable, so that connections go on while the disk works.

Whoever asks while a flush is under way goes with the next one, all together. Clones have a thread each, and
the store's committer takes what they flush at the same time in one round of syncs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from cowstore.errors import ClosedError

_log = logging.getLogger("cowstore.nbd")
Told = Callable[[Exception | None], None]


class Flusher:
    """Answers requests for durability.

    Args:
        flush: Makes every write that has returned durable.
    """

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._asked: SimpleQueue[Told | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = False

    def ask(self, told: Told) -> None:
        """Has told() called, from another thread, when everything written before is durable, or cannot be."""
        with self._lock:
            if not self._ended:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="cowstore-flusher", daemon=True)
                    thread.start()
                    self._thread = thread
                self._asked.put(told)
                return
        told(ClosedError("the device is closed", hint="connect again"))

    def _run(self) -> None:
        ended = False
        while not ended:
            group = [self._asked.get()]
            while not self._asked.empty():
                group.append(self._asked.get())
            ended = None in group
            waiting = [told for told in group if told is not None]
            if waiting:
                self._answer(waiting)

    def _answer(self, waiting: list[Told]) -> None:
        failure: Exception | None = None
        try:
            self._flush()
        except Exception as error:  # noqa: BLE001 - every client is told, whatever it is
            failure = error
        for told in waiting:
            try:
                told(failure)
            except Exception:  # noqa: BLE001 - one client's trouble; the others wait for this thread
                _log.exception("a client could not be told of its flush")

    def close(self) -> None:
        """Answers what was asked, and ends the thread."""
        with self._lock:
            thread, self._thread, self._ended = self._thread, None, True
            self._asked.put(None)
        if thread is not None:
            thread.join()
