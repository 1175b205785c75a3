"""The control socket: commands ask the process that has the machines, in lines of JSON.

A connection carries one request, ``{"do": VERB, "with": {...}}``, then any number of ``{"step": [...]}`` and one
``{"answer": ...}`` or ``{"error": {...}}``. Only processes of the same user are heard. A command that goes away in
the middle leaves its request to be done to its end.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from cowstore import errors
from cowstore.errors import InvalidError, MachineError, StoreError

from .accelerators import Accelerators
from .configuration import Configuration
from .forking import Wish
from .manager import Manager
from .stores import Progress, no_progress

_log = logging.getLogger("cowstore.machines")
_PEER = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED
_REQUEST_BYTES = 1 << 20
_BACKLOG = 64
_ACCELERATORS = "accelerators.json"


class Verbs:
    """What can be asked, as calls of a manager with and answers in plain values.

    Args:
        manager: Does it.
        accelerators: Chooses what a new machine runs on.
    """

    def __init__(self, manager: Manager, accelerators: Accelerators) -> None:
        self._manager = manager
        self._accelerators = accelerators

    def call(self, verb: str, arguments: dict[str, Any], progress: Progress) -> Any:
        """Does what a request asks for.

        Raises:
            InvalidError: There is no such request.
            StoreError: It failed.
        """
        handler = _HANDLERS.get(verb)
        if handler is None:
            raise InvalidError(f"request {verb!r} is not known", hint="is the server of another version?")
        try:
            return plain(handler(self, progress, **arguments))
        except TypeError as error:
            raise InvalidError(f"request {verb!r} does not fit: {error}") from error

    def _ping(self, _: Progress) -> Any:
        return {"pid": os.getpid()}

    def _start(self, _: Progress, name: str, configuration: dict[str, Any]) -> Any:
        chosen = self._accelerators.choose(str(configuration.get("accelerator", "auto")))
        return self._manager.start(name, Configuration.read({**configuration, "accelerator": chosen}))

    def _fork(self, progress: Progress, source: str, count: int, prefix: str, identity: bool, hook: str) -> Any:
        wish = Wish(identity, base64.b64decode(hook))
        return self._manager.fork(source, count, prefix=prefix, wish=wish, progress=progress)

    def _list(self, _: Progress) -> Any:
        return self._manager.machines()

    def _show(self, _: Progress, name: str) -> Any:
        return self._manager.info(name)

    def _checkpoint(self, progress: Progress, name: str, checkpoint: str) -> Any:
        return self._manager.checkpoint(name, checkpoint, progress)

    def _keep(self, progress: Progress, name: str, checkpoint: str) -> Any:
        return self._manager.keep(name, checkpoint, progress)

    def _refresh(self, _: Progress, name: str, hook: str) -> Any:
        return self._manager.refresh(name, Wish(hook=base64.b64decode(hook)))

    def _stop(self, _: Progress, names: list[str], seconds: float) -> Any:
        for name in names:
            self._manager.info(name)  # all of them, or none
        for name in names:
            self._manager.stop(name, seconds=seconds)
        return names

    def _run(self, _: Progress, name: str, words: list[str], data: str, seconds: float) -> Any:
        outcome = self._manager.run(name, words, base64.b64decode(data), seconds)
        output, said = (base64.b64encode(text).decode() for text in (outcome.output, outcome.errors))
        return {"status": outcome.status, "output": output, "errors": said}

    def _checkpoints(self, _: Progress) -> Any:
        return list(self._manager.checkpoints())

    def _delete_checkpoint(self, _: Progress, name: str) -> Any:
        self._manager.delete_checkpoint(name)
        return name


_HANDLERS: dict[str, Callable[..., Any]] = {
    "ping": Verbs._ping,
    "start": Verbs._start,
    "fork": Verbs._fork,
    "list": Verbs._list,
    "show": Verbs._show,
    "checkpoint": Verbs._checkpoint,
    "keep": Verbs._keep,
    "refresh": Verbs._refresh,
    "stop": Verbs._stop,
    "run": Verbs._run,
    "checkpoints": Verbs._checkpoints,
    "delete-checkpoint": Verbs._delete_checkpoint,
}


class Server:
    """Answers requests at a socket, each in a thread of its own.

    Args:
        manager: Does what is asked.
        path: The socket; its directory is private.
    """

    def __init__(self, manager: Manager, path: Path) -> None:
        self._verbs = Verbs(manager, Accelerators(path.parent / _ACCELERATORS))
        self._path = path
        path.unlink(missing_ok=True)  # nobody else's: there is one server a store
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        path.chmod(0o600)
        self._sock.listen(_BACKLOG)
        self._busy: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._acceptor = threading.Thread(target=self._accept, name="cowstore-control", daemon=True)
        self._acceptor.start()

    @property
    def busy(self) -> bool:
        """Whether anything is being done for somebody."""
        with self._lock:
            return bool(self._busy)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._sock.accept()
            except OSError:
                return  # closed
            _, uid, _ = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if uid != os.geteuid():
                sock.close()
                continue
            thread = threading.Thread(target=self._attend, args=(sock,), name="cowstore-request", daemon=True)
            with self._lock:
                self._busy.add(thread)
            thread.start()

    def _attend(self, sock: socket.socket) -> None:
        try:
            with sock, sock.makefile("rwb") as file:
                self._answer(cast("BinaryIO", file))
        except OSError as error:
            _log.info("a command has gone: %s", error)
        finally:
            with self._lock:
                self._busy.discard(threading.current_thread())

    def _answer(self, file: BinaryIO) -> None:
        def tell(step: str, done: int, total: int) -> None:
            try:
                _send(file, {"step": [step, done, total]})
            except OSError:
                pass  # nobody watches any more; what was asked for is done all the same

        try:
            verb, arguments = _request(file.readline(_REQUEST_BYTES))
            answer = {"answer": self._verbs.call(verb, arguments, tell)}
        except (StoreError, OSError) as error:
            answer = {"error": told(error)}
        except Exception as error:  # noqa: BLE001 - the last door of a thread: who asked gets an answer
            _log.exception("a request failed")
            answer = {"error": told(MachineError(f"unexpected {type(error).__name__}: {error}"))}
        _send(file, answer)

    def close(self) -> None:
        """Takes no more requests; those under way are done to their end."""
        self._path.unlink(missing_ok=True)
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._acceptor.join()
        with self._lock:
            busy = list(self._busy)
        for thread in busy:
            thread.join()


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
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(self._path))
            with sock.makefile("rwb") as file:
                _send(cast("BinaryIO", file), {"do": verb, "with": arguments})
                for line in file:
                    message = json.loads(line)
                    if "step" in message:
                        progress(*message["step"])
                    elif "error" in message:
                        raise raised(message["error"])
                    else:
                        return message["answer"]
        raise MachineError("the server has gone before it answered", hint="look at what runs: cowstore vm ls")


def _request(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        message = json.loads(line)
        verb, arguments = message["do"], message["with"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidError(f"that is no request: {error}") from error
    if not isinstance(verb, str) or not isinstance(arguments, dict):
        raise InvalidError("that is no request")
    return verb, arguments


def _send(file: BinaryIO, message: Any) -> None:
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


def plain(value: Any) -> Any:
    """The same in dicts and lists, which is all that JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value
