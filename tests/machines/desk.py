"""A store, the server of its disks and a manager of its machines, all in this process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cowstore
from cowstore import nbd
from cowstore.machines import Child, Configuration, Manager, Wish
from cowstore.machines.hypervisor import Hypervisor

from .children import opened
from .guestkit import COMMAND_LINE, Parts
from .images import hidden

MIB = 1 << 20
SOON_S = 60
NEW, SAME = Wish(), Wish(identity=False)


# Whose command line has the folder's name belongs to it; nothing else has that name.
_GUARD = """\
read -r _
for process in /proc/[0-9]*; do
    grep -qsF "$FOLDER" "$process/cmdline" && [ "$process" != "/proc/$$" ] && kill -KILL "${process#/proc/}"
done
rm -rf "$FOLDER"
"""


@contextmanager
def short_folder() -> Iterator[Path]:
    """A place for a store and for sockets, in memory where there is a place for files in memory.

    It is removed, and the machines in it are ended, also where the tests are killed: then a pipe ends.
    """
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="cowstore-vm-", dir=shared))
    folder.chmod(0o700)
    environment = {**os.environ, "FOLDER": str(folder)}
    words = ["/bin/sh", "-c", _GUARD]
    with subprocess.Popen(words, stdin=subprocess.PIPE, env=environment, start_new_session=True) as guard:
        try:
            yield folder
        finally:
            end_all(folder)
            shutil.rmtree(folder)
            guard.kill()


def configuration(parts: Parts, *disks: str, **changes: Any) -> Configuration:
    """A machine like that of guestkit."""
    wanted: dict[str, Any] = {
        "memory": 160 * MIB, "disks": disks, "kernel": str(parts.kernel), "initrd": str(parts.initramfs),
        "append": COMMAND_LINE, "nic": "virtio-net-pci",
    }  # fmt: skip
    return Configuration(**(wanted | changes))


def processes(folder: Path) -> list[int]:
    """The processes of machines that have something in a folder; one that has ended and was not reaped is none."""
    mark, found = str(folder).encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if mark in words and b"qemu" in words.partition(b"\0")[0]:
            found.append(int(path.name))
    return sorted(found)


def end_all(folder: Path) -> list[int]:
    """Ends the processes of machines in a folder; returns those that were there."""
    found = processes(folder)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has just gone by itself
    wait(lambda: not processes(folder), "the machines end")
    return found


def wait(condition: Any, what: str, seconds: float = SOON_S) -> Any:
    """What a condition gives, once that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"in vain waited until {what}"
        time.sleep(0.02)
    return found


class Desk:
    """See above. What it opens is closed with it; its machines go on until it is left."""

    def __init__(self, folder: Path, hypervisor: Hypervisor | None = None) -> None:
        self.folder = folder
        self._hypervisor = hypervisor
        self.open()

    def open(self) -> None:
        """Opens all of it; finds the machines again that are there."""
        with ExitStack() as stack:
            self.store = stack.enter_context(cowstore.open(self.folder / "s", create=True))
            stack.enter_context(self.store.serving())
            self.server = nbd.Server(self.store, [nbd.listen_unix(self.folder / "nbd.sock")])
            self.server.start()
            stack.callback(self.server.stop)
            self.manager = Manager(self.store, self.server, self.folder / "m", self._hypervisor)
            stack.callback(self.manager.close)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Closes all of it; machines go on, and wait for their disks."""
        self._stack.close()

    def boot(self, parts: Parts, name: str = "parent", **changes: Any) -> None:
        """Boots a guest from a clone of its disk, and waits until it can be asked."""
        if "disk" not in (one.name for one in self.store.devices()):
            self.store.import_image(parts.disk, "disk")
        self.store.clone("disk", name).close()
        self.manager.start(name, configuration(parts, name, **changes))
        self.wait_for_agent(name)

    def wait_for_agent(self, name: str) -> None:
        running = self.manager._host.running(self.manager._host.registry.get(name))
        wait(running.has_agent, f"the agent of {name} listens")
        # The disk's own counter would take much of a processor in every child.
        self.said(name, "until [ -s /run/count ]; do usleep 10000; done; kill -STOP $(busybox pidof counter)")

    def said(self, name: str, script: str, status: int = 0) -> str:
        """What a script in a guest says."""
        done = self.manager.run(name, ["/bin/sh", "-c", script])
        assert done.status == status, done
        return done.output.decode(errors="replace").strip()

    def fork(self, source: str, count: int = 1, wish: Wish = NEW, prefix: str = "") -> list[str]:
        """The names of children, all of which came up."""
        children = self.manager.fork(source, count, wish=wish, prefix=prefix)
        assert not errors_of(children), errors_of(children)
        return [child.name for child in children]

    @contextmanager
    def forked(self, source: str, count: int = 1, wish: Wish = NEW, prefix: str = "") -> Iterator[list[str]]:
        """Children for a while."""
        names = self.fork(source, count, wish, prefix)
        try:
            yield names
        finally:
            for name in names:
                if self.manager._host.registry.has(name):
                    self.manager.stop(name)

    def things(self) -> dict[str, Any]:
        """Everything that machines make, for a comparison of before and after."""
        return {
            "machines": [one.name for one in self.manager.machines()],
            "folders": sorted(path.name for path in (self.folder / "m").iterdir()),
            "processes": processes(self.folder),
            "devices": sorted(one.name for one in self.store.devices()),
            "checkpoints": [one.name for one in self.store.checkpoints.all()],
            "hidden images": hidden(self.store),
            "memory files": sorted(target for target in opened().values() if "/memfd:" in target),
            "clients": self.server.clients,
        }

    @contextmanager
    def nothing_left(self) -> Iterator[None]:
        """What is done in the block leaves nothing behind."""
        before = self.things()
        yield
        try:
            wait(lambda: self.things() == before, "", 5)
        except AssertionError:
            assert self.things() == before

    def clean(self) -> None:
        """Ends all machines and closes everything; what machine outlives that is a failure."""
        try:
            for one in self.manager.machines():
                self.manager.stop(one.name)
            assert not processes(self.folder)
        finally:
            left = end_all(self.folder)
            self.close()
        assert not left, "machines that their manager did not know"


@contextmanager
def desk() -> Iterator[Desk]:
    """A desk in a folder of its own, and nothing of it afterwards."""
    with short_folder() as folder:
        made = Desk(folder)
        try:
            yield made
        finally:
            made.clean()


def errors_of(children: list[Child]) -> list[str]:
    """What those say that were not handed out."""
    return [child.error for child in children if child.error]
