"""The `cowstore` command: the table of its commands, and the door that every error leaves by."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any

import click

from cowstore_cli import exits
from cowstore_cli.groups import LateGroup
from cowstore_cli.options import common_options
from cowstore_cli.session import Session

COMMANDS = {
    "init": "devices:init",
    "import": "data:import_",
    "create": "devices:create",
    "clone": "cloning:clone",
    "fork": "cloning:fork",
    "seal": "cloning:seal",
    "reset": "cloning:reset",
    "export": "data:export",
    "read": "data:read",
    "write": "data:write",
    "resize": "devices:resize",
    "rename": "devices:rename",
    "ls": "facts:ls",
    "tree": "facts:tree",
    "show": "facts:show",
    "diff": "facts:diff",
    "du": "facts:du",
    "rm": "devices:rm",
    "gc": "maintenance:gc",
    "stats": "facts:stats",
    "serve": "serving:serve",
    "vm": "vm:vm",
    "backup": "maintenance:backup",
    "completion": "completion:completion",
}
"""Each command and where it lives, in the order of the help: `module:function`."""


class CommandLine(LateGroup):
    """All commands; every failure ends in one line."""

    table = COMMANDS

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and flush what it printed while a closed pipe can still be told from a failure."""
        ctx.ensure_object(Session)
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_stdout()
            raise click.exceptions.Exit(exits.BROKEN_PIPE) from None
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and leave with its exit code."""
        arguments = sys.argv[1:] if args is None else list(args)

        def run() -> Any:
            return super(CommandLine, self).main(
                arguments, prog_name, complete_var, standalone_mode=False, windows_expand_args=False, **extra
            )

        if not standalone_mode:
            return run()
        sys.exit(guard(run, debug="--debug" in arguments))


def guard(run: Callable[[], Any], *, debug: bool) -> int:
    """Call, and turn whatever comes out into one line on stderr and an exit code."""
    try:
        result = run()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _report(_usage_line(error), debug)
        return error.exit_code
    except click.Abort:
        return exits.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last door: a person gets a line, --debug the traceback
        _report(exits.line_of(error), debug)
        return exits.code_of(error)
    return result if isinstance(result, int) else exits.OK


def _usage_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().rstrip(".").split())
    context = getattr(error, "ctx", None)
    hint = f" (see `{context.command_path} --help`)" if context is not None else ""
    return f"cowstore: {message[:1].lower()}{message[1:]}{hint}"


def _report(line: str, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(line, err=True)


def _drop_stdout() -> None:
    """What is still buffered has no reader; without this the interpreter would complain on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"]})
@partial(common_options, envvar="COWSTORE")
@click.version_option(package_name="cowstore", message="cowstore %(version)s")
def cli() -> None:
    """Keep the disks and the memory of virtual machines: import an image once, clone it, fork what runs.

    The store is a directory, named by --store or by the variable COWSTORE. Sizes and offsets are bytes, or a
    number and K, M, G, T, P or E, powers of 1024: 20G, 512M, 4KiB.
    """


def _leave(number: int, _: FrameType | None) -> None:
    """What a signal does: everything is closed on the way out, nothing half-written is published."""
    sys.exit(128 + number)


def main() -> None:
    """The `cowstore` script."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # `nohup` asks for hang-ups to be ignored
            signal.signal(number, _leave)
    cli(prog_name="cowstore")
