"""Sessions by chance, mostly right and sometimes not, against the model; and bugs that they have to find."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st

from cowstore.nbd import Handshake, Requests, wire
from cowstore.nbd.transmission import Transmission
from fuzz.nbd_protocol import DOCUMENTED, BugError, check, seeds
from tests.unit import nbd_messages as nbd
from tests.unit.nbd_messages import Request
from tests.unit.nbd_sessions import SESSIONS, Sent

ROOT = Path(__file__).parents[2]


@settings(max_examples=settings().max_examples * 6)
@given(SESSIONS)
def test_sessions_go_as_the_specification_says(sent):
    event(check(sent.data, tls=sent.tls).partition(":")[0])


@given(SESSIONS)
def test_session_can_be_made_again_from_what_is_shown(sent):
    again = eval(repr(sent), {"Sent": Sent})
    assert (again.data, again.tls) == (sent.data, sent.tls)


@given(st.binary(max_size=200))
def test_bytes_without_any_sense_do_no_harm(data):
    check(data)
    check(nbd.client_flags() + data)
    check(nbd.client_flags() + nbd.option(nbd.GO, nbd.info_data("desk")) + data)


# ----------------------------------------------------------------------------------------------- what it returns

GO = nbd.option(nbd.GO, nbd.info_data("desk"))
EXAMPLES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ended"),
    "abort": (nbd.client_flags() + nbd.option(nbd.ABORT), "ended"),
    "go": (nbd.client_flags() + GO, "accepted"),
    "a request": (nbd.client_flags() + GO + Request(nbd.READ, 1, 0, 10).encode(), "accepted"),
    "disc": (nbd.client_flags() + GO + Request(nbd.DISC).encode() + b"more", "ended"),
    "flags": (nbd.client_flags(7), "refused: unknown client flags 0x7"),
    "name": (nbd.client_flags() + nbd.option(nbd.EXPORT_NAME, b"gone"), "refused: no export for EXPORT_NAME: .*"),
    "magic": (nbd.client_flags() + GO + bytes(28), "refused: a request does not begin with its magic"),
    "write": (
        nbd.client_flags() + GO + Request(nbd.WRITE, 1, 0, 1 << 31).encode(),
        "refused: a write of 2147483648 bytes, where 1048576 are allowed",
    ),
}


def test_seeds_lead_everywhere():
    assert {check(data) for data in seeds()} == {"accepted", "ended"}
    assert {check(data, tls=True).partition(":")[0] for data in seeds()} == {"accepted", "ended", "refused"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_verdicts(name):
    data, expected = EXAMPLES[name]
    if expected.endswith(".*"):
        assert check(data).startswith(expected[:-2])
        assert DOCUMENTED.fullmatch(check(data).partition(": ")[2])
    else:
        assert check(data) == expected


# -------------------------------------------------------------------------------------------------- planted bugs


class Blind:
    """The structure of a request, whatever its magic is."""

    size = wire.REQUEST.size

    def unpack_from(self, buffer: Any, offset: int) -> tuple[int, ...]:
        _, *rest = struct.unpack_from(">IHHQQI", buffer, offset)
        return (wire.REQUEST_MAGIC, *rest)


def no_magic(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("cowstore.nbd.requests.wire.REQUEST", Blind())


def reply_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transmission, "_cache", lambda self, request: None)


def reply_sent_twice(patch: pytest.MonkeyPatch) -> None:
    fail = Transmission._fail

    def twice(self: Transmission, *arguments: Any) -> None:
        fail(self, *arguments)
        fail(self, *arguments)

    patch.setattr(Transmission, "_fail", twice)


def end_is_one_byte_late(patch: pytest.MonkeyPatch) -> None:
    check_range = Transmission._check

    def late(self: Transmission, request: Any, *arguments: Any) -> None:
        self._size += 1
        try:
            check_range(self, request, *arguments)
        finally:
            self._size -= 1

    patch.setattr(Transmission, "_check", late)


def fua_is_answered_at_once(patch: pytest.MonkeyPatch) -> None:
    succeed = Transmission._succeed
    patch.setattr(Transmission, "_succeed", lambda self, request: succeed(self, request._replace(flags=0)))


def contexts_count_for_any_export(patch: pytest.MonkeyPatch) -> None:
    choose = Handshake._choose

    def forgetful(self: Handshake, export: Any, raw: bytes) -> None:
        self._agreed.context_name = raw
        choose(self, export, raw)

    patch.setattr(Handshake, "_choose", forgetful)


def write_has_no_limit(patch: pytest.MonkeyPatch) -> None:
    init = Requests.__init__

    def boundless(self: Requests, limits: Any = None) -> None:
        init(self, limits)
        self._limit = 1 << 24

    patch.setattr(Requests, "__init__", boundless)


def zeros_are_not_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transmission, "_zero", lambda self, request: (self._check(request), self._succeed(request)))


def hole_is_too_long(patch: pytest.MonkeyPatch) -> None:
    class Longer:
        def pack(self, *values: int) -> bytes:
            return struct.pack(">IHHQIQI", *values[:-1], values[-1] + 1)

    patch.setattr("cowstore.nbd.transmission.wire.HOLE_CHUNK", Longer())


PLANTED: list[Callable[[pytest.MonkeyPatch], None]] = [
    no_magic,
    reply_dropped,
    reply_sent_twice,
    end_is_one_byte_late,
    fua_is_answered_at_once,
    contexts_count_for_any_export,
    write_has_no_limit,
    zeros_are_not_written,
    hole_is_too_long,
]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_planted_bug_is_found(plant, monkeypatch):
    """By the same sessions; the first failure is enough, so nothing is made smaller."""

    @seed(4)
    @settings(
        max_examples=2000,
        phases=[Phase.generate],
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(SESSIONS)
    def hunt(sent: Sent) -> None:
        check(sent.data, tls=sent.tls)

    plant(monkeypatch)
    with pytest.raises((AssertionError, EOFError)):
        hunt()


def test_memory_that_is_taken_is_found(monkeypatch):
    init = Requests.__init__

    def hoard(self: Any, limits: Any = None) -> None:
        init(self, limits)
        self.hoard = bytearray(1 << 24)

    monkeypatch.setattr(Requests, "__init__", hoard)
    with pytest.raises(BugError, match="bytes of memory"):
        check(nbd.client_flags() + GO + Request(nbd.FLUSH).encode())


def test_program_says_that_it_needs_atheris():
    words = [sys.executable, "-m", "fuzz.nbd_protocol", "-runs=10"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "atheris" in done.stderr
