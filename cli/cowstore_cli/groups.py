"""Groups of commands that are imported when they are named, so that one command waits for no other's imports."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import ClassVar

import click


class LateGroup(click.Group):
    """A group that imports a command's module when the command is named.

    Attributes:
        table: Each command and where it lives, ``module:function``, in the order of the help.
    """

    table: ClassVar[Mapping[str, str]] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the table's order."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in self.table:
            return None
        module, _, function = self.table[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f"cowstore_cli.{module}"), function)
        return command
