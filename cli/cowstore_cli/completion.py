"""The command that prints a shell's completion script."""

from __future__ import annotations

import os

import click
from click.shell_completion import get_completion_class

from cowstore_cli import console

PROGRAM = "cowstore"
VARIABLE = "_COWSTORE_COMPLETE"
SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", metavar="[bash|zsh|fish]", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print a shell's completion script.

    By default that of the shell in use. For bash, in ~/.bashrc: eval "$(cowstore completion bash)". It completes
    commands, options and the names of the store's devices.
    """
    chosen = shell or os.path.basename(os.environ.get("SHELL", ""))
    if chosen not in SHELLS:
        raise click.UsageError("name the shell: bash, zsh or fish")
    complete = get_completion_class(chosen)
    if complete is None:
        raise click.UsageError(f"no completion for {chosen}")
    console.say(complete(context.find_root().command, {}, PROGRAM, VARIABLE).source())
