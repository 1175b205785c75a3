"""The NBD server under test: started, killed and started again at the same socket."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any, Self

from .process import TIMEOUT, Process

FAULTY = Path(__file__).with_name("faulty.py")


class ServerError(AssertionError):
    """A server did not do what it was told; the message ends with what it said."""


class Server:
    """`cowstore serve` of one store on a Unix socket. Leaving the `with` block kills it, if it still runs."""

    def __init__(self, store: Path, socket: Path, folder: Path, fault: str = "") -> None:
        """Starts it.

        Args:
            store: The store that it serves.
            socket: Where it listens. The path of a Unix socket is short: 107 bytes.
            folder: Keeps what it says.
            fault: One of faulty.py, to be planted.
        """
        self.socket = socket
        program = [str(FAULTY), fault] if fault else ["-m", "cowstore_cli"]
        self._words = [sys.executable, *program]
        self._words += ["--store", str(store), "serve", "--json", "--socket", str(socket)]
        self._output, self._errors = folder / "server.out", folder / "server.err"
        self.facts: dict[str, Any] = {}
        self._start()

    def restart(self) -> None:
        """Starts it once more, where it was, after it was killed or stopped."""
        self._process.__exit__()
        self._start()

    def kill(self) -> None:
        """Ends it without a word."""
        self._process.end(signal.SIGKILL)

    def stop(self) -> None:
        """Asks it to end.

        Raises:
            ServerError: it did not end well.
        """
        status = self._process.end(signal.SIGTERM)
        if status != 0:
            raise self._error(f"it ended with status {status} after SIGTERM")

    def _start(self) -> None:
        """Starts it and waits until it says that it is ready."""
        self._output.write_bytes(b"")
        self._process = Process(self._words, self._output, self._errors)
        try:
            self.facts = json.loads(self._first_line())
            if self.facts["pid"] != self._process.pid:
                raise self._error(f"it is process {self._process.pid} and says {self.facts}")
        except BaseException:
            self._process.__exit__()
            raise

    def _first_line(self) -> str:
        end = time.monotonic() + TIMEOUT
        while not (said := self._output.read_text()).endswith("\n"):
            if self._process.status is not None:
                raise self._error(f"it ended with status {self._process.status} before it was ready")
            if time.monotonic() > end:
                raise self._error(f"it was not ready within {TIMEOUT} s")
            time.sleep(0.02)
        return said

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{what}\n--- {self._errors.name}\n{self._errors.read_text()[-5000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__()
