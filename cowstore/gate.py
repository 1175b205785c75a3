"""The gate before every write transaction: LMDB's own write lock has no timeout, and nobody knows who holds it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InUseError
from .files import Disk, File

_LOCK_TIMEOUT = 30.0  # seconds


class WriteGate:
    """The lock before every write transaction: with a timeout, and it names its holder."""

    def __init__(self, disk: Disk, path: Path, timeout: float = _LOCK_TIMEOUT) -> None:
        self._disk = disk
        self._path = path
        self._timeout = timeout
        self._mutex = threading.Lock()
        self._file: File | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Waits for the lock, at most the timeout.

        Raises:
            InUseError: Somebody, perhaps a stopped process, has held it all the time.
        """
        deadline = time.monotonic() + self._timeout
        if not self._mutex.acquire(timeout=self._timeout):
            raise InUseError("the catalog's write lock", os.getpid())
        try:
            file = self._lock(deadline)
            try:
                yield
            finally:
                file.unlock()
        finally:
            self._mutex.release()

    def _lock(self, deadline: float) -> File:
        if self._file is None:
            self._file = self._disk.open(self._path, write=True, create=True)
        pause = 0.0005
        while not self._file.try_lock(exclusive=True):
            if time.monotonic() > deadline:
                raise InUseError(
                    "the catalog's write lock",
                    self._file.holder(),
                    hint="that process may be stopped; continue or end it",
                )
            time.sleep(pause)
            pause = min(pause * 2, 0.005)
        self._file.sign()
        return self._file

    def close(self) -> None:
        """Closes the lock file."""
        if self._file is not None:
            self._file.close()
            self._file = None
