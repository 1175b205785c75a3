"""What the benchmarks stand on: a folder on a real disk, the peers' programs, and data to store."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

from tests.bench.measure import clock

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
BLOCK = 4096
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_IN_MEMORY = {"tmpfs", "ramfs"}
_HERE = Path(".bench")


def find_program(name: str) -> str | None:
    """The path of a program, also of one that only root has on the path."""
    return shutil.which(name, path=SYSTEM_PATH)


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words = line.split()
            if words[2] == wanted:
                return words[words.index("-") + 1]
    return "unknown"


def make_folder() -> Path:
    """A folder for data: in TMPDIR where that is set, else .bench. Not in memory, where a sync costs nothing."""
    if "TMPDIR" in os.environ:
        folder = Path(os.environ["TMPDIR"]) / f"cowstore-bench-{os.getpid()}"
    else:
        folder = _HERE / str(os.getpid())
        for left in _HERE.glob("[0-9]*"):  # by runs that were killed
            if not Path("/proc", left.name).exists():
                shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True)
    kind = file_system(folder)
    if kind in _IN_MEMORY:
        folder.rmdir()
        raise SystemExit(f"bench: {folder} is {kind}, in memory; set TMPDIR to a folder on a disk")
    free = shutil.disk_usage(folder).free
    if free < 14 * GIB:
        raise SystemExit(f"bench: {folder} has {free / GIB:.0f} of 14 GiB free; TMPDIR names another place")
    return folder.resolve()


def remove_folder(folder: Path) -> None:
    """Removes it with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        _HERE.rmdir()


def command() -> list[str]:
    """The `cowstore` command of this environment."""
    script = Path(sys.executable).with_name("cowstore")
    return [str(script)] if script.exists() else [sys.executable, "-m", "cowstore_cli"]


def run(words: list[str], env: Mapping[str, str] | None = None) -> float:
    """Runs a program; returns the seconds it took, and ends with what it said where it fails."""
    with clock() as watch:
        done = subprocess.run(words, capture_output=True, check=False, env={**os.environ, **(env or {})})
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace")
        raise SystemExit(f"bench: {' '.join(words)} failed: {said}")
    return watch.seconds


def settle() -> None:
    """Lets the disk finish what others have left to it."""
    os.sync()


def fresh(path: Path) -> Path:
    """The path, with nothing there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def warm(path: Path) -> None:
    """Reads a file into the page cache."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(4 * MIB)
        while file.readinto(buffer):
            pass


def disk_bytes(folder: Path) -> int:
    """Bytes that everything in a folder takes on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in [folder, *folder.rglob("*")])


class Noise(io.RawIOBase):
    """A stream of blocks of which no two are equal, made as fast as memory is copied.

    One random piece, in which every block gets a number of its own before it is handed out.
    """

    def __init__(self, length: int, seed: int) -> None:
        super().__init__()
        import numpy as np

        shape = min(length, 16 * MIB) // BLOCK, BLOCK // 8
        self._words = np.random.default_rng(seed).integers(0, 1 << 63, shape, np.uint64)
        self._view = memoryview(self._words.data).cast("B")
        self._seed = seed
        self._length = length
        self._done = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        at = self._done % len(self._view)
        if not at:
            self._renew()
        size = min(size if size >= 0 else self._length, self._length - self._done, len(self._view) - at)
        self._done += size
        return bytes(self._view[at : at + size])

    def _renew(self) -> None:
        import numpy as np

        first = self._done // BLOCK
        self._words[:, 7] = np.arange(first, first + len(self._words), dtype=np.uint64)
        self._words[:, 8] = self._seed


def noise(length: int, seed: int) -> BinaryIO:
    """Such a stream."""
    return cast("BinaryIO", Noise(length, seed))


def noise_file(path: Path, length: int, seed: int) -> None:
    """Writes noise to a file."""
    stream = Noise(length, seed)
    with open(path, "wb", buffering=0) as file:
        while piece := stream.read(4 * MIB):
            file.write(piece)
