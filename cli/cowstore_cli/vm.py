"""`cowstore vm`: running machines. Each command lives in a module that is imported when it is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from cowstore_cli.groups import LateGroup
from cowstore_cli.options import Command

COMMANDS = {
    "start": "machines:start",
    "fork": "forks:fork",
    "ls": "machines:ls",
    "show": "machines:show",
    "console": "guests:console",
    "exec": "guests:execute",
    "checkpoint": "forks:checkpoint",
    "checkpoints": "forks:checkpoints",
    "refresh": "forks:refresh",
    "keep": "forks:keep",
    "resume": "machines:resume",
    "stop": "machines:stop",
    "rm": "forks:rm",
}
"""Each command and where it lives, in the order of the help: `module:function`."""


class Machines(LateGroup):
    """The commands for running machines."""

    table = COMMANDS


@click.group(cls=Machines)
def vm() -> None:
    """Run machines, and fork them while they run.

    A machine is forked with its memory and its disks: every child goes on from the same moment, shares both with
    its parent and keeps what it changes. Machines run in QEMU, beside the store's server, which is started where
    it does not run; both are found by every later command.
    """


def machine_argument(
    name: str = "name", *, many: bool = False, checkpoints: bool = False
) -> Callable[[Command], Command]:
    """A machine's name, or several, completed by the shell; also a checkpoint's where that will do."""

    def complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        return [one for one in _names(context, checkpoints) if one.startswith(incomplete)]

    metavar = name.upper().rstrip("S") + "..." if many else name.upper()
    return click.argument(name, metavar=metavar, nargs=-1 if many else 1, required=True, shell_complete=complete)


def _names(context: click.Context, checkpoints: bool) -> list[str]:
    """The names of all machines, where their server runs; a completion starts none."""
    from pathlib import Path

    from cowstore_cli import runtime, session

    try:
        client = runtime.client(Path(session.of(context).path))
        found: list[Any] = client.ask("list")
        if checkpoints:
            found += client.ask("checkpoints")
    except Exception:  # noqa: BLE001 - a completion that fails offers nothing; it never disturbs the prompt
        return []
    return [one["name"] for one in found]
