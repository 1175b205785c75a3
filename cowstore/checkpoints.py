"""Checkpoints: one consistent moment of a machine, its memory, its disks and the state of its devices.

Taken in two transactions. While the machine stands still its disks' roots are secured by hidden images that
belong to the process lease. It goes on, its pages are taken in, and the second transaction hands all images over
to the checkpoint. Who dies in between leaves hidden images without an owner, which the collector removes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from . import catalog, layout
from .catalog import DeviceInfo
from .checkpoint import AUTOMATIC, RECORD_LIMIT, CheckpointRecord
from .devices import Device
from .environment import Environment, Snapshot
from .errors import ClosedError, InvalidError, NotFoundError, PoisonedError
from .imports import Import, copy_hidden, fill_hidden, is_durable
from .layout import CLONE, EPHEMERAL, HIDDEN, IMAGE, NAME_LIMIT, DeviceRecord, Root
from .lineage import Lineage
from .publisher import Workshop

Progress = Callable[[str, int, int], None]


def _no_progress(_step: str, _done: int, _total: int) -> None:
    """For callers who do not want to know."""


class Pages(Protocol):
    """Where the pages of a memory come from.

    Attributes:
        name: For messages.
        size: Bytes of the whole memory.
    """

    name: str
    size: int

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Offset and bytes of what differs from the earlier memory, in order; offsets and lengths are whole pages.

        A piece is not changed before the next but one is asked for.
        """
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...


@dataclass(frozen=True)
class CheckpointInfo:
    """What people and programs want to know of a checkpoint.

    Attributes:
        number: Its number, never used twice in a store.
        name: Its name.
        created: Seconds since 1970.
        automatic: Whether a fork made it, and nobody asked for it by name.
        memory_size: Bytes of the machine's memory.
        state_size: Bytes of its devices' state.
        disk_sizes: Bytes of each disk, in the machine's order.
        configuration: What the machine was like.
        images: The numbers of its hidden images: memory, state, disks.
    """

    number: int
    name: str
    created: float
    automatic: bool
    memory_size: int
    state_size: int
    disk_sizes: tuple[int, ...]
    configuration: dict[str, Any]
    images: tuple[int, ...]


@dataclass
class _Bytes:
    """A source of a few bytes."""

    data: bytes
    name: str = "device state"
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.data)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        yield 0, memoryview(self.data)

    def close(self) -> None:
        pass


class Pending:
    """A checkpoint that is being taken. Publish it, and close it in any case: what is not published is dropped.

    Memory, state and disks may be taken in side by side, each in a thread of its own.

    Args:
        workshop: Writers' tools.
        lineage: The records.
        environment: The catalog.
        disks: The names of the machine's clones, whose last flushed moments are secured now, all at once.
    """

    def __init__(
        self, workshop: Workshop, lineage: Lineage, environment: Environment, disks: Sequence[str]
    ) -> None:
        self._workshop = workshop
        self._lineage = lineage
        self._environment = environment
        self._images: list[int] = []  # everything to be dropped if it comes to nothing
        self._memory = self._state = 0
        self._created = time.time_ns()
        self._owner = owner = workshop.reservations.lease_number
        with environment.write() as writer:
            found = [catalog.find(writer, name, CLONE) for name in disks]
            self._disks = [catalog.add(writer, _secured(record, owner)) for record in found]
        self._images += [disk.number for disk in self._disks]

    def take_memory(self, pages: Pages, *, since: int | None = None, progress: Progress = _no_progress) -> None:
        """Takes the memory in.

        Args:
            pages: Its pages; only those that are not as they were, where there is an earlier checkpoint.
            since: The number of that checkpoint, on whose memory they are laid.
            progress: Told ("memory", bytes done, bytes of the whole memory).

        Raises:
            NotFoundError: The earlier checkpoint is gone.
            InvalidError: Its memory has another size.
        """

        def start(snapshot: Snapshot) -> Root:
            if since is None:
                return _blank(pages.size)
            root = _image(snapshot, catalog.living_checkpoint(snapshot, since).memory).root
            if root.size != pages.size:
                raise InvalidError(f"the earlier memory has {root.size} bytes, and not {pages.size}")
            return root

        def tell(_: str, done: int, total: int) -> None:
            progress("memory", done, total)

        self._memory = self._take(start, lambda job: job.lay(pages, tell))

    def take_state(self, state: bytes) -> None:
        """Takes the state of the devices in."""
        source = _Bytes(state)
        self._state = self._take(lambda _: _blank(len(state)), lambda job: job.read(source, _no_progress))

    def _take(self, start: Callable[[Snapshot], Root], fill: Callable[[Import], DeviceRecord]) -> int:
        record = fill_hidden(self._workshop, self._lineage, start, fill)
        self._images.append(record.number)
        return record.number

    def settle_disks(self) -> None:
        """Copies what ephemeral disks have of their own, so that it outlives a reboot."""
        for position, disk in enumerate(self._disks):
            if disk.ephemeral:
                copy = copy_hidden(self._workshop, self._lineage, disk)
                self._images.append(copy.number)
                self._disks[position] = copy

    def publish(self, name: str, configuration: dict[str, Any], *, automatic: bool = False) -> CheckpointInfo:
        """Gives everything to a checkpoint of that name, durably.

        Raises:
            ExistsError: The name is taken.
            InvalidError: It is no name, or the configuration is too large.
        """
        assert self._memory
        assert self._state
        self.settle_disks()  # where it was not done: the next boot would take a disk out of the checkpoint
        with self._environment.write() as writer:
            catalog.check_free_checkpoint(writer, name)
            images = (self._memory, self._state, *(disk.number for disk in self._disks))
            flags = AUTOMATIC if automatic else 0
            record = CheckpointRecord(
                writer.number(), name, self._created, images[0], images[1], images[2:], configuration, flags
            )
            if len(record.encode()) > RECORD_LIMIT:
                raise InvalidError(f"the configuration of checkpoint {name!r} is too large")
            for number, part in zip(images, _parts(len(self._disks)), strict=True):
                image = replace(_image(writer, number), owner=record.number, name=f"{name}.{part}"[:NAME_LIMIT])
                catalog.save(writer, replace(image, base=Root(layout.HOLE, 1, 0)))
            catalog.save_checkpoint(writer, record)
            info = describe(writer, record)
        self._images = [number for number in self._images if number not in images]
        return info

    def close(self) -> None:
        """Drops what was not published; harmless when done twice."""
        images, self._images = self._images, []
        if images:
            _drop(self._environment, self._lineage, images, self._owner)

    def __enter__(self) -> Pending:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Origin:
    """One moment, held and open for reading, and images made of it and of pages laid over it.

    Close it when no more are to be made.

    Args:
        device: The moment, open for reading.
        record: The record it was found in.
        environment: The catalog.
        lineage: The records of devices.
        workshop: Gives writers' tools; fails where the store is read-only.

    Attributes:
        device: See above.
    """

    def __init__(
        self, device: Device, record: DeviceRecord, environment: Environment, lineage: Lineage,
        workshop: Callable[[], Workshop],
    ) -> None:  # fmt: skip
        self.device = device
        self._record = record
        self._environment = environment
        self._lineage = lineage
        self._workshop = workshop

    def seal(self, name: str, pages: Pages) -> DeviceInfo:
        """Makes an image, which is there when it is complete, or not at all; the cost follows the pages.

        Args:
            name: The image's name.
            pages: What it has and the moment has not.

        Raises:
            ExistsError: The name is taken.
            InvalidError: The pages are of a memory of another size.
            ClosedError: The origin is closed.
        """
        workshop, root = self._workshop(), self._record.root
        if self.device.closed:
            raise ClosedError(f"the moment of {self._record.name!r} is closed", hint="open it again")
        if pages.size != root.size:
            raise InvalidError(f"{self._record.name!r} has {root.size} bytes, and its pages are of {pages.size}")
        self._lineage.check_free(name)
        base = next((one for one in (root, self._record.base) if is_durable(workshop.segments, one)), _blank(0))

        def fill(job: Import) -> DeviceRecord:
            if base != root:
                job.copy(workshop.segments, base, root)
            return job.lay(pages, _no_progress)

        hidden = fill_hidden(workshop, self._lineage, lambda snapshot: self._held(snapshot, base), fill)
        try:
            return self._named(hidden.number, name, base)
        except BaseException:
            _drop(self._environment, self._lineage, [hidden.number], hidden.owner)
            raise

    def _held(self, snapshot: Snapshot, base: Root) -> Root:
        """The root to start from, if something keeps it alive; where the disk was full, nothing may."""
        if base.node and not any(base.node in (one.root.node, one.base.node) for one in self._holders(snapshot)):
            raise NotFoundError("moment", self._record.name, hint="the store's disk was full: open it again")
        return base

    def _holders(self, snapshot: Snapshot) -> Iterator[DeviceRecord]:
        """Whose roots are alive; first the one that most likely has ours."""
        first = catalog.by_number(snapshot, self._record.number)
        if first is not None:
            yield first
        yield from (one for one in catalog.devices(snapshot) if not catalog.is_gone(one))

    def _named(self, number: int, name: str, base: Root) -> DeviceInfo:
        """Gives a hidden image its name, beside an ephemeral origin, and under any other."""
        with self._environment.write() as writer:
            parent = self._record.parent if self._record.ephemeral else self._record.number
            if catalog.by_number(writer, parent) is None:
                parent = 0  # deleted meanwhile, and nobody else descends from it
            current = _image(writer, number)
            image = replace(current, name=catalog.check_name(name), flags=0, owner=0, parent=parent, base=base)
            return catalog.describe(writer, catalog.move(writer, current, image))

    def close(self) -> None:
        """Lets the moment go; harmless when done twice."""
        self.device.close()


class Checkpoints:
    """The checkpoints of one store.

    Args:
        environment: The catalog.
        lineage: The records of devices.
        workshop: Gives writers' tools; fails where the store is read-only.
        open_moment: Opens the device that is found in a snapshot, for reading.
        despite_full_disk: Does something, with the reserve given up where the disk is full.
    """

    def __init__(
        self, environment: Environment, lineage: Lineage, workshop: Callable[[], Workshop],
        open_moment: Callable[[Callable[[Snapshot], DeviceRecord]], Device],
        despite_full_disk: Callable[[Callable[[], None]], None],
    ) -> None:  # fmt: skip
        self._environment = environment
        self._lineage = lineage
        self._workshop = workshop
        self._open_moment = open_moment
        self._despite_full_disk = despite_full_disk

    def all(self) -> list[CheckpointInfo]:
        """All of them, sorted by name."""
        with self._environment.read() as snapshot:
            found = [describe(snapshot, record) for record in catalog.checkpoints(snapshot)]
        return sorted(found, key=lambda info: info.name)

    def info(self, name: str) -> CheckpointInfo:
        """What is known of one; NotFoundError where there is none."""
        with self._environment.read() as snapshot:
            return describe(snapshot, catalog.find_checkpoint(snapshot, name))

    def check_free(self, name: str) -> None:
        """Raises ExistsError where a name is taken; before long work whose result is to have it."""
        with self._environment.read() as snapshot:
            catalog.check_free_checkpoint(snapshot, name)

    def begin(self, disks: Sequence[str]) -> Pending:
        """Secures the last flushed moments of a machine's clones; the rest of a checkpoint is to follow."""
        return Pending(self._workshop(), self._lineage, self._environment, disks)

    def memory(self, name: str) -> Device:
        """The memory of a checkpoint, open for reading."""
        return self._open_moment(lambda snapshot: _image(snapshot, catalog.find_checkpoint(snapshot, name).memory))

    def origin(self, name: str, *, checkpoint: bool = False) -> Origin:
        """What images can be made of: the last flushed moment of a device.

        Args:
            name: The device.
            checkpoint: It is the name of a checkpoint, whose memory is meant.
        """
        found: list[DeviceRecord] = []

        def find(snapshot: Snapshot) -> DeviceRecord:
            if checkpoint:
                found.append(_image(snapshot, catalog.find_checkpoint(snapshot, name).memory))
            else:
                found.append(catalog.find(snapshot, name))
            return found[-1]

        device = self._open_moment(find)
        return Origin(device, found[-1], self._environment, self._lineage, self._workshop)

    def state(self, name: str) -> bytes:
        """The state of a checkpoint's devices."""
        with self._open_moment(
            lambda snapshot: _image(snapshot, catalog.find_checkpoint(snapshot, name).state)
        ) as device:
            return device.pread(device.size, 0)

    def clone_disks(self, name: str, children: Sequence[Sequence[str]]) -> list[DeviceInfo]:
        """Ephemeral clones of a checkpoint's disks for any number of machines, in one transaction.

        Args:
            name: The checkpoint.
            children: For each machine the names of its clones, as many as the checkpoint has disks.
        """
        self._workshop()
        with self._environment.write() as writer:
            record = catalog.find_checkpoint(writer, name)
            if any(len(child) != len(record.disks) for child in children):
                raise InvalidError(
                    f"checkpoint {name!r} has {len(record.disks)} disks; each wants one clone's name"
                )
            added = []
            for position, number in enumerate(record.disks):
                image = _image(writer, number)
                template = catalog.child_of(image, image.root, ephemeral=True)
                names = [child[position] for child in children]
                added += catalog.add_children(writer, image, names, template)
            return [catalog.describe(writer, one) for one in added]

    def delete(self, *names: str) -> None:
        """Deletes checkpoints, all or none. Clones of their disks keep what they need."""

        def delete() -> None:
            with self._environment.write() as writer:
                for record in [catalog.find_checkpoint(writer, name) for name in names]:
                    catalog.remove_checkpoint(writer, record)

        self._workshop()
        self._despite_full_disk(delete)


def describe(snapshot: Snapshot, record: CheckpointRecord) -> CheckpointInfo:
    """The public facts of a record."""
    sizes = [_image(snapshot, number).root.size for number in record.images]
    return CheckpointInfo(
        record.number, record.name, record.created / 1e9, bool(record.flags & AUTOMATIC), sizes[0], sizes[1],
        tuple(sizes[2:]), record.configuration, record.images,
    )  # fmt: skip


def _secured(record: DeviceRecord, owner: int) -> DeviceRecord:
    """A hidden image of a clone's last flushed moment; its base is kept too, a copy starts from it."""
    flags = HIDDEN | record.flags & EPHEMERAL
    return DeviceRecord(0, "hidden", IMAGE, record.base, record.root, flags, owner=owner, boot=record.boot)


def _image(snapshot: Snapshot, number: int) -> DeviceRecord:
    record = catalog.by_number(snapshot, number)
    if record is None:
        raise NotFoundError("image", f"number {number}", hint="the collector has removed it: its process was gone")
    return record


def _drop(environment: Environment, lineage: Lineage, numbers: list[int], owner: int) -> None:
    """Drops the hidden images that still are their owner's: an interrupt does not tell, but the catalog does.

    Where the store is closed or can write no more they go with the process lease.
    """
    with suppress(ClosedError, PoisonedError):
        with environment.read() as snapshot:
            found = [catalog.by_number(snapshot, number) for number in numbers]
        lineage.drop_hidden([one.number for one in found if one is not None and one.owner == owner])


def _blank(size: int) -> Root:
    return Root(layout.HOLE, layout.height_for(size), size)


def _parts(disks: int) -> list[str]:
    return ["memory", "state", *(f"disk{number}" for number in range(disks))]
