"""Where what runs is found: a store's server, its machines and their sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cowstore
from cowstore_cli.console import no_bars

if TYPE_CHECKING:
    from cowstore.machines import Client

NBD, CONTROL, MACHINES, LOG, ACCELERATORS = "nbd.sock", "vm.sock", "m", "server.log", "accelerators.json"
IDLE_SECONDS = 60
_START_SECONDS = 30.0


def directory(store: Path) -> Path:
    """The private directory of a store, by its place on the disk, which no copy of it shares; made if missing."""
    from cowstore import nbd

    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        top = Path(runtime, "cowstore")
    else:
        top = Path("/run/cowstore") if os.geteuid() == 0 else Path(f"/tmp/cowstore-{os.geteuid()}")
    status = store.stat()
    place = top / f"{status.st_dev:x}-{status.st_ino:x}"
    for one in (top, place):
        nbd.make_private(one)
        nbd.check_private(one)
    return place


def existing(store: str) -> Path:
    """The path of a store that is there; NotFoundError where none is."""
    path = Path(store)
    if not (path / "store.json").is_file():
        raise cowstore.NotFoundError("store", store, hint="`cowstore init` makes one")
    return path


def client(store: Path) -> Client:
    """Whoever asks a store's server, which may run or not."""
    from cowstore.machines import Client

    return Client(directory(store) / CONTROL)


def has_machines(store: Path) -> bool:
    """Whether any machine is on record."""
    return any(one.is_dir() for one in (directory(store) / MACHINES).glob("*"))


class Asking:
    """Whoever asks a store's server, which is started where there is none.

    Args:
        store: The store's path.
    """

    def __init__(self, store: str) -> None:
        self._store = store
        self._client = _connected(store)

    def ask(self, verb: str, progress: Callable[[str, int, int], None] = no_bars, /, **arguments: Any) -> Any:
        """See cowstore.machines.Client; a server that has just ended, with nothing to do, is started again."""
        try:
            return self._client.ask(verb, progress, **arguments)
        except (FileNotFoundError, ConnectionRefusedError):
            self._client = _connected(self._store)
            return self._client.ask(verb, progress, **arguments)


def connect(store: str) -> Asking:
    """Whoever answers for a store's machines.

    Raises:
        NotFoundError: There is no such store.
        MachineError: The server does not start, or has no machines.
    """
    return Asking(store)


def _connected(store: str) -> Client:
    path = existing(store)
    place, asking = directory(path), client(path)
    if _answers(asking):
        return asking
    server = _start_server(path, place)
    deadline = time.monotonic() + _START_SECONDS
    while not _answers(asking):
        if server.poll() is not None and not _answers(asking) and not _is_another_starting(place):
            raise _not_started(place)
        if time.monotonic() > deadline:
            raise _not_started(place)
        time.sleep(0.02)
    return asking


def _answers(asking: Client) -> bool:
    try:
        asking.ask("ping")
    except OSError:
        return False
    return True


def _start_server(store: Path, place: Path) -> subprocess.Popen[Any]:
    """`cowstore serve` on its own, which ends when it has had nothing to do for a while."""
    words = [sys.executable, "-m", "cowstore_cli", "--store", str(store.absolute()), "serve"]
    with (place / LOG).open("ab") as log:
        return subprocess.Popen(
            [*words, "--idle", str(IDLE_SECONDS)], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, cwd="/",
        )  # fmt: skip


def _is_another_starting(place: Path) -> bool:
    """Whether ours ended because another command's came first, which is about to answer."""
    return "is in use by process" in _last_line(place)


def _last_line(place: Path) -> str:
    lines = (place / LOG).read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("cowstore: ") if lines else "it says nothing"


def _not_started(place: Path) -> cowstore.MachineError:
    return cowstore.MachineError(
        f"no server for machines could be started: {_last_line(place)}",
        hint="a server that runs has machines if it was started without names, --socket and --tcp",
    )
