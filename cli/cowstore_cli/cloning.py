"""Commands that make devices from devices: clone, fork, seal, and back again."""

from __future__ import annotations

import click

import cowstore
from cowstore_cli import console
from cowstore_cli.options import common_options, device_argument, json_option, size_option
from cowstore_cli.session import Session, pass_session


@click.command()
@device_argument("parent")
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option("--count", metavar="NUMBER", type=click.IntRange(min=1), help="Make so many clones, numbered.")
@click.option("--prefix", metavar="TEXT", help="What the numbers follow.  [default: the parent's name and a dash]")
@click.option(
    "--start", metavar="NUMBER", type=click.IntRange(min=0), default=1, help="The first number.  [default: 1]"
)
@size_option("--size", "Enlarge the clones to SIZE.")
@click.option("--ephemeral", is_flag=True, help="Gone after a reboot; flushing it may skip the disk.")
@json_option
@common_options
@pass_session
def clone(
    session: Session,
    parent: str,
    names: tuple[str, ...],
    count: int | None,
    prefix: str | None,
    start: int,
    size: int | None,
    ephemeral: bool,
    as_json: bool,
) -> None:
    """Make writable clones of PARENT, all of them or none.

    Name them one by one, or let them be numbered: `clone debian --count 1000 --prefix desk-`.
    """
    wanted = _clone_names(parent, names, count, prefix, start)
    with session.open() as store:
        if size is None:
            made = store.clone_many(parent, wanted, ephemeral=ephemeral)
        else:
            made = _clone_enlarged(store, parent, wanted, size, ephemeral)
    if as_json:
        console.emit(made)
    else:
        console.say(f"cloned {parent} as {console.name(made)}")


def _clone_names(
    parent: str, names: tuple[str, ...], count: int | None, prefix: str | None, start: int
) -> list[str]:
    if bool(names) == (count is not None):
        raise click.UsageError("name the clones, or say how many with --count")
    if count is None:
        if prefix is not None:
            raise click.UsageError("--prefix goes with --count")
        return list(names)
    stem = f"{parent}-" if prefix is None else prefix
    return [f"{stem}{number}" for number in range(start, start + count)]


def _clone_enlarged(
    store: cowstore.Store, parent: str, names: list[str], size: int, ephemeral: bool
) -> list[cowstore.DeviceInfo]:
    """Clones that are larger than their parent are made one by one; a failure takes back those before it."""
    made: list[cowstore.DeviceInfo] = []
    try:
        for name in names:
            with store.clone(parent, name, size=size, ephemeral=ephemeral) as device:
                made.append(device.info)
    except BaseException:
        store.delete(*(one.name for one in made))
        raise
    return made


@click.command()
@device_argument("name", kind="clone")
@click.argument("children", metavar="CHILD...", nargs=-1, required=True)
@json_option
@common_options
@pass_session
def fork(session: Session, name: str, children: tuple[str, ...], as_json: bool) -> None:
    """Give each CHILD the last flushed state of clone NAME.

    A child costs a record, whatever the clone holds; it and the clone go on apart. Works while another process
    writes the clone.
    """
    with session.open() as store:
        made = store.fork(name, *children)
    if as_json:
        console.emit(made)
    else:
        console.say(f"forked {name} into {console.name(made)}")


@click.command()
@device_argument("name", kind="clone")
@click.argument("image", metavar="IMAGE")
@json_option
@common_options
@pass_session
def seal(session: Session, name: str, image: str, as_json: bool) -> None:
    """Make an IMAGE of the last flushed state of clone NAME.

    Works while another process writes the clone.
    """
    with session.open() as store:
        made = store.seal(name, image)
    console.tell(made, f"sealed {name} as image {image}", as_json)


@click.command()
@device_argument("name", kind="clone")
@json_option
@common_options
@pass_session
def reset(session: Session, name: str, as_json: bool) -> None:
    """Put clone NAME back to the moment it was cloned at.

    What was written to it since is gone.
    """
    with session.open() as store:
        now = store.reset(name)
    console.tell(now, f"reset {name} to its parent's moment", as_json)
