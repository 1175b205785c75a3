"""Serving a clone over NBD: against qemu-nbd with a qcow2 clone of the same image, and nbdkit with a raw file.

All three are asked by the same client, fio with libnbd, over a Unix socket, in turn and again and again. Writes
are of random bytes, of which no two blocks are alike, and end with a flush that is part of the time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cowstore
from tests.bench import ground
from tests.bench.ground import GIB, MIB, find_program
from tests.bench.measure import Action, Bench, Sample, in_turn, timed

PROGRAMS = ("fio", "qemu-nbd", "qemu-img", "nbdkit")
PATIENCE = 60.0  # seconds until a server must be there


@dataclass(frozen=True)
class Load:
    """What the client does.

    Attributes:
        figure: In words.
        pattern: In fio's words.
        block: Bytes of a request.
        depth: Requests in flight.
        count: Requests in all.
        targets: How many times as fast as each peer it is to be.
    """

    figure: str
    pattern: str
    block: int
    depth: int
    count: int
    targets: dict[str, float]


LOADS = (
    Load("4 KiB random read, 32 in flight", "randread", 4096, 32, 100_000, {"qemu-nbd": 3, "nbdkit file": 1}),
    Load("4 KiB random read, one at a time", "randread", 4096, 1, 15_000, {"qemu-nbd": 1.5}),
    Load("1 MiB read in sequence, 4 in flight", "read", MIB, 4, 2_000, {"qemu-nbd": 1.5}),
    Load("4 KiB random write, 32 in flight, and a flush", "randwrite", 4096, 32, 60_000, {"qemu-nbd": 1.5}),
)


def run(bench: Bench) -> None:
    missing = [name for name in PROGRAMS if find_program(name) is None]
    if missing:
        bench.missing("serving over NBD", missing[0])
    else:
        compare(bench)
    reflink(bench)


def compare(bench: Bench) -> None:
    length = bench.pick(512, 32) * MIB
    raw = bench.folder / "disk.raw"
    ground.noise_file(raw, length, 1)
    with ExitStack() as stack:
        sockets = {
            "cowstore": stack.enter_context(ours(bench.folder, raw)),
            "qemu-nbd": stack.enter_context(qemu_nbd(bench.folder, raw)),
            "nbdkit file": stack.enter_context(nbdkit(bench.folder, raw)),
        }
        for load in LOADS:
            actions: dict[str, Action] = {
                name: partial(ask, load, uri, length, bench.pick(1, 50)) for name, uri in sockets.items()
            }
            ground.settle()
            tell(bench, load, in_turn(bench.pick(5, 1), actions, warm=bench.pick(1, 0)))


def tell(bench: Bench, load: Load, found: dict[str, Sample]) -> None:
    """Seconds a request, ours against each peer's."""
    samples = {name: sample.scaled(1 / load.count) for name, sample in found.items()}
    rate = f"{1 / samples['cowstore'].median:,.0f} requests/s"
    for peer in ("qemu-nbd", "nbdkit file"):
        if peer in load.targets:
            bench.faster(load.figure, samples["cowstore"], peer, samples[peer], load.targets[peer], rate)
        else:
            bench.at_most(load.figure, samples["cowstore"], peer, samples[peer], None)


def ask(load: Load, uri: str, length: int, divisor: int) -> float:
    """Seconds that the client takes for the load, the last flush of writes included."""
    words = [
        "fio", "--name=load", "--ioengine=nbd", f"--uri={uri}", f"--rw={load.pattern}", f"--bs={load.block}",
        f"--iodepth={load.depth}", f"--size={length}", f"--number_ios={load.count // divisor}", "--time_based=0",
        f"--io_size={load.count // divisor * load.block}", "--norandommap", "--refill_buffers", "--end_fsync=1",
        "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {' '.join(words)} failed: {done.stdout}{done.stderr}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    kind = "write" if "write" in load.pattern else "read"
    assert job[kind]["total_ios"] == load.count // divisor, "the client has done all that it was asked to do"
    return float(job["job_runtime"]) / 1000 * divisor


@contextmanager
def ours(folder: Path, raw: Path) -> Iterator[str]:
    path, socket = folder / "store", folder / "ours.sock"
    with cowstore.open(path, create=True) as store:
        store.import_image(raw, "image")
        store.clone_many("image", ["clone"])
    with running([*ground.command(), "-s", str(path), "serve", "--socket", str(socket)], socket):
        yield f"nbd+unix:///clone?socket={socket}"


@contextmanager
def qemu_nbd(folder: Path, raw: Path) -> Iterator[str]:
    """A qcow2 overlay on a qcow2 image."""
    image, clone, socket = folder / "image.qcow2", folder / "clone.qcow2", folder / "qemu.sock"
    ground.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)])
    ground.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image), "-F", "qcow2", str(clone)])
    with running(["qemu-nbd", "-t", "-e", "8", "-k", str(socket), "-f", "qcow2", str(clone)], socket):
        yield f"nbd+unix:///?socket={socket}"


@contextmanager
def nbdkit(folder: Path, raw: Path) -> Iterator[str]:
    """The plain file, of which a copy is written to."""
    copy, socket = folder / "copy.raw", folder / "nbdkit.sock"
    ground.run(["cp", str(raw), str(copy)])
    with running(["nbdkit", "-f", "-U", str(socket), "file", str(copy)], socket):
        yield f"nbd+unix:///?socket={socket}"


@contextmanager
def running(words: Sequence[str], socket: Path) -> Iterator[None]:
    """A server, until the block ends."""
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    try:
        end = time.monotonic() + PATIENCE
        while not socket.exists():
            if child.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"bench: {' '.join(words)} does not serve")
            time.sleep(0.05)
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(PATIENCE)


def reflink(bench: Bench) -> None:
    """Exporting a large sparse image on a file system that can share extents."""
    figure = "export of 10 GiB, sparse, with --reflink on XFS"
    if os.geteuid() != 0 or find_program("mkfs.xfs") is None:
        bench.missing(figure, "mkfs.xfs and root")
        return
    with mounted(bench.folder) as place:
        disk = bench.folder / "sparse.raw"
        held = bench.pick(1024, 16) * MIB
        ground.noise_file(disk, held, 2)
        os.truncate(disk, 10 * GIB)
        with cowstore.open(place / "store", create=True) as store:
            store.import_image(disk, "image")
        disk.unlink()
        turns = iter(range(1_000))

        def export(verify: bool) -> float:
            out = place / f"out-{next(turns)}.raw"
            with cowstore.open(place / "store") as store:  # anew: it reads nothing twice
                seconds = timed(lambda: store.export("image", out, reflink="always", verify=verify))
            out.unlink()
            return seconds

        actions: dict[str, Action] = {"verified": lambda: export(True), "unread": lambda: export(False)}
        found = in_turn(bench.pick(5, 1), actions, warm=1)
        bench.within(figure, found["verified"], 1.0, note=f"{held // MIB} MiB of data in it")
        bench.within("the same, with --no-verify", found["unread"], 1.0)


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A new XFS on a loop device."""
    image, place = folder / "xfs.img", folder / "xfs"
    with image.open("wb") as file:
        file.truncate(8 * GIB)
    place.mkdir()
    ground.run(["mkfs.xfs", "-q", str(image)])
    ground.run(["mount", "-o", "loop", str(image), str(place)])
    try:
        yield place
    finally:
        ground.run(["umount", str(place)])
        image.unlink()
