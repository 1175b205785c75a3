"""Commands for moments of machines, and what is forked from them."""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

import click

from cowstore_cli import console, exits, runtime, sizes
from cowstore_cli.options import common_options, json_option
from cowstore_cli.session import Session, pass_session
from cowstore_cli.vm import machine_argument

NO_CHECKPOINTS = "no checkpoints yet: `cowstore vm checkpoint` takes one"

hook_option = click.option(
    "--hook", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Run this script in each guest before it is handed out.",
)  # fmt: skip


@click.command()
@machine_argument(checkpoints=True)
@click.option(
    "-n", "--count", metavar="NUMBER", type=click.IntRange(min=1), default=1, help="How many.  [default: 1]"
)
@click.option("--prefix", metavar="TEXT", default="", help="What numbers follow.  [default: the name and a dash]")
@click.option("--identity", type=click.Choice(["new", "none"]), metavar="new|none", default="new",
              help="Whether each is told that it is another machine.  [default: new]")  # fmt: skip
@hook_option
@json_option
@common_options
@pass_session
def fork(
    session: Session, name: str, count: int, prefix: str, identity: str, hook: Path | None, as_json: bool
) -> None:
    """Fork machine or checkpoint NAME into running children.

    Each starts from the same moment of memory and disks, and is disposable: `vm stop` leaves nothing of it. With a
    new identity it gets its own network address, hostname, machine id and randomness and the right time, and is
    handed out when its guest has confirmed them, which takes qemu-guest-agent in the guest. The hook is a script
    for the guest's shell; it has 20 seconds, and COWSTORE_NAME, COWSTORE_PARENT and COWSTORE_MAC in its
    environment. A child whose step fails is stopped, and named.
    """
    client = runtime.connect(session.path)
    with console.progress() as progress:
        children = client.ask(
            "fork", progress, source=name, count=count, prefix=prefix, identity=identity == "new", hook=_text(hook)
        )
    _tell(children, as_json)


def _text(hook: Path | None) -> str:
    return base64.b64encode(hook.read_bytes()).decode() if hook else ""


def _tell(children: list[dict[str, Any]], as_json: bool) -> None:
    """Prints what became of children; fails where one could not be handed out."""
    if as_json:
        console.emit(children)
    else:
        rows = [(one["name"], f"{one['running'] * 1e3:.0f} ms", f"{one['ready']:.2f} s")
                for one in children if not one["error"]]  # fmt: skip
        if rows:
            console.table(("NAME", "RUNNING", "READY"), rows, right=("RUNNING", "READY"))
    failed = [one for one in children if one["error"]]
    for one in failed:
        console.warn(f"{one['name']} was stopped: {one['error']}")
    if failed:
        raise click.exceptions.Exit(exits.MACHINE)


@click.command()
@machine_argument()
@click.argument("checkpoint", metavar="AS")
@click.option("--no-freeze", is_flag=True, help="Do not have the guest freeze its file systems first.")
@json_option
@common_options
@pass_session
def checkpoint(session: Session, name: str, checkpoint: str, no_freeze: bool, as_json: bool) -> None:
    """Keep this moment of machine NAME under the name AS: memory, disks and devices. The machine goes on.

    Its file systems are frozen meanwhile, where its guest has an agent, so that its disks are clean also for those
    who read them without the memory.
    """
    client = runtime.connect(session.path)
    with console.progress() as progress:
        moment = client.ask("checkpoint", progress, name=name, checkpoint=checkpoint, freezing=not no_freeze)
    _tell_moment(f"took checkpoint {checkpoint} of {name}", moment, as_json)


@click.command()
@machine_argument()
@click.argument("checkpoint", metavar="[AS]", default="")
@json_option
@common_options
@pass_session
def keep(session: Session, name: str, checkpoint: str, as_json: bool) -> None:
    """Turn machine NAME into a checkpoint, of its own name or of the name AS. The machine is stopped."""
    client = runtime.connect(session.path)
    with console.progress() as progress:
        moment = client.ask("keep", progress, name=name, checkpoint=checkpoint)
    _tell_moment(f"kept {name} as checkpoint {checkpoint or name}", moment, as_json)


def _tell_moment(line: str, moment: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.emit(moment)
    else:
        console.say(f"{line}: {moment['pages']:,} pages, stood still for {moment['pause'] * 1e3:.0f} ms")


@click.command()
@json_option
@common_options
@pass_session
def checkpoints(session: Session, as_json: bool) -> None:
    """List the checkpoints. Those in parentheses were made by a fork, and go with their last child."""
    with session.look() as store:
        found = store.checkpoints.all()
    if as_json:
        console.emit(found)
        return
    if console.says_nothing(found, NO_CHECKPOINTS):
        return
    rows = [
        (
            f"({one.name})" if one.automatic else one.name, one.configuration.get("from", "-"),
            sizes.show(one.memory_size), sizes.show(sum(one.disk_sizes)),
            time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(one.created)),
        )
        for one in found
    ]  # fmt: skip
    console.table(("NAME", "MACHINE", "MEMORY", "DISKS", "CREATED"), rows, right=("MEMORY", "DISKS"))


@click.command()
@machine_argument()
@hook_option
@json_option
@common_options
@pass_session
def refresh(session: Session, name: str, hook: Path | None, as_json: bool) -> None:
    """Put the forked machine NAME back to its parent's moment, under the identity that it has."""
    child = runtime.connect(session.path).ask("refresh", name=name, hook=_text(hook))
    _tell([child], as_json)


@click.command()
@machine_argument("names", many=True, checkpoints=True)
@json_option
@common_options
@pass_session
def rm(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Delete checkpoints, all or none. One whose children still run is refused."""
    runtime.connect(session.path).ask("delete-checkpoints", names=list(names))
    if as_json:
        console.emit(names)
    else:
        console.say(f"deleted {', '.join(names)}")
