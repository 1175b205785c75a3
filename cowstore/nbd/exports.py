"""Exports: the store's devices by name, each opened for its first client and released after its last.

All clients of a clone share one handle, so that a flush on one connection covers the writes of all: that is
what CAN_MULTI_CONN promises.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from cowstore.errors import ClosedError, NotFoundError, StoreError

from .flusher import Flusher

_log = logging.getLogger("cowstore.nbd")
Piece = bytes | bytearray | memoryview | int


class Extent(Protocol):
    """A run of bytes that are alike; see cowstore.Extent."""

    @property
    def length(self) -> int:
        """Bytes."""
        ...

    @property
    def data(self) -> bool:
        """Whether anything is stored there."""
        ...

    @property
    def own(self) -> bool:
        """Whether the device has it and its parent's moment has not."""
        ...


class Disk(Protocol):
    """What the server needs of an open device. Offsets, lengths and sizes are bytes."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def steady(self) -> AbstractContextManager[object]:
        """While it is held, what views() has returned does not change."""
        ...

    def views(self, length: int, offset: int) -> list[Piece]:
        """The bytes of a range in pieces, without a copy; a number stands for so many zeros."""
        ...

    def prefetch(self, length: int, offset: int) -> None:
        """Asks for a range to be brought into memory."""
        ...

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Runs of data or zeros, own or inherited."""
        ...

    def close(self) -> None:
        """Gives the device back, a clone after a flush."""
        ...


class WritableDisk(Disk, Protocol):
    """A device that can be written, too."""

    def pwrite(self, data: Any, offset: int) -> int:
        """Writes all bytes."""
        ...

    def zero(self, length: int, offset: int) -> None:
        """Makes a range read as zeros."""
        ...

    def flush(self) -> None:
        """Makes every write that has returned durable."""
        ...


class Description(Protocol):
    """What is known of a device without opening it; see cowstore.DeviceInfo."""

    @property
    def number(self) -> int:
        """Never used twice, whatever becomes of the name."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def kind(self) -> str:
        """``image``, read-only, or ``clone``."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...


class Devices(Protocol):
    """Where exports come from: a store, or whatever has devices by name."""

    def devices(self) -> Iterable[Description]:
        """All of them."""
        ...

    def info(self, name: str) -> Description:
        """One of them; NotFoundError where there is none."""
        ...

    def device(self, name: str) -> Any:
        """Opened: a Disk, of a clone a WritableDisk."""
        ...


class Export:
    """A device that clients have open.

    Attributes:
        number: The device's number.
        disk: The open device.
        writable: Whether clients may write.
        flusher: Makes their writes durable; None where nothing can be written.
    """

    def __init__(self, number: int, disk: Any, *, writable: bool) -> None:
        self.number = number
        self.disk = disk
        self.writable = writable
        self.flusher = Flusher(disk.flush) if writable else None

    def close(self) -> None:
        """Flushes and gives the device back."""
        if self.flusher is not None:
            self.flusher.close()
        self.disk.close()


class _Place:
    """Where one device's export is, and how many clients it has."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held while the device is opened or released: others wait for that
        self.waiting = 0
        self.users = 0
        self.export: Export | None = None


class Exports:
    """What one server offers.

    Args:
        devices: Where they come from.
        names: Those that are offered; all where there are none.
    """

    def __init__(self, devices: Devices, names: Iterable[str] = ()) -> None:
        self._devices = devices
        self._names = frozenset(names)
        self._default = next(iter(self._names)) if len(self._names) == 1 else ""
        self._places: dict[int, _Place] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """The names of all exports that are there now, sorted."""
        return sorted(one.name for one in self._devices.devices() if not self._names or one.name in self._names)

    def describe(self, name: str) -> Description:
        """What is known of an export; the empty name is the only export's, where there is only one.

        Raises:
            NotFoundError: It is not there, or not offered.
        """
        name = name or self._default
        if not name or (self._names and name not in self._names):
            raise NotFoundError("export", name)
        try:
            return self._devices.info(name)
        except ValueError as error:  # not a name at all
            raise NotFoundError("export", name) from error

    def acquire(self, name: str) -> Export:
        """The export of that name, opened if nobody has it open; give it back with release().

        Raises:
            NotFoundError: It is not there, or not offered.
            StoreError: It cannot be opened, for example because another process writes it.
        """
        found = self.describe(name)
        with self._at(found.number) as place:
            if place.export is None:
                disk = self._devices.device(found.name)
                place.export = Export(found.number, disk, writable=found.kind == "clone")
                _log.info("%s %s is open", found.kind, found.name)
            place.users += 1
            return place.export

    def release(self, export: Export) -> None:
        """Gives an export back; the last one closes it, a clone after a flush."""
        with self._at(export.number) as place:
            place.users -= 1
            if place.users == 0:
                place.export = None
                close(export)

    @contextmanager
    def _at(self, number: int) -> Iterator[_Place]:
        """The place of one device, alone with it; forgotten when nobody needs it."""
        with self._lock:
            place = self._places.setdefault(number, _Place())
            place.waiting += 1
        try:
            with place.lock:
                yield place
        finally:
            with self._lock:
                place.waiting -= 1
                if not place.waiting and not place.users:
                    del self._places[number]

    def open_count(self) -> int:
        """How many devices are open now."""
        with self._lock:
            return sum(place.export is not None for place in self._places.values())

    def close(self) -> None:
        """Closes what is still open, though clients may have it: for a server that has waited long enough."""
        with self._lock:
            left = [place.export for place in self._places.values() if place.export is not None]
        for export in left:
            close(export)


def close(export: Export) -> None:
    """Closes an export; its last writes may fail to become durable, and nobody is left to be told."""
    try:
        export.close()
    except ClosedError:
        pass  # by the store's own end, with a flush
    except (StoreError, OSError) as error:
        _log.error("unflushed writes of device number %d are lost: %s", export.number, error)


Opener = Callable[[str], Export]
