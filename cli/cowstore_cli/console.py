"""What commands print: lines, tables, JSON, and bars while they work.

Rich draws on terminals only and is imported only then. Into a file or a pipe go plain aligned columns, without
colours or borders, in words without spaces: `grep`, `awk` and `cut` read them as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

import click

import cowstore

Progress = Callable[[str, int, int], None]


def on_terminal() -> bool:
    """Whether a person reads what the command prints."""
    return sys.stdout.isatty()


def say(line: str) -> None:
    """Print one line."""
    click.echo(line)


def emit(value: Any) -> None:
    """Print JSON. Dataclasses become objects with their fields in order."""
    import json

    click.echo(json.dumps(plain(value), indent=2))


def emit_line(value: Any) -> None:
    """Print JSON in one line, for programs that read while the command goes on."""
    import json

    click.echo(json.dumps(plain(value)))


def warn(line: str) -> None:
    """Print a line on stderr that is no error."""
    click.echo(f"cowstore: {line}", err=True)


def plain(value: Any) -> Any:
    """The same in dicts and lists, which is all that JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """Print a table.

    Args:
        headers: One word a column.
        rows: As many cells each.
        right: The headers of the columns that are set flush right.
    """
    flush_right = [header in set(right) for header in headers]
    if on_terminal():
        from cowstore_cli import drawing

        drawing.table(headers, rows, flush_right)
    else:
        for line in columns([headers, *rows], flush_right):
            say(line)


def columns(rows: Sequence[Sequence[str]], flush_right: Sequence[bool]) -> Iterator[str]:
    """Rows as lines of aligned columns, two spaces between them and none at a line's end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, flush_right, strict=True)
        yield "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()


def says_nothing(items: Collection[object], line: str) -> bool:
    """Whether there is nothing to list; a person is told so, a pipe gets the head of an empty table."""
    if items or not on_terminal():
        return False
    say(line)
    return True


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair a line."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        say(f"{click.style(name.ljust(width), dim=True)}  {value}")


def tell(device: cowstore.DeviceInfo, line: str, as_json: bool) -> None:
    """Print what became of a device: its facts as JSON, or a line for people."""
    if as_json:
        emit(device)
    else:
        say(line)


def name(devices: Sequence[cowstore.DeviceInfo]) -> str:
    """Devices in a sentence; the first and the last where there are many."""
    if len(devices) <= 4:
        return ", ".join(one.name for one in devices)
    return f"{devices[0].name} ... {devices[-1].name} ({len(devices):,} devices)"


def no_bars(_step: str, _done: int, _total: int) -> None:
    """For files and pipes."""


@contextmanager
def progress() -> Iterator[Progress]:
    """A callback that draws bars on stderr while the block runs; it draws none where nobody would see them."""
    if not sys.stderr.isatty():
        yield no_bars
        return
    from cowstore_cli import drawing

    with drawing.Bars() as bars:
        yield bars
