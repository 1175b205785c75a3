"""`python -m cowstore_cli.demo`: the store's main job on a real file system, and the proof that it was done.

An ext4 disk is built of real files of this machine and imported; a thousand clones are made; files are changed in
a few of them; one is forked while it is being written, one is sealed. What comes out is checked by e2fsck, by
debugfs and byte by byte. Where QEMU is installed, a running machine is forked in the end. Nothing is left behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console

import cowstore
from cowstore_cli import demo_disk, demo_machine, demo_proofs, sizes
from cowstore_cli.demo_disk import BLOCK, LOG, LOG_BLOCKS
from cowstore_cli.demo_proofs import ProofError
from cowstore_cli.demo_steps import Steps

_EDITED = ("desk-1", "desk-2", "desk-3")
_FLUSH_EVERY = 32  # records


class Writer(threading.Thread):
    """A program in a machine: it appends records to its log, and goes on until somebody has had enough.

    Attributes:
        written: Records that were written.
        limit: Where to stop.
    """

    def __init__(self, clone: cowstore.Clone, places: list[int]) -> None:
        super().__init__(name="writer")
        self.written = 0
        self.limit = len(places)
        self.fault: BaseException | None = None
        self._clone = clone
        self._places = places

    def run(self) -> None:
        """Writes, and flushes every few records."""
        try:
            while self.written < self.limit:
                self._clone.pwrite(demo_disk.record(self.written), self._places[self.written])
                self.written += 1
                if self.written % _FLUSH_EVERY == 0:
                    self._clone.flush()
        except BaseException as error:  # noqa: BLE001 - told by wait(), in the thread that asks
            self.fault = error

    def wait(self, records: int) -> None:
        """Waits until so many records are written, or the end."""
        while self.written < records and self.is_alive():
            time.sleep(0.0005)
        if self.fault is not None:
            raise self.fault


class Demonstration:
    """The job, step by step, in a folder of its own.

    Args:
        folder: An empty folder.
        content: Bytes of real files, about.
        size: Bytes of the disk.
        clones: How many.
        console: Where to tell of it.
    """

    def __init__(self, folder: Path, content: int, size: int, clones: int, console: Console) -> None:
        self.steps = Steps(console)
        self.growth = 0
        self._folder = folder
        self._content, self._size, self._clones = content, size, clones
        self._disk = folder / "disk.raw"
        self._places: list[int] = []
        self._victims: dict[str, str] = {}
        self._store: cowstore.Store

    def run(self) -> cowstore.Stats:
        """Does all of it; returns what the store then holds."""
        self._build()
        with cowstore.open(self._folder / "demo.store", create=True) as self._store:
            self._import()
            self._clone()
            self._change()
            self._fork()
            self._seal()
            stats = self._store.stats()
            self._prove_exports()
            self._prove_devices()
            if not demo_machine.missing():
                self._fork_live()
        return stats

    def _build(self) -> None:
        with self.steps.step("build a disk of real files") as remarks:
            files = self._folder / "files"
            count, total = demo_disk.gather(files, self._content)
            demo_disk.add_log(files)
            demo_disk.make(self._disk, files, self._size, count)
            self._victims = dict(zip(_EDITED, demo_disk.plain_names(files, len(_EDITED)), strict=True))
            shutil.rmtree(files)
            self._places = demo_disk.log_places(self._disk)
            remarks.append(f"{count:,} files, {sizes.show(total)}, in an ext4 of {sizes.show(self._size)}")

    def _import(self) -> None:
        with self.steps.step("import it") as remarks:
            self._store.import_image(self._disk, "machine")
            used = self._store.stats().used
            remarks.append(f"{sizes.show(_on_disk(self._disk))} became {sizes.show(used)} of blocks")

    def _clone(self) -> None:
        before = _tree_bytes(self._store.path)
        with self.steps.step(f"make {self._clones:,} clones") as remarks:
            self._store.clone_many("machine", [f"desk-{number + 1}" for number in range(self._clones)])
            self.growth = _tree_bytes(self._store.path) - before
            remarks.append(f"the store grew by {self.growth // self._clones:,} bytes a clone")

    def _copy_of(self, name: str) -> Path:
        """The file that a device must equal."""
        return self._folder / f"{name}.expected"

    def _change(self) -> None:
        changed = 0
        with self.steps.step("change files in three of them") as remarks:
            for name in _EDITED:
                copy = self._copy_of(name)
                self._store.export(name, copy)
                note = self._folder / f"{name}.note"
                note.write_bytes(_note(name))
                commands = [f"write {note} /demo/{name}", "mkdir /demo/more", f"rm {self._victims[name]}"]
                demo_disk.edit(copy, commands, self._folder / "script")
                with self._writable(name) as clone:
                    changed += demo_proofs.bring_back(copy, clone)
            remarks.append(f"debugfs did it, {changed} changed blocks came back")

    @contextmanager
    def _writable(self, name: str) -> Iterator[cowstore.Clone]:
        with self._store.device(name) as clone:
            assert isinstance(clone, cowstore.Clone)
            yield clone

    def _fork(self) -> None:
        with self.steps.step("fork one while it is being written") as remarks, self._writable("desk-1") as clone:
            writer = Writer(clone, self._places)
            writer.start()
            try:
                writer.wait(200)
                least = writer.written
                begun = time.monotonic()
                clone.fork("child")
                seconds = time.monotonic() - begun
                most = writer.written
            finally:
                writer.limit = min(writer.written + 200, LOG_BLOCKS)
                writer.join()
            writer.wait(writer.limit)
            if most >= writer.written:
                raise ProofError("the writer had ended before the fork; nothing is proved by that")
            caught = self._caught("child")
            if not least <= caught <= most:
                raise ProofError(f"the child has {caught} records, but had to have {least} to {most}")
            self.steps.proved()
            remarks.append(f"in {seconds * 1000:.0f} ms, at record {caught} of {writer.written}")
        demo_disk.copy_sparse(self._copy_of("desk-1"), self._copy_of("child"))
        self._log_into(self._copy_of("child"), caught)
        self._log_into(self._copy_of("desk-1"), writer.written)

    def _caught(self, name: str) -> int:
        """How many records a device's log has; they must be the first ones, without a gap."""
        with self._store.device(name, readonly=True) as device:
            found = [device.pread(BLOCK, place) for place in self._places]
        count = sum(one != demo_disk.unused() for one in found)
        if found[:count] != [demo_disk.record(number) for number in range(count)]:
            raise ProofError(f"the log of {name} is not one moment of its parent's")
        return count

    def _log_into(self, copy: Path, records: int) -> None:
        with open(copy, "r+b", buffering=0) as file:
            for number in range(records):
                os.pwrite(file.fileno(), demo_disk.record(number), self._places[number])

    def _seal(self) -> None:
        with self.steps.step("seal one as a new image") as remarks:
            self._store.seal("desk-2", "machine-2")
            self._store.clone("machine-2", "next-1").close()
            self._copy_of("machine-2").hardlink_to(self._copy_of("desk-2"))
            self._copy_of("next-1").hardlink_to(self._copy_of("desk-2"))
            ranges = list(self._store.diff("machine", "machine-2"))
            remarks.append(f"{sizes.show(sum(one.length for one in ranges))} differ from the first")

    def _fork_live(self) -> None:
        with tempfile.TemporaryDirectory(prefix="cowstore-", dir="/tmp") as folder:  # short, for sockets
            demo_machine.LiveFork(Path(folder), self.steps).run(self._store)

    def _prove_exports(self) -> None:
        last = f"desk-{self._clones}"
        self._copy_of("machine").hardlink_to(self._disk)
        self._copy_of(last).hardlink_to(self._disk)
        names = ["machine", "desk-1", "child", "machine-2", last]
        with self.steps.step(f"export {len(names)}, and prove them") as remarks:
            for name in names:
                exported = self._folder / f"{name}.raw"
                self._store.export(name, exported)
                demo_proofs.prove_file_equal(name, exported, self._copy_of(name))
                self.steps.proved()
                if found := demo_disk.fault(exported):
                    raise ProofError(f"e2fsck does not like {name}: {found}")
                self.steps.proved()
                self._prove_files(name, exported)
                exported.unlink()
            remarks.append("e2fsck -fn, debugfs, every byte")

    def _prove_files(self, name: str, exported: Path) -> None:
        """Reads the changed files of an exported disk with debugfs."""
        editor = {"machine-2": "desk-2", "child": "desk-1"}.get(name, name)
        if editor not in _EDITED:
            return
        if demo_disk.cat(exported, f"/demo/{editor}") != _note(editor):
            raise ProofError(f"/demo/{editor} on {name} is not what was written")
        if demo_disk.cat(exported, self._victims[editor]):
            raise ProofError(f"{self._victims[editor]} on {name} was removed and is still there")
        with open(self._copy_of(name), "rb") as expected:
            log = b"".join(os.pread(expected.fileno(), BLOCK, place) for place in self._places)
        if demo_disk.cat(exported, LOG) != log:
            raise ProofError(f"{LOG} on {name} is not what was written")
        self.steps.proved()

    def _prove_devices(self) -> None:
        with self.steps.step("prove five more through the library") as remarks:
            for name in ("desk-2", "desk-3", "next-1", f"desk-{self._clones // 2}", f"desk-{self._clones - 1}"):
                expected = self._copy_of(name)
                with self._store.device(name, readonly=True) as device:
                    found = demo_proofs.of_device(device)
                    demo_proofs.prove_equal(name, found, expected if expected.exists() else self._disk)
                self.steps.proved()
            remarks.append("every byte")


def _note(name: str) -> bytes:
    return b"".join(b"%d: this is %s, and nobody else's\n" % (line, name.encode()) for line in range(2000))


def _on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def _tree_bytes(folder: Path) -> int:
    return sum(_on_disk(path) for path in folder.rglob("*") if path.is_file())


@click.command()
@click.option("--content", default="150M", metavar="SIZE", help="Real files, about.  [default: 150M]")
@click.option("--size", default="1G", metavar="SIZE", help="The disk.  [default: 1G]")
@click.option("--clones", default=1000, type=click.IntRange(min=10), help="How many.  [default: 1000]")
def main(content: str, size: str, clones: int) -> None:
    """Import a disk of real files, clone it by the thousand, change, fork, seal, export, and prove it all."""
    demo_disk.check_programs()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="cowstore-demo-") as folder:
        demonstration = Demonstration(Path(folder), sizes.parse(content), sizes.parse(size), clones, console)
        try:
            stats = demonstration.run()
        except cowstore.StoreError as error:
            raise click.ClickException(f"{error}") from error
    facts = [
        ("logical", f"{sizes.show(stats.virtual)}, of which {sizes.show(stats.allocated)} is not empty"),
        ("stored", sizes.show(stats.used)),
        ("a clone", f"{demonstration.growth // clones:,} bytes"),
    ]
    demonstration.steps.show(facts)
    disks, proofs = stats.images + stats.clones, demonstration.steps.proofs
    if lacking := demo_machine.missing():
        console.print(f"[yellow]To see a running machine forked, install {lacking}[/]")
    console.print(f"[bold green]All {proofs} proofs hold: the {disks:,} disks are exactly what they should be.[/]")


if __name__ == "__main__":
    main()
