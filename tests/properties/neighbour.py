"""Another process that uses the same store. It does what it is told, one command at a time.

It keeps its store open between commands, so that everything it remembers of it grows old while others write.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

import cowstore
import cowstore.collector
from cowstore.digest import Buffer

ROOT = Path(__file__).parents[2]


def few(block: Buffer, seed: int) -> bytes:
    """A hash function of eight values: different blocks have one digest all the time."""
    return (xxhash.xxh3_64_intdigest(block, seed) & 7).to_bytes(16, "big")


HASHES: dict[str, Callable[[Buffer, int], bytes]] = {"few": few, "whole": xxhash.xxh3_128_digest}


class Neighbour:
    """The process, seen from here. It is started by the first command, and again after it has died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, command: str, *arguments: Any) -> Any:
        """Has a command done; returns its result. What cowstore raises there is raised here, as its name."""
        if self._process is None:
            program = "from tests.properties.neighbour import work; work()"
            self._process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", program],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump((command, arguments), self._process.stdin)
        self._process.stdin.flush()
        error, result = pickle.load(self._process.stdout)
        if error:
            raise RefusedError(error)
        if result is FAILED:
            raise AssertionError("the other process met what it should not have met; see stderr")
        return result

    def die(self) -> None:
        """Ends the process on the spot, with everything it has open."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


FAILED = ...


class RefusedError(Exception):
    """The name of an error that the other process met."""


class Work:
    """The commands, in the other process."""

    def __init__(self) -> None:
        self._store: cowstore.Store | None = None
        self._held: cowstore.Clone | None = None

    @property
    def store(self) -> cowstore.Store:
        assert self._store is not None
        return self._store

    def open(self, path: str, function: str) -> None:
        self._store = cowstore.open(path, _hash=HASHES[function])

    def close(self) -> None:
        self.release()
        self.store.close()

    def fork(self, name: str, child: str) -> None:
        self.store.fork(name, child)

    def seal(self, name: str, image: str) -> None:
        self.store.seal(name, image)

    def collect(self) -> int:
        return self.store.collect().waiting

    def read(self, name: str) -> tuple[int, list[tuple[int, bytes]]]:
        """Size of a device's last flushed moment, and all data of it."""
        with self.store.device(name, readonly=True) as device:
            return device.size, [
                (one.offset, device.pread(one.length, one.offset)) for one in device.extents() if one.data
            ]

    def write(self, name: str, data: bytes, offset: int) -> None:
        """Writes, and keeps the clone open."""
        clone = self.store.device(name)
        assert isinstance(clone, cowstore.Clone)
        self._held = clone
        clone.pwrite(data, offset)

    def stage(self) -> None:
        """Brings what is not flushed to the disk."""
        assert self._held is not None
        list(self._held.extents())

    def release(self, flush: bool = True) -> None:
        held, self._held = self._held, None
        if held is not None:
            (held.close if flush else held.discard)()


def work() -> None:
    """The loop of the other process."""
    cowstore.collector._PATIENCE = 0.02
    todo = Work()
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            command, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = "", getattr(todo, command)(*arguments)
        except cowstore.StoreError as error:
            reply = type(error).__name__, None
        except Exception:  # noqa: BLE001 - whatever it is, the test is told
            reply = "", FAILED
            traceback.print_exc()
        pickle.dump(reply, replies)
        replies.flush()
