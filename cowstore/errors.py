"""Everything that cowstore raises, one tree.

    StoreError
    |-- NotFoundError            no device, store or file of that name
    |-- ExistsError              the name or the file is taken
    |-- InvalidError             an argument that can never be right: a bad name, a negative size
    |   `-- RangeError           an offset or length outside the device
    |-- InUseError               somebody holds it: a device's writer, the catalog's write lock
    |-- ReadOnlyError            a write to an image, to a read-only handle or to a store opened so
    |-- ClosedError              a handle used after close(), or after os.fork() in the child
    |-- PoisonedError            a sync failed; nothing more is written through this handle
    |-- NoSpaceError             the file system, or a size limit of the store, is full
    |-- MachineError             a machine or its hypervisor did not do what was asked
    |   `-- GuestError           the system inside did not: no agent, or a step that failed
    |-- SourceError              an import source that cannot be read, or changed meanwhile
    |-- FormatError              not a store, or one of a version or with features not known here
    `-- CorruptError             stored bytes are not what was written
        |-- BlockCorruptError    a block or a node against its digest
        |-- SegmentCorruptError  a segment's header or length
        `-- CatalogCorruptError  a record, the sum of all records, or the catalog's own pages

Each class carries its facts as fields; the message is made from them and ends with the remedy where there
is one. Corruption is never a kind of "not found". Exit codes are the command line's affair.
"""

from __future__ import annotations

import os


class StoreError(Exception):
    """Any failure that cowstore foresees.

    Attributes:
        hint: What the caller can do about it; empty where nothing sensible can be said.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class NotFoundError(StoreError):
    """Nothing of that name is there.

    Attributes:
        kind: What was looked for: ``device``, ``image``, ``clone``, ``store``, ``directory``.
        name: The name that was asked for.
    """

    def __init__(self, kind: str, name: str, *, hint: str = "") -> None:
        super().__init__(f"no {kind} named {name!r}", hint=hint)
        self.kind = kind
        self.name = name


class ExistsError(StoreError):
    """The name is taken.

    Attributes:
        kind: What holds the name: ``image``, ``clone``, ``store``, ``file``.
        name: The name.
    """

    def __init__(self, kind: str, name: str, *, hint: str = "") -> None:
        super().__init__(f"{kind} {name!r} exists already", hint=hint)
        self.kind = kind
        self.name = name


class InvalidError(StoreError, ValueError):
    """An argument that can never be right."""


class RangeError(InvalidError):
    """An offset or a length that lies outside a device.

    Attributes:
        name: The device.
        offset: Bytes, as asked.
        length: Bytes, as asked.
        size: The device's size in bytes.
    """

    def __init__(self, name: str, offset: int, length: int, size: int) -> None:
        super().__init__(f"{name}: {length} bytes at offset {offset} lie outside its {size} bytes")
        self.name = name
        self.offset = offset
        self.length = length
        self.size = size


class InUseError(StoreError):
    """Somebody holds what the call needs.

    Attributes:
        what: The thing that is held, for example ``clone 'desk-1'``.
        holder: The process id of the holder, 0 where it is not known.
    """

    def __init__(self, what: str, holder: int = 0, *, hint: str = "") -> None:
        if holder == os.getpid():
            by = "this process"
        else:
            by = f"process {holder}" if holder else "another process"
        super().__init__(f"{what} is in use by {by}", hint=hint)
        self.what = what
        self.holder = holder


class ReadOnlyError(StoreError):
    """A write to something that is not writable.

    Attributes:
        what: The thing that was to be written.
    """

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(f"{what} is read-only", hint=hint)
        self.what = what


class ClosedError(StoreError):
    """A handle that is closed, or was inherited through os.fork()."""


class PoisonedError(StoreError):
    """A sync failed earlier, so what is on the disk is unknown.

    The operating system reports a failed writeback once and then forgets the data; a second sync would
    claim success. Nothing more is written through this handle. Reopen the store to go on from the last
    flushed state.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"a write or sync failed: {reason}",
            hint="close the store and open it again: all flushed data is there, unflushed writes are lost",
        )
        self.reason = reason


class NoSpaceError(StoreError):
    """The file system under the store, or a limit of the store, is full.

    Attributes:
        path: The file that could not grow.
    """

    def __init__(self, path: str, *, hint: str = "") -> None:
        super().__init__(
            f"no space left for {path}",
            hint=hint or "free some space or delete devices and run a collection, then try again",
        )
        self.path = path


class MachineError(StoreError):
    """A machine or its hypervisor did not do what was asked of it."""


class GuestError(MachineError):
    """The system inside a machine did not do what was asked of it.

    Attributes:
        machine: The machine's name.
        step: What was asked.
    """

    def __init__(self, machine: str, step: str, reason: str, *, hint: str = "") -> None:
        said = "".join(
            letter if letter.isprintable() else "?" for letter in reason[:500]
        )  # a guest may have said it
        super().__init__(f"the guest of {machine}: {step}: {said}", hint=hint)
        self.machine = machine
        self.step = step


class SourceError(StoreError):
    """An import source cannot be read, or changed while it was read.

    Attributes:
        source: The source as it was named.
    """

    def __init__(self, source: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"cannot import {source}: {reason}", hint=hint)
        self.source = source


class FormatError(StoreError):
    """A directory that is not a store, or one that this version cannot use.

    Attributes:
        path: The directory or file.
    """

    def __init__(self, path: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: {reason}", hint=hint)
        self.path = path


class CorruptError(StoreError):
    """Stored bytes are not what was written."""


class BlockCorruptError(CorruptError):
    """A block or node that does not match its digest.

    Attributes:
        block_id: Its block id.
        name: The device it was read for; empty where there was none.
        offset: Bytes from the device's start, -1 where it is not known.
        expected: The 16-byte digest on record, empty where there is none.
    """

    def __init__(
        self, block_id: int, reason: str, *, name: str = "", offset: int = -1, expected: bytes = b""
    ) -> None:
        where = f"block {block_id:#x} (segment {block_id >> 18}, slot {block_id & 0x3FFFF})"
        if name:
            where += f" of {name}" + (f" at offset {offset}" if offset >= 0 else "")
        super().__init__(f"{where}: {reason}", hint="restore the device from a backup")
        self.block_id = block_id
        self.reason = reason
        self.name = name
        self.offset = offset
        self.expected = expected


class SegmentCorruptError(CorruptError):
    """A segment file whose header or length is wrong.

    Attributes:
        path: The segment's file.
    """

    def __init__(self, path: str, reason: str, *, hint: str = "") -> None:
        super().__init__(f"segment {path}: {reason}", hint=hint or "restore the store from a backup")
        self.path = path
        self.reason = reason


class CatalogCorruptError(CorruptError):
    """The catalog does not verify.

    Attributes:
        path: The catalog's directory.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(
            f"catalog {path}: {reason}", hint="put the newer catalog.copy in its place, or restore a backup"
        )
        self.path = path
        self.reason = reason
