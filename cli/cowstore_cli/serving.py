"""`cowstore serve`: the store's devices as disks over NBD, until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

import cowstore
from cowstore_cli import console, exits, sizes
from cowstore_cli.options import common_options, device_argument
from cowstore_cli.session import Session, pass_session

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

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
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when ready.")
@common_options
@pass_session
def serve(
    session: Session, names: tuple[str, ...], path: str | None, tcp: str | None, tls_cert: str | None,
    tls_key: str | None, tls_ca: str | None, metrics: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Serve devices as disks over NBD: all of them, or those named. Images are read-only, clones are writable.

    A clone is opened for its first client and flushed and released after its last; new ones are there as soon as
    they are made. Only processes of the same user can connect, at a socket in that user's runtime directory,
    unless another place is named. With --tls-cert, --tls-key and --tls-ca every client needs a certificate of the
    same authority. SIGTERM answers what was asked, flushes, and ends.
    """
    logging.basicConfig(format="cowstore: %(message)s", level=logging.WARNING)
    if path is not None and tcp is not None:
        raise click.UsageError("--socket and --tcp do not go together")
    tls = _tls(tls_cert, tls_key, tls_ca)
    with _signals_held(), session.open() as store, store.serving():
        for name in names:
            store.info(name)  # a name that is not there is a mistake now, not when a client asks for it
        _run(store, _listeners(store, path, tcp), names, tls, metrics, as_json)


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
    return passed or [nbd.listen_unix(_runtime_directory(store.path) / "nbd.sock")]


def _runtime_directory(store: Path) -> Path:
    """Where a store's server is found: by the directory's place on the disk, which no copy of it shares."""
    from cowstore import nbd

    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        top = Path(runtime, "cowstore")
    else:
        top = Path("/run/cowstore") if os.geteuid() == 0 else Path(f"/tmp/cowstore-{os.geteuid()}")
    status = store.stat()
    place = top / f"{status.st_dev:x}-{status.st_ino:x}"
    for directory in (top, place):
        nbd.make_private(directory)
        nbd.check_private(directory)
    return place


def _run(
    store: cowstore.Store, listeners: Sequence[Listener], names: Sequence[str], tls: ssl.SSLContext | None,
    metrics: str | None, as_json: bool,
) -> None:  # fmt: skip
    from cowstore import nbd

    server = nbd.Server(store, listeners, names=names, tls=tls)
    in_time = False
    if metrics:
        _write_metrics(server, Path(metrics))  # a place where it cannot be is a mistake now; later it is a pity
    server.start()
    try:
        _announce(store, server, tls is not None, as_json)
        _watch(server, Path(metrics) if metrics else None)
    finally:
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


def _watch(server: Server, metrics: Path | None) -> None:
    """Waits for a signal; meanwhile draws the live line and writes the metrics."""
    line = _LiveLine(server) if sys.stderr.isatty() else None
    due = time.monotonic()
    while True:
        if metrics is not None and time.monotonic() >= due:
            _try_metrics(server, metrics)
            due = time.monotonic() + _METRICS_SECONDS
        if signal.sigtimedwait(_endings(), 1.0 if line or metrics else 3600.0) is not None:
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
