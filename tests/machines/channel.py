"""JSON messages over a Unix socket, one a line: what QEMU's monitor and the guest's agent speak."""

from __future__ import annotations

import itertools
import json
import socket
import time
from pathlib import Path
from typing import Any, Self

TIMEOUT_S = 60


class RefusedError(AssertionError):
    """A command was answered with an error."""


class Channel:
    """One connection. Nothing in an agent's answers tells them apart, so one command is under way at a time."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(str(path))
        self._unread = b""
        self.events: list[dict[str, Any]] = []

    @classmethod
    def monitor(cls, path: Path) -> Self:
        monitor = cls(path)
        monitor.message()  # the greeting
        monitor.run("qmp_capabilities")
        return monitor

    @classmethod
    def agent(cls, path: Path) -> Self:
        """Waits for the agent, and for it to drop what an earlier connection may have left half said."""
        agent = cls(path)
        number = time.monotonic_ns()
        agent._say("guest-sync-delimited", {"id": number}, prefix=b"\xff")
        while agent._line() != b'\xff{"return": %d}' % number:
            pass
        return agent

    def run(self, command: str, **arguments: Any) -> Any:
        """What a command returns.

        Raises:
            RefusedError: it failed.
        """
        self._say(command, arguments)
        while "event" in (message := self.message()):
            self.events.append(message)
        if "error" in message:
            raise RefusedError(f"{command}: {message['error']}")
        return message["return"]

    def wait_for(self, event: str, **data: Any) -> None:
        """Waits for an event of the monitor with this among its data; what has come before counts, too."""
        for index in itertools.count():
            if index == len(self.events):
                self.events.append(self.message())
            message = self.events[index]
            if message["event"] == event and data.items() <= message.get("data", {}).items():
                del self.events[: index + 1]
                return

    def message(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._line())
        return found

    def _say(self, command: str, arguments: dict[str, Any], prefix: bytes = b"") -> None:
        words = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self._socket.sendall(prefix + json.dumps(words).encode() + b"\n")

    def _line(self) -> bytes:
        while b"\n" not in self._unread:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionError("QEMU has closed the connection")
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        return line.rstrip(b"\r")

    def close(self) -> None:
        self._socket.close()
