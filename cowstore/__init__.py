"""cowstore: one content-addressed store for the disks and the memory of virtual machines.

    import cowstore
    with cowstore.open("vdi.store", create=True) as store:
        store.import_image("debian.raw", "debian")
        desk = store.clone("debian", "desk-1")
        desk.pwrite(b"hello", 0)
        desk.flush()

Names that need NumPy are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from . import errors
from .catalog import DeviceInfo
from .errors import (
    BlockCorruptError,
    CatalogCorruptError,
    ClosedError,
    CorruptError,
    ExistsError,
    FormatError,
    GuestError,
    InUseError,
    InvalidError,
    MachineError,
    NoSpaceError,
    NotFoundError,
    PoisonedError,
    RangeError,
    ReadOnlyError,
    SegmentCorruptError,
    SourceError,
    StoreError,
)
from .opening import open  # noqa: A004 - the name that every store of this kind has
from .store import Store

if TYPE_CHECKING:
    from .checkpoints import CheckpointInfo
    from .clones import Clone
    from .collector import Collection
    from .devices import Device, Extent
    from .differences import Change
    from .usage import MemoryUsage, Stats, Usage

__version__ = "0.1.0"

_LATE = {
    "Change": "differences",
    "CheckpointInfo": "checkpoints",
    "Clone": "clones",
    "Collection": "collector",
    "Device": "devices",
    "Extent": "devices",
    "MemoryUsage": "usage",
    "Stats": "usage",
    "Usage": "usage",
}

__all__ = [
    "BlockCorruptError",
    "CatalogCorruptError",
    "Change",
    "CheckpointInfo",
    "Clone",
    "ClosedError",
    "Collection",
    "CorruptError",
    "Device",
    "DeviceInfo",
    "ExistsError",
    "Extent",
    "FormatError",
    "GuestError",
    "InUseError",
    "InvalidError",
    "MachineError",
    "MemoryUsage",
    "NoSpaceError",
    "NotFoundError",
    "PoisonedError",
    "RangeError",
    "ReadOnlyError",
    "SegmentCorruptError",
    "SourceError",
    "Stats",
    "Store",
    "StoreError",
    "Usage",
    "errors",
    "open",
]


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
