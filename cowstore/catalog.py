"""Names, devices and leases: what the records of the catalog mean and which changes keep them true.

Every function takes the snapshot or write transaction it works in, so that callers decide what happens at
once. Nothing here knows what is in a tree; a device is a name, a moment and its lineage.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from . import layout
from .checkpoint import CheckpointRecord
from .environment import CHECKPOINTS, DEVICES, LEASES, NAMES, SEGMENTS, Snapshot, Writer
from .errors import CatalogCorruptError, ExistsError, InvalidError, NotFoundError
from .files import boot_id
from .layout import CLONE, DELETED, EPHEMERAL, HIDDEN, IMAGE, DeviceRecord, LeaseRecord, Root, number_key

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
_NUMBER = re.compile(r"#[0-9]{1,18}\Z")
KINDS: dict[int, Literal["image", "clone"]] = {IMAGE: "image", CLONE: "clone"}
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class DeviceInfo:
    """What people and programs want to know of a device.

    Attributes:
        number: Its number, never used twice in a store.
        name: Its name.
        kind: ``image`` or ``clone``.
        size: Bytes.
        ephemeral: Whether it is gone after a reboot of the host.
        created: Seconds since 1970.
        parent: The name of the device it was made from, also of a deleted one; None where there is none.
        parent_number: That device's number, 0 for none.
        deleted: Kept only because living devices name it as their parent.
        sequence: The last flush that changed it.
    """

    number: int
    name: str
    kind: Literal["image", "clone"]
    size: int
    ephemeral: bool
    created: float
    parent: str | None
    parent_number: int
    deleted: bool
    sequence: int


def check_name(name: str) -> str:
    """The name, if it is a good one.

    Raises:
        InvalidError: It is not.
    """
    if not _NAME.match(name):
        raise InvalidError(
            f"{name!r} is not a name", hint="letters, digits, '.', '_' and '-', 1 to 128, not starting with a dot"
        )
    return name


def check_size(size: int) -> int:
    """The size in bytes, if a device can have it."""
    if not 0 <= size <= layout.MAX_SIZE:
        raise InvalidError(f"a device cannot have a size of {size} bytes", hint=f"0 to {layout.MAX_SIZE}")
    return size


def is_gone(record: DeviceRecord) -> bool:
    """Whether an ephemeral device belongs to an earlier boot."""
    return record.ephemeral and record.boot != boot_id()


def decoded(snapshot: Snapshot, decoder: Callable[[int, bytes], _Record], key: bytes, payload: bytes) -> _Record:
    """A record whose key is a number, decoded."""
    try:
        return decoder(layout.key_number(key), payload)
    except (ValueError, UnicodeDecodeError) as error:
        raise CatalogCorruptError("catalog", f"record {key.hex()}: {error}") from error


def by_number(snapshot: Snapshot, number: int) -> DeviceRecord | None:
    """The device of that number."""
    key = number_key(number)
    payload = snapshot.get(DEVICES, key)
    return None if payload is None else decoded(snapshot, DeviceRecord.decode, key, payload)


def living(snapshot: Snapshot, number: int, name: str = "") -> DeviceRecord:
    """The device of that number, which may have been found by its name before.

    Raises:
        NotFoundError: It is gone.
    """
    record = by_number(snapshot, number)
    if record is None or record.flags & DELETED:
        raise NotFoundError("device", name or f"number {number}")
    return record


def find(snapshot: Snapshot, name: str, kind: int = 0) -> DeviceRecord:
    """The device of that name, or of that number where the name is one behind a ``#``: whatever it is called now.

    Raises:
        NotFoundError: There is none, or it is of the other kind.
        InvalidError: The name cannot be one.
    """
    wanted = KINDS.get(kind, "device")
    record = _numbered(snapshot, name) if _NUMBER.match(name) else _named(snapshot, name)
    if record is None:
        raise NotFoundError(wanted, name, hint="`cowstore ls` shows all names")
    if is_gone(record):
        raise NotFoundError(wanted, name, hint="it was ephemeral and went with the last boot")
    if kind and record.kind != kind:
        raise NotFoundError(wanted, name, hint=f"{name} is {'an image' if record.kind == IMAGE else 'a clone'}")
    return record


def _named(snapshot: Snapshot, name: str) -> DeviceRecord | None:
    key = snapshot.get(NAMES, check_name(name).encode())
    if key is None:
        return None
    record = by_number(snapshot, layout.key_number(key))
    if record is None:
        raise CatalogCorruptError("catalog", f"the name {name!r} leads nowhere")
    return record


def _numbered(snapshot: Snapshot, name: str) -> DeviceRecord | None:
    record = by_number(snapshot, int(name[1:]))
    return record if record is not None and record.visible else None


def devices(snapshot: Snapshot) -> Iterator[DeviceRecord]:
    """Every device record: hidden, deleted and bygone ones too, in the order of their numbers."""
    for key, payload in snapshot.items(DEVICES):
        yield decoded(snapshot, DeviceRecord.decode, key, payload)


def save(writer: Writer, record: DeviceRecord) -> DeviceRecord:
    """Writes a device record as it is."""
    writer.put(DEVICES, number_key(record.number), record.encode())
    return record


def add(writer: Writer, record: DeviceRecord) -> DeviceRecord:
    """Adds a device under a fresh number; its parent counts it.

    Raises:
        ExistsError: The name is taken.
    """
    record = replace(record, number=writer.number(), created=time.time_ns())
    if record.visible:
        _take_name(writer, record)
    _count_child(writer, record.parent, 1)
    return save(writer, record)


def add_children(
    writer: Writer, parent: DeviceRecord, names: list[str], template: DeviceRecord
) -> list[DeviceRecord]:
    """Adds many children of one parent, which is counted once."""
    created = time.time_ns()
    added = []
    for name in names:
        record = replace(template, number=writer.number(), name=check_name(name), created=created)
        _take_name(writer, record)
        added.append(save(writer, record))
    _count_child(writer, parent.number, len(added))
    return added


def _take_name(writer: Writer, record: DeviceRecord) -> None:
    check_free(writer, record.name)
    writer.put(NAMES, record.name.encode(), number_key(record.number))


def check_free(snapshot: Snapshot, name: str) -> None:
    """Raises ExistsError where a name is taken. One of an ephemeral device of an earlier boot is free."""
    taken = snapshot.get(NAMES, check_name(name).encode())
    if taken is not None:
        holder = by_number(snapshot, layout.key_number(taken))
        if holder is not None and not is_gone(holder):
            raise ExistsError(KINDS[holder.kind], name, hint="choose another name")


def _count_child(writer: Writer, number: int, change: int) -> None:
    while number:  # not by recursion: a lineage may be thousands of deleted devices long
        parent = by_number(writer, number)
        if parent is None:
            raise CatalogCorruptError("catalog", f"device {number} is missing, but has children")
        parent = replace(parent, children=parent.children + change)
        if parent.children or not parent.flags & DELETED:
            save(writer, parent)
            return
        writer.delete(DEVICES, number_key(number))
        number, change = parent.parent, -1


def child_of(parent: DeviceRecord, root: Root, *, ephemeral: bool = False) -> DeviceRecord:
    """A clone that starts from a root of its parent; name and number are still to be given."""
    ephemeral = ephemeral or parent.ephemeral
    return DeviceRecord(
        0, "", CLONE, root, root, EPHEMERAL if ephemeral else 0, parent.number, sequence=0,
        boot=boot_id() if ephemeral else bytes(16),
    )  # fmt: skip


def remove(writer: Writer, record: DeviceRecord) -> None:
    """Removes a device; where children name it, only its name and lineage stay."""
    if record.visible:
        writer.delete(NAMES, record.name.encode())
    if record.children:
        nothing = Root(layout.HOLE, 1, 0)
        flags = record.flags & ~HIDDEN | DELETED
        save(writer, replace(record, base=nothing, root=nothing, flags=flags, owner=0))
        return
    writer.delete(DEVICES, number_key(record.number))
    _count_child(writer, record.parent, -1)


def rename(writer: Writer, record: DeviceRecord, name: str) -> DeviceRecord:
    """Gives a device another name."""
    renamed = replace(record, name=check_name(name))
    if renamed.name != record.name:
        _take_name(writer, renamed)
        writer.delete(NAMES, record.name.encode())
    return save(writer, renamed)


def describe(snapshot: Snapshot, record: DeviceRecord) -> DeviceInfo:
    """The public facts of a record."""
    parent = by_number(snapshot, record.parent) if record.parent else None
    return info(record, parent.name if parent else None)


def lineage(snapshot: Snapshot) -> list[DeviceInfo]:
    """Every visible device and the deleted ancestors of some, sorted by name."""
    records = {record.number: record for record in devices(snapshot)}
    names = {number: record.name for number, record in records.items()}
    shown = [
        record for record in records.values()
        if not record.flags & HIDDEN and (record.flags & DELETED or not is_gone(record))
    ]  # fmt: skip
    return sorted((info(record, names.get(record.parent)) for record in shown), key=lambda shown: shown.name)


def info(record: DeviceRecord, parent: str | None) -> DeviceInfo:
    """The public facts of a record whose parent's name is known."""
    return DeviceInfo(
        record.number, record.name, KINDS[record.kind], record.root.size, record.ephemeral, record.created / 1e9,
        parent, record.parent, bool(record.flags & DELETED), record.sequence,
    )  # fmt: skip


def purge(writer: Writer) -> int:
    """Removes the ephemeral devices of earlier boots; returns how many they were."""
    gone = [record for record in devices(writer) if is_gone(record) and not record.flags & DELETED]
    for record in gone:
        current = by_number(writer, record.number)
        if current is not None:
            holder = writer.get(NAMES, current.name.encode()) if current.visible else None
            if holder is not None and layout.key_number(holder) != current.number:
                current = replace(current, flags=current.flags | HIDDEN)  # the name went on to another device
            remove(writer, current)
    return len(gone)


def leases(snapshot: Snapshot) -> Iterator[LeaseRecord]:
    """The record of every process lease."""
    for key, payload in snapshot.items(LEASES):
        yield decoded(snapshot, LeaseRecord.decode, key, payload)


def lease(snapshot: Snapshot, number: int) -> LeaseRecord:
    """The record of one process lease.

    Raises:
        CatalogCorruptError: It is not there.
    """
    key = number_key(number)
    payload = snapshot.get(LEASES, key)
    if payload is None:
        raise CatalogCorruptError("catalog", f"the record of lease {number} is missing")
    return decoded(snapshot, LeaseRecord.decode, key, payload)


def save_lease(writer: Writer, record: LeaseRecord) -> None:
    """Writes the record of a process lease."""
    writer.put(LEASES, number_key(record.number), record.encode())


def remove_lease(writer: Writer, number: int) -> None:
    """Removes the record of a process lease."""
    writer.delete(LEASES, number_key(number))


def checkpoints(snapshot: Snapshot) -> Iterator[CheckpointRecord]:
    """The record of every checkpoint, in the order of their numbers."""
    for key, payload in snapshot.items(CHECKPOINTS):
        yield decoded(snapshot, CheckpointRecord.decode, key, payload)


def find_checkpoint(snapshot: Snapshot, name: str) -> CheckpointRecord:
    """The checkpoint of that name.

    Raises:
        NotFoundError: There is none.
    """
    check_name(name)
    found = next((one for one in checkpoints(snapshot) if one.name == name), None)
    if found is None:
        raise NotFoundError("checkpoint", name, hint="`cowstore vm checkpoints` shows all names")
    return found


def living_checkpoint(snapshot: Snapshot, number: int) -> CheckpointRecord:
    """The checkpoint of that number.

    Raises:
        NotFoundError: It is gone, whatever has its name now.
    """
    key = number_key(number)
    payload = snapshot.get(CHECKPOINTS, key)
    if payload is None:
        raise NotFoundError("checkpoint", f"number {number}", hint="it was deleted meanwhile")
    return decoded(snapshot, CheckpointRecord.decode, key, payload)


def check_free_checkpoint(snapshot: Snapshot, name: str) -> None:
    """Raises ExistsError where a checkpoint has the name already, InvalidError where it is none."""
    check_name(name)
    if any(one.name == name for one in checkpoints(snapshot)):
        raise ExistsError("checkpoint", name, hint="choose another name")


def save_checkpoint(writer: Writer, record: CheckpointRecord) -> None:
    """Writes the record of a checkpoint."""
    writer.put(CHECKPOINTS, number_key(record.number), record.encode())


def remove_checkpoint(writer: Writer, record: CheckpointRecord) -> None:
    """Removes a checkpoint and its images; clones of those keep what they need."""
    writer.delete(CHECKPOINTS, number_key(record.number))
    for number in record.images:
        image = by_number(writer, number)
        if image is not None and image.owner == record.number:
            remove(writer, image)


def segments(snapshot: Snapshot) -> dict[int, tuple[int, int]]:
    """Kind and free slots of every segment, by number."""
    found = {}
    for key, payload in snapshot.items(SEGMENTS):
        found[layout.key_number(key)] = layout.decode_segment_record(payload)
    return found


def save_segment(writer: Writer, number: int, kind: int, free: int) -> None:
    """Writes the record of a segment."""
    writer.put(SEGMENTS, number_key(number), layout.encode_segment_record(kind, free))


def move(writer: Writer, current: DeviceRecord, flushed: DeviceRecord) -> DeviceRecord:
    """Gives a device the root of a flush; one that was hidden until now gets its name and its parent too.

    What others may change while a device is open stays: its name and the count of its children.
    """
    if not current.flags & HIDDEN or flushed.flags & HIDDEN:
        return save(writer, replace(current, root=flushed.root, sequence=flushed.sequence))
    _take_name(writer, flushed)
    _count_child(writer, flushed.parent, 1)
    return save(writer, flushed)


def restore(writer: Writer, record: DeviceRecord) -> None:
    """Writes a record of another catalog as it is, and its name."""
    if record.visible:
        writer.put(NAMES, record.name.encode(), number_key(record.number))
    save(writer, record)
