"""The demonstration's disk: an ext4 file system made of real files of this machine; no root, no mounting.

Everything goes through the programs of e2fsprogs, so what is on a disk is said by somebody else than cowstore.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import click

BLOCK = 4096
LOG = "/demo/log"
"""A file whose blocks the demonstration overwrites in place, as a program in a machine would."""
LOG_BLOCKS = 4096

_SOURCES = ("/usr/share", "/usr/lib", "/usr/bin", "/usr/include", "/usr/local", "/usr/sbin", sys.prefix)
_LARGEST = 8 << 20  # bytes; one huge file is not a file system
_ADMIN = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_PROGRAMS = ("mke2fs", "e2fsck", "debugfs")


def check_programs() -> None:
    """Ends with advice where a program is missing."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_ADMIN) is None]
    if missing:
        raise click.ClickException(
            f"the demonstration needs {', '.join(missing)}; install e2fsprogs: sudo apt-get install e2fsprogs"
        )


def _run(name: str, *words: str, allowed: Sequence[int] = (0,)) -> str:
    program = shutil.which(name, path=_ADMIN) or name
    done = subprocess.run([program, *words], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    said = (done.stdout + done.stderr).decode(errors="replace")
    if done.returncode not in allowed:
        raise click.ClickException(f"{name} failed with {done.returncode}: {said.strip()}")
    return said


def gather(folder: Path, limit: int) -> tuple[int, int]:
    """Copies real files of this machine into a folder, from several places in turn, up to a limit in bytes.

    Returns:
        How many files they are, and their bytes. Fewer than the limit where the machine has no more.
    """
    count = total = 0
    for row in zip_longest(*map(_files, dict.fromkeys(map(os.path.realpath, _SOURCES)))):
        for path in filter(None, row):
            if total >= limit:
                return count, total
            try:
                total += _copy(path, folder)
                count += 1
            except OSError:  # not ours to read, or gone meanwhile
                continue
    return count, total


def _copy(path: str, folder: Path) -> int:
    target = folder / path.lstrip("/")
    if target.exists():  # one of the places lies within another
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    return target.stat().st_size


def _files(top: str) -> Iterator[str]:
    """Regular files below a folder, in a fixed order."""
    for parent, folders, files in os.walk(top):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(parent, name)
            try:
                found = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode) and 0 < found.st_size <= _LARGEST:
                yield path


def plain_names(folder: Path, count: int) -> list[str]:
    """Some files in a folder, as paths from its top, whose names no program misunderstands."""
    names = sorted(f"/{path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file())
    plain = [name for name in names if re.fullmatch(r"[A-Za-z0-9._/-]+", name) and name != LOG]
    if len(plain) < count:
        raise click.ClickException("this machine has too few files for the demonstration")
    return plain[len(plain) // 3 :][:count]


def make(image: Path, folder: Path, size: int, files: int) -> None:
    """Makes an ext4 image of so many bytes, sparse, that holds what is in a folder."""
    words = ["-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-N", str(files * 2 + 1024), "-m", "0", "-d", str(folder)]
    _run("mke2fs", *words, str(image), str(size // BLOCK))


def copy_sparse(source: Path, target: Path) -> None:
    """Copies a file; its holes stay holes."""
    with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        for start, end in data_ranges(old.fileno(), size):
            while start < end:
                start += os.copy_file_range(old.fileno(), new.fileno(), end - start, start, start)


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of everything in a file that is not a hole."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def add_log(folder: Path) -> None:
    """Adds the log, full of unused records, to a folder that becomes an image."""
    path = folder / LOG.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(unused() * LOG_BLOCKS)


def unused() -> bytes:
    """A record of the log that is still to be written; not zeros, so that it is no hole."""
    return b"unused\n".ljust(BLOCK, b".")


def record(number: int) -> bytes:
    """A record of the log."""
    return (b"record %06d\n" % number).ljust(BLOCK, b".")


def log_places(image: Path) -> list[int]:
    """The byte offsets of the log's records in an image, in their order."""
    listed = _run("debugfs", "-R", f"blocks {LOG}", str(image)).split()
    with open(image, "rb") as disk:
        places = [int(word) * BLOCK for word in listed if word.isdigit()]
        found = [at for at in places if os.pread(disk.fileno(), BLOCK, at) == unused()]
    if len(found) != LOG_BLOCKS:
        raise click.ClickException(f"debugfs shows {len(found)} of the log's {LOG_BLOCKS} blocks")
    return found


def edit(image: Path, commands: Sequence[str], script: Path) -> None:
    """Changes files in an image with debugfs."""
    script.write_text("".join(f"{command}\n" for command in commands))
    said = _run("debugfs", "-w", "-f", str(script), str(image))
    faults = [line for line in said.splitlines() if ": " in line and not line.startswith(("debugfs", "Allocated"))]
    if faults:
        raise click.ClickException(f"debugfs: {faults[0]}")


def cat(image: Path, path: str) -> bytes:
    """What a file in an image holds, as debugfs reads it."""
    program = shutil.which("debugfs", path=_ADMIN) or "debugfs"
    return subprocess.run([program, "-R", f"cat {path}", str(image)], capture_output=True, check=True).stdout


def fault(image: Path) -> str:
    """What e2fsck finds wrong with an image, which it must not change; empty where it is clean."""
    program = shutil.which("e2fsck", path=_ADMIN) or "e2fsck"
    done = subprocess.run([program, "-fn", str(image)], capture_output=True, check=False)
    return "" if done.returncode == 0 else done.stdout.decode(errors="replace").strip()
