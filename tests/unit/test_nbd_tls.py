"""TLS on real sockets: both sides show a certificate, or nothing goes on."""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cowstore.errors import InvalidError
from cowstore.nbd import Limits, tls_context
from tests.conftest import needs_program
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_certificates import Authority
from tests.unit.nbd_client import Client, GoneError, OptionError
from tests.unit.nbd_lines import until
from tests.unit.nbd_memory import MemoryDevices
from tests.unit.nbd_serving import Serving, descriptors, serving, threads

BLOCK, MIB = 4096, 1 << 20
BOUND = 20.0  # seconds: far more than any limit here
REFUSED = (ssl.SSLError, GoneError, ConnectionError)


@dataclass
class Papers:
    """Who has which certificate."""

    authority: Authority
    other: Authority
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    stranger: tuple[Path, Path]
    locked: tuple[Path, Path]


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    needs_program("openssl")
    place = tmp_path_factory.mktemp("papers")
    authority, other = Authority(place, "ca"), Authority(place, "other-ca")
    return Papers(
        authority,
        other,
        authority.sign("server"),
        authority.sign("client"),
        other.sign("stranger"),
        authority.sign("locked", "-passout", "pass:secret"),
    )


@pytest.fixture
def devices() -> MemoryDevices:
    return MemoryDevices({"base": os.urandom(8 * MIB)}, {"desk": b"D" * 8 * MIB})


@pytest.fixture
def context(papers: Papers) -> ssl.SSLContext:
    return tls_context(*papers.server, papers.authority.certificate)


@pytest.fixture
def served(devices: MemoryDevices, tmp_path: Path, context: ssl.SSLContext) -> Iterator[Serving]:
    with serving(devices, tmp_path, tcp=True, tls=context) as one:
        yield one


def secure(served: Serving, papers: Papers, name: str = "", identity: tuple[Path, Path] | None = None) -> Client:
    """A client in TLS, by default with the right papers; with an export if one is named."""
    client = served.client()
    client.start_tls(papers.authority.client_context(identity or papers.client), "localhost")
    if name:
        client.structured_replies()
        client.set_contexts(name, "base:allocation")
        client.go(name)
    return client


# -------------------------------------------------------------------------------------------------- what goes on


def test_megabytes_go_both_ways(served, papers, devices):
    client = secure(served, papers, "desk")
    data = os.urandom(5 * MIB)
    client.write(12345, data)
    client.write(0, b"first", nbd.FUA)
    client.flush()
    assert client.read(12345, 5 * MIB) == data
    assert client.status(0, 8 * MIB)
    image = secure(served, papers, "base")
    assert image.read(0, 8 * MIB) == devices._contents["base"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions(served, papers, version):
    ours = papers.authority.client_context(papers.client)
    ours.minimum_version = ours.maximum_version = version
    client = served.client()
    client.start_tls(ours, "localhost")
    client.go("desk")
    client.write(0, b"x" * 100_000)
    assert client.read(0, 100_000) == b"x" * 100_000


def test_many_requests_in_flight(served, papers):
    """Answers of the connection's thread and of the flusher's are records of one stream."""
    client = secure(served, papers, "desk")
    for turn in range(10):
        asked = []
        for number in range(100):
            asked.append(
                client.pending(nbd.WRITE, number * BLOCK, data=bytes([turn]) * BLOCK, flags=number % 7 == 0)
            )
            asked.append(client.pending(nbd.READ, number * BLOCK, BLOCK))
            if number % 10 == 0:
                asked.append(client.pending(nbd.FLUSH))
        client.send_many(*asked)
        answers = [client.receive() for _ in asked]
        assert {answer.error for answer in answers} == {0}
        assert {answer.data for answer in answers} - {b""} == {bytes([turn]) * BLOCK}


def test_address_says_that_tls_is_required(served):
    assert served.server.uris == [f"nbds://127.0.0.1:{served.place[1]}/"]


def test_over_a_unix_socket(devices, tmp_path, context, papers):
    with serving(devices, tmp_path, tls=context) as served:
        assert secure(served, papers).exports() == ["base", "desk"]


def test_tls_begins_once(served, papers):
    client = secure(served, papers)
    with pytest.raises(OptionError) as caught:
        client.start_tls(papers.authority.client_context(papers.client), "localhost")
    assert caught.value.kind == nbd.INVALID
    client.go("desk")


@pytest.mark.parametrize("by", ["disc", "abort"])
def test_end_is_told_from_a_cut(served, papers, by):
    """The server ends TLS before it closes the socket."""
    client = secure(served, papers, "desk" if by == "disc" else "")
    vars(client.sock)["suppress_ragged_eofs"] = False
    if by == "disc":
        client.sock.sendall(nbd.Request(nbd.DISC).encode())
    else:
        assert client.option(nbd.ABORT)[-1].kind == nbd.ACK
    assert client.sock.recv(100) == b""


# ------------------------------------------------------------------------------------------------ who is refused


@pytest.mark.parametrize("code", [nbd.LIST, nbd.GO, nbd.INFO, nbd.STRUCTURED_REPLY, nbd.SET_META_CONTEXT, 99])
def test_client_in_the_clear_is_told_that_tls_is_required(served, code):
    client = served.client()
    assert [reply.kind for reply in client.option(code)] == [nbd.TLS_REQD]
    client.abort()


def test_export_name_in_the_clear_ends_the_connection(served):
    with pytest.raises(GoneError) as caught:
        served.client().export_name("desk")
    assert caught.value.rest == b""


def look_around(served: Serving, ours: ssl.SSLContext) -> list[str]:
    client = served.client()
    client.start_tls(ours, "localhost")
    return client.exports()


def test_client_without_a_certificate_is_refused(served, papers, devices):
    with pytest.raises(REFUSED):
        look_around(served, papers.authority.client_context())
    until(lambda: served.server.clients == 0)
    assert not devices.opened


def test_client_with_another_authoritys_certificate_is_refused(served, papers, devices):
    with pytest.raises(REFUSED):
        look_around(served, papers.authority.client_context(papers.stranger))
    until(lambda: served.server.clients == 0)
    assert not devices.opened


def test_client_that_does_not_trust_the_server_leaves(served, papers):
    client = served.client()
    with pytest.raises(ssl.SSLCertVerificationError):
        client.start_tls(papers.other.client_context(papers.client), "localhost")
    until(lambda: served.server.clients == 0)
    secure(served, papers, "desk")


@pytest.mark.parametrize(
    "smuggled", [nbd.option(nbd.LIST), nbd.option(nbd.GO, nbd.info_data("desk")), b"x" * 5000]
)
def test_what_is_smuggled_in_behind_starttls_ends_the_connection(served, devices, smuggled):
    client = served.client()
    client.sock.sendall(nbd.option(nbd.STARTTLS) + smuggled)
    said = client.wait_for_end()
    assert nbd.read_option_reply(nbd.taking(said)).kind == nbd.ACK
    assert nbd.OPTION_REPLY_MAGIC not in said[20:]
    assert not devices.opened


def test_server_without_a_certificate_refuses_tls(devices, tmp_path):
    with serving(devices, tmp_path, tcp=True) as served:
        client = served.client()
        assert client.option(nbd.STARTTLS)[-1].kind == nbd.POLICY
        client.go("desk")


# -------------------------------------------------------------------------------------------------------- limits


def test_client_that_falls_silent_in_the_tls_handshake_is_dropped(devices, tmp_path, context):
    with serving(devices, tmp_path, tls=context, limits=Limits(handshake_seconds=0.3)) as served:
        client = served.client()
        client.option(nbd.STARTTLS)
        assert client.wait_for_end() == b""
        until(lambda: served.server.clients == 0)


def test_record_that_drips_does_not_stretch_the_handshake(devices, tmp_path, context, papers):
    limits = Limits(handshake_seconds=1.0)
    with serving(devices, tmp_path, tls=context, limits=limits) as served:
        client = served.client()
        client.option(nbd.STARTTLS)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        ours = papers.authority.client_context(papers.client)
        tls = ours.wrap_bio(incoming, outgoing, server_hostname="localhost")
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                client.sock.sendall(outgoing.read())
                incoming.write(client.sock.recv(1 << 16))
        tls.write(nbd.client_flags() * 4000)
        drips, begun = outgoing.read(), time.monotonic()
        with contextlib.suppress(ConnectionError):
            for drip in drips:
                if time.monotonic() - begun > BOUND:
                    break
                client.sock.sendall(bytes([drip]))
                time.sleep(0.02)
        assert time.monotonic() - begun < BOUND
        until(lambda: served.server.clients == 0)


def test_client_that_does_not_read_is_dropped(devices, tmp_path, context, papers):
    with serving(devices, tmp_path, tcp=True, tls=context, limits=Limits(send_seconds=0.3)) as served:
        client = secure(served, papers, "desk")
        client.send_many(*(client.pending(nbd.READ, 0, 8 * MIB) for _ in range(20)))
        until(lambda: served.server.clients == 0)
    assert devices.open_names == []


def test_clients_that_vanish_leave_nothing(served, papers):
    secure(served, papers, "desk").disconnect()
    until(lambda: served.server.clients == 0)
    before = descriptors()
    for turn in range(40):
        client = secure(served, papers, "desk")
        client.send_many(*(client.pending(nbd.READ, 0, MIB) for _ in range(turn)), client.pending(nbd.FLUSH))
        client.close()
    until(lambda: served.server.clients == 0)
    assert threads() == ["cowstore-nbd"]
    assert descriptors() <= before


def test_requests_that_were_sent_are_answered_at_the_end(devices, tmp_path, context, papers):
    with serving(devices, tmp_path, tls=context) as served:
        client = secure(served, papers, "desk")
        client.flush()
        asked = [client.pending(nbd.WRITE, number * BLOCK, data=b"w" * BLOCK) for number in range(100)]
        client.send_many(*asked, client.pending(nbd.FLUSH))
        assert served.server.stop()
        assert {client.receive().error for _ in range(101)} == {0}
        assert client.wait_for_end() == b""


# ---------------------------------------------------------------------------------------------- the server's own


def test_papers_that_cannot_be_used(papers, tmp_path):
    certificate, key = papers.server
    authority = papers.authority.certificate
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for wrong in [
        (tmp_path / "gone", key, authority),
        (certificate, tmp_path / "gone", authority),
        (certificate, key, tmp_path / "gone"),
        (certificate, papers.client[1], authority),
        (nonsense, key, authority),
        (certificate, nonsense, authority),
        (certificate, key, nonsense),
        (*papers.locked, authority),
    ]:
        with pytest.raises(InvalidError, match="TLS cannot be set up"):
            tls_context(*wrong)
