"""What the server's parts are tested on: disks, devices and a channel in memory, which misbehave when told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

from cowstore.errors import NotFoundError
from cowstore.nbd.channel import Channel

BLOCK = 4096
Piece = bytes | memoryview | int


@dataclass(frozen=True)
class Extent:
    """A run of bytes that are alike."""

    length: int
    data: bool
    own: bool


@dataclass
class Described:
    """What is known of a device in memory."""

    number: int
    name: str
    kind: str
    size: int


class MemoryDisk:
    """A disk in memory; blocks of zeros are its holes, and what was written is its own.

    Args:
        content: What is on it.
        number: Its device's number.

    Attributes:
        info: What it is.
        content: Its bytes.
        durable: Its bytes as they were when the last flush that succeeded began.
        failures: What its methods raise, by name.
        calls: The methods that were called, with their arguments.
        open_now: Whether it has not been closed.
        held: Whether somebody holds it steady.
        flushing: Set when a flush has begun.
        may_flush: What a flush waits for.
        journal_size: Bytes of changes since the last flush began.
    """

    def __init__(self, content: bytes | bytearray = b"", number: int = 1) -> None:
        self.info = Described(number, "disk", "clone", len(content))
        self.journal_size = 0
        self.content = bytearray(content)
        self.durable = bytes(content)
        self.failures: dict[str, BaseException] = {}
        self.calls: list[tuple[object, ...]] = []
        self.open_now = True
        self.held = False
        self.flushing = threading.Event()
        self.may_flush = threading.Event()
        self.may_flush.set()
        self.deferred = False
        self.on_record: Callable[[], object] = lambda: None
        self._own: set[int] = set()
        self._lock = threading.RLock()

    @property
    def size(self) -> int:
        return len(self.content)

    def _called(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if name in self.failures:
            raise self.failures[name]

    def count(self, name: str) -> int:
        """How often a method was called."""
        return sum(call[0] == name for call in self.calls)

    @contextmanager
    def steady(self) -> Iterator[object]:
        with self._lock:
            before, self.held = self.held, True
            try:
                yield None
            finally:
                self.held = before

    def _blocks(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Number, offset and length of each block, the first and the last cut where the range is."""
        end = offset + length
        for number in range(offset // BLOCK, -(-end // BLOCK)) if length else ():
            start = max(number * BLOCK, offset)
            yield number, start, min((number + 1) * BLOCK, end) - start

    def _is_hole(self, number: int) -> bool:
        block = self.content[number * BLOCK : (number + 1) * BLOCK]
        return block.count(0) == len(block)

    def views(self, length: int, offset: int) -> list[Piece]:
        self._called("views", length, offset)
        assert offset + length <= self.size
        pieces: list[Piece] = []
        for is_hole, blocks in groupby(self._blocks(offset, length), key=lambda block: self._is_hole(block[0])):
            run = list(blocks)
            size = sum(block[2] for block in run)
            if is_hole:
                pieces.append(size)
            else:
                pieces += [bytes(self.content[at : at + part]) for _, at, part in run]
        return pieces

    def prefetch(self, length: int, offset: int) -> None:
        self._called("prefetch", length, offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        self._called("extents", offset, length)

        def kind(block: tuple[int, int, int]) -> tuple[bool, bool]:
            return not self._is_hole(block[0]), block[0] in self._own

        for (data, own), blocks in groupby(self._blocks(offset, length), key=kind):
            yield Extent(sum(part for _, _, part in blocks), data, own)

    def keep_journal(self) -> None:
        self._called("keep_journal")

    def defer_records(self, deferred: bool) -> None:
        self.deferred = deferred

    def record(self) -> None:
        self.on_record()
        if "record" in self.failures:
            raise self.failures["record"]

    def pwrite(self, data: bytes | memoryview, offset: int) -> int:
        self._called("pwrite", len(data), offset)
        self.journal_size += len(data)
        assert offset + len(data) <= self.size
        self.content[offset : offset + len(data)] = data
        self._own.update(number for number, _, _ in self._blocks(offset, len(data)))
        return len(data)

    def zero(self, length: int, offset: int) -> None:
        self._called("zero", length, offset)
        assert offset + length <= self.size
        self.content[offset : offset + length] = bytes(length)
        self._own.update(number for number, _, _ in self._blocks(offset, length))

    def flush(self) -> None:
        content, self.journal_size = bytes(self.content), 0
        self.flushing.set()
        assert self.may_flush.wait(60)
        self._called("flush")
        self.durable = content

    def close(self) -> None:
        self._called("close")
        self.open_now = False


class MemoryDevices:
    """Devices in memory: each opening makes a new disk of the device's content, and closing it keeps that.

    Args:
        images: Content by name.
        clones: Content by name.

    Attributes:
        opened: The disks in the order they were opened, with their names.
        failures: What opening raises, by name.
        prepare: What is done to each new disk.
    """

    def __init__(self, images: dict[str, bytes] | None = None, clones: dict[str, bytes] | None = None) -> None:
        self._contents = {**(images or {}), **(clones or {})}
        kinds = {**dict.fromkeys(images or {}, "image"), **dict.fromkeys(clones or {}, "clone")}
        self.described = {
            name: Described(number, name, kinds[name], len(content))
            for number, (name, content) in enumerate(self._contents.items(), 1)
        }
        self.opened: list[tuple[str, MemoryDisk]] = []
        self.failures: dict[str, BaseException] = {}
        self.prepare: Callable[[MemoryDisk], object] = lambda disk: None

    def devices(self) -> list[Described]:
        return list(self.described.values())

    def info(self, name: str) -> Described:
        if name in self.described:
            return self.described[name]
        raise NotFoundError("device", name)

    def device(self, name: str) -> MemoryDisk:
        if name in self.failures:
            raise self.failures[name]
        disk = MemoryDisk(self._contents[name], self.described[name].number)
        self.prepare(disk)
        self.opened.append((name, disk))
        return disk

    @property
    def open_names(self) -> list[str]:
        """Of the devices that are open now."""
        return [name for name, disk in self.opened if disk.open_now]


@dataclass
class MemoryChannel(Channel):
    """Keeps what is sent, and who sent it.

    Attributes:
        own: What the connection's own thread has sent.
        late: What others have sent, a message each.
        everything: All of it in order.
        turn: Held while bytes are added.
        watch: Told of each step: ``start``, ``finish``, ``post``.
        at_once: How many bytes go out without waiting, at each start().
        broken: What sending raises.
        dropped: How often it was dropped.
        is_dropped: Whether it was.
        coming: What is received, in pieces.
    """

    own: bytearray = field(default_factory=bytearray)
    late: list[bytes] = field(default_factory=list)
    everything: bytearray = field(default_factory=bytearray)
    turn: threading.Lock = field(default_factory=threading.Lock)
    watch: Callable[[str], object] = lambda step: None
    at_once: int = 1 << 62
    broken: OSError | None = None
    dropped: int = 0
    is_dropped: bool = False
    coming: Iterator[bytes] = field(default_factory=lambda: iter(()))
    _piece: bytes = b""

    def receive_into(self, space: memoryview) -> int:
        assert len(space) > 0
        self._piece = self._piece or next(self.coming, b"")
        count = min(len(space), len(self._piece))
        space[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    def _check(self, step: str) -> None:
        self.watch(step)
        if self.broken is not None:
            raise self.broken

    def _put(self, data: bytes | bytearray) -> None:
        with self.turn:
            self.everything += data

    def start(self, parts: Sequence[bytes | bytearray | memoryview]) -> Sequence[bytes | bytearray | memoryview]:
        self._check("start")
        left, rest, gone = self.at_once, list[memoryview](), bytearray()
        for one in parts:
            part = memoryview(one)
            gone += part[:left]
            rest += [part[left:]] if left < len(part) else []
            left = max(left - len(part), 0)
        self.own += gone
        self._put(gone)
        return rest

    def finish(self, rest: Sequence[bytes | bytearray | memoryview]) -> None:
        self._check("finish")
        self.own += b"".join(rest)
        self._put(b"".join(rest))

    def send(self, data: bytes | bytearray | memoryview) -> None:
        raise AssertionError("only the handshake waits for its turn")

    def post(self, data: bytes | bytearray | memoryview, sent: Callable[[], object] = lambda: None) -> None:
        self.watch("post")
        if self.broken is not None:
            self.drop()
        else:
            self.late.append(bytes(data))
            self._put(bytes(data))
        sent()

    def drop(self) -> None:
        self.dropped += 1
        self.is_dropped = True
