"""Commands that keep a store in shape: gc, backup."""

from __future__ import annotations

import click

import cowstore
from cowstore_cli import console, sizes
from cowstore_cli.options import common_options, json_option
from cowstore_cli.session import Session, pass_session

BLOCK_SIZE = 4096


@click.command()
@click.option("--dry-run", is_flag=True, help="Free nothing; say what would be freed.")
@json_option
@common_options
@pass_session
def gc(session: Session, dry_run: bool, as_json: bool) -> None:
    """Free the space of what no device names any more.

    Others may go on using the store meanwhile.
    """
    with session.open() as store, console.progress() as progress:
        done = store.collect(dry_run=dry_run, progress=progress)
    if as_json:
        console.emit(done)
        return
    if done.dry_run:
        console.say(f"would free {_blocks(done.doomed)}")
    else:
        console.say(f"freed {_blocks(done.freed)}, in {done.seconds:.1f} s")
    if done.waiting:
        console.say(_waiting(done))


def _blocks(count: int) -> str:
    return f"{sizes.exact(count * BLOCK_SIZE)}, {count:,} block{'' if count == 1 else 's'}" if count else "nothing"


def _waiting(done: cowstore.Collection) -> str:
    holders = ", ".join(map(str, done.pins)) or "another process"
    return f"left for a later run: {_blocks(done.waiting)}, still in the sight of process {holders}"


@click.command()
@click.argument("path", metavar="PATH", type=click.Path())
@json_option
@common_options
@pass_session
def backup(session: Session, path: str, as_json: bool) -> None:
    """Make a consistent copy of the whole store at PATH.

    Others may go on using the store meanwhile; ephemeral clones stay behind.
    """
    with session.copy() as store, console.progress() as progress:
        store.backup(path, progress=progress)
    if as_json:
        console.emit({"path": path})
    else:
        console.say(f"backed up to {path}")
