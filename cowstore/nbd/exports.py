"""Exports: the store's devices by name, each opened for its first client and released after its last.

All clients of a clone share one handle, so that a flush on one connection covers the writes of all: that is
what CAN_MULTI_CONN promises.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from cowstore.errors import ClosedError, InUseError, NotFoundError, StoreError

from .flusher import Flusher

_log = logging.getLogger("cowstore.nbd")
_TRIES = 10  # to open a device whose name is given to another one at this moment
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
    def info(self) -> Description:
        """What it is."""
        ...

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

    def keep_journal(self) -> None:
        """From now on what is written survives the death of this process."""
        ...

    def defer_records(self, deferred: bool) -> None:
        """Has the journal wait for record(); for whoever holds the disk steady."""
        ...

    def record(self) -> None:
        """Records the writes that waited, all or none."""
        ...

    @property
    def journal_size(self) -> int:
        """Bytes that the journal holds of writes since the last flush began."""
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
        self._is_relieving = False
        if writable:
            disk.keep_journal()

    def relieve(self, limit: int) -> None:
        """Has the clone flushed, though nobody asks for it, where its journal holds more bytes than the limit."""
        if self.flusher is not None and self.disk.journal_size > limit and not self._is_relieving:
            self._is_relieving = True
            try:
                self.flusher.ask(self._relieved)
            except BaseException:
                self._is_relieving = False
                raise

    def _relieved(self, failure: Exception | None) -> None:
        self._is_relieving = False
        if failure is not None:
            _log.error("device number %d cannot be flushed: %s", self.number, failure)

    def close(self) -> None:
        """Flushes and gives the device back."""
        try:
            if self.flusher is not None:
                self.flusher.close()
        finally:
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
        for _ in range(_TRIES):
            found = self.describe(name)
            with self._at(found.number) as place:
                if place.export is None:
                    place.export = self._open(found)
                if place.export is not None:
                    place.users += 1
                    return place.export
        raise InUseError(f"export {name!r}", hint="it is renamed all the time; try again")

    def _open(self, found: Description) -> Export | None:
        """The device, open; None where its name has meanwhile been given to another one."""
        disk = self._devices.device(found.name)
        if disk.info.number != found.number:
            disk.close()
            return None
        _log.info("%s %s is open", found.kind, found.name)
        return Export(found.number, disk, writable=found.kind == "clone")

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
    """Closes an export. Writes that cannot be made durable now stay in the clone's journal."""
    try:
        export.close()
    except ClosedError:
        pass  # by the store's own end, with a flush
    except (StoreError, OSError) as error:
        _log.error("device number %d cannot be flushed now, and keeps its journal: %s", export.number, error)
