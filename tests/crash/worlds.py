"""What a disk may hold after a crash, and directories made so.

Of a log cut off after some operation, everything that a finished sync covers is there. Of the rest each change
of a file is kept, dropped or torn in sectors, and each change of a name kept or dropped, independently: more
than any file system does, and all that the store may count on. Where a process dies and the host goes on,
everything is there.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cowstore import index as index_module
from cowstore.digest import checksum

from .recording import (
    TOP,
    Change,
    Committed,
    DirectorySynced,
    Linked,
    Naming,
    Operation,
    Punched,
    Renamed,
    Sized,
    Synced,
    Unlinked,
    Written,
)

PAGE = 4096
SECTOR = 512
_ZEROS = bytes(PAGE)


@dataclass
class Content:
    """A sparse file: its length and those pages that hold something."""

    size: int = 0
    pages: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Content:
        return Content(self.size, dict(self.pages))

    def apply(self, change: Change) -> None:
        match change:
            case Written(_, offset, data):
                self.write(offset, data)
            case Sized(_, size):
                self.resize(size)
            case Punched(_, offset, length):
                self.punch(offset, min(length, self.size - offset))

    def write(self, offset: int, data: bytes) -> None:
        self.size = max(self.size, offset + len(data))
        position = 0
        while position < len(data):
            page, skip = divmod(offset + position, PAGE)
            part = data[position : position + PAGE - skip]
            position += len(part)
            if len(part) < PAGE:
                old = self.pages.get(page, _ZEROS)
                part = old[:skip] + part + old[skip + len(part) :]
            self.pages[page] = part

    def resize(self, size: int) -> None:
        if size < self.size:
            self.punch(size, self.size - size)
        self.size = size

    def punch(self, offset: int, length: int) -> None:
        end = offset + length
        for page in [page for page in self.pages if offset < (page + 1) * PAGE and page * PAGE < end]:
            start, stop = max(offset - page * PAGE, 0), min(end - page * PAGE, PAGE)
            old = self.pages.pop(page)
            if stop - start < PAGE:
                self.pages[page] = old[:start] + bytes(stop - start) + old[stop:]

    def save(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            for first, pages in self._runs():
                for start in range(0, len(pages), 512):
                    os.pwritev(fd, pages[start : start + 512], (first + start) * PAGE)
            os.ftruncate(fd, self.size)
        finally:
            os.close(fd)

    def _runs(self) -> list[tuple[int, list[bytes]]]:
        runs: list[tuple[int, list[bytes]]] = []
        for page in sorted(self.pages):
            if not runs or runs[-1][0] + len(runs[-1][1]) != page:
                runs.append((page, []))
            runs[-1][1].append(self.pages[page])
        return runs


@dataclass
class _File:
    durable: Content = field(default_factory=Content)
    open: list[tuple[int, Change]] = field(default_factory=list)  # not synced yet, with their places in the log


@dataclass
class _Directory:
    durable: dict[str, int] = field(default_factory=dict)
    open: list[tuple[int, Naming]] = field(default_factory=list)


@dataclass(frozen=True)
class Manner:
    """How a crash treats what was not synced.

    Attributes:
        name: For messages.
        power: Whether the host loses power; else only the process dies.
        keep: How likely a change of a file is kept whole.
        tear: How likely a change that is not kept whole is torn; else it is dropped.
        names: How likely a change of a name is kept.
        index: What becomes of the index: `gone`, `kept`, `later` or `scrambled`.
        garbage: Whether pages of a file that were never synced, and are not kept, hold anything at all.
    """

    name: str
    power: bool = True
    keep: float = 1.0
    tear: float = 0.0
    names: float = 1.0
    index: str = "kept"
    garbage: bool = False


MANNERS = (
    Manner("killed", power=False),
    Manner("nothing unsynced is kept", keep=0, names=0, index="gone"),
    Manner("everything is kept", index="later"),
    Manner("names are kept, content is not", keep=0, index="scrambled"),
    Manner("content is kept, names are not", names=0, index="kept"),
    Manner("half is kept", keep=0.5, tear=0.3, names=0.5, index="scrambled"),
    Manner("most is kept", keep=0.85, tear=0.5, names=0.8, index="later"),
    Manner("little is kept", keep=0.15, tear=0.2, names=0.5, index="kept"),
    Manner("garbage is where little is kept", keep=0.3, tear=0.3, names=0.7, index="gone", garbage=True),
)


class History:
    """A log played back, always forward; worlds are made of its present point."""

    def __init__(self, log: Sequence[Operation], hints: Sequence[tuple[int, bytes]] = ()) -> None:
        self._log = log
        self._hints = hints
        self._files: dict[int, _File] = defaultdict(_File)
        self._directories: dict[int, _Directory] = defaultdict(_Directory)
        self._folders = {one.node for one in log if isinstance(one, Linked) and one.is_folder}
        self._at = 0

    def advance(self, count: int) -> None:
        """Goes on to the moment after the first so many operations."""
        assert count >= self._at
        for position in range(self._at, count):
            self._step(position, self._log[position])
        self._at = count

    def _step(self, position: int, operation: Operation) -> None:
        match operation:
            case Committed(number, data, size):
                file = self._files[number]
                file.open.clear()
                file.durable = Content()
                file.durable.write(0, data)
                file.durable.resize(size)
            case Synced(number, covers, lost):
                file = self._files[number]
                if not lost:
                    for _, change in (one for one in file.open if one[0] < covers):
                        file.durable.apply(change)
                file.open = [one for one in file.open if one[0] >= covers]
            case DirectorySynced(number, covers):
                folder = self._directories[number]
                for _, naming in (one for one in folder.open if one[0] < covers):
                    _rename(folder.durable, naming)
                folder.open = [one for one in folder.open if one[0] >= covers]
            case Written() | Sized() | Punched():
                self._files[operation.file].open.append((position, operation))
            case _:
                self._directories[operation.directory].open.append((position, operation))

    def make(self, target: Path, manner: Manner, rng: random.Random) -> None:
        """Makes a directory as a crash at this point might leave it."""
        self._make_folder(TOP, target, manner, rng)

    def _make_folder(self, number: int, path: Path, manner: Manner, rng: random.Random) -> None:
        os.mkdir(path)
        folder = self._directories.get(number, _Directory())
        names = dict(folder.durable)
        for _, naming in folder.open:
            if rng.random() < manner.names:
                _rename(names, naming)
        for name, node in names.items():
            if node in self._folders:
                self._make_folder(node, path / name, manner, rng)
            else:
                self._content(node, manner, rng).save(path / name)
        if path.name == "index":
            self._make_index(path, manner, rng)

    def _content(self, number: int, manner: Manner, rng: random.Random) -> Content:
        file = self._files.get(number, _File())
        if not file.open:
            return file.durable
        content = file.durable.copy()
        if manner.garbage:
            _litter(content, [change for _, change in file.open], rng)
        for _, change in file.open:
            if rng.random() < manner.keep:
                content.apply(change)
            elif isinstance(change, Written) and rng.random() < manner.tear:
                _tear(content, change, rng)
        return content

    def _make_index(self, path: Path, manner: Manner, rng: random.Random) -> None:
        earlier = [data for place, data in self._hints if place <= self._at]
        table = self._hints[-1][1] if manner.index == "later" and self._hints else b"".join(earlier[-1:])
        if manner.index == "gone" or not table:
            return
        if manner.index == "scrambled":
            table = scrambled(table, rng)
        with open(path / "table", "wb") as file:
            file.write(table)
            file.flush()
            self._own(file.fileno(), table)

    def _own(self, fd: int, table: bytes) -> None:
        """Makes the table one of this very file: else it would be thrown away unread."""
        head = index_module._HEADER
        magic, version, bucket, seed, _, buckets = head.unpack_from(table)
        assert (magic, version, bucket) == (index_module._MAGIC, index_module._VERSION, index_module.BUCKET_SIZE)
        fields = head.pack(magic, version, bucket, seed, os.fstat(fd).st_ino, buckets)
        os.pwrite(fd, fields + checksum(fields).to_bytes(8, "little"), 0)


def _rename(names: dict[str, int], naming: Naming) -> None:
    match naming:
        case Linked(_, name, node):
            names[name] = node
        case Unlinked(_, name):
            names.pop(name, None)
        case Renamed(_, old, name, node):
            names.pop(old, None)
            names[name] = node


def _litter(content: Content, changes: Sequence[Change], rng: random.Random) -> None:
    """Fills pages that were given space, but never synced: some file systems show what was there before."""
    for change in changes:
        if isinstance(change, Written):
            for page in range(change.offset // PAGE, -(-(change.offset + len(change.data)) // PAGE)):
                if page not in content.pages and rng.random() < 0.5:
                    content.write(page * PAGE, rng.randbytes(PAGE))


def _tear(content: Content, change: Written, rng: random.Random) -> None:
    """Keeps some sectors of a write: the first ones, or any."""
    edges = [0, *range(SECTOR - change.offset % SECTOR, len(change.data), SECTOR), len(change.data)]
    prefix = rng.randrange(len(edges)) if rng.random() < 0.5 else -1
    for position in range(len(edges) - 1):
        if position < prefix or (prefix < 0 and rng.random() < 0.5):
            start, end = edges[position], edges[position + 1]
            content.write(change.offset + start, change.data[start:end])


def scrambled(table: bytes, rng: random.Random) -> bytes:
    """An index with entries exchanged, made up, and overwritten; its header is left as it is."""
    start = index_module.HEADER_SIZE
    head, words = table[:start], np.frombuffer(table, np.uint64, offset=start).copy()
    rows = words.reshape(-1, 2, index_module.LANES)  # keys, then ids
    keys, ids = rows[:, 0].ravel(), rows[:, 1].ravel()
    live = np.flatnonzero(ids)
    dice = np.random.default_rng(rng.getrandbits(64))
    if len(live):
        shuffled = ids[live]
        some = dice.random(len(live)) < 0.5
        shuffled[some] = dice.permutation(shuffled[some])
        near = dice.random(len(live)) < 0.2
        shuffled[near] += dice.integers(0, 8, len(live), np.uint64)[near]
        wild = dice.random(len(live)) < 0.1
        shuffled[wild] = dice.integers(0, 1 << 64, len(live), np.uint64)[wild]
        ids[live] = shuffled
    rows[:, 0], rows[:, 1] = keys.reshape(rows[:, 0].shape), ids.reshape(rows[:, 1].shape)
    return head + words.tobytes()
