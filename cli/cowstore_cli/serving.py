"""`cowstore serve`: the store's devices as disks over NBD, until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

import cowstore
from cowstore_cli import console, exits, runtime, sizes
from cowstore_cli.options import common_options, device_argument
from cowstore_cli.session import Session, pass_session

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from cowstore import machines
    from cowstore.nbd import Counters, Listener, Server

_ENDINGS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
_METRICS_SECONDS = 5.0
_log = logging.getLogger("cowstore")
_FILE = click.Path(dir_okay=False)


@click.command()
@device_argument("names", many=True, required=False)
@click.option("--socket", "path", metavar="PATH", type=_FILE, help="Listen at this Unix socket.")
@click.option("--tcp", metavar="HOST:PORT", help="Listen on TCP instead; without a host, on the loopback address.")
@click.option("--tls-cert", metavar="FILE", type=_FILE, help="The server's certificate, in PEM.")
@click.option("--tls-key", metavar="FILE", type=_FILE, help="The certificate's private key.")
@click.option("--tls-ca", metavar="FILE", type=_FILE, help="What the clients' certificates are checked against.")
@click.option("--metrics", metavar="FILE", type=_FILE, help="Write numbers there, in Prometheus' text format.")
@click.option("--idle", metavar="SECONDS", type=float, help="End after so long without clients and machines.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
@common_options
@pass_session
def serve(
    session: Session, names: tuple[str, ...], path: str | None, tcp: str | None, tls_cert: str | None,
    tls_key: str | None, tls_ca: str | None, metrics: str | None, idle: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Serve devices as disks over NBD: all of them, or those named. Images are read-only, clones are writable.

    A clone is opened for its first client and flushed and released after its last; new ones are there as soon as
    they are made. Only processes of the same user can connect, at a socket in that user's runtime directory,
    unless another place is named. With --tls-cert, --tls-key and --tls-ca every client needs a certificate of the
    same authority. SIGTERM answers what was asked, flushes, and ends.

    At its own place, and with all devices, it also answers for the store's running machines (`cowstore vm`). They
    go on when it ends, and wait for their disks until it is back there.
    """
    logging.basicConfig(format="cowstore: %(message)s", level=logging.WARNING)
    if path is not None and tcp is not None:
        raise click.UsageError("--socket and --tcp do not go together")
    tls = _tls(tls_cert, tls_key, tls_ca)
    with _signals_held(), session.open() as store, store.serving():
        for name in names:
            store.info(name)  # a name that is not there is a mistake now, not when a client asks for it
        _run(store, _listeners(store, path, tcp), names, tls, metrics, idle, as_json)


def _tls(certificate: str | None, key: str | None, authority: str | None) -> ssl.SSLContext | None:
    if certificate is None and key is None and authority is None:
        return None
    if certificate is None or key is None or authority is None:
        raise click.UsageError("--tls-cert, --tls-key and --tls-ca go together")
    from cowstore import nbd

    return nbd.tls_context(certificate, key, authority)


def _listeners(store: cowstore.Store, path: str | None, tcp: str | None) -> list[Listener]:
    from cowstore import nbd

    if tcp is not None:
        return [nbd.listen_tcp(tcp)]
    if path is not None:
        return [nbd.listen_unix(path)]
    passed = nbd.passed(os.environ.get("LISTEN_PID", ""), os.environ.get("LISTEN_FDS", ""))
    return passed or [nbd.listen_unix(runtime.directory(store.path) / runtime.NBD)]


def _run(
    store: cowstore.Store, listeners: Sequence[Listener], names: Sequence[str], tls: ssl.SSLContext | None,
    metrics: str | None, idle: float | None, as_json: bool,
) -> None:  # fmt: skip
    from cowstore import nbd

    server = nbd.Server(store, listeners, names=names, tls=tls)
    in_time = False
    if metrics:
        _write_metrics(server, Path(metrics))  # a place where it cannot be is a mistake now; later it is a pity
    server.start()
    vms = None
    try:
        if not names and listeners[0].path == runtime.directory(store.path) / runtime.NBD:
            vms = _looked_after(store, server)
        _announce(store, server, tls is not None, as_json)
        _watch(server, Path(metrics) if metrics else None, _Idleness(server, vms, idle))
    finally:
        if vms is not None:
            vms.close()
        in_time = server.stop()
        if metrics:
            _try_metrics(server, Path(metrics))
    if not in_time:
        console.warn("some clients did not leave in time and were dropped")
        raise click.exceptions.Exit(exits.OTHER)


def _announce(store: cowstore.Store, server: Server, secure: bool, as_json: bool) -> None:
    if as_json:
        facts = {"store": str(store.path), "pid": os.getpid(), "uris": server.uris, "tls": secure}
        console.emit_line(facts)
    else:
        console.say(f"serving {store.path} at {' and '.join(server.uris)}")
    sys.stdout.flush()
    _notify("READY=1")


def _notify(state: str) -> None:
    """Tells systemd, where it has asked to be told; see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(state.encode())


def _endings() -> set[signal.Signals]:
    """The signals that end the server; `nohup` asks for one of them to be ignored."""
    return {number for number in _ENDINGS if signal.getsignal(number) is not signal.SIG_IGN}


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals that end the program wait until somebody looks for them; so nothing is left half done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _endings())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Machines:
    """The store's running machines, and the socket at which commands ask about them.

    The manager comes with the first machine: who only serves disks needs nothing of what it needs.
    """

    def __init__(self, store: cowstore.Store, server: Server) -> None:
        from cowstore import machines

        self._store = store
        self._server = server
        self._place = runtime.directory(store.path)
        self._verbs: machines.Verbs | None = None
        self._lock = threading.Lock()
        if runtime.has_machines(store.path):
            try:
                self._made()
            except (cowstore.StoreError, OSError) as error:
                _log.error(
                    "the machines cannot be looked after now: %s", error
                )  # their disks are served all the same
        self._control = machines.Server(self._made, self._place / runtime.CONTROL)

    def _made(self) -> machines.Verbs:
        from cowstore import machines

        with self._lock:
            if self._verbs is None:
                manager = machines.Manager(self._store, self._server, self._place / runtime.MACHINES)
                self._verbs = machines.Verbs(manager, machines.Accelerators(self._place / runtime.ACCELERATORS))
            return self._verbs

    @property
    def idle(self) -> bool:
        """Whether there is no machine, and nobody asks about one."""
        return not self._control.busy and (self._verbs is None or self._verbs.manager.idle)

    def close(self) -> None:
        """Lets go of the machines, which go on."""
        self._control.close()
        if self._verbs is not None:
            self._verbs.manager.close()


def _looked_after(store: cowstore.Store, server: Server) -> _Machines | None:
    """The store's machines; None where they cannot be, since disks are served all the same."""
    try:
        return _Machines(store, server)
    except (cowstore.StoreError, OSError) as error:
        _log.error("no machines here: %s", error)
        return None


class _Idleness:
    """Whether nothing has been to do for so long that the server may end."""

    def __init__(self, server: Server, machines: _Machines | None, seconds: float | None) -> None:
        self._server = server
        self._machines = machines
        self._seconds = seconds
        self._since = time.monotonic()

    @property
    def tick(self) -> float:
        """Seconds between two looks."""
        return 3600.0 if self._seconds is None else max(min(self._seconds / 4, 5.0), 0.1)

    def lasts(self) -> bool:
        """Looks; whether it has lasted long enough now."""
        if self._server.clients or not (self._machines is None or self._machines.idle):
            self._since = time.monotonic()
        return self._seconds is not None and time.monotonic() - self._since >= self._seconds


def _watch(server: Server, metrics: Path | None, idleness: _Idleness) -> None:
    """Waits for a signal, or until nothing is to do; meanwhile draws the live line and writes the metrics."""
    line = _LiveLine(server) if sys.stderr.isatty() else None
    due = time.monotonic()
    while True:
        if metrics is not None and time.monotonic() >= due:
            _try_metrics(server, metrics)
            due = time.monotonic() + _METRICS_SECONDS
        wait = min(1.0 if line or metrics else 3600.0, idleness.tick)
        if signal.sigtimedwait(_endings(), wait) is not None or idleness.lasts():
            break
        if line is not None:
            line.draw()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _endings())  # who is impatient sends another one
    _notify("STOPPING=1")
    if line is not None:
        line.clear()


def _try_metrics(server: Server, path: Path) -> None:
    """Writes the metrics; guests must not lose their disks where that fails."""
    try:
        _write_metrics(server, path)
    except OSError as error:
        _log.error("the metrics cannot be written to %s: %s", path, error.strerror)


def _write_metrics(server: Server, path: Path) -> None:
    """Replaces the file as a whole, so that whoever collects it never sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(server.prometheus())
    aside.replace(path)


class _LiveLine:
    """One line on the terminal that says what goes on now."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._before = server.metrics.sum()
        self._at = time.monotonic()

    def draw(self) -> None:
        """Draws it anew."""
        now, at = self._server.metrics.sum(), time.monotonic()
        text = live_line(self._before, now, at - self._at, self._server.clients, self._server.exports.open_count())
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)
        self._before, self._at = now, at

    def clear(self) -> None:
        """Takes it away."""
        click.echo("\r\x1b[K", nl=False, err=True)


def live_line(before: Counters, now: Counters, seconds: float, clients: int, exports: int) -> str:
    """What happened between two looks, so many seconds apart."""
    recent = type(now)()
    recent.add(now)
    recent.latencies = [late - early for early, late in zip(before.latencies, now.latencies, strict=True)]
    rate = recent.total / seconds
    read = sizes.show(int((now.read_bytes - before.read_bytes) / seconds))
    written = sizes.show(int((now.written_bytes - before.written_bytes) / seconds))
    middle, slow = recent.quantile(0.5) * 1e3, recent.quantile(0.99) * 1e3
    return (
        f"{clients} clients, {exports} devices   {rate:,.0f} requests/s   read {read}/s   written {written}/s   "
        f"half within {middle:g} ms, 99% within {slow:g} ms"
    )
