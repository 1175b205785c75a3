"""Agents: what speaks for the guest, on a port of the machine. Debian's `qemu-guest-agent` is one.

Source: docs/interop/qemu-ga.rst and qga/qapi-schema.json of QEMU.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cowstore.errors import GuestError

_COMMAND_SECONDS = 60.0
_SYNC_SECONDS = 30.0
_POLL_SECONDS = 0.01
_SENTINEL = b"\xff"  # no part of any JSON text, so the other side forgets whatever it has half read
_ANSWER_BYTES = 64 << 20


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
    """The line to one guest's agent, for one conversation at a time.

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
        self._pending = b""
        self._in_step = False
        try:
            self._sock.connect(str(path))
        except OSError as error:
            self._sock.close()
            raise self._error("connect", str(error)) from error

    def _sync(self) -> None:
        """Throws away what an earlier conversation has left, on both sides."""
        number = int.from_bytes(os.urandom(4), "big")
        deadline = time.monotonic() + _SYNC_SECONDS
        self._send("guest-sync-delimited", {"id": number}, _SENTINEL)
        while self._receive("sync", deadline).get("return") != number:
            pass
        self._in_step = True

    def ask(self, command: str, seconds: float = _COMMAND_SECONDS, **arguments: Any) -> Any:
        """Has the agent do something; returns its answer.

        Args:
            command: The command without ``guest-`` before it.
            seconds: The time limit.
            **arguments: Its arguments; ``_`` in a name stands for ``-``.

        Raises:
            GuestError: It refuses, or does not answer in time.
        """
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            if not self._in_step:
                self._sync()
            self._in_step = False  # until it has answered: what comes after that would be taken for another answer
            self._send(f"guest-{command}", named)
            answer = self._receive(command, time.monotonic() + seconds)
            self._in_step = True
        except OSError as error:
            raise self._error(command, str(error)) from error
        if "error" in answer:
            raise self._error(command, str(answer["error"].get("desc", "it says no")))
        return answer.get("return")

    def tell(self, command: str, **arguments: Any) -> None:
        """Has the agent do something that it does not answer, as it goes down with the guest."""
        try:
            self._send(f"guest-{command}", arguments)
        except OSError as error:
            raise self._error(command, str(error)) from error

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
        pid = self.ask("exec", seconds, **wanted)["pid"]
        pause = _POLL_SECONDS
        while not (found := self.ask("exec-status", pid=pid))["exited"]:
            if time.monotonic() > deadline:
                raise self._error(words[0], f"it has not ended within {seconds:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        status = 128 + found["signal"] if "signal" in found else found.get("exitcode", 0)
        output, errors = (base64.b64decode(found.get(key, "")) for key in ("out-data", "err-data"))
        return Outcome(status, output, errors)

    def _send(self, command: str, arguments: Mapping[str, Any], prefix: bytes = b"") -> None:
        self._sock.settimeout(_COMMAND_SECONDS)
        self._sock.sendall(prefix + json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")

    def _receive(self, step: str, deadline: float) -> dict[str, Any]:
        """The next answer. The guest is not trusted: what is no answer is passed over, and each has an end."""
        while True:
            line, found, rest = self._pending.partition(b"\n")
            if found:
                self._pending = rest
                try:
                    answer = json.loads(line.rpartition(_SENTINEL)[2])
                except (ValueError, RecursionError):
                    continue
                if isinstance(answer, dict):
                    return answer
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._error(step, "no answer in time", hint="is qemu-guest-agent running in the guest?")
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(1 << 16)
            except TimeoutError:
                continue
            if not data:
                raise self._error(step, "the machine has ended")
            self._pending += data
            if len(self._pending) > _ANSWER_BYTES:
                raise self._error(step, f"an answer of more than {_ANSWER_BYTES} bytes")

    def _error(self, step: str, reason: str, *, hint: str = "") -> GuestError:
        return GuestError(self._machine, step, reason, hint=hint)

    def close(self) -> None:
        """Ends the conversation."""
        self._sock.close()
