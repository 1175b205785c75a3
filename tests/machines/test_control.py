"""The control socket: requests, answers, errors with their facts, and who goes away in the middle."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cowstore import errors
from cowstore.errors import InvalidError, MachineError, StoreError
from cowstore.machines import Client, Server
from cowstore.machines.control import raised, request, told


class Verbs:
    """What is asked of a manager, answered by a function."""

    def __init__(self) -> None:
        self.answer: Callable[..., Any] = lambda verb, arguments, progress: [verb, arguments]

    def call(self, verb: str, arguments: dict[str, Any], progress: Any) -> Any:
        return self.answer(verb, arguments, progress)


@pytest.fixture
def verbs() -> Verbs:
    return Verbs()


@pytest.fixture
def path(socket_folder: Path) -> Path:
    return socket_folder / f"control{time.monotonic_ns():x}"


@pytest.fixture
def server(verbs: Verbs, path: Path) -> Iterator[Server]:
    made = Server(lambda: verbs, path)  # type: ignore[arg-type,return-value]  # all that it calls is there
    yield made
    made.close()


ERRORS: list[StoreError] = [
    errors.NotFoundError("machine", "desk", hint="look"),
    errors.ExistsError("machine", "desk"),
    errors.InvalidError("never right", hint="do it otherwise"),
    errors.RangeError("desk", 1, 2, 3),
    errors.InUseError("clone 'desk'", 4, hint="wait"),
    errors.ReadOnlyError("image"),
    errors.ClosedError("closed"),
    errors.PoisonedError("planted"),
    errors.NoSpaceError("/path"),
    errors.MachineError("did not", hint="try"),
    errors.GuestError("desk", "hook", "failed", hint="mend it"),
    errors.SourceError("source", "changed"),
    errors.FormatError("/path", "no store"),
    errors.CorruptError("damage"),
    errors.BlockCorruptError(5, "wrong", name="desk", offset=4096),
    errors.SegmentCorruptError("/path", "short"),
    errors.CatalogCorruptError("/path", "wrong"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_arrive_as_they_were_raised(server, verbs, path, error):
    def fail(*_: object) -> None:
        raise error

    verbs.answer = fail
    with pytest.raises(type(error)) as refused:
        Client(path).ask("fork")
    assert type(refused.value) is type(error)
    assert str(refused.value) == str(error)
    assert {**vars(refused.value)} == {
        key: value for key, value in vars(error).items() if not isinstance(value, bytes)
    }


def test_every_error_is_in_the_list():
    classes = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StoreError)}
    assert {type(error) for error in ERRORS} | {StoreError} == classes


def test_other_errors_become_machine_errors(server, verbs, path, caplog):
    for error, said in (
        (OSError(28, "No space left"), "No space left"),
        (RuntimeError("oops"), "RuntimeError: oops"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        verbs.answer = fail
        with caplog.at_level(logging.CRITICAL), pytest.raises(MachineError, match=said):
            Client(path).ask("fork")


def test_told_and_raised_are_inverse():
    again = raised(json.loads(json.dumps(told(errors.GuestError("m", "s", "r", hint="h")))))
    assert isinstance(again, errors.GuestError)
    assert (again.machine, again.step, again.hint) == ("m", "s", "h")
    assert raised({"kind": "NoSuchError", "message": "m", "facts": {"hint": ""}}).args == ("m",)


def test_an_answer_and_its_steps(server, verbs, path):
    def work(verb: str, arguments: dict[str, Any], progress: Any) -> Any:
        for done in range(3):
            progress(verb, done, 3)
        return arguments

    verbs.answer = work
    steps: list[tuple[str, int, int]] = []
    assert Client(path).ask("fork", lambda *step: steps.append(step), count=3) == {"count": 3}
    assert steps == [("fork", 0, 3), ("fork", 1, 3), ("fork", 2, 3)]


def test_ping_asks_nobody(server, verbs, path):
    verbs.answer = None
    assert set(Client(path).ask("ping")) == {"pid"}


GARBAGE = [b"\n", b"what\n", b"[]\n", b"5\n", b"{}\n", b'{"do": "x"}\n', b'{"do": 5, "with": {}}\n',
           b'{"do": "x", "with": []}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n", b'{"do":']  # fmt: skip


@pytest.mark.parametrize("said", GARBAGE, ids=lambda said: repr(said[:12]))
def test_what_is_no_request(server, path, said):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as file:
            answer = json.loads(file.readline())
    assert answer["error"]["kind"] == "InvalidError"
    assert answer["error"]["message"].startswith("that is no request")
    assert Client(path).ask("list") == ["list", {}], "the next one is served"


def test_requests_are_checked():
    assert request(b'{"do": "x", "with": {"a": 1}}') == ("x", {"a": 1})
    with pytest.raises(InvalidError):
        request(b"")


def test_many_at_once_are_served_side_by_side(server, verbs, path):
    together = threading.Barrier(20)
    verbs.answer = lambda *_: together.wait(20)
    answers: list[int] = []
    threads = [threading.Thread(target=lambda: answers.append(Client(path).ask("list"))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == list(range(20))


def test_what_is_asked_for_is_done_though_nobody_waits(server, verbs, path):
    gone, done = threading.Event(), threading.Event()

    def work(_: str, __: dict[str, Any], progress: Any) -> Any:
        assert gone.wait(20)
        for number in range(100):
            progress("step", number, 100)
        done.set()
        return "x" * 1_000_000

    verbs.answer = work
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b'{"do": "fork", "with": {}}\n')
        while not server.busy:
            time.sleep(0.01)
    gone.set()
    assert done.wait(20)
    end = time.monotonic() + 20
    while server.busy:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_only_its_user_may_connect(server, path):
    assert path.stat().st_mode & 0o777 == 0o600


def test_closing_waits_for_what_is_done(verbs, path):
    begun, go_on = threading.Event(), threading.Event()

    def work(*_: object) -> str:
        begun.set()
        assert go_on.wait(20)
        return "done"

    verbs.answer = work
    server = Server(lambda: verbs, path)
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(Client(path).ask("fork")))
    asking.start()
    assert begun.wait(20)
    threading.Timer(0.2, go_on.set).start()
    server.close()
    asking.join()
    assert answers == ["done"]
    assert not path.exists()
    with pytest.raises(OSError, match="No such file"):
        Client(path).ask("ping")


def test_who_says_nothing_keeps_no_server_from_ending(verbs, path):
    server = Server(lambda: verbs, path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        begun = time.monotonic()
        server.close()
        assert time.monotonic() - begun < 5


def test_a_socket_that_was_left_is_replaced(verbs, path):
    path.touch()
    server = Server(lambda: verbs, path)
    assert Client(path).ask("list") == ["list", {}]
    server.close()


# A server that goes away.


def listening(path: Path, said: bytes) -> threading.Thread:
    """Takes one request, says that, and goes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as sock:
            sock.recv(65536)
            sock.sendall(said)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize("said", [b"", b'{"step": ["fork", 1, 2]}\n'])
def test_a_server_that_goes_before_it_answers(path, said):
    thread = listening(path, said)
    with pytest.raises(MachineError, match="has gone before it answered"):
        Client(path).ask("fork")
    thread.join()


def test_a_server_that_goes_in_the_middle_of_its_answer(path):
    thread = listening(path, b'{"answer": [1, 2')
    try:
        with pytest.raises(MachineError, match="has gone before it answered"):
            Client(path).ask("fork")
    finally:
        thread.join()
