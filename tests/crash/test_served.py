"""The server killed while clients write: whatever it had answered is there when it is started again.

A killed process takes nothing of the page cache with it, so these tests prove less than a power cut would: that
nothing is promised before it has left the process, that what the next process finds is whole, and that nothing
needs to be repaired by hand. Whether it is on the disk by then is what test_crash.py is about.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import cowstore
from cowstore.clones import Clone
from cowstore_cli.main import cli
from tests.interop import server as serving
from tests.interop.server import Server

from . import planted
from .checking import audit
from .connection import Connection
from .hands import Promises, ServedClone, client
from .hunting import SECONDS
from .integrity import BLOCK, IntegrityError, Ledger, Loss

BLOCKS = 768
ROUNDS = 12
EXPORTED_EVERY = 4  # rounds
SHIFTS = {"x": 0, "y": 512}  # bytes before the first labelled block
CONNECTIONS = {"x": 3, "y": 1}
MOMENTS = ("flush", "fua", "")  # a promise that was made too early is not yet kept right afterwards
TAIL = 1000  # bytes behind the last of them
DEPTH = 8

pytestmark = [pytest.mark.timeout(900 + SECONDS), pytest.mark.program("setpriv")]


class Arena:
    """A store whose clones are served, killed and looked at."""

    def __init__(self, place: Path, dice: random.Random, fault: str = "") -> None:
        self.dice = dice
        self._keeps_answered = fault in ("", planted.nothing_is_recorded.__name__)
        self.store, self._place = place / "store", place
        self.promises = Promises()
        cowstore.open(self.store, create=True).close()
        self.clones = [self._clone(number, name) for number, name in enumerate(SHIFTS, 1)]
        self.server = Server(self.store, place / "nbd.sock", place, fault)
        self.rounds, self.loss = 0, Loss()

    def _clone(self, number: int, name: str) -> ServedClone:
        """A clone of an image that has some labelled blocks, and bytes before and behind."""
        data = [self.dice.random() < 0.5 for _ in range(BLOCKS)]
        ledger = Ledger(number, data, keeps_answered=self._keeps_answered)
        image = b"B" * SHIFTS[name] + ledger.start() + b"E" * TAIL
        (self._place / "image").write_bytes(image)
        self.run("import", str(self._place / "image"), f"image-{name}")
        self.run("clone", f"image-{name}", name)
        return ServedClone(name, ledger, SHIFTS[name], CONNECTIONS[name], DEPTH, self.promises)

    def run(self, *words: str) -> None:
        """Runs the command on the store."""
        result = CliRunner().invoke(cli, ["--store", str(self.store), *words])
        assert result.exit_code == 0, result.output

    def run_rounds(self, seconds: float = 0) -> None:
        """A dozen rounds, or more if that leaves time."""
        end = time.monotonic() + seconds
        while self.rounds < ROUNDS or time.monotonic() < end:
            self._round()

    def _round(self) -> None:
        """Clients work, the server is killed, and what it leaves is checked."""
        asyncio.run(self._work())
        self._check_free()
        exported = self._exported() if self.rounds % EXPORTED_EVERY == 0 else None
        self.server.restart()
        contents = asyncio.run(self._read())
        if exported not in (None, contents):
            raise IntegrityError("clients do not see what was exported")
        for clone, content in zip(self.clones, contents, strict=True):
            end = clone.shift + BLOCKS * BLOCK
            assert (content[: clone.shift], content[end:]) == (b"B" * clone.shift, b"E" * TAIL)
            self.loss += clone.ledger.settle(content[clone.shift : end])
        self.rounds += 1

    async def _work(self) -> None:
        """Clients work until the server is killed, at any moment or right after it has promised something."""
        clients = [
            asyncio.create_task(client(clone, self.server.socket, random.Random(self.dice.random())))
            for clone in self.clones
            for _ in range(clone.connections)
        ]
        early: list[asyncio.Task[None]] | None = None

        def kill() -> None:
            nonlocal early
            early = [client for client in clients if client.done()]
            self.server.kill()

        collecting = asyncio.create_task(asyncio.to_thread(self._collect))
        await asyncio.sleep(self.dice.uniform(0.1, 1.1))
        moment = MOMENTS[self.rounds % len(MOMENTS)]
        if moment:
            self.promises.after_next(moment, kill)
        else:
            kill()
        await asyncio.wait(clients)
        if early is None:
            kill()
        await asyncio.gather(collecting, *clients)
        assert not early, "the server dropped a client"

    def _collect(self) -> None:
        """What dead servers have left, while one is at work."""
        with cowstore.open(self.store) as store:
            store.collect()

    def _check_free(self) -> None:
        """Nobody holds the clones that the killed server had."""
        with cowstore.open(self.store) as store:
            for clone in self.clones:
                device = store.device(clone.name)
                assert isinstance(device, Clone)
                device.discard()

    def _exported(self) -> list[bytes]:
        out = self._place / "exported"
        contents = []
        for clone in self.clones:
            self.run("export", "--force", clone.name, str(out))
            contents.append(out.read_bytes())
        return contents

    async def _read(self) -> list[bytes]:
        """What clients see of each clone."""
        contents = []
        size = BLOCKS * BLOCK + TAIL
        for clone in self.clones:
            connection = await Connection.open(self.server.socket, clone.name, structured=True)
            try:
                contents.append(await connection.read(0, clone.shift + size))
                await connection.leave()
            finally:
                connection.close()
        return contents


def test_killed_while_clients_write(arena):
    """The clones are free, and hold what was promised; every few rounds the export says so, too."""
    place = Arena(arena, random.Random(7))
    with place.server as server:
        place.run_rounds(SECONDS)
        server.stop()
    assert place.server._errors.read_text() == ""
    with cowstore.open(place.store) as store:
        audit(store)
        store.collect()
        audit(store, collected=True)
    print(f"{place.rounds} rounds, {place.loss}, promised {dict(place.promises.count)}")
    assert place.promises.count["flush"] > ROUNDS
    assert place.promises.count["fua"] > ROUNDS
    assert place.loss != Loss(), "it was killed while it was at work"


@pytest.mark.parametrize("fault", [*planted.FAULTS, planted.nothing_is_recorded], ids=lambda fault: fault.__name__)
def test_planted_fault_is_found(arena, monkeypatch, fault):
    monkeypatch.setattr(serving, "FAULTY", Path(planted.__file__))
    place = Arena(arena, random.Random(5), fault.__name__)
    with place.server, pytest.raises(IntegrityError) as caught:
        place.run_rounds()
    print(f"in round {place.rounds}: {caught.value}")
