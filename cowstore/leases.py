"""Leases: lock files that say who has a device open, and which processes live.

A lease is a flock on ``leases/NUMBER``, exclusive for a clone's writer and for a process, shared for readers.
The kernel gives it up when its process ends, however it ends. Numbers are never used twice, so a lock file
can be removed by whoever holds it exclusively; after taking one its path is looked at again.
"""

from __future__ import annotations

import errno
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InUseError, StoreError
from .files import Disk, File

_PATIENCE = 5  # tries, 2 ms apart: is_held() takes a lock for a moment
_READ_ONLY = frozenset((errno.EROFS, errno.EACCES, errno.EPERM))


class Lease:
    """A lock that is held. Close it to give it up.

    A child made by os.fork() shares the lock: it closes its descriptor only (abandon()), while the owner
    unlocks before it closes, so that no child keeps what its parent has given up.
    """

    def __init__(self, file: File | None) -> None:
        self._file = file

    def close(self) -> None:
        """Gives the lease up; harmless when done twice."""
        file, self._file = self._file, None
        if file is not None:
            file.unlock()
            file.close()

    def abandon(self) -> None:
        """Closes the descriptor, and leaves the lock to the process it came from."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class Leases:
    """The lock files of one store.

    Args:
        disk: Opens them.
        directory: Where they are.
    """

    def __init__(self, disk: Disk, directory: Path) -> None:
        self._disk = disk
        self._directory = directory
        self._held: weakref.WeakSet[Lease] = weakref.WeakSet()

    def take(self, number: int, what: str, *, exclusive: bool) -> Lease:
        """Takes the lease of a device or process.

        Raises:
            InUseError: Somebody holds it in a way that does not go together; with the holder's pid.
        """
        for attempt in range(100):
            file = self._open(number)
            if file is None:
                return Lease(None)  # a store on read-only media has no writers to guard against
            if not file.try_lock(exclusive=exclusive):
                holder = file.holder()
                file.close()
                if attempt < _PATIENCE:
                    time.sleep(0.002)
                    continue
                raise InUseError(what, holder, hint="close it there first")
            if file.is_at_path():
                file.sign()
                lease = Lease(file)
                self._held.add(lease)
                return lease
            file.close()
        raise StoreError(f"the lease of {what} changes all the time")

    def _open(self, number: int) -> File | None:
        path = self._directory / str(number)
        try:
            return self._disk.open(path, write=True, create=True)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise _not_opened(path, error) from error
        try:
            return self._disk.open(path)
        except OSError:
            return None

    def abandon(self) -> None:
        """In a child made by os.fork(): every lease is the parent's."""
        for lease in list(self._held):
            lease.abandon()

    def is_held(self, number: int) -> bool:
        """Whether somebody holds the lease now."""
        try:
            file = self._disk.open(self._directory / str(number))
        except FileNotFoundError:
            return False
        try:
            free = file.try_lock(exclusive=True)
            if free:
                file.unlock()
            return not free
        finally:
            file.close()

    def forget(self, number: int) -> None:
        """Removes a lock file, which the caller holds exclusively or knows to be nobody's."""
        self._disk.unlink(self._directory / str(number))


def _not_opened(path: Path, error: OSError) -> StoreError:
    return StoreError(f"the lock file {path} cannot be opened: {error.strerror}")


@contextmanager
def turn(
    disk: Disk, path: Path, what: str, patience: float, hint: str = "wait until it is done there"
) -> Iterator[None]:
    """Holds a lock file for the length of a block, so that one process at a time does something.

    Raises:
        InUseError: Somebody holds it for longer than the patience, seconds; with the holder's pid.
    """
    try:
        file = disk.open(path, write=True, create=True)
    except OSError as error:
        raise _not_opened(path, error) from error
    deadline = time.monotonic() + patience
    try:
        while not file.try_lock(exclusive=True):
            if time.monotonic() >= deadline:
                raise InUseError(what, file.holder(), hint=hint)
            time.sleep(0.01)
        file.sign()
        try:
            yield
        finally:
            file.unlock()  # a child forked meanwhile has the file open too
    finally:
        file.close()
