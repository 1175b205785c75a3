"""Monitors: commands to QEMU over QMP, one after the other, from any thread.

The protocol is spoken by the QEMU project's own library, `qemu.qmp`, whose event loop has its own thread here.

Source: docs/interop/qmp-spec.rst of QEMU.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from cowstore.errors import MachineError, NotFoundError

try:
    from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError
except ImportError as error:  # pragma: no cover - says what to install
    raise NotFoundError("package", "qemu.qmp", hint="pip install 'cowstore[vm]'") from error

_Result = TypeVar("_Result")
_COMMAND_SECONDS = 30.0


class _Loop:
    """The event loop of all monitors of this process, in a thread that is started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs to the end, in the loop's thread."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="cowstore-qmp", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


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
        self._client = QMPClient(name)
        self._events = EventListener(("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"))
        try:
            _loop.run(asyncio.wait_for(self._connect(path), seconds))
        except (QMPError, OSError) as error:
            raise MachineError(f"machine {name} does not answer: {_reason(error)}") from error

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
        """Ends the connection; QEMU goes on."""
        try:
            _loop.run(asyncio.wait_for(self._client.disconnect(), 5))
        except (QMPError, OSError, EOFError):
            pass  # it is gone already


def _reason(error: Exception) -> str:
    return "the time is up" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
