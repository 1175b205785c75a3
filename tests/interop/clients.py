"""Programs of other people's that are NBD clients, each run to its clean end, and what they say read back.

What a test expects they are told in the same terms: a *layout* is a list of runs, each a length in bytes and a
mark, neighbours of the same mark joined.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .process import TIMEOUT

BLOCK = 4096
HOLE, DATA = 3, 0  # of base:allocation
OWN, INHERITED = 1, 0  # of cowstore:own
Layout = list[tuple[int, int]]
Content = bytes | bytearray


def ended(*words: str | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
    """Runs a program; returns its exit status, its output and its complaints."""
    done = subprocess.run(words, input=stdin, capture_output=True, timeout=TIMEOUT, check=False)
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


def said(*words: str | Path, stdin: bytes = b"") -> bytes:
    """What a program says that ends well and complains of nothing."""
    status, output, errors = ended(*words, stdin=stdin)
    assert (status, errors) == (0, ""), (words, status, errors, output[-2000:])
    return output


@dataclass(frozen=True)
class Export:
    """One export of a server, as clients see it."""

    socket: Path
    name: str

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.name}?socket={self.socket}"

    def info(self) -> dict[str, Any]:
        """What nbdinfo finds out."""
        (export,) = json.loads(said("nbdinfo", "--json", self.uri))["exports"]
        return export

    def layout(self, context: str = "base:allocation") -> Layout:
        """What nbdinfo finds to be where."""
        found = json.loads(said("nbdinfo", f"--map={context}", "--json", self.uri))
        end = 0
        for run in found:
            assert run["offset"] == end, found
            end += run["length"]
        return joined((run["length"], run["type"]) for run in found)

    def content(self) -> bytes:
        """All of its bytes."""
        return said("nbdcopy", self.uri, "-")

    def qemu_io(self, *commands: str) -> str:
        """What qemu-io says to commands; it tells of a pattern that is not there by its exit status."""
        words = [word for command in commands for word in ("-c", command)]
        return said("qemu-io", "-f", "raw", *words, self.uri).decode()


def server_list(socket: Path) -> dict[str, int]:
    """The names and sizes of a server's exports."""
    listed = json.loads(said("nbdinfo", "--list", "--json", f"nbd+unix://?socket={socket}"))
    return {one["export-name"]: one["export-size"] for one in listed["exports"]}


def fio(folder: Path, export: Export, *jobs: Sequence[str]) -> list[dict[str, Any]]:
    """Runs fio's jobs, each a name and options, on one export; returns a clean report of every process."""
    status, complaints, reports = tried_fio(folder, export, *jobs)
    assert (status, complaints) == (0, []), (jobs, status, complaints)
    assert {report["error"] for report in reports} == {0}
    return reports


def tried_fio(folder: Path, export: Export, *jobs: Sequence[str]) -> tuple[int, list[str], list[dict[str, Any]]]:
    """The same, whatever comes of it: the exit status, the complaints, and the reports."""
    output = folder / "fio.json"
    words = [f"--output={output}", "--output-format=json", "--bs=4k", "--iodepth=32", "--randrepeat=1"]
    words += ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]
    for name, *options in jobs:
        words += [f"--name={name}", "--ioengine=nbd", f"--uri={export.uri}", *options]
    status, noise, errors = ended("fio", *words)
    complaints = [line for line in errors.splitlines() if line != "fio: connected to NBD server"]
    text = output.read_text()
    start = text.find("{")
    complaints += text[:start].splitlines() + noise.decode().splitlines()
    return status, complaints, json.loads(text[start:])["jobs"]


# What is expected.


def difference(found: Content, expected: Content) -> str:
    """Where bytes are not as expected; empty where they are. Pytest would take minutes to tell about so many."""
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    starts = [at for at in range(0, len(found), BLOCK) if found[at : at + BLOCK] != expected[at : at + BLOCK]]
    return f"{len(starts)} blocks differ, the first at {starts[0]}" if starts else ""


def layout_of(content: Content, mark: Callable[[int, Content], int]) -> Layout:
    """The layout of a disk whose blocks are marked by what is at an offset."""
    blocks = ((at, content[at : at + BLOCK]) for at in range(0, len(content), BLOCK))
    return joined((len(block), mark(at, block)) for at, block in blocks)


def allocation(content: Content) -> Layout:
    """The base:allocation of a disk that is as sparse as it can be."""
    return layout_of(content, lambda _, block: DATA if any(block) else HOLE)


def ownership(content: Content, parent: Content) -> Layout:
    """The cowstore:own of a clone."""
    return layout_of(content, lambda at, block: INHERITED if parent[at : at + BLOCK] == block else OWN)


def joined(runs: Iterable[tuple[int, int]]) -> Layout:
    """Neighbours of the same mark as one."""
    groups = itertools.groupby(runs, key=lambda run: run[1])
    return [(sum(length for length, _ in group), mark) for mark, group in groups]
