"""The store: one directory, opened. This is the facade; it wires the parts and holds no logic."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from . import catalog, founding
from .catalog import DeviceInfo
from .digest import HashFunction
from .environment import Environment, Snapshot
from .errors import ClosedError, InvalidError, NoSpaceError, NotFoundError, ReadOnlyError
from .files import Disk
from .journal import Journals
from .layout import CLONE, IMAGE, DeviceRecord
from .leases import Lease, Leases, turn
from .lineage import Lineage
from .moments import Moments

if TYPE_CHECKING:
    from .checkpoints import Checkpoints
    from .clones import Clone
    from .collector import Collection
    from .devices import Device
    from .differences import Change
    from .engine import Engine
    from .usage import Stats, Usage

Progress = Callable[[str, int, int], None]
Path_ = str | os.PathLike[str]
_Result = TypeVar("_Result")
_Device = TypeVar("_Device", bound="Device")


def _no_progress(_step: str, _done: int, _total: int) -> None:
    """For callers who do not want to know."""


class Store:
    """An open store. Use open() to get one, and close it or use it as a context manager.

    Any number of threads may use one Store, and any number of processes one store directory. A process
    made by os.fork() must open the store anew.

    Attributes:
        path: The store's directory.
        readonly: Whether it was opened for reading only.
    """

    def __init__(self, path: Path, disk: Disk, function: HashFunction, *, readonly: bool) -> None:
        self.path = path
        self.readonly = readonly
        self._disk = disk
        self._function = function
        self._identity = founding.read_identity(path)
        self._closed = False
        self._made_engine: Engine | None = None
        self._engine_lock = threading.Lock()
        self._open: weakref.WeakSet[Device] = weakref.WeakSet()
        self._environment = Environment.open(path / "catalog", disk, path / "leases" / "writer", readonly=readonly)
        self._leases = Leases(disk, path / "leases")
        self._journals = Journals(disk, path / "journals")
        self._lineage = Lineage(self._environment, self._leases, self._journals)
        if not readonly:
            self._purge()

    def _purge(self) -> None:
        try:
            self._lineage.purge()
        except NoSpaceError:
            return  # nobody sees them, and another opening removes them
        except BaseException:
            self._environment.close()
            raise

    @property
    def _engine(self) -> Engine:
        self._check_open()
        with self._engine_lock:
            if self._made_engine is None:
                from .engine import Engine

                self._made_engine = Engine(
                    self._disk, self.path, self._identity, self._environment, self._leases, self._function,
                    readonly=self.readonly,
                )  # fmt: skip
            return self._made_engine

    def _read(self) -> Snapshot:
        self._check_open()
        return self._environment.read()

    def _check_writable(self) -> None:
        self._check_open()
        if self.readonly:
            raise ReadOnlyError(f"store {self.path}", hint="it was opened read-only")

    def _writing_engine(self) -> Engine:
        self._check_writable()
        self._engine.restore_index()
        return self._engine

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"store {self.path} is closed", hint="open it again")

    # Images and clones.

    def import_image(
        self, source: Path_ | BinaryIO, name: str, *, format: str = "auto",  # noqa: A002 - the field's word
        progress: Progress = _no_progress,
    ) -> DeviceInfo:  # fmt: skip
        """Takes a disk image in, under a name.

        Args:
            source: A path, or a binary file. Holes of sparse files are not read.
            name: The image's name.
            format: "raw", or one of sources.FOREIGN, which qemu-img reads from a path; "auto" looks at the file.
            progress: Told ("import", bytes done, bytes in all); 0 in all where the length is not known.

        Raises:
            SourceError: It cannot be read, or changed meanwhile, or leads to other files.
            ExistsError: The name is taken.
            NotFoundError: qemu-img is needed, and not installed.
        """
        from .imports import import_source
        from .sources import format_of, open_source

        self._check_writable()
        self._lineage.check_free(name)
        if (kind := format_of(source, format)) != "raw":
            from . import foreign

            return foreign.take_in(
                source, kind, name, self, self._writing_engine().workshop, self._lineage, progress
            )
        stream = open_source(source)
        try:
            engine = self._writing_engine()
            return import_source(engine.workshop, self._lineage, stream, name, progress)
        finally:
            stream.close()

    def create(self, name: str, size: int) -> Clone:
        """A blank clone of so many bytes, open for writing."""
        self._check_writable()
        self._writing_engine()  # what else may fail comes first
        return self._clone_of(*self._lineage.create(name, size))

    def clone(self, parent: str, name: str, *, size: int | None = None, ephemeral: bool = False) -> Clone:
        """A private writable copy of an image, or of a clone's last flushed moment, open for writing.

        Args:
            parent: The device to start from.
            name: The clone's name.
            size: Bytes, not less than the parent's.
            ephemeral: Gone after a reboot of the host; flushes are cheaper and not durable.
        """
        self._check_writable()
        with self._read() as snapshot:
            least = catalog.find(snapshot, parent).root.size
        if size is not None and catalog.check_size(size) < least:
            raise InvalidError(
                f"a clone of {parent!r} cannot be smaller than its {least} bytes",
                hint="resize the clone afterwards",
            )
        self._writing_engine()  # what else may fail comes first
        clone = self._clone_of(*self._lineage.clone_leased(parent, name, ephemeral=ephemeral))
        try:
            if size is not None and size != clone.size:
                clone.resize(size)
                clone.flush()
        except BaseException:
            clone.discard()
            self._lineage.delete([name])
            raise
        return clone

    def clone_many(self, parent: str, names: Sequence[str], *, ephemeral: bool = False) -> list[DeviceInfo]:
        """Clones by the thousand, in one transaction; none of them is opened."""
        self._check_writable()
        return self._lineage.clone(parent, names, ephemeral=ephemeral)

    def fork(self, name: str, *children: str) -> list[DeviceInfo]:
        """New clones that start from a clone's last flushed moment, also while somebody writes it."""
        self._check_writable()
        return self._lineage.fork(name, children)

    def seal(self, name: str, image: str) -> DeviceInfo:
        """Publishes a clone's last flushed moment as an image, also while somebody writes it."""
        self._check_writable()
        with self._read() as snapshot:
            number = catalog.find(snapshot, name, CLONE).number
        return self.seal_number(number, image)

    def seal_number(self, number: int, image: str) -> DeviceInfo:
        """The same for a clone that is known by its number. An ephemeral clone's blocks are copied."""
        with self._read() as snapshot:
            record = catalog.living(snapshot, number)
        if not record.ephemeral:
            return self._lineage.seal(record, image)
        from .imports import seal_ephemeral

        workshop = self._writing_engine().workshop
        with self._moments.held(lambda pin: [catalog.living(pin, number)]) as (record,):
            return seal_ephemeral(workshop, self._lineage, record, image)

    def reset(self, name: str) -> DeviceInfo:
        """Puts a clone back to its parent's moment; refused while it is open."""
        self._check_writable()
        return self._lineage.reset(name)

    def rename(self, old: str, new: str) -> DeviceInfo:
        """Gives a device another name, also while it is open."""
        self._check_writable()
        return self._lineage.rename(old, new)

    def delete(self, *names: str) -> list[DeviceInfo]:
        """Deletes devices at once, all or none; refused while one is open.

        Their clones keep what they need, and lineage keeps their names. A collection frees the space.
        """
        self._check_writable()
        return self._despite_full_disk(lambda: self._lineage.delete(names))

    def device(self, name: str, *, readonly: bool = False) -> Device:
        """Opens an image for reading, or a clone for writing.

        Args:
            name: The device.
            readonly: Open a clone's last flushed moment instead, which works while somebody writes it.
        """
        self._check_open()
        with self._read() as snapshot:
            record = catalog.find(snapshot, name)
        if record.kind == IMAGE:
            return self._open_image(record)
        if readonly or self.readonly:
            return self._open_moment(lambda pin: catalog.find(pin, name))
        return self._open_clone(name)

    # What is there.

    def info(self, name: str) -> DeviceInfo:
        """What is known of a device without reading its blocks."""
        with self._read() as snapshot:
            return catalog.describe(snapshot, catalog.find(snapshot, name))

    def devices(self) -> list[DeviceInfo]:
        """All images and clones, sorted by name."""
        return [info for info in self.lineage() if not info.deleted]

    def lineage(self) -> list[DeviceInfo]:
        """All images and clones, and the deleted ancestors of some, sorted by name."""
        with self._read() as snapshot:
            return catalog.lineage(snapshot)

    def diff(self, old: str, new: str) -> Iterator[Change]:
        """The ranges in which two devices' last flushed moments differ, in order; the cost follows the change."""
        from .differences import changes

        segments, pin = self._engine.segments, self._read()
        try:
            before, after = catalog.find(pin, old).root, catalog.find(pin, new).root
        except BaseException:
            pin.close()
            raise
        return changes(segments, before, after, pin)

    def usage(self, name: str) -> Usage:
        """What a device takes, shares, and would free."""
        from . import usage

        with self._read() as pin:
            return usage.usage(pin, self._engine.segments, catalog.find(pin, name))

    def usages(self, *names: str, progress: Progress = _no_progress) -> dict[str, Usage]:
        """The same for several devices by name, all where none is named, in one walk over what they hold."""
        from . import usage

        with self._read() as pin:
            return usage.usages(pin, self._engine.segments, names, progress)

    def exclusive(self, *names: str) -> int:
        """The bytes that deleting these devices together frees, exactly, after a collection."""
        from . import usage

        with self._read() as pin:
            numbers = {catalog.find(pin, name).number for name in names}
            return usage.exclusive_bytes(pin, self._engine.segments, numbers)

    def own_bytes(self) -> dict[str, int]:
        """For each device the bytes that it has and its parent's moment has not."""
        from . import usage

        with self._read() as pin:
            return usage.own_bytes(pin, self._engine.segments)

    def stats(self) -> Stats:
        """The whole store in numbers."""
        from . import usage

        with self._read() as pin:
            return usage.stats(pin, self._engine.segments, len(self._engine.index), self._environment.size())

    # Ways out, and upkeep.

    def export(
        self, name: str, path: Path_, *, overwrite: bool = False, format: str = "raw",  # noqa: A002 - as above
        reflink: str = "auto", verify: bool = True, progress: Progress = _no_progress,
    ) -> None:  # fmt: skip
        """Writes a device's last flushed moment as a file, which appears when it is complete.

        Args:
            name: The device.
            path: The file to be made.
            overwrite: Replace a file that is there.
            format: "raw", a sparse file, or one of sources.FOREIGN, which qemu-img writes.
            reflink: "auto" shares space with the store where that works, "always" does or fails, "never" copies.
            verify: Check what is shared against its digests, as what is copied always is.
            progress: Told ("export", bytes done, bytes in all).
        """
        from .exports import Export

        self._check_open()
        job = Export(Path(path), overwrite=overwrite, reflink=reflink, verify=verify)
        if format == "raw":
            with self._moments.held(lambda pin: [catalog.find(pin, name)]) as (record,):
                job.write_tree(self._engine.segments, record.root, progress)
            return
        from . import foreign

        with self.device(name, readonly=True) as device:
            foreign.export(job, device, format, progress)

    def backup(self, path: Path_, *, progress: Progress = _no_progress) -> None:
        """Makes a consistent copy of the whole store, while it is in use; ephemeral devices stay behind."""
        from .backup import Backup

        self._check_open()
        job = Backup(self._disk, self._engine.segments, self._engine.hasher, Path(path))
        with self._moments.held(job.choose) as records:
            job.write(records, progress)

    def collect(self, *, dry_run: bool = False, progress: Progress = _no_progress) -> Collection:
        """Frees what no device reaches any more; readers and writers go on meanwhile."""
        from .collector import Collector

        engine = self._writing_engine()
        collector = Collector(
            self._environment, engine.segments, self._leases, engine.index, engine.copies, self._disk, progress
        )

        def run() -> Collection:
            self._moments.sweep()
            self._lineage.drop_unwanted()
            engine.reservations.doom_now()
            return collector.run(self.path / "leases" / "collector", dry_run=dry_run)

        collection = self._despite_full_disk(run)
        founding.make_reserve(self.path, self._disk)
        return collection

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """Moments of machines: memory, disks and the state of the devices together."""
        from .checkpoints import Checkpoints

        environment, lineage, workshop = self._environment, self._lineage, lambda: self._writing_engine().workshop
        return Checkpoints(environment, lineage, workshop, self._open_moment, self._despite_full_disk)

    def serving(self) -> AbstractContextManager[None]:
        """Held by the one server of the store on this host; InUseError where there is one already."""
        self._check_open()
        place, what = self.path / "leases" / "server", f"serving store {self.path}"
        return turn(self._disk, place, what, 0, hint="one server is enough: use that one")

    # Opening devices.

    @cached_property
    def _moments(self) -> Moments:
        engine = self._engine
        owner = None if self.readonly else lambda: engine.reservations.lease_number
        return Moments(self._environment, self._lineage, owner)

    def _opened(self, record: DeviceRecord, lease: Lease) -> DeviceRecord:
        """The record as it is now that the lease is held; the device may have been deleted before."""
        with self._read() as snapshot:
            current = catalog.by_number(snapshot, record.number)
        if current is None or not current.visible:
            self._leases.forget(record.number)
            lease.close()
            raise NotFoundError(catalog.KINDS[record.kind], record.name)
        self._engine.segments.refresh()
        return current

    def _open_image(self, record: DeviceRecord) -> Device:
        from .devices import Device

        try:
            lease = self._leases.take(record.number, f"image {record.name!r}", exclusive=False)
        except NoSpaceError:
            return self._open_moment(lambda pin: catalog.find(pin, record.name))  # reading needs no space
        record = self._opened(record, lease)
        info, view, segments = (
            self._lineage.describe(record),
            self._engine.view(record.root),
            self._engine.segments,
        )
        return self._keep(Device(info, record.base, view, self._environment, segments, lease.close))

    def _open_moment(self, find: Callable[[Snapshot], DeviceRecord]) -> Device:
        from .devices import Device

        (record,), release = self._moments.take(lambda pin: [find(pin)])
        self._engine.segments.refresh()
        info, view, segments = (
            self._lineage.describe(record),
            self._engine.view(record.root),
            self._engine.segments,
        )
        settle = self._moments.settle
        return self._keep(Device(info, record.base, view, self._environment, segments, release, settle))

    def _open_clone(self, name: str) -> Clone:
        self._writing_engine()
        with self._read() as snapshot:
            record = catalog.find(snapshot, name)
        return self._clone_of(record, self._leases.take(record.number, f"clone {name!r}", exclusive=True))

    def _clone_of(self, record: DeviceRecord, lease: Lease) -> Clone:
        from .clones import Clone

        record = self._opened(record, lease)
        info = self._lineage.describe(record)
        workshop, journal = self._writing_engine().workshop, self._journals.of(record.number)
        return self._keep(Clone(info, record, workshop, self, lease.close, journal).recovered())

    def _keep(self, device: _Device) -> _Device:
        self._open.add(device)
        return device

    def fork_number(self, number: int, names: tuple[str, ...]) -> list[DeviceInfo]:
        """fork() for a clone that is known by its number."""
        return self._lineage.fork_number(number, names)

    def _despite_full_disk(self, action: Callable[[], _Result]) -> _Result:
        """Gives the reserve up where a full disk keeps anybody from making room."""
        reserve = self.path / "reserve"
        try:
            return action()
        except NoSpaceError:
            if not reserve.exists():
                raise
            self._disk.unlink(reserve)
            return action()

    # The end.

    def close(self) -> None:
        """Closes every open device, clones with a flush, and the store; harmless when done twice."""
        if self._closed:
            return
        engine = self._made_engine
        sweep = self._moments.sweep if engine else None
        self._closed = True
        with ExitStack() as stack:  # whatever fails, the rest is closed
            stack.callback(self._environment.close)
            if engine and sweep:
                stack.callback(engine.close)
                stack.callback(sweep)
            for device in list(self._open):
                stack.callback(device.close)

    def _abandon(self) -> None:
        """In a child made by os.fork(): the parent owns everything."""
        if self._closed:
            return
        self._closed = True
        for device in list(self._open):
            device.abandon()
        self._leases.abandon()
        self._environment.abandon()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Store {str(self.path)!r}{', closed' if self._closed else ''}>"
