"""LMDB's files, looked at before LMDB maps them: what it trusts without a word, and what would be a signal."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

from .errors import CatalogCorruptError
from .files import Disk

MAX_READERS = 4096
_READER_SIZE = 64  # bytes of an entry in LMDB's table of readers
_META = struct.Struct("<16x II QQ 16x32x 48x QQ")
_META_MAGIC = 0xBEEFC0DE


def vet(path: Path) -> None:
    """Checks LMDB's two meta pages and the file's length before LMDB trusts them.

    LMDB falls back to the older meta page without a word, and maps a file that is too short.

    Raises:
        CatalogCorruptError: One of them is not as LMDB leaves it.
    """
    reason = ""
    for _ in range(5):  # a commit between the two reads looks like damage once
        reason = _meta_fault(path / "data.mdb")
        if not reason:
            return
        time.sleep(0.01)
    raise CatalogCorruptError(str(path), reason)


def _meta_fault(file: Path) -> str:
    try:
        with open(file, "rb", buffering=0) as data:
            first, second = data.read(152), os.pread(data.fileno(), 152, page_size())
            size = os.fstat(data.fileno()).st_size
    except FileNotFoundError:
        return "data.mdb is missing"
    if len(first) < 152 or len(second) < 152:
        return "data.mdb is cut off"
    metas = [_META.unpack(page) for page in (first, second)]
    if any(magic != _META_MAGIC or version != 1 for magic, version, *_ in metas):
        return "a meta page of data.mdb is damaged"
    old, new = sorted(meta[-1] for meta in metas)
    if new > 1 and (new - old != 1 or metas[new & 1][-1] != new):
        return "the meta pages of data.mdb do not follow each other"
    if size < (metas[new & 1][-2] + 1) * page_size():
        return "data.mdb is shorter than its meta pages say"
    return ""


def page_size() -> int:
    """LMDB's page size, which is the system's."""
    return os.sysconf("SC_PAGESIZE")


def make_room_for_readers(path: Path, disk: Disk) -> None:
    """Gives LMDB's table of readers its space: LMDB maps it, and a write to a page without any is a SIGBUS.

    Called only where this process has not opened the environment: closing lock.mdb drops LMDB's locks on it.
    """
    try:
        disk.allocate_mapped(path / "lock.mdb", MAX_READERS * _READER_SIZE + page_size())
    except OSError:
        return  # read-only, or of a kind that cannot; LMDB says what it makes of it
