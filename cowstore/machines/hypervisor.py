"""Hypervisors: what the fork manager asks of one. QEMU is the one there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .configuration import Configuration

AGENT, CONSOLE, QMP = "agent.sock", "console.sock", "qmp.sock"
CONSOLE_LOG, LOG = "console.log", "hypervisor.log"
"""What a machine's directory has: sockets of the agent's port, the console and a monitor, and what was said."""


@dataclass(frozen=True)
class Nic:
    """A network card in its place.

    Attributes:
        model: What it is, one of NIC_MODELS.
        port: 0 or 1: a card that is replaced makes room for the next one at the other port.
        mac: Its address, as in ``52:54:00:12:34:56``.
    """

    model: str
    port: int
    mac: str


@dataclass(frozen=True)
class Launch:
    """Everything that a hypervisor needs to start a machine.

    Attributes:
        name: The machine's name, for people.
        configuration: What it is like.
        directory: Where its sockets and logs go; the path is short enough for sockets.
        socket: Where its disks are served over NBD.
        exports: What they go by there, in the configuration's order.
        generation: The GUID that tells a guest that it was forked.
        nic: The network card that it has from the start.
        template: The path of its memory; empty where it starts with none.
        state: The state of its devices, as save_state() gave it; None where it boots.
    """

    name: str
    configuration: Configuration
    directory: Path
    socket: Path
    exports: tuple[str, ...]
    generation: str
    nic: Nic | None = None
    template: str = ""
    state: bytes | None = None


class Running(Protocol):
    """A machine's process. Every call raises MachineError where the hypervisor refuses or is gone.

    Attributes:
        pid: The process.
    """

    pid: int

    @property
    def lost(self) -> bool:
        """Whether it did not answer when it should have: attach to it again."""
        ...

    def version(self) -> str:
        """What the process is; see Hypervisor.version()."""
        ...

    def status(self) -> str:
        """``running``, ``paused``, or what else the hypervisor calls it."""
        ...

    def stop(self) -> None:
        """Has it stand still, with what it wrote sent to its disks."""
        ...

    def resume(self) -> None:
        """Has it go on."""
        ...

    def save_state(self) -> bytes:
        """The state of its devices, but for the memory."""
        ...

    def address(self) -> int:
        """Where its memory begins in its process."""
        ...

    def replace_nic(self, old: Nic | None, new: Nic) -> None:
        """Cuts the old card off and plugs the new one, while the machine stands still."""
        ...

    def remove_nic(self, old: Nic, seconds: float) -> None:
        """Unplugs a card that was cut off; the running guest has to let go of it."""
        ...

    def has_agent(self) -> bool:
        """Whether somebody in the guest listens to the agent's port."""
        ...

    def power_down(self) -> None:
        """Presses the button."""
        ...

    def quit(self) -> None:
        """Ends the process, after what it holds for its disks was sent."""
        ...

    def close(self) -> None:
        """Lets go of the process, which goes on."""
        ...


class Hypervisor(Protocol):
    """Starts machines."""

    def version(self) -> str:
        """What a checkpoint has to be loaded with, for example ``QEMU 7.2``."""
        ...

    def settled(self, configuration: Configuration) -> Configuration:
        """The same with every alias and default replaced by what it stands for today."""
        ...

    def start(self, launch: Launch) -> Running:
        """Starts a machine; one with a state stands still with it loaded, another boots.

        Raises:
            MachineError: It did not start, or did not load; no process is left.
        """
        ...

    def attach(self, pid: int, directory: Path) -> Running:
        """A machine that was started before, perhaps by another process."""
        ...

    def find(self, directory: Path) -> Sequence[int]:
        """The processes of machines with that directory, by what the system tells of them."""
        ...
