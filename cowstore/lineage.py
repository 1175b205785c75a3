"""Lineage: devices made from devices. Creating, forking, sealing, resetting, renaming and deleting.

Each is one transaction on records; no block is read or written, whatever the size. By name they take the last
flushed moment, which is what a power cut would leave, and the writer notices nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

from . import catalog, layout
from .catalog import DeviceInfo, check_name, check_size
from .environment import Environment, Snapshot, Writer
from .errors import InvalidError, NoSpaceError
from .journal import Journals
from .layout import CLONE, EPHEMERAL, HIDDEN, IMAGE, DeviceRecord, Root
from .leases import Lease, Leases


class Lineage:
    """The records of one store's devices."""

    def __init__(self, environment: Environment, leases: Leases, journals: Journals) -> None:
        self._environment = environment
        self._leases = leases
        self._journals = journals
        self._unwanted: list[int] = []

    def create(self, name: str, size: int) -> tuple[DeviceRecord, Lease]:
        """A blank clone of so many bytes, and its lease."""
        root = Root(layout.HOLE, layout.height_for(check_size(size)), size)
        record = DeviceRecord(0, check_name(name), CLONE, root, root)
        return self._leased(lambda writer: catalog.add(writer, record))

    def clone_leased(self, parent: str, name: str, *, ephemeral: bool) -> tuple[DeviceRecord, Lease]:
        """A single clone, and its lease."""

        def add(writer: Writer) -> DeviceRecord:
            self._add_clones(writer, catalog.find(writer, parent), [name], ephemeral=ephemeral)
            return catalog.find(writer, name)

        return self._leased(add)

    def _leased(self, add: Callable[[Writer], DeviceRecord]) -> tuple[DeviceRecord, Lease]:
        """Makes a device and takes its lease at once: one whose lease cannot be had is not made."""
        lease = None
        try:
            with self._environment.write() as writer:
                record = add(writer)
                lease = self._leases.take(record.number, f"clone {record.name!r}", exclusive=True)
        except BaseException:
            if lease is not None:
                lease.close()
            raise
        return record, lease

    def clone(self, parent: str, names: Sequence[str], *, ephemeral: bool) -> list[DeviceInfo]:
        """Clones of an image, or of a clone's last flushed moment, in one transaction."""
        with self._environment.write() as writer:
            record = catalog.find(writer, parent)
            return self._add_clones(writer, record, names, ephemeral=ephemeral)

    def _add_clones(
        self, writer: Writer, parent: DeviceRecord, names: Sequence[str], *, ephemeral: bool = False
    ) -> list[DeviceInfo]:
        if len(set(names)) != len(names):
            raise InvalidError("a name stands twice among the new clones")
        template = catalog.child_of(parent, parent.root, ephemeral=ephemeral)
        added = catalog.add_children(writer, parent, list(names), template)
        return [catalog.info(record, parent.name) for record in added]

    def fork(self, name: str, children: Sequence[str]) -> list[DeviceInfo]:
        """New clones that start from a clone's last flushed moment."""
        with self._environment.write() as writer:
            return self._add_clones(writer, catalog.find(writer, name, CLONE), children)

    def fork_number(self, number: int, names: tuple[str, ...]) -> list[DeviceInfo]:
        """The same for an open clone, whose name may have changed."""
        with self._environment.write() as writer:
            return self._add_clones(writer, catalog.living(writer, number), names)

    def seal(self, record: DeviceRecord, name: str) -> DeviceInfo:
        """A clone's last flushed moment as an image beside its parent; the clone must not be ephemeral."""
        with self._environment.write() as writer:
            record = catalog.living(writer, record.number)
            image = DeviceRecord(0, check_name(name), IMAGE, record.base, record.root, 0, record.parent)
            return catalog.describe(writer, catalog.add(writer, replace(image, sequence=record.sequence)))

    def reset(self, name: str) -> DeviceInfo:
        """Puts a clone that nobody has open back to its parent's moment."""
        with self._environment.read() as snapshot:
            number = catalog.find(snapshot, name, CLONE).number
        lease = self._leases.take(number, f"clone {name!r}", exclusive=True)
        try:
            with self._environment.write() as writer:
                record = catalog.living(writer, number, name)
                info = catalog.describe(writer, catalog.save(writer, replace(record, root=record.base)))
                self._journals.of(number).drop()  # just before: what it holds must not be done again afterwards
                return info
        finally:
            lease.close()

    def rename(self, old: str, new: str) -> DeviceInfo:
        """Gives a device another name, also while it is open."""
        with self._environment.write() as writer:
            return catalog.describe(writer, catalog.rename(writer, catalog.find(writer, old), new))

    def delete(self, names: Sequence[str]) -> list[DeviceInfo]:
        """Deletes devices, all or none; refused where one is open. Their clones keep what they need."""
        with ExitStack() as stack:
            with self._environment.read() as snapshot:
                found = {name: catalog.find(snapshot, name) for name in names}
            for name, record in found.items():
                lease = self._leases.take(record.number, f"{catalog.KINDS[record.kind]} {name!r}", exclusive=True)
                stack.callback(lease.close)
            with self._environment.write() as writer:
                deleted = [_delete(writer, record.number, name) for name, record in found.items()]
            for record in found.values():
                self._journals.of(record.number).drop()
                self._leases.forget(record.number)  # not before: who opens it now must find it locked, or gone
            return deleted

    def hide(
        self, choose: Callable[[Snapshot], list[DeviceRecord]], owner: int
    ) -> tuple[list[DeviceRecord], list[DeviceRecord]]:
        """Finds devices, and keeps their roots alive until they are dropped or their owner's lease ends.

        Both in one transaction: a root that was found before it may be doomed by now.

        Returns:
            The devices, and the images without a name that hold their roots.
        """
        with self._environment.write() as writer:
            records = choose(writer)
            roots = {root.node: (root, one) for one in records for root in (one.base, one.root) if root.node}
            return records, [catalog.add(writer, _hidden(root, one, owner)) for root, one in roots.values()]

    def drop_hidden(self, numbers: Sequence[int]) -> None:
        """Removes hidden devices; harmless where they are gone. On a full disk the next collection does."""
        self._unwanted.extend(numbers)
        with suppress(NoSpaceError):
            self.drop_unwanted()

    def drop_unwanted(self) -> None:
        """Removes the hidden devices that could not be removed before."""
        unwanted, self._unwanted = self._unwanted, []
        if not unwanted:
            return
        try:
            with self._environment.write() as writer:
                for number in unwanted:
                    record = catalog.by_number(writer, number)
                    if record is not None:
                        catalog.remove(writer, record)
        except BaseException:
            self._unwanted.extend(unwanted)
            raise

    def start_image(self, image: DeviceRecord, owner: int) -> DeviceRecord:
        """A hidden image that is about to be filled; its owner's death removes it."""
        with self._environment.write() as writer:
            hidden = replace(image, flags=image.flags | HIDDEN, owner=owner, parent=0)
            return catalog.add(writer, hidden)

    def start_hidden(self, start: Callable[[Snapshot], Root], owner: int) -> DeviceRecord:
        """A hidden image that starts from a root found in the same transaction, and is about to be filled."""
        with self._environment.write() as writer:
            image = DeviceRecord(0, "hidden", IMAGE, Root(layout.HOLE, 1, 0), start(writer), HIDDEN, owner=owner)
            return catalog.add(writer, image)

    def check_free(self, name: str) -> None:
        """Raises ExistsError where a name is taken; before long work whose result is to have it."""
        with self._environment.read() as snapshot:
            catalog.check_free(snapshot, name)

    def describe(self, record: DeviceRecord) -> DeviceInfo:
        """The public facts of a record."""
        with self._environment.read() as snapshot:
            return catalog.describe(snapshot, record)

    def purge(self) -> None:
        """Removes the ephemeral devices of earlier boots, if there are any."""
        with self._environment.read() as snapshot:
            gone = any(
                catalog.is_gone(record) and not record.flags & layout.DELETED
                for record in catalog.devices(snapshot)
            )
        if gone:
            with self._environment.write() as writer:
                catalog.purge(writer)


def _hidden(root: Root, record: DeviceRecord, owner: int) -> DeviceRecord:
    """An image without a name, which goes with the next boot where the device does whose root it holds."""
    flags = HIDDEN | record.flags & EPHEMERAL
    return DeviceRecord(0, "hidden", IMAGE, root, root, flags, owner=owner, boot=record.boot)


def _delete(writer: Writer, number: int, name: str) -> DeviceInfo:
    current = catalog.living(writer, number, name)
    info = catalog.describe(writer, current)
    catalog.remove(writer, current)
    return info
