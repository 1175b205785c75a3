"""Taking in a disk of real files: against other deduplicating stores, and against a plain copy.

Commands against commands: everybody starts as a process, reads the same warm file and ends durable. Borg and
restic sync what they commit; the copy is followed by a sync of its file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cowstore
from cowstore_cli import demo_disk
from tests.bench import ground
from tests.bench.ground import GIB, MIB, find_program
from tests.bench.measure import Action, Bench, Sample, in_turn, timed

FASTER, COPIES = 5.0, 2.5


def run(bench: Bench) -> None:
    if any(find_program(name) is None for name in ("mke2fs", "debugfs")):
        bench.missing("import of a disk of real files", "mke2fs")
        return
    disk = bench.folder / "disk.raw"
    files, held = real_disk(disk, bench.folder / "files", bench.pick(230, 24) * MIB, bench.pick(1024, 128) * MIB)
    contents = f"ext4 of {disk.stat().st_size / GIB:.3g} GiB with {files:,} files of {held / MIB:.0f} MiB"
    bench.say(contents)
    actions: dict[str, Action] = {
        "cp": copying(bench.folder, disk),
        "command": by_command(bench.folder, disk),
        "library": by_library(bench.folder, disk),
    }
    again = dict(actions)
    for name, peer in (("borg", borg), ("restic", restic)):
        if find_program(name):
            actions[name] = peer(bench.folder, disk)
    found = in_turn(bench.pick(3, 1), actions, warm=0)
    more = in_turn(bench.pick(4, 1), again, warm=0)  # those are quick, so they get more turns
    for name, sample in more.items():
        found[name] = Sample(found[name].values + sample.values)
    for name in ("borg", "restic"):
        bench.faster("first import, the command", found["command"], name, found.get(name), FASTER, contents)
    bench.at_most("first import, the command", found["command"], "cp + fsync", found["cp"], COPIES)
    bench.at_most("first import, the library", found["library"], "cp + fsync", found["cp"], COPIES)
    second(bench, disk)


def second(bench: Bench, disk: Path) -> None:
    """The same disk once more, under other names."""
    path = bench.folder / "store-again"
    with cowstore.open(path, create=True) as store:
        store.import_image(disk, "first")
    names = iter(f"again-{number}" for number in range(100))

    def by_library() -> float:
        ready(disk)
        with cowstore.open(path) as store:
            return timed(lambda: store.import_image(disk, next(names)))

    def by_command() -> float:
        ready(disk)
        return ground.run([*ground.command(), "-s", str(path), "import", str(disk), next(names)])

    found = in_turn(
        bench.pick(7, 1), {"cp": copying(bench.folder, disk), "command": by_command, "library": by_library}
    )
    bench.at_most("import again, the command", found["command"], "cp + fsync", found["cp"], 1.0)
    bench.at_most("import again, the library", found["library"], "cp + fsync", found["cp"], 1.0)


def real_disk(disk: Path, folder: Path, content: int, size: int) -> tuple[int, int]:
    """Makes the image; returns how many files it holds and their bytes."""
    count, total = demo_disk.gather(folder, content)
    demo_disk.make(disk, folder, size, count)
    shutil.rmtree(folder)
    return count, total


def ready(disk: Path) -> None:
    ground.settle()
    ground.warm(disk)


def copying(folder: Path, disk: Path) -> Action:
    target = folder / "copy.raw"

    def once() -> float:
        target.unlink(missing_ok=True)
        ready(disk)
        return ground.run(["sh", "-c", 'cp --sparse=always "$0" "$1" && sync "$1"', str(disk), str(target)])

    return once


def by_command(folder: Path, disk: Path) -> Action:
    def once() -> float:
        path = str(ground.fresh(folder / "store"))
        ground.run([*ground.command(), "-s", path, "init"])
        ready(disk)
        return ground.run([*ground.command(), "-s", path, "import", str(disk), "disk"])

    return once


def by_library(folder: Path, disk: Path) -> Action:
    def once() -> float:
        with cowstore.open(ground.fresh(folder / "store"), create=True) as store:
            ready(disk)
            return timed(lambda: store.import_image(disk, "disk"))

    return once


def borg(folder: Path, disk: Path) -> Action:
    env = {"BORG_BASE_DIR": str(folder / "borg-home"), "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}
    words = ["create", "--chunker-params", "fixed,4096", "--sparse", "--compression", "none"]

    def prepare(path: str) -> None:
        shutil.rmtree(folder / "borg-home", ignore_errors=True)
        ground.run(["borg", "init", "--encryption", "none", path], env)

    return other(folder, disk, prepare, lambda path: ground.run(["borg", *words, f"{path}::a", str(disk)], env))


def restic(folder: Path, disk: Path) -> Action:
    env = {"RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": str(folder / "restic-cache")}

    def prepare(path: str) -> None:
        shutil.rmtree(folder / "restic-cache", ignore_errors=True)
        ground.run(["restic", "-r", path, "init"], env)

    words = ["backup", "--compression", "off", str(disk)]
    return other(folder, disk, prepare, lambda path: ground.run(["restic", "-r", path, *words], env))


def other(folder: Path, disk: Path, prepare: Callable[[str], None], backup: Callable[[str], float]) -> Action:
    """A first backup into a new repository, whose making is not counted."""

    def once() -> float:
        path = str(ground.fresh(folder / "repository"))
        prepare(path)
        ready(disk)
        return backup(path)

    return once
