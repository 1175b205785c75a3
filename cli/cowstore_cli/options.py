"""The arguments and options that several commands share, so that they are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from cowstore_cli import session, sizes

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]


def _keep_store(context: click.Context, _: click.Parameter, value: str | None) -> None:
    """The store may be named before the command or after it; the last one counts."""
    if value is not None:
        session.of(context).store = value


def _parse_size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        return sizes.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def common_options(function: Command, *, envvar: str | None = None) -> Command:
    """``-s/--store`` and ``--debug``, which may stand before the command or after it."""
    store = click.option(
        "-s",
        "--store",
        metavar="PATH",
        type=click.Path(),
        envvar=envvar,
        show_envvar=envvar is not None,
        expose_value=False,
        is_eager=True,
        callback=_keep_store,
        help="The store's directory.",
    )
    # The door in `main` looks for the flag itself: it has to know even where the command line does not parse.
    debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
    return store(debug(function))


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: sizes in bytes, times in Unix seconds."
)


def size_option(name: str, text: str) -> Decorator[Any]:
    """An option that takes a size: ``--offset 4KiB``."""
    return click.option(name, metavar="SIZE", callback=_parse_size, help=text)


size_argument = click.argument("size", metavar="SIZE", callback=_parse_size)


def device_argument(name: str, *, kind: str = "", many: bool = False, required: bool = True) -> Decorator[Any]:
    """A device's name, or several, completed by the shell from the store.

    Args:
        name: The argument's name in the command's signature; in capitals, its name in the help.
        kind: ``image`` or ``clone`` completes only those.
        many: Takes any number of names, as a tuple.
        required: At least one has to be given.
    """

    def complete(context: click.Context, _: click.Parameter, incomplete: str) -> Sequence[str]:
        return names(context, kind, incomplete)

    metavar = name.upper().rstrip("S") if many else name.upper()
    if many:
        metavar += "..."
    return click.argument(
        name,
        metavar=metavar if required else f"[{metavar}]",
        nargs=-1 if many else 1,
        required=required,
        shell_complete=complete,
    )


def names(context: click.Context, kind: str, incomplete: str) -> list[str]:
    """The names of the store's devices that begin with what is typed so far."""
    try:
        with session.of(context).look() as store:
            devices = store.devices()
    except Exception:  # noqa: BLE001 - a completion that fails offers nothing; it never disturbs the prompt
        return []
    return [one.name for one in devices if one.name.startswith(incomplete) and kind in ("", one.kind)]
