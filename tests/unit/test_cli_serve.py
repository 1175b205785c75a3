"""`cowstore serve`: what it says when it is ready, where it listens, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

import cowstore
from cowstore.nbd import Counters, listen_tcp, listen_unix
from cowstore_cli.serving import live_line
from tests.conftest import needs_program
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_certificates import Authority
from tests.unit.nbd_client import Client, GoneError
from tests.unit.nbd_lines import until
from tests.unit.nbd_serving import handing
from tests.unit.test_nbd_metrics import parse

MIB = 1 << 20


@pytest.fixture
def place(path: Path) -> Path:
    """A store with the clones `desk` and `other`; it is `store` in a directory of its own."""
    with cowstore.open(path, create=True) as store:
        store.create("desk", MIB).close()
        store.create("other", MIB).close()
    return path


class Command:
    """The command at work."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout
        self.ready = process.stdout.readline().rstrip("\n")

    @property
    def facts(self) -> Any:
        """What it said with --json."""
        return json.loads(self.ready)

    def connect(self) -> Client:
        """Somebody who has been greeted, at its first address."""
        uri = self.facts["uris"][0] if self.ready.startswith("{") else self.ready.split(" at ")[-1]
        parts = urlsplit(uri)
        if parts.scheme == "nbd+unix":
            return Client(parse_qs(parts.query)["socket"][0])
        assert parts.hostname
        assert parts.port
        return Client((parts.hostname, parts.port))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Its exit code, and what it had said until then."""
        self.process.send_signal(number)
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors


@contextmanager
def signals_not_ignored() -> Iterator[None]:
    """Programs inherit what is ignored, and these tests may run under `nohup` or in the background of a shell."""
    ignored = [
        number
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is signal.SIG_IGN
    ]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def start(place: Path, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts the command; by default its runtime directory is `run`."""
    (tmp_path / "run").mkdir(mode=0o700)
    made: list[Command] = []

    def begin(*words: str, before: tuple[str, ...] = ("-m", "cowstore_cli"), **settings: Any) -> Command:
        env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "run"), **settings.pop("env", {})}
        line = [sys.executable, *before, "--store", str(place), "serve", *words]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
        with signals_not_ignored():
            process = subprocess.Popen(line, env=env, text=True, **streams)
        made.append(Command(process))
        return made[-1]

    yield begin
    for one in made:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def refused(place: Path, run: Callable[..., Any]) -> Callable[..., str]:
    """What the command says when it does not start."""

    def refuse(*words: str, code: int) -> str:
        return str(run("--store", str(place), "serve", *words, code=code).output)

    return refuse


# ----------------------------------------------------------------------------------------------------------- ready


def test_line_says_what_is_served_and_where(start, place):
    command = start()
    assert re.fullmatch(rf"serving {re.escape(str(place))} at nbd\+unix:///\?socket=\S+/nbd\.sock", command.ready)
    with command.connect() as client:
        assert client.exports() == ["desk", "other"]


def test_line_of_json(start, place):
    command = start("--json", "--tcp", "0")
    facts = command.facts
    assert (facts["store"], facts["pid"], facts["tls"]) == (str(place), command.process.pid, False)
    (uri,) = facts["uris"]
    assert re.fullmatch(r"nbd://127\.0\.0\.1:\d+/", uri)
    with command.connect() as client:
        client.go("desk")


def test_named_devices_alone_are_served(start):
    with start("other").connect() as client:
        assert client.exports() == ["other"]
        assert client.go("", nbd.INFO_NAME).name == "other"


def test_clones_that_others_make_are_served_at_once(start, place):
    command = start()
    with cowstore.open(place) as store:
        store.clone_many("desk", ["new"])
    with command.connect() as client:
        client.go("new")
        client.write(0, b"x")
        client.disconnect()


# ------------------------------------------------------------------------------------------------------------- end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_answers_flushes_and_ends_well(start, place, tmp_path, number):
    command = start("--socket", str(tmp_path / "nbd.sock"))
    client = command.connect()
    client.go("desk")
    client.write(0, b"unflushed")
    assert command.end(number) == (0, "", "")
    assert client.wait_for_end() == b""
    client.close()
    assert not (tmp_path / "nbd.sock").exists()
    with cowstore.open(place) as store, store.device("desk") as desk:
        assert desk.pread(9, 0) == b"unflushed"


def test_hang_up_that_is_to_be_ignored_is_ignored(start):
    launch = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "os.execv(sys.executable, [sys.executable, '-m', 'cowstore_cli', *sys.argv[1:]])"
    )
    command = start(before=("-c", launch))
    command.process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        command.process.wait(2)
    assert command.end()[0] == 0


def test_second_signal_does_not_wait_for_a_client_that_does_not_read(start, place):
    command = start()
    client = command.connect()
    client.go("desk")
    client.write(0, b"x" * MIB)
    client.send_many(*(client.pending(nbd.READ, 0, MIB) for _ in range(50)))
    command.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        command.process.wait(1)
    command.process.send_signal(signal.SIGTERM)
    assert command.process.wait(60) == 128 + signal.SIGTERM
    client.close()
    with cowstore.open(place) as store:
        store.delete("desk")


def test_killed_server_is_followed_by_another_at_the_same_place(start, tmp_path):
    words = ["--socket", str(tmp_path / "nbd.sock")]
    first = start(*words)
    client = first.connect()
    client.go("desk")
    client.write(0, b"flushed")
    client.flush()
    client.write(0, b"answered")
    first.end(signal.SIGKILL)
    client.close()
    with start(*words).connect() as again:
        again.go("desk")
        assert again.read(0, 8) == b"answered", "though it was not flushed"


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--socket", "a", "--tcp", "0"], 2, "do not go together"),
        (["--tls-cert", "a"], 2, "go together"),
        (["--tls-cert", "a", "--tls-key", "b"], 2, "go together"),
        (["--tls-key", "b", "--tls-ca", "c"], 2, "go together"),
        (["--tls-cert", "a", "--tls-key", "b", "--tls-ca", "c"], 2, "cannot be set up"),
        (["nothing"], 3, "nothing"),
        (["desk", "nothing"], 3, "nothing"),
        (["--tcp", "here"], 2, "no address"),
        (["--socket", "x" * 200], 2, "too long"),
    ],
)
def test_mistakes_are_told_at_once(place, words, code, says):
    line = [sys.executable, "-m", "cowstore_cli", "--store", str(place), "serve", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_socket_where_somebody_listens(refused, tmp_path):
    living = listen_unix(tmp_path / "nbd.sock")
    assert "in use" in refused("--socket", str(tmp_path / "nbd.sock"), code=5)
    living.close()


def test_port_where_somebody_listens(refused):
    living = listen_tcp("0")
    assert "in use" in refused("--tcp", str(living.sock.getsockname()[1]), code=5)
    living.close()


def test_file_in_the_sockets_place(refused, tmp_path):
    (tmp_path / "precious").write_text("precious")
    assert "no socket" in refused("--socket", str(tmp_path / "precious"), code=1)
    assert (tmp_path / "precious").read_text() == "precious"


def test_second_server_of_a_store_is_refused_with_the_firsts_pid(start, refused):
    first = start()
    assert f"in use by process {first.process.pid}" in refused("--tcp", "0", code=5)
    with first.connect() as client:
        assert client.exports() == ["desk", "other"]


# ------------------------------------------------------------------------------------------------ where it listens


def socket_of(command: Command) -> Path:
    return Path(unquote(command.ready.split("?socket=")[1]))


def test_default_place_is_private_and_the_stores_own(start, place, tmp_path):
    path = socket_of(start())
    status = place.stat()
    assert path == tmp_path / "run" / "cowstore" / f"{status.st_dev:x}-{status.st_ino:x}" / "nbd.sock"
    assert [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent, path.parent.parent)] == [
        0o600, 0o700, 0o700,
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["cowstore", "cowstore/place"])
def test_place_that_others_can_enter_is_refused(refused, place, tmp_path, monkeypatch, where):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    status = place.stat()
    wrong = tmp_path / "run" / where.replace("place", f"{status.st_dev:x}-{status.st_ino:x}")
    wrong.mkdir(parents=True, mode=0o700)
    wrong.parent.chmod(0o700)
    wrong.chmod(0o755)
    assert "is not private" in refused(code=1)


def test_metrics_are_written_and_stay(start, tmp_path):
    path = tmp_path / "metrics.prom"
    command = start("--metrics", str(path))
    until(path.exists)
    parse(path.read_text())
    with command.connect() as client:
        client.go("desk")
        client.write(0, b"x" * 100)
        client.disconnect()
    assert command.end()[0] == 0
    _, values = parse(path.read_text())
    assert values["cowstore_nbd_written_bytes_total", ""] == 100
    assert values["cowstore_nbd_clients", ""] == 0
    assert [one.name for one in tmp_path.iterdir() if one.name.endswith(".tmp")] == []


@pytest.mark.program("openssl")
def test_tls(start, tmp_path):
    needs_program("openssl")
    authority = Authority(tmp_path, "ca")
    (certificate, key), ours = authority.sign("server"), authority.sign("client")
    command = start(
        "--json", "--tcp", "localhost:0", "--tls-cert", str(certificate), "--tls-key", str(key), "--tls-ca",
        str(authority.certificate),
    )  # fmt: skip
    assert command.facts["tls"] is True
    with command.connect() as client:
        assert client.option(nbd.LIST)[-1].kind == nbd.TLS_REQD
        client.start_tls(authority.client_context(ours), "localhost")
        client.go("desk")
        client.write(5, b"secret")
        assert client.read(5, 6) == b"secret"
        client.disconnect()
    assert command.end()[0] == 0


# --------------------------------------------------------------------------------------------------------- systemd


def test_sockets_that_are_handed_over_are_used_and_stay(start, tmp_path):
    path = tmp_path / "handed.sock"
    listener = listen_unix(path)
    (_, *words), numbers = handing([listener.sock], "-m", "cowstore_cli")
    command = start("--json", before=tuple(words), pass_fds=numbers)
    assert command.facts["uris"] == [f"nbd+unix:///?socket={path}"]
    with command.connect() as client:
        assert client.exports() == ["desk", "other"]
    assert command.end()[0] == 0
    assert path.exists()
    listener.close()


def test_socket_that_is_named_goes_before_one_that_is_handed_over(start, tmp_path):
    listener = listen_unix(tmp_path / "handed.sock")
    (_, *words), numbers = handing([listener.sock], "-m", "cowstore_cli")
    command = start("--socket", str(tmp_path / "named.sock"), before=tuple(words), pass_fds=numbers)
    assert socket_of(command) == tmp_path / "named.sock"
    listener.close()


@pytest.mark.parametrize("abstract", [False, True])
def test_service_manager_is_told(start, tmp_path, abstract):
    name = f"\0cowstore-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name)
        manager.settimeout(60)
        command = start(env={"NOTIFY_SOCKET": name.replace("\0", "@")})
        assert manager.recv(100) == b"READY=1"
        assert command.end()[0] == 0
        assert manager.recv(100) == b"STOPPING=1"


# ------------------------------------------------------------------------------------------------------- live line


def test_line_says_what_happened_between_two_looks():
    before, now = Counters(), Counters()
    before.took(2.0, 7)
    before.read_bytes, now.read_bytes, now.written_bytes = MIB, 5 * MIB, 3 * MIB
    now.add(before)
    now.read_bytes -= MIB
    now.took(0.0002, 90)
    now.took(0.03, 10)
    line = live_line(before, now, 2.0, clients=3, exports=2)
    assert line.startswith("3 clients, 2 devices   50 requests/s   read 2MiB/s   written 1.5MiB/s")
    assert line.endswith("half within 0.25 ms, 99% within 50 ms")


def test_line_when_nothing_happens():
    assert "0 requests/s   read 0B/s" in live_line(Counters(), Counters(), 1.0, clients=0, exports=0)


def test_line_is_drawn_on_a_terminal_and_taken_away(start):
    ours, theirs = os.openpty()
    command = start(stderr=theirs)
    os.close(theirs)
    said = b""
    while b"requests/s" not in said:
        said += os.read(ours, 4096)
    with command.connect() as client:
        client.go("desk")
    command.end()
    said = os.read(ours, 4096)
    assert said.endswith(b"\r\x1b[K")
    os.close(ours)


def test_nothing_is_drawn_where_nobody_looks(start):
    command = start()
    with command.connect() as client, pytest.raises(GoneError):
        client.export_name("nothing")
    assert command.end() == (0, "", "")
