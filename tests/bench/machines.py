"""Forking a running machine: a real Linux under QEMU's emulation, as tests/machines has it.

The peer is what QEMU does by itself: its whole state with all of the memory in a file, written by a migration and
loaded by another process. Both are timed from the call until the child has been told to run.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cowstore
from cowstore import nbd
from cowstore.machines import Configuration, Manager, Wish
from cowstore.machines.hypervisor import Launch
from cowstore.machines.qemu import RunningQemu, command_line
from tests.bench.measure import Bench, Sample, clock
from tests.machines.guestkit import COMMAND_LINE, Parts

MEMORY = 256 << 20
AS_IT_IS = Wish(identity=False)
PAGE = 4096
_BOOT_SECONDS = 120


def run(bench: Bench) -> None:
    if shutil.which("qemu-system-x86_64") is None:
        bench.missing("one child runs", "qemu-system-x86_64")
        return
    parts = Parts.make(bench.folder)
    with _parent(bench.folder, parts) as (manager, store, place):
        _checkpoints(bench, manager)
        _one(bench, manager, store, place)
        _changed(bench, manager)
        _frozen(bench, manager)
        _private(bench, manager)
        _identity(bench, manager)
        for count in (1, 8, 20, 64):
            _many(bench, manager, count)


@contextmanager
def _parent(folder: Path, parts: Parts) -> Iterator[tuple[Manager, cowstore.Store, Path]]:
    """A booted machine `parent`, and the place of its sockets."""
    place = Path(tempfile.mkdtemp(prefix="cowstore-"))
    with cowstore.open(folder / "store", create=True) as store:
        store.import_image(parts.disk, "debian")
        store.clone("debian", "desk").close()
        server = nbd.Server(store, [nbd.listen_unix(place / "nbd.sock")])
        server.start()
        manager = Manager(store, server, place / "m")
        try:
            configuration = Configuration(
                MEMORY, ("desk",), kernel=str(parts.kernel), initrd=str(parts.initramfs), append=COMMAND_LINE,
                nic="virtio-net-pci",
            )  # fmt: skip
            log = Path(manager.start("parent", configuration).console_log)
            _wait_for(log, "guest is up")
            time.sleep(1)
            yield manager, store, place
        finally:
            for machine in manager.machines():
                manager.stop(machine.name)
            manager.close()
            server.stop()
            shutil.rmtree(place)


def _wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + _BOOT_SECONDS
    while text not in log.read_text(errors="replace"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {text!r} in {log}")
        time.sleep(0.05)


def _checkpoints(bench: Bench, manager: Manager) -> None:
    """Of the parent, whose whole memory is its own. The children to come are of one that was not frozen."""
    manager.checkpoint("parent", "moment", freezing=False)
    moments, times = [], []
    for number in range(bench.pick(5, 2)):
        with clock() as watch:
            moments.append(manager.checkpoint("parent", f"moment-{number}"))
        times.append(watch.seconds)
    pages = moments[0].pages
    bench.within(
        f"pause of the parent, {pages * PAGE >> 20} MiB of memory copied in it",
        Sample(tuple(moment.pause for moment in moments)), 0.1, note="the file systems frozen before it",
    )  # fmt: skip
    bench.fact("checkpoint of the parent, durable", Sample(tuple(times)))


def _stop_all(manager: Manager, names: list[str]) -> None:
    for name in names:
        manager.stop(name)


def _forked(manager: Manager, count: int, wish: Wish = AS_IT_IS) -> tuple[list[float], list[float]]:
    """Seconds until each child ran, and until each was ready; none is left."""
    children = manager.fork("moment", count, prefix="child-", wish=wish)
    _stop_all(manager, [child.name for child in children if not child.error])
    assert not any(child.error for child in children), children
    return [child.running for child in children], [child.ready for child in children]


def _one(bench: Bench, manager: Manager, store: cowstore.Store, place: Path) -> None:
    _forked(manager, 1)  # the template is there from here on
    peer = _Whole(manager, store, place)
    ours, theirs = [], []
    for _ in range(bench.pick(20, 3)):
        ours += _forked(manager, 1)[0]
        theirs.append(peer.child())
    bench.within("one child runs, its template on the host", Sample(tuple(ours)), 0.2)
    slow = statistics.quantiles(ours, n=100, method="inclusive")[98]
    bench.fact("the same, 99% within", Sample((slow,)))
    bench.faster("one child runs", Sample(tuple(ours)), "QEMU loading its whole state", Sample(tuple(theirs)), 1)
    bench.fact("on the disk for the state that QEMU loads", Sample((float(peer.size),)), "B")


class _Whole:
    """QEMU's own way: a migration to a file, and another process that loads it."""

    def __init__(self, manager: Manager, store: cowstore.Store, place: Path) -> None:
        self._place = place
        self._file = place / "whole"
        info = manager.info("parent")
        self._configuration = Configuration.read(info.configuration).with_disks(["whole"])
        self._nic = manager._host.registry.get("parent").nic
        parent = manager._host.running(manager._host.registry.get("parent"))
        assert isinstance(parent, RunningQemu)
        parent.stop()
        with socket.socket(socket.AF_UNIX) as listener:  # its sandbox lets it start no `cat`
            listener.bind(str(place / "whole.sock"))
            listener.listen(1)
            parent._monitor.execute("migrate", uri=f"unix:{place}/whole.sock")
            source, _ = listener.accept()
            with source, source.makefile("rb") as stream, self._file.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        assert parent._monitor.execute("query-migrate")["status"] == "completed"
        store.clone("desk", "whole").close()
        parent.resume()
        self.size = self._file.stat().st_size

    def child(self) -> float:
        """Starts one and ends it; seconds until it ran."""
        folder = Path(tempfile.mkdtemp(dir=self._place))
        launch = Launch(
            "whole", self._configuration, folder, self._place / "nbd.sock", ("whole",), "auto", self._nic
        )
        begun = time.perf_counter()
        running = _started(launch, self._file)
        while running.status() == "inmigrate":
            time.sleep(0.001)
        running.resume()
        seconds = time.perf_counter() - begun
        running.quit()
        running.close()
        os.waitpid(running.pid, 0)
        shutil.rmtree(folder)
        return seconds


def _started(launch: Launch, state: Path) -> RunningQemu:
    """The same process that a child of ours has, but for the memory, which comes with the state."""
    with socket.socket(socket.AF_UNIX) as control, state.open("rb") as file:
        control.bind(str(launch.directory / "control.sock"))
        control.listen(1)
        words = [*command_line(launch, control.fileno(), None), "-S", "-incoming", f"fd:{file.fileno()}"]
        pid = os.posix_spawn(
            shutil.which("qemu-system-x86_64") or "", ["qemu", *words], {"PATH": os.defpath},
            file_actions=[(os.POSIX_SPAWN_DUP2, one.fileno(), one.fileno()) for one in (control, file)],
        )  # fmt: skip
    return RunningQemu("whole", pid, launch.directory)


def _many(bench: Bench, manager: Manager, count: int) -> None:
    last, every = [], []
    for _ in range(bench.pick(3, 1)):
        running, _ready = _forked(manager, count)
        last.append(max(running))
        every += running
    if count == 64:
        bench.within("64 children run", Sample(tuple(last)), 8)
    else:
        bench.fact(f"{count} children run" if count > 1 else "1 child runs", Sample(tuple(last)))
    slow = statistics.quantiles(every, n=100, method="inclusive")[98] if len(every) > 1 else every[0]
    bench.fact(f"each of {count}, median", Sample(tuple(every)), note=f"99% within {slow * 1e3:.0f} ms")


def _identity(bench: Bench, manager: Manager) -> None:
    """With an identity of its own, confirmed by the guest."""
    ready = [_forked(manager, 1, Wish())[1][0] for _ in range(bench.pick(5, 1))]
    bench.fact("one child is handed out with an identity", Sample(tuple(ready)), note="most of it in the guest")


def _changed(bench: Bench, manager: Manager) -> None:
    """A child's checkpoint against the number of pages that it has changed."""
    for wanted in (0, 1000, 10_000):
        times, pages = [], 0
        for turn in range(bench.pick(5, 1)):
            (child,) = manager.fork("moment", 1, prefix="changing-", wish=AS_IT_IS)
            if wanted:
                _write_pages(manager, child.name, wanted)
            name = f"changed-{wanted}-{turn}"
            begun = time.perf_counter()
            pages = manager.checkpoint(child.name, name, freezing=False).pages
            times.append(time.perf_counter() - begun)
            manager.stop(child.name)
            manager.delete_checkpoints(name)
        figure = f"checkpoint of a child with {pages:,} pages of its own"
        if wanted == 1000:
            bench.within(figure, Sample(tuple(times)), 0.1, note="without freezing, which is the guest's time")
        else:
            bench.fact(figure, Sample(tuple(times)))


def _frozen(bench: Bench, manager: Manager) -> None:
    """What freezing and thawing adds, in a guest that is emulated."""
    times = []
    for turn in range(bench.pick(5, 1)):
        (child,) = manager.fork("moment", 1, prefix="frozen-", wish=AS_IT_IS)
        _write_pages(manager, child.name, 1000)
        with clock() as watch:
            manager.checkpoint(child.name, f"when-frozen-{turn}")
        times.append(watch.seconds)
        manager.stop(child.name)
        manager.delete_checkpoints(f"when-frozen-{turn}")
    bench.fact("the same with 1,000 pages written, frozen and thawed", Sample(tuple(times)))


def _write_pages(manager: Manager, name: str, pages: int) -> None:
    """Has the guest write so many pages of its memory, none like another."""
    script = f"dd if=/dev/urandom of=/run/pages bs={PAGE} count={pages}"
    done = manager.run(name, ["/bin/sh", "-c", script])
    assert done.status == 0, done


def _private(bench: Bench, manager: Manager) -> None:
    """What a child takes for itself of the host's memory, against what it has written."""
    written, parts = 16_000, []  # so many that what the writing program needs itself is little beside it
    for _ in range(bench.pick(3, 1)):
        (child,) = manager.fork("moment", 1, prefix="private-", wish=AS_IT_IS)
        before = manager.info(child.name).memory["private_bytes"]
        _write_pages(manager, child.name, written)
        parts.append((manager.info(child.name).memory["private_bytes"] - before) / (written * PAGE))
        manager.stop(child.name)
    bench.within("private guest memory for each byte that a child wrote", Sample(tuple(parts)), 1.1, "")
    (child,) = manager.fork("moment", 1, prefix="private-", wish=AS_IT_IS)
    time.sleep(4)  # of its light work
    one = manager.info(child.name)
    guest = one.memory["private_bytes"]
    bench.fact("private host memory of a child after 4 s, its guest's pages", Sample((float(guest),)), "B")
    bench.fact("the same, the hypervisor's own", Sample((float(_private_bytes(one.pid) - guest),)), "B")
    manager.stop(child.name)


def _private_bytes(pid: int) -> int:
    """What a process has for itself alone; see proc_pid_smaps(5)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))
