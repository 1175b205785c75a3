"""Moments: roots that must stay while long work reads them.

A clone's root moves and a device may be deleted, so an export, a backup or a reader of a clone's last flushed
moment holds the roots by hidden images, which belong to the process lease. A pin would do as well, but a long
one keeps LMDB from using its free pages again. A store opened read-only has only pins, and so has a full disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .environment import Environment, Snapshot
from .errors import NoSpaceError, StoreError
from .layout import DeviceRecord
from .lineage import Lineage


class Moments:
    """What one process holds.

    Args:
        environment: The catalog.
        lineage: Makes and drops hidden images.
        owner: Gives the number of the process lease; None in a store opened read-only.
    """

    def __init__(self, environment: Environment, lineage: Lineage, owner: Callable[[], int] | None) -> None:
        self._environment = environment
        self._lineage = lineage
        self._owner = owner
        self._done: list[int] = []

    def take(
        self, choose: Callable[[Snapshot], list[DeviceRecord]]
    ) -> tuple[list[DeviceRecord], Callable[[], None]]:
        """Holds the roots of some devices.

        Args:
            choose: Finds the devices in a snapshot.

        Returns:
            Their records, and a function that lets them go. It may be called from a destructor: it only
            notes what sweep() is to drop.
        """
        self.sweep()
        if self._owner is None:
            return self._pinned(choose)
        try:
            records, hidden = self._lineage.hide(choose, self._owner())
        except NoSpaceError:
            return self._pinned(choose)  # reading needs no space
        numbers = [record.number for record in hidden]
        return records, lambda: self._done.extend(numbers)

    def _pinned(
        self, choose: Callable[[Snapshot], list[DeviceRecord]]
    ) -> tuple[list[DeviceRecord], Callable[[], None]]:
        pin = self._environment.read()
        try:
            return choose(pin), pin.close
        except BaseException:
            pin.close()
            raise

    @contextmanager
    def held(self, choose: Callable[[Snapshot], list[DeviceRecord]]) -> Iterator[list[DeviceRecord]]:
        """The same for the length of a block."""
        records, release = self.take(choose)
        try:
            yield records
        finally:
            release()
            self.sweep()

    def sweep(self) -> None:
        """Drops the hidden images that nobody needs any more."""
        done, self._done = self._done, []
        if done:
            try:
                self._lineage.drop_hidden(done)
            except BaseException:
                self._done.extend(done)
                raise

    def settle(self) -> None:
        """sweep() where nobody waits for it: what cannot be dropped now is dropped by the next sweep()."""
        with suppress(StoreError):
            self.sweep()
