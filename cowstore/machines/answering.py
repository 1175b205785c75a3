"""Answering: what commands may ask of the process that has the machines, and who is heard.

Only processes of the same user are. A command that goes away in the middle leaves its request to be done.
"""

from __future__ import annotations

import base64
import inspect
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from cowstore.errors import InvalidError, MachineError, StoreError

from .accelerators import Accelerators
from .configuration import Configuration
from .control import REQUEST_BYTES, request, send, told
from .forking import Wish
from .manager import Manager
from .stores import Progress

_log = logging.getLogger("cowstore.machines")
_PEER = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED
_BACKLOG = 64
_PATIENCE = 10.0  # seconds
_END_SECONDS = 60.0


class Verbs:
    """What can be asked, as calls of a manager with and answers in plain values.

    Args:
        manager: Does it.
        accelerators: Chooses what a new machine runs on.

    Attributes:
        manager: See above.
    """

    def __init__(self, manager: Manager, accelerators: Accelerators) -> None:
        self.manager = manager
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
            inspect.signature(handler).bind(self, progress, **arguments)
        except TypeError as error:
            raise InvalidError(f"request {verb!r} does not fit: {error}") from error
        return plain(handler(self, progress, **arguments))

    def _start(self, _: Progress, name: str, configuration: dict[str, Any]) -> Any:
        chosen = self._accelerators.choose(str(configuration.get("accelerator", "auto")))
        return self.manager.start(name, Configuration.read({**configuration, "accelerator": chosen}))

    def _fork(self, progress: Progress, source: str, count: int, prefix: str, identity: bool, hook: str) -> Any:
        wish = Wish(identity, base64.b64decode(hook))
        return self.manager.fork(source, count, prefix=prefix, wish=wish, progress=progress)

    def _list(self, _: Progress) -> Any:
        return self.manager.machines()

    def _show(self, _: Progress, name: str) -> Any:
        return self.manager.info(name)

    def _checkpoint(self, progress: Progress, name: str, checkpoint: str, freezing: bool) -> Any:
        return self.manager.checkpoint(name, checkpoint, progress, freezing=freezing)

    def _keep(self, progress: Progress, name: str, checkpoint: str) -> Any:
        return self.manager.keep(name, checkpoint, progress)

    def _refresh(self, _: Progress, name: str, hook: str) -> Any:
        return self.manager.refresh(name, Wish(hook=base64.b64decode(hook)))

    def _resume(self, _: Progress, name: str) -> Any:
        self.manager.resume(name)
        return self.manager.info(name)

    def _stop(self, _: Progress, names: list[str], seconds: float) -> Any:
        for name in names:
            self.manager.info(name)  # all of them, or none
        for name in names:
            self.manager.stop(name, seconds=seconds)
        return names

    def _run(self, _: Progress, name: str, words: list[str], data: str, seconds: float) -> Any:
        outcome = self.manager.run(name, words, base64.b64decode(data), seconds)
        output, said = (base64.b64encode(text).decode() for text in (outcome.output, outcome.errors))
        return {"status": outcome.status, "output": output, "errors": said}

    def _checkpoints(self, _: Progress) -> Any:
        return list(self.manager.checkpoints())

    def _delete_checkpoints(self, _: Progress, names: list[str]) -> Any:
        self.manager.delete_checkpoints(*names)
        return names


_HANDLERS: dict[str, Callable[..., Any]] = {
    "start": Verbs._start,
    "fork": Verbs._fork,
    "list": Verbs._list,
    "show": Verbs._show,
    "checkpoint": Verbs._checkpoint,
    "keep": Verbs._keep,
    "refresh": Verbs._refresh,
    "resume": Verbs._resume,
    "stop": Verbs._stop,
    "run": Verbs._run,
    "checkpoints": Verbs._checkpoints,
    "delete-checkpoints": Verbs._delete_checkpoints,
}


class Server:
    """Answers requests at a socket, each in a thread of its own.

    Args:
        verbs: Gives what can be asked; called when somebody asks.
        path: The socket; its directory is private.
    """

    def __init__(self, verbs: Callable[[], Verbs], path: Path) -> None:
        self._verbs = verbs
        self._path = path
        path.unlink(missing_ok=True)  # nobody else's: there is one server a store
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        path.chmod(0o600)
        self._sock.listen(_BACKLOG)
        self._busy: dict[threading.Thread, socket.socket] = {}
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
                self._busy[thread] = sock
            thread.start()

    def _attend(self, sock: socket.socket) -> None:
        sock.settimeout(_PATIENCE)  # with who says nothing, and with who does not listen
        try:
            with sock, sock.makefile("rwb") as file:
                self._answer(cast("BinaryIO", file))
        except OSError as error:
            _log.info("a command has gone: %s", error)
        finally:
            with self._lock:
                self._busy.pop(threading.current_thread(), None)

    def _answer(self, file: BinaryIO) -> None:
        watched = True

        def tell(step: str, done: int, total: int) -> None:
            nonlocal watched
            try:
                if watched:
                    send(file, {"step": [step, done, total]})
            except OSError:
                watched = False  # nobody looks any more; what was asked for is done all the same

        try:
            verb, arguments = request(file.readline(REQUEST_BYTES))
            answer = {"answer": self._call(verb, arguments, tell)}
        except (StoreError, OSError) as error:
            answer = {"error": told(error)}
        except Exception as error:  # noqa: BLE001 - the last door of a thread: who asked gets an answer
            _log.exception("a request failed")
            answer = {"error": told(MachineError(f"unexpected {type(error).__name__}: {error}"))}
        send(file, answer)

    def _call(self, verb: str, arguments: dict[str, Any], progress: Progress) -> Any:
        if verb == "ping":
            return {"pid": os.getpid()}
        return self._verbs().call(verb, arguments, progress)

    def close(self) -> None:
        """Takes no more requests; those under way are done to their end, if it comes soon."""
        self._path.unlink(missing_ok=True)
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._acceptor.join()
        with self._lock:
            busy = dict(self._busy)
        deadline = time.monotonic() + _END_SECONDS
        for thread, sock in busy.items():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RD)  # who has not asked yet does not
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                _log.error("a request is still under way and is given up")


def plain(value: Any) -> Any:
    """The same in dicts and lists, which is all that JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value
