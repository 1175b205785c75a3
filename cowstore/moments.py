"""Moments: roots that must stay while long work reads them.

A clone's root moves and a device may be deleted, so an export, a backup or a reader of a clone's last flushed
moment holds the roots by hidden images, which belong to the process lease. A pin would do as well, but a long
one keeps LMDB from using its free pages again. A store opened read-only has only pins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .environment import Environment, Snapshot
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
        pin = self._environment.read()
        try:
            records = choose(pin)
            if self._owner is None:
                return records, pin.close
            roots = {root.node: root for record in records for root in (record.base, record.root) if root.node}
            hidden = self._lineage.hide(list(roots.values()), self._owner()) if roots else []
        except BaseException:
            pin.close()
            raise
        pin.close()
        numbers = [record.number for record in hidden]
        return records, lambda: self._done.extend(numbers)

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
            self._lineage.drop_hidden(done)
