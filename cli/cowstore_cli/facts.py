"""Commands that only look: ls, tree, show, diff, du, stats. They open the store read-only."""

from __future__ import annotations

import time

import click

import cowstore
from cowstore_cli import console, sizes
from cowstore_cli.options import common_options, device_argument, json_option
from cowstore_cli.session import Session, pass_session

NO_DEVICES = "no devices yet: `cowstore import` and `cowstore create` make some"


@click.command()
@json_option
@common_options
@pass_session
def ls(session: Session, as_json: bool) -> None:
    """List the devices. A parent in parentheses is deleted."""
    with session.look() as store:
        lineage = store.lineage()
    devices, deleted = _apart(lineage)
    if as_json:
        console.emit(devices)
        return
    if console.says_nothing(devices, NO_DEVICES):
        return
    rows = [(one.name, _kind(one), sizes.show(one.size), _parent(one, deleted), _when(one)) for one in devices]
    console.table(("NAME", "KIND", "SIZE", "PARENT", "CREATED"), rows, right=["SIZE"])


def _kind(device: cowstore.DeviceInfo) -> str:
    return "ephemeral" if device.ephemeral else device.kind


def _apart(lineage: list[cowstore.DeviceInfo]) -> tuple[list[cowstore.DeviceInfo], set[int]]:
    """The devices, and the numbers of their deleted ancestors."""
    return [one for one in lineage if not one.deleted], {one.number for one in lineage if one.deleted}


def _parent(device: cowstore.DeviceInfo, deleted: set[int]) -> str:
    if device.parent is None:
        return "-"
    return f"({device.parent})" if device.parent_number in deleted else device.parent


def _when(device: cowstore.DeviceInfo) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(device.created))


@click.command()
@click.option("--all", "every", is_flag=True, help="Name every clone, however many are alike.")
@json_option
@common_options
@pass_session
def tree(session: Session, every: bool, as_json: bool) -> None:
    """Show who descends from whom, and what each has of its own."""
    from cowstore_cli import lineage

    with session.look() as store:
        devices, own = store.lineage(), store.own_bytes()
    if as_json:
        console.emit([console.plain(one) | {"own": own.get(one.name, 0)} for one in devices])
        return
    if console.says_nothing(devices, NO_DEVICES):
        return
    roots = lineage.grow(devices, own, every=every)
    if console.on_terminal():
        from cowstore_cli import drawing

        drawing.tree(roots)
    else:
        for line in lineage.lines(roots):
            console.say(line)


@click.command()
@device_argument("name")
@json_option
@common_options
@pass_session
def show(session: Session, name: str, as_json: bool) -> None:
    """Show everything about device NAME: lineage, times and space."""
    with session.look() as store:
        device, usage, (devices, deleted) = store.info(name), store.usage(name), _apart(store.lineage())
    children = [one.name for one in devices if one.parent_number == device.number]
    if as_json:
        console.emit(console.plain(device) | {"usage": usage, "children": children})
        return
    console.facts(
        [
            ("name", device.name),
            ("kind", ("ephemeral " if device.ephemeral else "") + device.kind),
            ("number", str(device.number)),
            ("parent", _parent(device, deleted)),
            ("children", f"{len(children):,}"),
            ("created", _when(device)),
            ("sequence", str(device.sequence)),
            ("size", sizes.exact(usage.virtual)),
            ("allocated", sizes.exact(usage.allocated)),
            ("inherited", sizes.exact(usage.inherited)),
            ("own", sizes.exact(usage.own)),
            ("exclusive", f"{sizes.exact(usage.exclusive)}, freed if it were deleted"),
        ]
    )


@click.command()
@device_argument("old")
@device_argument("new")
@json_option
@common_options
@pass_session
def diff(session: Session, old: str, new: str, as_json: bool) -> None:
    """List the ranges in which two devices differ, in bytes."""
    with session.look() as store:
        changes = list(store.diff(old, new))
    total = sum(change.length for change in changes)
    if as_json:
        console.emit({"old": old, "new": new, "bytes": total, "changes": changes})
        return
    if console.says_nothing(changes, f"{old} and {new} do not differ"):
        return
    rows = [(str(change.offset), str(change.length)) for change in changes]
    console.table(("OFFSET", "LENGTH"), rows, right=["OFFSET", "LENGTH"])
    if console.on_terminal():
        console.say(f"{len(changes):,} range{'' if len(changes) == 1 else 's'}, {sizes.exact(total)}")


@click.command()
@device_argument("names", many=True, required=False)
@json_option
@common_options
@pass_session
def du(session: Session, names: tuple[str, ...], as_json: bool) -> None:
    """Show how much room devices take: all of them, or those named.

    VIRTUAL is what a guest sees, ALLOCATED what of it holds data, INHERITED and OWN what of that comes from the
    parent's moment and what does not, EXCLUSIVE what deleting the device alone would free.
    """
    with session.look() as store, console.progress() as progress:
        usages = store.usages(*names, progress=progress)
    if as_json:
        console.emit([{"name": name} | console.plain(usage) for name, usage in usages.items()])
        return
    if console.says_nothing(usages, NO_DEVICES):
        return
    rows = [
        (name, *map(sizes.show, (usage.virtual, usage.allocated, usage.inherited, usage.own, usage.exclusive)))
        for name, usage in usages.items()
    ]
    headers = ("NAME", "VIRTUAL", "ALLOCATED", "INHERITED", "OWN", "EXCLUSIVE")
    console.table(headers, rows, right=headers[1:])


@click.command()
@json_option
@common_options
@pass_session
def stats(session: Session, as_json: bool) -> None:
    """Show what the store as a whole promises, and what it takes.

    VIRTUAL is what all guests together see, ALLOCATED what of it holds data, and USED what that takes: blocks are
    stored once, however many devices have them. RESERVED is held ready by writers, DOOMED waits to be erased, FREE
    can be written before another segment is added. FILES is what the segments take on the disk. Of a checkpoint's
    memory ON-DISK are the pages that some disk has, too, and SHARED those that another checkpoint has.
    """
    with session.look() as store:
        found = store.stats()
    if as_json:
        console.emit(found)
        return
    ratio = f", {found.allocated / found.used:,.1f} times what is used" if found.used else ""
    console.facts(
        [
            ("images", f"{found.images:,}"),
            ("clones", f"{found.clones:,}"),
            ("virtual", sizes.exact(found.virtual)),
            ("allocated", sizes.exact(found.allocated) + ratio),
            ("used", sizes.exact(found.used)),
            ("reserved", sizes.exact(found.reserved)),
            ("doomed", sizes.exact(found.doomed)),
            ("free", sizes.exact(found.free)),
            ("segments", f"{found.segments:,}"),
            ("index entries", f"{found.index_entries:,}"),
            ("files", sizes.exact(found.file_bytes)),
            ("catalog", sizes.exact(found.catalog_bytes)),
        ]
    )
    if found.memories:
        console.say("")
        rows = [(one.checkpoint, f"{one.pages:,}", _part(one.on_disk, one.pages), _part(one.shared, one.pages))
                for one in found.memories]  # fmt: skip
        headers = ("CHECKPOINT", "PAGES", "ON-DISK", "SHARED")
        console.table(headers, rows, right=headers[1:])


def _part(count: int, total: int) -> str:
    """A number of pages, and how much that is of all."""
    return f"{count:,} ({100 * count / max(total, 1):.0f}%)"
