"""Opening: from a directory to a store, and what becomes of open stores in a child made by os.fork()."""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import xxhash

from . import founding
from .digest import HashFunction
from .environment import Environment
from .files import Disk
from .store import Path_, Store


def open(  # noqa: A001 - the name that every store of this kind has
    path: Path_,
    *,
    create: bool = False,
    readonly: bool = False,
    _disk: Disk | None = None,
    _hash: HashFunction = xxhash.xxh3_128_digest,
) -> Store:
    """Opens a store.

    Args:
        path: Its directory.
        create: Make an empty one where there is none.
        readonly: Open it for reading only; writes raise ReadOnlyError.

    Raises:
        NotFoundError: There is no such directory.
        FormatError: It is not a store, or one that this version cannot use.
        CatalogCorruptError: Its catalog does not verify.
    """
    directory, disk = Path(path), _disk or Disk()
    if create and not readonly and not (directory / "store.json").exists():
        founding.found(directory, disk)
    store = Store(directory, disk, _hash, readonly=readonly)
    _stores.add(store)
    return store


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _abandon_stores() -> None:
    Environment.forget_lock()
    for store in list(_stores):
        store._abandon()


os.register_at_fork(after_in_child=_abandon_stores)
