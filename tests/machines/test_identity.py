"""Identities: made so that no two are alike, and believed only when the guest has said them."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from cowstore.errors import GuestError
from cowstore.machines.agent import Outcome
from cowstore.machines.identity import Identity, apply, check_told, fresh_mac, run_hook, set_clock

ONE = Identity("desk-1", "0123456789abcdef" * 2, "g", "52:54:00:00:00:01")
FORMER = "52:54:00:00:00:99"
SAID = ["desk-1", "0123456789abcdef" * 2, "00:00:00:00:00:00", "52:54:00:00:00:01"]


class Fake:
    """An agent that runs nothing, and tells what it is told to tell."""

    def __init__(self, outcome: Outcome | None = None, off: float = 0.0, refuses: bool = False) -> None:
        self.outcome = outcome or Outcome(0, " ".join(SAID).encode(), b"")
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.ran: dict[str, Any] = {}
        self._off = off
        self._refuses = refuses

    def ask(self, command: str, **arguments: Any) -> Any:
        self.asked.append((command, arguments))
        if command == "set-time" and self._refuses:
            raise GuestError("desk", command, "no clock here")
        return int((time.time() + self._off) * 1e9) if command == "get-time" else {}

    number = ask

    def run(self, words: list[str], **options: Any) -> Outcome:
        self.ran = {"words": words, **options}
        return self.outcome


@pytest.mark.parametrize(
    ("name", "hostname"),
    [("desk-1", "desk-1"), ("Desk_1.A", "desk-1-a"), ("-x-", "x"), ("\u00fc", "machine"), ("a" * 80, "a" * 63),
     ("a" * 62 + "-b", "a" * 62)],
)  # fmt: skip
def test_names_of_hosts(name, hostname):
    assert Identity.make(name, "").hostname == hostname


def test_no_two_are_alike():
    made = [Identity.make("x", fresh_mac(())) for _ in range(200)]
    for what in ("machine_id", "generation"):
        assert len({getattr(one, what) for one in made}) == 200
    assert all(re.fullmatch("[0-9a-f]{32}", one.machine_id) for one in made)
    taken: set[str] = set()
    for _ in range(200):
        mac = fresh_mac(taken)
        assert mac not in taken
        taken.add(mac)
    assert all(re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", one.mac) for one in made)
    assert not Identity.make("x", "").mac


def test_what_a_guest_says_is_believed():
    check_told("desk", ONE, FORMER, SAID)
    check_told("desk", Identity(ONE.hostname, ONE.machine_id, "g"), "", SAID[:2])


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([], "calls itself ''"),
        (SAID[:1], "calls itself 'desk-1'"),
        (["parent", *SAID[1:]], "calls itself 'parent"),
        ([SAID[0], "f" * 32, *SAID[2:]], "calls itself"),
        ([SAID[1], SAID[0], *SAID[2:]], "calls itself"),
        (SAID[:2], "no network card, and not 52:54:00:00:00:01"),
        (SAID[:3], "and not 52:54:00:00:00:01"),
        ([*SAID[:3], FORMER], f"{FORMER}, and not"),
        ([*SAID, FORMER], f"{FORMER}, and not"),
    ],
)
def test_what_a_guest_says_is_compared(said, why):
    with pytest.raises(GuestError, match=f"the guest of desk: identity: .*{why}"):
        check_told("desk", ONE, FORMER, said)


def test_an_identity_is_given_with_entropy():
    agents = [Fake(), Fake()]
    for agent in agents:
        apply(agent, "desk", ONE, FORMER)  # type: ignore[arg-type]
    seeds = [agent.ran["data"] for agent in agents]
    assert seeds[0][-256:] != seeds[1][-256:]
    assert agents[0].ran["environment"]["COWSTORE_MAC"] == ONE.mac
    assert [command for command, _ in agents[0].asked] == ["set-time", "get-time"]


@pytest.mark.parametrize("outcome", [Outcome(1, b"", b"no room"), Outcome(137, b"x", b""), Outcome(0, b"", b"")])
def test_an_identity_that_is_not_taken(outcome):
    with pytest.raises(GuestError, match="the guest of desk: identity: "):
        apply(Fake(outcome), "desk", ONE, FORMER)  # type: ignore[arg-type]


@pytest.mark.parametrize("outcome", [Outcome(1, b"", b"x" * 100_000), Outcome(0, b"x" * 100_000, b"")])
def test_what_a_guest_says_is_not_repeated_at_length(outcome):
    with pytest.raises(GuestError) as refused:
        apply(Fake(outcome), "desk", ONE, FORMER)  # type: ignore[arg-type]
    assert len(str(refused.value)) < 2000


def test_clocks():
    set_clock(Fake(off=1), "desk")  # type: ignore[arg-type]
    set_clock(Fake(refuses=True), "desk")  # type: ignore[arg-type]
    for off in (-3600, 60):
        with pytest.raises(GuestError, match=rf"clock: it is {off}\.\d s off"):
            set_clock(Fake(off=off), "desk")  # type: ignore[arg-type]
    with pytest.raises(GuestError, match="no clock here"):
        set_clock(Fake(off=60, refuses=True), "desk")  # type: ignore[arg-type]


def test_hooks():
    agent = Fake(Outcome(0, b"", b""))
    run_hook(agent, "desk", b"echo", ONE, "parent")  # type: ignore[arg-type]
    assert agent.ran["data"] == b"echo"
    assert agent.ran["seconds"] == 20
    given = agent.ran["environment"]
    assert (given["COWSTORE_NAME"], given["COWSTORE_PARENT"], given["COWSTORE_MAC"]) == ("desk", "parent", ONE.mac)
    with pytest.raises(GuestError, match="hook: it ended with status 5: wrong") as refused:
        run_hook(Fake(Outcome(5, b"", b"wrong")), "desk", b"x", ONE, "p")  # type: ignore[arg-type]
    assert refused.value.step == "hook"
    with pytest.raises(GuestError) as refused:
        run_hook(Fake(Outcome(5, b"o" * 10_000, b"")), "desk", b"x", ONE, "p")  # type: ignore[arg-type]
    assert len(str(refused.value)) < 1000


def test_an_address_that_somebody_has_is_not_given_again(monkeypatch):
    drawn = iter([b"\1\2\3", b"\1\2\3", b"\4\5\6"])
    monkeypatch.setattr("cowstore.machines.identity.os.urandom", lambda _: next(drawn))
    assert fresh_mac({"52:54:00:01:02:03"}) == "52:54:00:04:05:06"
