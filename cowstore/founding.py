"""Founding: how a store directory comes to be, and how it is recognised."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from . import layout
from .environment import Environment
from .errors import FormatError, NoSpaceError, NotFoundError, StoreError
from .files import Disk
from .layout import Identity

_RESERVE = 4 << 20  # bytes
_PARTS = ("segments", "index", "leases")


def found(path: Path, disk: Disk) -> None:
    """Makes an empty store, durably and all at once.

    Raises:
        FormatError: Something else is there.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FormatError(
            str(path), "it is not a store, and not empty", hint="name a directory that is not there yet"
        )
    aside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")  # a crash may leave one
    try:
        disk.make_directory(aside)
        for part in _PARTS:
            disk.make_directory(aside / part)
        Environment.create(aside / "catalog", disk, aside / "leases" / "writer")
        make_reserve(aside, disk)
        identity = Identity(os.urandom(16), int.from_bytes(os.urandom(8), "little"))
        disk.write_whole(aside / "store.json", layout.encode_identity(identity))
        _place(aside, path, disk)
    except BaseException as error:
        disk.remove_tree(aside)
        if isinstance(error, OSError):
            raise StoreError(f"cannot make a store at {path}: {error.strerror}") from error
        raise


def _place(aside: Path, path: Path, disk: Disk) -> None:
    try:
        disk.rename(aside, path)
    except OSError:
        if not (path / "store.json").exists():
            raise
        disk.remove_tree(aside)  # another process was faster, and its store is as good
        return
    disk.sync_directory(path.parent)


def make_reserve(path: Path, disk: Disk) -> None:
    """Makes the file that is given up when the disk is full, so that deletes still work.

    One that is there is given its space again: a crash may have left it without.
    """
    reserve = path / "reserve"
    try:
        file = disk.open(reserve, write=True, create=True)
    except (OSError, NoSpaceError):
        return
    try:
        file.allocate(_RESERVE)
    except (OSError, NoSpaceError):
        disk.unlink(reserve)
    finally:
        file.close()


def read_identity(path: Path) -> Identity:
    """The identity of the store at a path.

    Raises:
        NotFoundError: There is nothing.
        FormatError: It is not a store, its store.json is damaged, or it is of a newer format.
    """
    if sys.byteorder != "little":
        raise FormatError(str(path), "stores are little-endian, and this host is not")
    file = path / "store.json"
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        if not path.exists():
            raise NotFoundError("store", str(path), hint="make one with `cowstore init`") from None
        hint = "name the store's directory, or make one in an empty directory with `cowstore init`"
        raise FormatError(str(path), "it is not a store: it has no store.json", hint=hint) from None
    except NotADirectoryError:
        raise FormatError(
            str(path), "it is not a store: it is no directory", hint="name the store's directory"
        ) from None
    except OSError as error:
        raise FormatError(str(file), f"it cannot be read: {error.strerror}") from error
    try:
        return layout.decode_identity(text)
    except layout.UnknownFormatError as error:
        raise FormatError(str(file), str(error), hint="use a newer version of cowstore") from error
    except ValueError as error:
        raise FormatError(str(file), f"it is damaged: {error}", hint="restore it from a backup") from error
