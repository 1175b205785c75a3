"""Commands that talk to the system inside a machine: console and exec."""

from __future__ import annotations

import base64
import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cowstore_cli import console as printing
from cowstore_cli import runtime
from cowstore_cli.options import common_options, json_option
from cowstore_cli.session import Session, pass_session
from cowstore_cli.vm import machine_argument

_LEAVE = b"\x1d"  # Ctrl and ]
_PIECE = 1 << 16


@click.command()
@machine_argument()
@click.option("--log", is_flag=True, help="Print what it has said so far, and end.")
@json_option
@common_options
@pass_session
def console(session: Session, name: str, log: bool, as_json: bool) -> None:
    """Talk to the console of machine NAME; Ctrl-] leaves it. One at a time: a second one waits for the first."""
    one = runtime.connect(session.path).ask("show", name=name)
    said = Path(one["console_log"]).read_text(errors="replace")
    if as_json:
        printing.emit({"name": name, "console_log": one["console_log"], "text": said})
    elif log:
        click.echo(said, nl=False)
    else:
        with socket.socket(socket.AF_UNIX) as sock, _raw_terminal():
            sock.connect(one["console_socket"])
            _talk(sock)


@contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the guest, where there is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    click.echo("connected; Ctrl-] leaves", err=True)
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        click.echo(err=True)


def _talk(sock: socket.socket) -> None:
    """Copies both ways, until the machine ends, the key to leave is pressed, or there is no more to say."""
    sources: list[Any] = [sock, sys.stdin.fileno()]
    while True:
        ready, _, _ = select.select(sources, [], [])
        if sock in ready:
            data = sock.recv(_PIECE)
            if not data:
                return
            _write(data)
        if sys.stdin.fileno() in ready:
            data = os.read(sys.stdin.fileno(), _PIECE)
            before, leave, _ = data.partition(_LEAVE)
            sock.sendall(before)
            if leave:
                return
            if not data:  # a pipe that has ended; what the guest says to it is still to come
                sources.remove(sys.stdin.fileno())


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


@click.command("exec", context_settings={"ignore_unknown_options": True})
@machine_argument()
@click.argument("words", metavar="PROGRAM [ARGUMENT]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option("--stdin", "with_input", is_flag=True, help="Give the program this command's standard input.")
@click.option(
    "--timeout", metavar="SECONDS", type=float, default=60.0, help="How long it may take.  [default: 60]"
)
@json_option
@common_options
@pass_session
def execute(
    session: Session, name: str, words: tuple[str, ...], with_input: bool, timeout: float, as_json: bool
) -> None:
    """Run a program in the guest of machine NAME, by its agent, and end as it does.

    PROGRAM is a path in the guest: `cowstore vm exec desk-1 -- /bin/sh -c 'uptime'`.
    """
    data = base64.b64encode(sys.stdin.buffer.read() if with_input else b"").decode()
    client = runtime.connect(session.path)
    done = client.ask("run", name=name, words=list(words), data=data, seconds=timeout)
    output, errors = base64.b64decode(done["output"]), base64.b64decode(done["errors"])
    if as_json:
        texts = {"output": output.decode(errors="replace"), "errors": errors.decode(errors="replace")}
        printing.emit({"status": done["status"]} | texts)
    else:
        _write(output)
        sys.stderr.buffer.write(errors)
        sys.stderr.buffer.flush()
    raise click.exceptions.Exit(done["status"])
