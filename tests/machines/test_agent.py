"""The line to a guest's agent, with an agent at the other end that is slow, broken or hostile."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cowstore.errors import GuestError
from cowstore.machines.agent import Agent, Outcome

Answers = Callable[[str, dict[str, Any]], bytes | None]


def line(answer: Any) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def returned(value: Any) -> bytes:
    return line({"return": value})


class Fake:
    """An agent: it is in step with whoever syncs, and leaves the rest to a function; None says nothing."""

    def __init__(self, path: Path, answers: Answers, before: bytes = b"") -> None:
        self.asked: list[str] = []
        self._answers = answers
        self._before = before
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            sock, _ = self._listener.accept()
            with sock, sock.makefile("rb") as file:
                sock.sendall(self._before)
                for said in file:
                    answer = self._answer(json.loads(said.strip(b"\xff\n")))
                    if answer is None:
                        continue
                    if answer == b"":
                        return
                    sock.sendall(answer)
        except OSError:
            pass  # the test is over

    def _answer(self, message: dict[str, Any]) -> bytes | None:
        command = message["execute"].removeprefix("guest-")
        self.asked.append(command)
        if command == "sync-delimited":
            return b"\xff" + returned(message["arguments"]["id"])
        return self._answers(command, message["arguments"])

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def agent(socket_folder: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Agent]]:
    """Makes an agent that answers so, and the line to it."""
    made: list[Any] = []

    def make(answers: Answers, before: bytes = b"") -> Agent:
        path = socket_folder / f"agent{time.monotonic_ns():x}"
        made.append(Fake(path, answers, before))
        made.append(Agent("desk", path))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()


def test_it_answers(agent):
    line = agent(lambda command, arguments: returned([command, arguments]))
    assert line.ask("ping", some_name=3) == ["ping", {"some-name": 3}]
    assert line.ask("info") == ["info", {}]


NOISE = {
    "garbage": b"what is this\n\x80\x81\n{\n",
    "no answers": b'5\n[]\n"return"\nnull\n',
    "half a line": b'{"return": "of somebody el',
    "answers of another conversation": returned("old") + line({"error": {"desc": "old"}}),
    "an end mark": b"\xff\xff\n\xff",
    "empty lines": b"\n" * 5000,
    "brackets": b"[" * 50_000 + b"\n",
    "a number without end": b"9" * 50_000 + b"\n",
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_what_was_said_before_is_passed_over(agent, noise):
    line = agent(lambda *_: returned("new"), before=noise)
    assert line.ask("ping") == "new"


@pytest.mark.parametrize("noise", [NOISE["garbage"], NOISE["no answers"], NOISE["empty lines"], NOISE["brackets"]])
def test_noise_before_an_answer_is_passed_over(agent, noise):
    line = agent(lambda *_: noise + returned("new"))
    assert line.ask("ping") == "new"
    assert line.ask("ping") == "new"


def test_an_answer_in_pieces(agent):
    pieces = iter([b'{"ret', None])
    line = agent(lambda *_: next(pieces) or b"")
    with pytest.raises(GuestError, match="the guest of desk: ping: "):
        line.ask("ping", 0.3)


def test_one_that_says_nothing(agent):
    line = agent(lambda *_: None)
    begun = time.monotonic()
    with pytest.raises(GuestError, match="ping: no answer in time") as refused:
        line.ask("ping", 0.2)
    assert time.monotonic() - begun < 5
    assert "qemu-guest-agent" in refused.value.hint


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(agent):
    def answers(command: str, _: dict[str, Any]) -> bytes:
        if command == "slow":
            time.sleep(0.5)
        return returned(command)

    line = agent(answers)
    with pytest.raises(GuestError, match="no answer in time"):
        line.ask("slow", 0.1)
    assert line.ask("quick") == "quick"


def test_an_answer_without_end_has_one(agent):
    line = agent(lambda *_: b"x" * (60 << 20))
    begun = time.monotonic()
    with pytest.raises(GuestError, match="an answer of more than"):
        line.ask("ping", 10)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"error": {"class": "GenericError", "desc": "not now"}}, "not now"),
        ({"error": {}}, "says no"),
        ({"error": "text"}, "text"),
        ({"error": None}, "None"),
        ({"error": {"desc": ["a", "list"]}}, "list"),
        ({"error": {"desc": "long " * 10_000}}, "long"),
    ],
)
def test_it_says_no(agent, answer, said):
    line_ = agent(lambda *_: line(answer))
    with pytest.raises(GuestError, match=said) as refused:
        line_.ask("ping")
    assert len(str(refused.value)) < 2000


def test_it_goes_away(agent):
    line = agent(lambda *_: b"")
    with pytest.raises(GuestError, match="desk: ping: "):
        line.ask("ping")


def test_nobody_is_there(socket_folder):
    with pytest.raises(GuestError, match="desk: connect: ") as refused:
        Agent("desk", socket_folder / "nobody").ask("ping")
    assert (refused.value.machine, refused.value.step) == ("desk", "connect")


# Programs.


def program(status: dict[str, Any]) -> Answers:
    """A program that takes a look or two, and ends so."""
    looks = iter(range(3))

    def answers(command: str, _: dict[str, Any]) -> bytes:
        if command == "exec":
            return returned({"pid": 7})
        return returned({"exited": False}) if next(looks) < 2 else returned({"exited": True} | status)

    return answers


def test_a_program_ends(agent):
    text = {"out-data": base64.b64encode(b"out\0").decode(), "err-data": base64.b64encode(b"err").decode()}
    assert agent(program({"exitcode": 3} | text)).run(["/bin/x"]) == Outcome(3, b"out\0", b"err")
    assert agent(program({"signal": 9})).run(["/bin/x"]).status == 128 + 9
    assert agent(program({})).run(["/bin/x"]) == Outcome(0, b"", b"")


def test_what_a_program_is_given(agent):
    seen: list[dict[str, Any]] = []

    def answers(command: str, arguments: dict[str, Any]) -> bytes:
        seen.append(arguments)
        return returned({"pid": 7} if command == "exec" else {"exited": True})

    agent(answers).run(["/bin/x", "a"], data=b"\0in", environment={"A": "1"})
    assert seen[0] == {
        "path": "/bin/x", "arg": ["a"], "capture-output": True, "env": ["A=1"],
        "input-data": base64.b64encode(b"\0in").decode(),
    }  # fmt: skip
    assert seen[1] == {"pid": 7}


def test_a_program_that_does_not_end(agent):
    line = agent(lambda command, _: returned({"pid": 7} if command == "exec" else {"exited": False}))
    with pytest.raises(GuestError, match=r"/bin/x: it has not ended within 0\.3 s"):
        line.run(["/bin/x"], seconds=0.3)


SENSELESS: list[Any] = [5, None, [], "x", {}, {"pid": "x"}, {"pid": None}]


@pytest.mark.parametrize("answer", SENSELESS, ids=str)
def test_a_senseless_answer_to_exec(agent, answer):
    with pytest.raises(GuestError, match="desk: exec"):
        agent(lambda *_: returned(answer)).run(["/bin/x"], seconds=1)


@pytest.mark.parametrize(
    "status",
    [
        5, None, [], {"exited": "yes"}, {"exited": True, "exitcode": "x"}, {"exited": True, "signal": [1]},
        {"exited": True, "out-data": 5}, {"exited": True, "out-data": "a"}, {"exited": True, "err-data": "\u00e9"},
        {"exited": True, "out-data": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_senseless_answer_to_exec_status(agent, status):
    line = agent(lambda command, _: returned({"pid": 7} if command == "exec" else status))
    with pytest.raises(GuestError, match="desk: exec-status"):
        line.run(["/bin/x"], seconds=1)
