"""The control socket: commands ask the process that has the machines, in lines of JSON.

A connection carries one request, ``{"do": VERB, "with": {...}}``, then any number of ``{"step": [...]}`` and one
``{"answer": ...}`` or ``{"error": {...}}``.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, BinaryIO, cast

from cowstore import errors
from cowstore.errors import InvalidError, MachineError, StoreError

from .stores import Progress, no_progress

REQUEST_BYTES = 16 << 20


class Client:
    """Whoever asks.

    Args:
        path: The server's socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, verb: str, progress: Progress = no_progress, /, **arguments: Any) -> Any:
        """Sends a request and waits for its answer.

        Raises:
            StoreError: As the server raised it.
            OSError: Nobody listens there.
        """
        message = {"do": verb, "with": arguments}
        if len(json.dumps(message)) >= REQUEST_BYTES:
            raise InvalidError(f"that is more than {REQUEST_BYTES >> 20} MiB to ask for", hint="put it on a disk")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(self._path))
            with sock.makefile("rwb") as file:
                send(cast("BinaryIO", file), message)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # half an answer: it went in the middle of it
                    message = json.loads(line)
                    if "step" in message:
                        progress(*message["step"])
                    elif "error" in message:
                        raise raised(message["error"])
                    else:
                        return message["answer"]
        raise MachineError("the server has gone before it answered", hint="look at what runs: cowstore vm ls")


def request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Verb and arguments of a request. Raises InvalidError."""
    try:
        message = json.loads(line)
        verb, arguments = message["do"], message["with"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidError(f"that is no request: {error}") from error
    if not isinstance(verb, str) or not isinstance(arguments, dict):
        raise InvalidError("that is no request")
    return verb, arguments


def send(file: BinaryIO, message: Any) -> None:
    """Sends one message."""
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def told(error: Exception) -> dict[str, Any]:
    """An error for the other side: its class, its message and its facts."""
    facts = {key: value for key, value in vars(error).items() if isinstance(value, str | int)}
    kind = type(error).__name__ if isinstance(error, StoreError) else "MachineError"
    return {"kind": kind, "message": str(error), "facts": {"hint": "", **facts}}


def raised(message: dict[str, Any]) -> StoreError:
    """The inverse of told()."""
    kind = getattr(errors, str(message["kind"]), MachineError)
    error: StoreError = kind.__new__(kind)
    error.args = (message["message"],)
    vars(error).update(message["facts"])
    return error
