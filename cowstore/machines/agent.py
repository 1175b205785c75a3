"""Agents: what speaks for the guest, on a port of the machine. Debian's `qemu-guest-agent` is one.

The guest is not trusted: whatever it says is looked at before it is believed, and has an end.

Source: docs/interop/qemu-ga.rst and qga/qapi-schema.json of QEMU.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cowstore.errors import GuestError

_COMMAND_SECONDS = 60.0
_SYNC_SECONDS = 30.0
_POLL_SECONDS = 0.01
_SENTINEL = b"\xff"  # no part of any JSON text, so the other side forgets whatever it has half read
_ANSWER_BYTES = 64 << 10
_OUTPUT_BYTES = 48 << 20  # of an answer with what a program wrote: the agent keeps 16 MiB of each stream
_BRACKETS = 1000  # of any answer: more of them would be objects by the million
_MESSAGE = 500  # characters of what an agent says is wrong
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Outcome:
    """How a program in the guest ended.

    Attributes:
        status: Its exit status; 128 and the number of a signal that ended it.
        output: What it wrote.
        errors: What it wrote to its standard error.
    """

    status: int
    output: bytes
    errors: bytes


class Agent:
    """The line to one guest's agent. Any thread may use it; each command waits for the one before it.

    It is kept open: an agent that finds nobody at the other end sleeps for 100 ms before it looks again.

    Args:
        machine: Its name, for messages.
        path: The socket of its port.

    Raises:
        GuestError: There is no such machine.
    """

    def __init__(self, machine: str, path: Path) -> None:
        self._machine = machine
        self._sock = socket.socket(socket.AF_UNIX)
        self._pending = bytearray()
        self._in_step = False
        self._turn = threading.Lock()
        self._sock.settimeout(_COMMAND_SECONDS)
        try:
            self._sock.connect(str(path))
        except OSError as error:
            self._sock.close()
            raise self._error("connect", str(error)) from error

    # One command.

    def ask(self, command: str, seconds: float = _COMMAND_SECONDS, **arguments: Any) -> Any:
        """Has the agent do something; returns its answer, which may be anything.

        Args:
            command: The command without ``guest-`` before it.
            seconds: The time limit.
            **arguments: Its arguments; ``_`` in a name stands for ``-``.

        Raises:
            GuestError: It refuses, or does not answer in time.
        """
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        with self._turn:
            try:
                if not self._in_step:
                    self._sync()
                self._in_step = False  # until it has answered: what comes later would be taken for another answer
                self._send(f"guest-{command}", named)
                answer = self._receive(command, time.monotonic() + seconds)
                self._in_step = True
            except OSError as error:
                raise self._error(command, str(error)) from error
        if "error" in answer:
            refusal = answer["error"]
            said = refusal.get("desc", "it says no") if isinstance(refusal, dict) else refusal
            raise self._error(command, str(said)[:_MESSAGE])
        return answer.get("return")

    def number(self, command: str) -> int:
        """Asks for a number.

        Raises:
            GuestError: It does not give one.
        """
        answer = self.ask(command)
        if not isinstance(answer, int) or abs(answer) >= 1 << 63:
            raise self._error(command, "its answer is no number that makes sense")
        return answer

    def tell(self, command: str, **arguments: Any) -> None:
        """Has the agent do something that it does not answer where it works, as it goes down with the guest."""
        with self._turn:
            try:
                if not self._in_step:
                    self._sync()
                self._in_step = False
                self._send(f"guest-{command}", arguments)
            except OSError as error:
                raise self._error(command, str(error)) from error

    # Programs.

    def run(
        self, words: Sequence[str], *, data: bytes = b"", environment: Mapping[str, str] | None = None,
        seconds: float = _COMMAND_SECONDS,
    ) -> Outcome:  # fmt: skip
        """Runs a program in the guest and waits for its end.

        Args:
            words: Its path and arguments.
            data: Its standard input.
            environment: Its variables.
            seconds: The time limit; a program that takes longer goes on, unwatched.

        Raises:
            GuestError: It could not be started, or has not ended in time.
        """
        deadline = time.monotonic() + seconds
        wanted: dict[str, Any] = {"path": words[0], "arg": list(words[1:]), "capture_output": True}
        if data:
            wanted["input_data"] = base64.b64encode(data).decode()
        if environment:
            wanted["env"] = [f"{key}={value}" for key, value in environment.items()]
        pid = self._field("exec", self.ask("exec", seconds, **wanted), "pid", int)
        pause = _POLL_SECONDS
        while not self._field("exec-status", found := self._status(pid, deadline), "exited", bool):
            if time.monotonic() > deadline:
                raise self._error(words[0], f"it has not ended within {seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        if found.get("out-truncated") or found.get("err-truncated"):
            raise self._error(words[0], "it wrote more than its agent keeps, which is 16 MiB")
        signal = self._field("exec-status", found, "signal", int, 0)
        status = 128 + signal if signal else self._field("exec-status", found, "exitcode", int, 0)
        return Outcome(status & 0xFF, self._bytes(found, "out-data"), self._bytes(found, "err-data"))

    def _status(self, pid: int, deadline: float) -> Any:
        """How far a program is; while file systems are frozen an agent does not tell."""
        try:
            return self.ask("exec-status", max(deadline - time.monotonic(), 1), pid=pid)
        except GuestError as error:
            if "frozen" not in str(error):
                raise
            return {"exited": False}

    def _bytes(self, found: Any, key: str) -> bytes:
        """What a program wrote, as its agent tells it."""
        try:
            return base64.b64decode(self._field("exec-status", found, key, str, ""))
        except ValueError as error:
            raise self._error("exec-status", f"its answer has no {key} that makes sense") from error

    # Messages.

    def _sync(self) -> None:
        """Throws away what an earlier conversation has left, on both sides."""
        number = int.from_bytes(os.urandom(4), "big")
        deadline = time.monotonic() + _SYNC_SECONDS
        self._send("guest-sync-delimited", {"id": number}, _SENTINEL)
        while self._receive("sync", deadline).get("return") != number:
            pass
        self._in_step = True

    def _send(self, command: str, arguments: Mapping[str, Any], prefix: bytes = b"") -> None:
        self._sock.settimeout(_COMMAND_SECONDS)
        self._sock.sendall(prefix + json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def _receive(self, step: str, deadline: float) -> dict[str, Any]:
        """The next answer; what is none is passed over."""
        limit = _OUTPUT_BYTES if step == "exec-status" else _ANSWER_BYTES
        searched = 0
        while True:
            end = self._pending.find(b"\n", searched)
            if end >= 0:
                answer = _parsed(bytes(self._pending[:end]).rpartition(_SENTINEL)[2])
                del self._pending[: end + 1]
                searched = 0
                if answer is not None:
                    return answer
                continue
            searched = len(self._pending)
            if searched > limit:
                raise self._error(step, f"an answer of more than {limit} bytes")
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._error(step, "no answer in time", hint="is qemu-guest-agent running in the guest?")
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(1 << 20)
            except TimeoutError:
                continue
            if not data:
                raise self._error(step, "the machine has ended")
            self._pending += data

    def _field(
        self, step: str, answer: Any, key: str, kind: type[_Value], default: _Value | None = None
    ) -> _Value:
        """A field of an answer, if it is there and of its kind."""
        value = answer.get(key, default) if isinstance(answer, dict) else None
        if not isinstance(value, kind):
            raise self._error(step, f"its answer has no {key} that makes sense")
        return value

    def _error(self, step: str, reason: str, *, hint: str = "") -> GuestError:
        return GuestError(self._machine, step, reason, hint=hint)

    def close(self) -> None:
        """Ends the conversation, also where somebody waits for an answer."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An answer; None where it is none."""
    if line.count(b"{") + line.count(b"[") > _BRACKETS:
        return None
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None
