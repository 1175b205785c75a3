"""The end of the demonstration: a running machine is forked, and it is proved that each child goes its own way."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import cowstore
from cowstore_cli import demo_guest
from cowstore_cli.demo_proofs import ProofError
from cowstore_cli.demo_steps import Steps

if TYPE_CHECKING:
    from cowstore import machines, nbd

PROGRAM = "qemu-system-x86_64"
_CHILDREN = 5
_EARLY = 20  # numbers that the parent counts before it is forked
_LATER = 10  # numbers that each counts afterwards
_PATIENCE = 60.0  # seconds


def missing() -> str:
    """What has to be installed before a machine can run here; empty where nothing has."""
    if shutil.which(PROGRAM) is None:
        return "QEMU, on Debian and Ubuntu: apt install qemu-system-x86"
    if importlib.util.find_spec("qemu.qmp") is None:
        return "the package qemu.qmp: pip install 'cowstore[vm]'"
    return ""


class LiveFork:
    """A machine that counts, in memory and onto its disk, and what its children make of that.

    Args:
        folder: An empty folder with a short path, for sockets.
        steps: Where to tell of it.
    """

    def __init__(self, folder: Path, steps: Steps) -> None:
        self._folder = folder
        self._steps = steps
        self._logs: dict[str, Path] = {}

    def run(self, store: cowstore.Store) -> None:
        """Boots it, forks it, and proves all of them."""
        image = self._folder / "counter.raw"
        image.write_bytes(demo_guest.disk())
        store.import_image(image, "counter")
        store.clone("counter", "counting").close()
        with self._managed(store) as (manager, server):
            self._start(manager)
            self._fork(manager)
            self._prove(store, server)
            for name in self._logs:
                manager.stop(name)
        store.delete("counting")

    @contextmanager
    def _managed(self, store: cowstore.Store) -> Iterator[tuple[machines.Manager, nbd.Server]]:
        """A server of the store's disks, and a manager; no machine is left behind, whatever happens."""
        from cowstore import machines, nbd

        server = nbd.Server(store, [nbd.listen_unix(self._folder / "nbd.sock")])
        server.start()
        manager = machines.Manager(store, server, self._folder / "m")
        try:
            yield manager, server
        finally:
            for one in manager.machines():
                manager.stop(one.name)
            manager.close()
            server.stop()

    def _start(self, manager: machines.Manager) -> None:
        from cowstore import machines

        with self._steps.step("boot a machine that counts") as remarks:
            configuration = machines.Configuration(memory=16 << 20, disks=("counting",))
            self._logs["counting"] = Path(manager.start("counting", configuration).console_log)
            self._wait("counting", _EARLY)
            remarks.append("in memory, and onto its disk")

    def _fork(self, manager: machines.Manager) -> None:
        from cowstore import machines

        with self._steps.step(f"fork it into {_CHILDREN} while it runs") as remarks:
            children = manager.fork("counting", _CHILDREN, wish=machines.Wish(identity=False))
            if failed := [child.error for child in children if child.error]:
                raise ProofError(f"a child did not start: {failed[0]}")
            slowest = max(child.running for child in children)
            remarks.append(f"all run after {slowest * 1000:.0f} ms")
        self._logs |= {child.name: Path(manager.info(child.name).console_log) for child in children}

    def _prove(self, store: cowstore.Store, server: nbd.Server) -> None:
        with self._steps.step("prove that each goes its own way") as remarks:
            firsts = {min(self._said(name)) for name in self._logs if name != "counting" and self._waited(name)}
            if len(firsts) != 1:
                raise ProofError(f"the children go on from different numbers: {sorted(firsts)}")
            self._steps.proved()
            self._wait("counting", min(firsts) + _LATER)
            for name in self._logs:
                self._prove_disk(store, server, name, min(firsts))
                self._steps.proved()
            self._prove_apart()
            self._steps.proved()
            remarks.append(f"all go on from {min(firsts)}, and no disk has a number of another's")

    def _waited(self, name: str) -> bool:
        """Waits until a child has counted for a while."""
        self._wait(name, 0)
        self._wait(name, min(self._said(name)) + _LATER)
        return True

    def _prove_disk(self, store: cowstore.Store, server: nbd.Server, name: str, first: int) -> None:
        """A machine's disk has what it has said itself since the fork, and what its parent said before."""
        said = self._said(name)
        server.flush(name)
        with store.device(name, readonly=True) as device:
            found = demo_guest.written(device.pread(device.size, 0))
        numbers = sorted(said)
        if numbers != list(range(numbers[0], numbers[-1] + 1)):
            raise ProofError(f"{name} has left numbers out")
        expected = {number: stamp for number, stamp in self._said("counting").items() if number < first} | said
        if {number: found.get(number) for number in expected} != expected:
            raise ProofError(f"the disk of {name} is not what {name} has written")

    def _prove_apart(self) -> None:
        """No two machines have put the same stamp to a number since the fork.

        The first one may have been stamped before the fork, and written after it.
        """
        everything = [self._said(name) for name in self._logs]
        first = max(min(said) for said in everything)
        for number in range(first + 1, first + _LATER):
            stamps = [said[number] for said in everything]
            if len(set(stamps)) != len(stamps):
                raise ProofError(f"two machines wrote the same at number {number}")

    def _said(self, name: str) -> dict[int, int]:
        return demo_guest.said(self._logs[name].read_bytes())

    def _wait(self, name: str, number: int) -> None:
        """Waits until a machine has counted beyond a number."""
        deadline = time.monotonic() + _PATIENCE
        while not (said := self._said(name)) or max(said) <= number:
            if time.monotonic() > deadline:
                raise ProofError(f"{name} does not count on")
            time.sleep(0.02)
