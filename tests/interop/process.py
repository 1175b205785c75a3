"""A program that runs beside a test, and that is gone when the test is."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Self

TIMEOUT = 400
"""Seconds to wait for what should happen soon: a machine may be busy, and nothing here is about speed."""


class Process:
    """A running program, its output in a file. Leaving the `with` block kills it, as does the test's own end."""

    def __init__(self, words: Sequence[str], output: Path, errors: Path) -> None:
        with output.open("ab") as stdout, errors.open("ab") as stderr:
            # The signal at the parent's death is for the case that not even `finally` is reached.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *words], stdin=subprocess.PIPE, stdout=stdout, stderr=stderr
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def end(self, number: signal.Signals) -> int:
        """Sends it a signal and waits for its end; returns its exit status."""
        self._process.send_signal(number)
        return self._process.wait(TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        try:
            self.stdin.close()
        except BrokenPipeError:  # what it has not read by now, it will not
            pass
