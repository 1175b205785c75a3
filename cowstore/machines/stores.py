"""What machines ask of a store and of the server of its disks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from .pages import Capture
from .template import Memory
from .template import Progress as Progress


def no_progress(_step: str, _done: int, _total: int) -> None:
    """For callers who do not want to know."""


class Device(Protocol):
    """A device as it is described; see cowstore.DeviceInfo."""

    @property
    def number(self) -> int:
        """Never used twice; ``#`` and the number do for the name."""
        ...

    @property
    def name(self) -> str:
        """Its name now."""
        ...

    @property
    def kind(self) -> str:
        """``image`` or ``clone``."""
        ...

    @property
    def ephemeral(self) -> bool:
        """Whether it is gone after a reboot."""
        ...

    @property
    def parent_number(self) -> int:
        """The number of the device that it was made from."""
        ...


class Checkpoint(Protocol):
    """A checkpoint as it is described; see cowstore.CheckpointInfo."""

    @property
    def number(self) -> int:
        """Never used twice."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def automatic(self) -> bool:
        """Whether a fork made it."""
        ...

    @property
    def memory_size(self) -> int:
        """Bytes."""
        ...

    @property
    def images(self) -> tuple[int, ...]:
        """The numbers of the devices that it is made of."""
        ...

    @property
    def configuration(self) -> dict[str, Any]:
        """What the machine was like."""
        ...


class Pending(Protocol):
    """A checkpoint that is being taken; see cowstore.checkpoints.Pending."""

    def take_memory(self, pages: Capture, *, since: int | None, progress: Progress) -> None:
        """Takes the memory in."""
        ...

    def take_state(self, state: bytes) -> None:
        """Takes the state of the devices in."""
        ...

    def settle_disks(self) -> None:
        """Makes the disks outlive a reboot."""
        ...

    def publish(self, name: str, configuration: dict[str, Any], *, automatic: bool) -> Checkpoint:
        """Makes it a checkpoint."""
        ...

    def close(self) -> None:
        """Drops what was not published."""
        ...


class OpenMemory(Memory, AbstractContextManager[Any], Protocol):
    """The memory of a checkpoint, open for reading."""


class Checkpoints(Protocol):
    """The checkpoints of a store; see cowstore.checkpoints.Checkpoints."""

    def all(self) -> Sequence[Checkpoint]:
        """All of them."""
        ...

    def info(self, name: str) -> Checkpoint:
        """One of them."""
        ...

    def check_free(self, name: str) -> None:
        """Refuses a name that is taken."""
        ...

    def begin(self, disks: Sequence[str]) -> Pending:
        """Secures a machine's disks."""
        ...

    def memory(self, name: str) -> OpenMemory:
        """The memory of one."""
        ...

    def state(self, name: str) -> bytes:
        """The state of the devices of one."""
        ...

    def clone_disks(self, name: str, children: Sequence[Sequence[str]]) -> Sequence[Device]:
        """Clones for machines: the first disk of each, then the second, and so on."""
        ...

    def delete(self, *names: str) -> None:
        """Deletes some."""
        ...


class Store(Protocol):
    """A store; see cowstore.Store."""

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints."""
        ...

    def info(self, name: str) -> Device:
        """One device."""
        ...

    def delete(self, *names: str) -> Iterable[Any]:
        """Deletes devices."""
        ...

    def own_bytes(self) -> dict[str, int]:
        """What each device has of its own."""
        ...


class Disks(Protocol):
    """Where machines find their disks: an NBD server that offers every device by its name."""

    @property
    def place(self) -> Path:
        """The path of the Unix socket it listens at."""
        ...

    def flush(self, name: str) -> None:
        """Makes durable what any client of a device has been answered."""
        ...
