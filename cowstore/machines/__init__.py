"""Running machines: forked, with their memory and their disks, from one moment.

    from cowstore import machines
    manager = machines.Manager(store, disks, Path("/run/desks"))
    manager.start("parent", machines.Configuration(memory=512 << 20, disks=("desk",)))
    manager.fork("parent", 20)

Machines run in QEMU, which is spoken to through the package `qemu.qmp` (``pip install 'cowstore[vm]'``).
``cowstore.machines.memory`` does without a hypervisor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .accelerators import Accelerators
    from .answering import Server, Verbs
    from .configuration import Configuration
    from .control import Client
    from .forking import Child, Wish
    from .manager import MachineInfo, Manager

_LATE = {
    "Accelerators": "accelerators",
    "Child": "forking",
    "Client": "control",
    "Configuration": "configuration",
    "MachineInfo": "manager",
    "Manager": "manager",
    "Server": "answering",
    "Verbs": "answering",
    "Wish": "forking",
}

__all__ = [
    "Accelerators",
    "Child",
    "Client",
    "Configuration",
    "MachineInfo",
    "Manager",
    "Server",
    "Verbs",
    "Wish",
]


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LATE[name]}", __name__), name)
