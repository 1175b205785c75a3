"""Many requests under way on one connection: the tests' NBD client among the tasks of an event loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

from tests.unit import nbd_messages as nbd
from tests.unit.nbd_client import Client
from tests.unit.nbd_messages import Answer


class Connection:
    """One connection to an export. Any number of tasks may ask.

    ConnectionError tells them that the server is gone. What was not answered by then may have been done, or not.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._end: Exception | None = None
        self._receiver = threading.Thread(target=self._receive)
        self._receiver.start()

    @classmethod
    async def open(cls, place: Path, name: str, *, structured: bool) -> Connection:
        """A new connection, with structured replies or simple ones."""
        return cls(await asyncio.to_thread(_client, place, name, structured=structured))

    async def read(self, offset: int, length: int) -> bytes:
        return (await self._ask(nbd.READ, offset, length)).data

    async def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        await self._ask(nbd.WRITE, offset, len(data), flags, data)

    async def zero(self, offset: int, length: int, flags: int = 0) -> None:
        await self._ask(nbd.WRITE_ZEROES, offset, length, flags)

    async def trim(self, offset: int, length: int, flags: int = 0) -> None:
        await self._ask(nbd.TRIM, offset, length, flags)

    async def flush(self) -> None:
        await self._ask(nbd.FLUSH)

    async def _ask(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> Answer:
        if self._end is not None:
            raise self._end
        request = self._client.pending(kind, offset, length, flags=flags, data=data)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting[request.cookie] = future
        try:
            self._client.sock.sendall(request.encode())  # does not wait for long: answers are always taken
        except ConnectionError:
            del self._waiting[request.cookie]
            raise
        answer = await future
        assert not answer.error, answer
        return answer

    def _receive(self) -> None:
        """Hands on every answer; in a thread, until the server is gone."""
        try:
            while True:
                self._loop.call_soon_threadsafe(self._hand_over, self._client.receive())
        except Exception as error:  # noqa: BLE001 - whoever waits is told, whatever it is
            self._loop.call_soon_threadsafe(self._finish, error)

    def _hand_over(self, answer: Answer) -> None:
        self._waiting.pop(answer.request.cookie).set_result(answer)

    def _finish(self, error: Exception) -> None:
        self._end = error
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    async def leave(self) -> None:
        """Says goodbye, when everything was answered, and sees the server leave."""
        assert not self._waiting
        self._client.sock.sendall(nbd.Request(nbd.DISC).encode())
        await asyncio.to_thread(self._receiver.join)
        assert isinstance(self._end, ConnectionError), self._end

    def close(self) -> None:
        """Leaves without a word."""
        try:
            self._client.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the server was faster
        self._receiver.join()
        self._client.close()


def _client(place: Path, name: str, *, structured: bool) -> Client:
    client = Client(place)
    try:
        if structured:
            client.structured_replies()
        client.go(name)
    except BaseException:
        client.close()
        raise
    return client
