"""Commands that make stores and devices, and size, name and remove them."""

from __future__ import annotations

from pathlib import Path

import click

import cowstore
from cowstore_cli import console, sizes
from cowstore_cli.options import common_options, device_argument, json_option, size_argument
from cowstore_cli.session import Session, pass_session, writing


@click.command()
@click.argument("path", metavar="[PATH]", required=False, type=click.Path())
@json_option
@common_options
@pass_session
def init(session: Session, path: str | None, as_json: bool) -> None:
    """Make an empty store at PATH, or where --store says."""
    place = Path(path or session.path)
    if (place / "store.json").exists():
        raise cowstore.ExistsError("store", str(place))
    with cowstore.open(place, create=True) as store:
        made = store.path
    if as_json:
        console.emit({"path": str(made)})
    else:
        console.say(f"made an empty store at {made}")


@click.command()
@click.argument("name", metavar="NAME")
@size_argument
@json_option
@common_options
@pass_session
def create(session: Session, name: str, size: int, as_json: bool) -> None:
    """Make a blank clone NAME of SIZE bytes: 20G, 512M, 4KiB."""
    with session.open() as store, store.create(name, size) as device:
        made = device.info
    console.tell(made, f"made {name}, a blank clone of {sizes.show(made.size)}", as_json)


@click.command()
@device_argument("name", kind="clone")
@size_argument
@click.option("--shrink", is_flag=True, help="Allow a smaller size: what lies beyond it is gone.")
@json_option
@common_options
@pass_session
def resize(session: Session, name: str, size: int, shrink: bool, as_json: bool) -> None:
    """Make clone NAME larger; with --shrink, also smaller."""
    with session.open() as store:
        old = store.info(name).size
        if size < old and not shrink:
            raise click.UsageError(f"{name} has {sizes.exact(old)}; a smaller size needs --shrink")
        with writing(store, name) as device:
            device.resize(size)
        now = store.info(name)
    console.tell(now, f"resized {name} from {sizes.show(old)} to {sizes.show(now.size)}", as_json)


@click.command()
@device_argument("old")
@click.argument("new", metavar="NEW")
@json_option
@common_options
@pass_session
def rename(session: Session, old: str, new: str, as_json: bool) -> None:
    """Rename a device."""
    with session.open() as store:
        now = store.rename(old, new)
    console.tell(now, f"renamed {old} to {new}", as_json)


@click.command()
@device_argument("names", many=True)
@click.option("--dry-run", is_flag=True, help="Delete nothing; say exactly what would be freed.")
@json_option
@common_options
@pass_session
def rm(session: Session, names: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Delete devices, all of them or none.

    Their space is freed by the next `cowstore gc`. An image may go before its clones: they keep what they need.
    """
    wanted = tuple(dict.fromkeys(names))
    if dry_run:
        _would_free(session, wanted, as_json)
        return
    with session.open() as store:
        gone = store.delete(*wanted)
    if as_json:
        console.emit({"dry_run": False, "devices": gone})
    else:
        console.say(f"deleted {console.name(gone)}; `cowstore gc` frees their space")


def _would_free(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    with session.look() as store:
        devices = [store.info(name) for name in names]
        alone = [store.usage(name).exclusive for name in names]
        together = store.exclusive(*names)
    if as_json:
        listed = [console.plain(one) | {"exclusive": count} for one, count in zip(devices, alone, strict=True)]
        console.emit({"dry_run": True, "devices": listed, "freed": together})
        return
    for one, count in zip(devices, alone, strict=True):
        console.say(f"would delete {one.kind} {one.name}, which alone has {sizes.exact(count)}")
    console.say(f"deleting {'it' if len(devices) == 1 else 'them'} would free {sizes.exact(together)}")
