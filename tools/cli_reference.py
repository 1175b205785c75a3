"""Write the reference of the command line, `docs/cli.md`, from the commands themselves.

Everything before the marker is written by hand and kept; everything after it is made here. A test makes it
again and compares, so the page cannot fall behind.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from cowstore_cli.exits import CODES, OK, SIGNALS
from cowstore_cli.main import cli

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
MARKER = "<!-- Made by `make docs` from here on: change the commands' own help instead. -->"


def page(written: str) -> str:
    """The whole page: the part written by hand, then the part made from the commands."""
    by_hand, _, _ = written.partition(MARKER)
    return "\n".join([by_hand.rstrip(), "", MARKER, "", *exit_codes(), "", *commands()]).rstrip() + "\n"


def exit_codes() -> Iterator[str]:
    """The table of exit codes."""
    yield from ("## Exit codes", "", "| code | meaning |", "|---:|---|", f"| {OK} | done |")
    for code, meaning in sorted([(code, meaning) for _, code, meaning in CODES] + list(SIGNALS)):
        yield f"| {code} | {meaning} |"


def commands() -> Iterator[str]:
    """A section for the program and for each of its commands."""
    context = click.Context(cli, info_name="cowstore", **cli.context_settings)
    yield from ("## Commands", "", *section(cli, context), *below(cli, context))


def below(group: click.Group, context: click.Context) -> Iterator[str]:
    """A section for each command of a group, and for those of groups in it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        yield from ("", *section(command, inner))
        if isinstance(command, click.Group):
            yield from below(command, inner)


def section(command: click.Command, context: click.Context) -> Iterator[str]:
    """One command: how it is called, what it does, and its options."""
    parameters = command.get_params(context)
    arguments = [one.metavar or "" for one in parameters if isinstance(one, click.Argument)]
    rest = ["COMMAND"] if isinstance(command, click.Group) else []
    usage = " ".join([context.command_path, "[OPTIONS]", *arguments, *rest])
    yield from (f"### {context.command_path}", "", "```text", usage, "```", "")
    yield from inspect.cleandoc(command.help or "").splitlines()
    yield from ("", "| option | |", "|---|---|")
    yield from (row(one) for one in parameters if isinstance(one, click.Option))


def row(option: click.Option) -> str:
    """One option. Made from its parts, since the layout of click's own help changes with its versions."""
    names = ", ".join([*option.opts, *option.secondary_opts])
    value = f" {option.metavar}" if option.metavar else ""
    variable = f" [variable: {option.envvar}]" if option.envvar else ""
    return f"| `{names}{value}` | {' '.join((option.help or '').split())}{variable} |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    print(f"wrote {PAGE}")
