"""Monitors: commands to QEMU over QMP, one after the other, from any thread.

The protocol is spoken by the QEMU project's own library, `qemu.qmp`, whose event loop has its own thread here.

Source: docs/interop/qmp-spec.rst of QEMU.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from cowstore.errors import MachineError, NotFoundError

try:
    from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError
except ImportError as error:  # pragma: no cover - says what to install
    raise NotFoundError("package", "qemu.qmp", hint="pip install 'cowstore[vm]'") from error

_log = logging.getLogger("cowstore.machines")
_Result = TypeVar("_Result")
_COMMAND_SECONDS = 30.0


class _Loop:
    """The event loop of all monitors of this process, in a thread that is there while any monitor is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread()

    def enter(self) -> None:
        """One monitor more."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                loop = self._loop = asyncio.new_event_loop()
                loop.set_exception_handler(_note)
                self._thread = threading.Thread(target=loop.run_forever, name="cowstore-qmp", daemon=True)
                self._thread.start()

    def leave(self) -> None:
        """One monitor less; the last one ends the thread."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._loop is not None:
                self.run(_wind_up())
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
                self._loop = None

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs to the end, in the loop's thread; for who has entered."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _wind_up() -> None:
    """Ends what connections have left, and lets their sockets be closed."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    for _ in range(3):  # a transport that is closed closes its socket in its next turn
        await asyncio.sleep(0)


def _note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a connection leaves that was lost: whoever used it was told already."""
    _log.debug("%s: %s", context.get("message"), context.get("exception"))


_loop = _Loop()


class Monitor:
    """One connection to a QEMU.

    Args:
        name: The machine, for messages.
        path: Its socket.
        seconds: How long to wait until it answers for the first time.

    Attributes:
        lost: Whether it did not answer when it should have: another connection may be better.

    Raises:
        MachineError: Nobody answers.
    """

    def __init__(self, name: str, path: Path, seconds: float) -> None:
        self.lost = False
        self._name = name
        self._open = True
        _loop.enter()
        self._client = QMPClient(name)
        self._events = EventListener(("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"))
        try:
            _loop.run(asyncio.wait_for(self._connect(path), seconds))
        except BaseException as error:
            self.close()
            if isinstance(error, QMPError | OSError):
                raise MachineError(f"machine {name} does not answer: {_reason(error)}") from error
            raise

    async def _connect(self, path: Path) -> None:
        self._client.register_listener(self._events)
        await self._client.connect(str(path))

    def execute(self, command: str, seconds: float = _COMMAND_SECONDS, /, **arguments: Any) -> Any:
        """Runs a command; returns what it returns.

        Args:
            command: Its name.
            seconds: The time limit.
            **arguments: Its arguments; ``_`` in a name stands for ``-``.

        Raises:
            MachineError: QEMU refuses, or is gone.
        """
        self._client.events.clear()  # nobody reads those, and a guest makes as many as it likes
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return _loop.run(asyncio.wait_for(self._client.execute(command, named), seconds))
        except ExecuteError as error:
            raise MachineError(f"machine {self._name} refuses {command}: {error}") from error
        except (QMPError, OSError) as error:
            self.lost = True
            raise MachineError(f"machine {self._name} does not answer {command}: {_reason(error)}") from error

    def wait_deleted(self, device: str, seconds: float) -> None:
        """Waits until the guest has let go of a device that was told to leave.

        Raises:
            MachineError: It does not, within the time or at all.
        """

        async def watch() -> None:
            while True:
                event: dict[str, Any] = dict(await self._events.get())
                if event.get("data", {}).get("device") == device:
                    if event["event"] == "DEVICE_DELETED":
                        return
                    raise MachineError(f"the guest of {self._name} does not let go of {device}")

        try:
            _loop.run(asyncio.wait_for(watch(), seconds))
        except TimeoutError:
            raise MachineError(f"the guest of {self._name} has not let go of {device} in {seconds:g} s") from None

    def close(self) -> None:
        """Ends the connection; QEMU goes on. Harmless when done twice."""
        if not self._open:
            return
        self._open = False
        try:
            _loop.run(asyncio.wait_for(self._client.disconnect(), 5))
        except (QMPError, OSError, EOFError):
            pass  # it is gone already
        finally:
            _loop.leave()


def _reason(error: Exception) -> str:
    return "the time is up" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
