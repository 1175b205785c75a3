"""Transmissions played without a socket."""

from __future__ import annotations

import time
from collections.abc import Callable

from cowstore.nbd import Limits, Metrics
from cowstore.nbd import Request as Incoming
from cowstore.nbd.exports import Export as Exported
from cowstore.nbd.handshake import Chosen
from cowstore.nbd.transmission import Transmission
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_memory import BLOCK, MemoryChannel, MemoryDisk


def until(condition: Callable[[], object], patience: float = 60.0) -> None:
    """Waits until something is so."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it never came to pass"
        time.sleep(0.001)


class Line:
    """One connection in its transmission, without a socket. Close it.

    Args:
        disk: What it is about; by default four blocks: data, a hole, data, a hole.
        export: An export that several lines share, in place of the disk.
        structured: Whether structured replies were agreed on.
        contexts: The numbers of the selected metadata contexts.
        writable: Whether it is a clone.
        limits: The server's.
    """

    def __init__(
        self, disk: MemoryDisk | None = None, *, export: Exported | None = None, structured: bool = True,
        contexts: tuple[int, ...] = (), writable: bool = True, limits: Limits | None = None,
    ) -> None:  # fmt: skip
        content = b"A" * BLOCK + bytes(BLOCK) + b"B" * BLOCK + bytes(BLOCK)
        self.export = export or Exported(1, disk or MemoryDisk(content), writable=writable)
        self.disk: MemoryDisk = self.export.disk
        self.channel = MemoryChannel()
        self.metrics = Metrics()
        self.transmission = Transmission(
            Chosen(self.export, structured, contexts), self.channel, limits or Limits(), self.metrics
        )
        self._replies = nbd.Replies(structured=structured, contexts=contexts)
        self._read = 0
        self._ended = False
        self.stays = True

    def send(self, *requests: nbd.Request) -> None:
        """Has requests done that came in one piece, and does not wait for what is answered later."""
        for request in requests:
            self._replies.expect(request)
        self.stays = self.transmission.handle(
            [
                Incoming(one.flags, one.kind, one.cookie, one.offset, one.length, memoryview(one.data))
                for one in requests
            ]
        )

    def answers(self) -> list[nbd.Answer]:
        """What was answered since somebody looked, all of it whole."""
        with self.channel.turn:
            data = bytes(self.channel.everything[self._read :])
            self._read += len(data)
        found, take = [], nbd.taking(data)
        left = len(data)

        def counted(count: int) -> bytes:
            nonlocal left
            left -= count
            return take(count)

        while left:
            found.append(self._replies.read(counted))
        return found

    def ask(self, *requests: nbd.Request) -> list[nbd.Answer]:
        """Sends requests and waits for all answers, in the order in which they came."""
        self.send(*requests)
        found = self.answers()
        while self._replies.missing:
            until(lambda: len(self.channel.everything) > self._read)
            found += self.answers()
        return found

    def error(self, request: nbd.Request) -> int:
        """What one request is answered, 0 for success."""
        (answer,) = self.ask(request)
        return answer.error

    @property
    def missing(self) -> list[nbd.Request]:
        """What has not been answered."""
        return self._replies.missing

    def end(self) -> None:
        """Waits for the last answers."""
        if not self._ended:
            self._ended = True
            self.transmission.end()

    def close(self) -> None:
        """Waits for the last answers, and closes the disk."""
        self.end()
        self.export.close()
