"""Real guests on clones that are served over NBD: what they have synced is there, whoever dies."""

from __future__ import annotations

import filecmp
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result

from .filesystem import FileSystem
from .guest import TROUBLE, Guest, GuestError, Parts
from .rootdisk import written
from .server import Server

pytestmark = pytest.mark.program("qemu-system-x86_64", "mke2fs", "e2fsck", "debugfs", "setpriv")


class Desk:
    """A store with the image `debian` and its clone `desk`, and a folder for what comes of it."""

    def __init__(self, folder: Path, parts: Parts, socket: Path, run: Callable[..., Result]) -> None:
        self.folder, self.parts, self.socket = folder, parts, socket
        self._run = run
        run("init")
        run("import", str(parts.disk), "debian")
        run("clone", "debian", "desk")

    def serve(self, fault: str = "") -> Server:
        return Server(self.folder / "s", self.socket, self.folder, fault)

    def boot(self, *, write_cache: bool = True) -> Guest:
        return Guest(self.parts, self.socket, "desk", self.folder, write_cache=write_cache)

    def fork(self, name: str) -> None:
        self._run("fork", "desk", name)

    def export(self, name: str = "desk") -> FileSystem:
        self._run("export", name, f"{name}.raw")
        return FileSystem(self.folder / f"{name}.raw")


@pytest.fixture
def desk(tmp_path: Path, guest_parts: Parts, socket_path: Path, run: Callable[..., Result]) -> Iterator[Desk]:
    """The image is in the end what was imported, to the byte."""
    desk = Desk(tmp_path, guest_parts, socket_path, run)
    yield desk
    assert filecmp.cmp(desk.export("debian").image, guest_parts.disk, shallow=False)


def synced(guest: Guest) -> list[int]:
    """The files that the writer in the guest has called synced."""
    return [int(number) for number in re.findall(r"^synced (\d+)$", guest.said(), re.MULTILINE)]


def lost(system: FileSystem, numbers: list[int]) -> list[int]:
    """Which of the writer's files are not what they should be."""
    files = system.folder("/data")
    return [number for number in numbers if files.get(str(number)) != written(number)]


def test_frozen_guest_is_exported_clean(desk):
    """Nothing needs to be replayed. A fork of the moment is as clean, and knows nothing of what came later."""
    with desk.serve() as server, desk.boot() as guest:
        guest.run("echo early >/data/early; cp /bin/busybox /data/large; sync; fsfreeze --freeze /")
        desk.fork("moment")
        guest.run("fsfreeze --unfreeze /; rm /data/early; echo late >/data/late; sync; fsfreeze --freeze /")
        assert guest.trouble() == []
        guest.kill()
        server.stop()
    desk_system, moment = desk.export(), desk.export("moment")
    desk_system.check()
    moment.check()
    large = desk.parts.busybox.read_bytes()
    assert moment.folder("/data") == {"early": b"early\n", "large": large}
    assert desk_system.folder("/data") == {"late": b"late\n", "large": large}


def test_guest_killed_while_it_writes(desk):
    """What it had synced is there once the journal has been replayed, which is all that has to be done."""
    with desk.serve() as server, desk.boot() as guest:
        guest.begin("writer")
        guest.wait_for("^synced 30")
        guest.kill()
        server.stop()
    system = desk.export()
    system.recover()
    system.check()
    assert lost(system, synced(guest)) == []


def test_server_killed_while_guest_writes(desk):
    """The guest waits for the server to come back, and does not notice otherwise."""
    dice = random.Random(7)
    with desk.serve() as server, desk.boot() as guest:
        guest.begin("writer")
        for _ in range(4):
            guest.wait_for(r"^synced \d+")
            time.sleep(dice.random())
            server.kill()
            time.sleep(dice.random())
            server.restart()
        guest.wait_for(r"(?:^synced \d+\n){10}^synced \d+")
        guest.run("touch /run/stop")
        guest.wait_for("^stopped")
        assert guest.trouble() == []
        guest.kill()
        server.kill()
    system = desk.export()
    system.recover()
    system.check()
    assert lost(system, synced(guest)) == []


@pytest.mark.parametrize("write_cache", [False, True], ids=["through", "back"])
def test_write_answered_before_the_server_was_killed(desk, write_cache):
    """The guest's flush comes to a server that has not seen the write itself, and must not vouch for it unread."""
    with desk.serve() as server, desk.boot(write_cache=write_cache) as guest:
        guest.run("sync; dd if=/bin/busybox of=/data/direct bs=64k oflag=direct")
        server.kill()
        server.restart()
        guest.run("sync /data/direct; fsfreeze --freeze /")
        guest.kill()
        server.stop()
    system = desk.export()
    system.check()
    assert system.folder("/data") == {"direct": desk.parts.busybox.read_bytes()}


def test_planted_forgetful_flush_is_found(desk):
    with desk.serve("forgetful") as server, desk.boot() as guest:
        guest.begin("writer")
        guest.wait_for("^synced 5")
        server.kill()
        guest.kill()
    system = desk.export()
    system.recover()
    system.check()
    assert lost(system, synced(guest)) == synced(guest) != []


def test_planted_failing_write_is_found(desk):
    with desk.serve("failing"), pytest.raises(GuestError, match=TROUBLE), desk.boot() as guest:
        guest.run("echo >/data/file; sync /data/file")
