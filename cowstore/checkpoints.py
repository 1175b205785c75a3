"""Checkpoints: one consistent moment of a machine, its memory, its disks and the state of its devices.

Taken in two transactions. While the machine stands still its disks' roots are secured by hidden images that
belong to the process lease. It goes on, its pages are taken in, and the second transaction hands all images over
to the checkpoint. Who dies in between leaves hidden images without an owner, which the collector removes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from . import catalog, layout
from .catalog import DeviceInfo
from .checkpoint import AUTOMATIC, RECORD_LIMIT, CheckpointRecord
from .devices import Device
from .environment import Environment, Snapshot
from .errors import InvalidError, NotFoundError
from .imports import copy_hidden, fill_hidden
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
        owner = workshop.reservations.lease_number
        with environment.write() as writer:
            found = [catalog.find(writer, name, CLONE) for name in disks]
            self._disks = [catalog.add(writer, _secured(record, owner)) for record in found]
        self._images += [disk.number for disk in self._disks]

    def take_memory(self, pages: Pages, *, since: str | None = None, progress: Progress = _no_progress) -> None:
        """Takes the memory in.

        Args:
            pages: Its pages; only those that are not as they were, where there is an earlier checkpoint.
            since: The name of that checkpoint, on whose memory they are laid.
            progress: Told ("memory", bytes done, bytes of the whole memory).

        Raises:
            NotFoundError: The earlier checkpoint is gone.
            InvalidError: Its memory has another size.
        """

        def start(snapshot: Snapshot) -> Root:
            if since is None:
                return _blank(pages.size)
            root = _image(snapshot, catalog.find_checkpoint(snapshot, since).memory).root
            if root.size != pages.size:
                raise InvalidError(f"the memory of {since!r} has {root.size} bytes, and not {pages.size}")
            return root

        def tell(_: str, done: int, total: int) -> None:
            progress("memory", done, total)

        self._memory = self._take(start, pages, tell)

    def take_state(self, state: bytes) -> None:
        """Takes the state of the devices in."""
        self._state = self._take(lambda _: _blank(len(state)), _Bytes(state), _no_progress)

    def _take(self, start: Callable[[Snapshot], Root], pages: Pages, progress: Progress) -> int:
        record = fill_hidden(self._workshop, self._lineage, start, lambda job: job.read(pages, progress))
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
        """
        assert self._memory
        assert self._state
        with self._environment.write() as writer:
            catalog.check_free_checkpoint(writer, name)
            images = (self._memory, self._state, *(disk.number for disk in self._disks))
            created, flags = _image(writer, self._memory).created, AUTOMATIC if automatic else 0
            record = CheckpointRecord(
                writer.number(), name, created, images[0], images[1], images[2:], configuration, flags
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
        self._lineage.drop_hidden(images)

    def __enter__(self) -> Pending:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Checkpoints:
    """The checkpoints of one store.

    Args:
        environment: The catalog.
        lineage: The records of devices.
        workshop: Gives writers' tools; fails where the store is read-only.
        open_moment: Opens the device that is found in a snapshot, for reading.
    """

    def __init__(
        self, environment: Environment, lineage: Lineage, workshop: Callable[[], Workshop],
        open_moment: Callable[[Callable[[Snapshot], DeviceRecord]], Device],
    ) -> None:  # fmt: skip
        self._environment = environment
        self._lineage = lineage
        self._workshop = workshop
        self._open_moment = open_moment

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
            added = []
            for position, number in enumerate(record.disks):
                image = _image(writer, number)
                template = catalog.child_of(image, image.root, ephemeral=True)
                names = [child[position] for child in children]
                added += catalog.add_children(writer, image, names, template)
            return [catalog.describe(writer, one) for one in added]

    def delete(self, *names: str) -> None:
        """Deletes checkpoints, all or none. Clones of their disks keep what they need."""
        self._workshop()
        with self._environment.write() as writer:
            for record in [catalog.find_checkpoint(writer, name) for name in names]:
                catalog.remove_checkpoint(writer, record)


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


def _blank(size: int) -> Root:
    return Root(layout.HOLE, layout.height_for(size), size)


def _parts(disks: int) -> list[str]:
    return ["memory", "state", *(f"disk{number}" for number in range(disks))]
