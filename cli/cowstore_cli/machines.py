"""Commands for machines as such: start, ls, show, stop."""

from __future__ import annotations

import os
import shlex
import time
from typing import Any

import click

from cowstore_cli import console, runtime, sizes
from cowstore_cli.options import common_options, json_option, names, size_option
from cowstore_cli.session import Session, pass_session
from cowstore_cli.vm import machine_argument

NO_MACHINES = "no machine runs: `cowstore vm start` boots one"
_SHUTDOWN_SECONDS = 60.0


def _disks(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    return names(context, "clone", incomplete)


@click.command()
@click.argument("name")
@click.option(
    "--disk", "disks", metavar="CLONE", multiple=True, shell_complete=_disks, help="A disk; again for more."
)
@size_option("--memory", "Its memory.  [default: 512M]")
@click.option("--cpus", metavar="NUMBER", type=int, default=1, help="Its processors.  [default: 1]")
@click.option("--accel", type=click.Choice(["auto", "kvm", "tcg"]), metavar="auto|kvm|tcg", default="auto",
              help="What it runs on; `auto` takes KVM where a guest has been seen to run.")  # fmt: skip
@click.option("--cpu", metavar="MODEL", default="", help="The model of its processors.")
@click.option("--machine", metavar="TYPE", default="q35", help="QEMU's machine type.  [default: q35]")
@click.option("--kernel", metavar="FILE", type=click.Path(), help="Boot this kernel instead of the first disk.")
@click.option("--initrd", metavar="FILE", type=click.Path(), help="What goes with the kernel.")
@click.option("--append", metavar="TEXT", default="", help="The kernel's command line.")
@click.option("--nic", metavar="MODEL", default="", help="Give it a network card, for example virtio-net-pci.")
@click.option("--extra", metavar="OPTIONS", multiple=True, help="Further options of QEMU's, from a short list.")
@json_option
@common_options
@pass_session
def start(
    session: Session, name: str, disks: tuple[str, ...], memory: int | None, cpus: int, accel: str, cpu: str,
    machine: str, kernel: str | None, initrd: str | None, append: str, nic: str, extra: tuple[str, ...],
    as_json: bool,
) -> None:  # fmt: skip
    """Boot a machine called NAME, from its first disk or from a kernel.

    Its disks are clones, which stay when it is stopped. What it writes to its console is kept, see `vm console`.
    A network card is on a network of its own, behind QEMU's user-mode networking.
    """
    configuration = {
        "memory": 512 << 20 if memory is None else memory, "disks": disks, "cpus": cpus, "machine": machine,
        "accelerator": accel, "cpu": cpu, "kernel": _absolute(kernel), "initrd": _absolute(initrd),
        "append": append, "nic": nic, "extra": [word for words in extra for word in shlex.split(words)],
    }  # fmt: skip
    found = runtime.connect(session.path).ask("start", name=name, configuration=configuration)
    if as_json:
        console.emit(found)
    else:
        console.say(f"started {name}, process {found['pid']}")


def _absolute(path: str | None) -> str:
    return os.path.abspath(path) if path else ""


@click.command()
@json_option
@common_options
@pass_session
def ls(session: Session, as_json: bool) -> None:
    """List the machines that run.

    MEMORY is what of a machine's memory is its own, DISK what of its disks: the rest it shares.
    """
    known = runtime.has_machines(runtime.existing(session.path))  # to look at none starts no server
    found = runtime.connect(session.path).ask("list") if known else []
    if as_json:
        console.emit(found)
        return
    if console.says_nothing(found, NO_MACHINES):
        return
    now = time.time()
    rows = [
        (
            one["name"], one["state"], one["parent"] or "-", age(now - one["created"]),
            sizes.show(one["memory"]["private_bytes"]),
            sizes.show(sum(disk["own_bytes"] for disk in one["disks"])),
        )
        for one in found
    ]  # fmt: skip
    headers = ("NAME", "STATE", "PARENT", "AGE", "MEMORY", "DISK")
    console.table(headers, rows, right=headers[3:])


def age(seconds: float) -> str:
    """A length of time in its largest unit: 7s, 12m, 5h, 3d."""
    for limit, unit, length in ((60, "s", 1), (3600, "m", 60), (86400, "h", 3600)):
        if seconds < limit:
            return f"{int(seconds / length)}{unit}"
    return f"{int(seconds / 86400)}d"


@click.command()
@machine_argument()
@json_option
@common_options
@pass_session
def show(session: Session, name: str, as_json: bool) -> None:
    """Show everything about machine NAME: where it comes from, what it has of its own, how to talk to it."""
    one = runtime.connect(session.path).ask("show", name=name)
    if as_json:
        console.emit(one)
        return
    made, identity = one["configuration"], one["identity"] or {}
    console.facts(
        [
            ("name", one["name"]),
            ("state", one["state"]),
            ("pid", str(one["pid"])),
            ("parent", one["parent"] or "-"),
            ("checkpoint", one["checkpoint"] or "-"),
            ("age", age(time.time() - one["created"])),
            ("disposable", "yes, its disks go with it" if one["disposable"] else "no"),
            ("memory", sizes.exact(one["memory"]["size"])),
            ("private memory", sizes.exact(one["memory"]["private_bytes"])),
            *((f"disk {disk['name']}", f"{sizes.exact(disk['own_bytes'])} of its own") for disk in one["disks"]),
            *((word.replace("_", " "), value) for word, value in identity.items() if value),
            ("machine", f"{made['machine']} on {made['accelerator']}, {made['cpus']} x {made['cpu']}"),
            ("console log", one["console_log"]),
            ("qmp socket", one["qmp_socket"]),
        ]
    )


@click.command()
@machine_argument()
@json_option
@common_options
@pass_session
def resume(session: Session, name: str, as_json: bool) -> None:
    """Have machine NAME go on that stands still: after `io-error`, when the store has room again."""
    one = runtime.connect(session.path).ask("resume", name=name)
    if as_json:
        console.emit(one)
    else:
        console.say(f"{name} is {one['state']}")


@click.command()
@machine_argument("names", many=True)
@click.option("--now", is_flag=True, help="Pull the plug, instead of asking the guest to shut down.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=float,
    default=_SHUTDOWN_SECONDS,
    help="How long a guest may take.  [default: 60]",
)
@json_option
@common_options
@pass_session
def stop(session: Session, names: tuple[str, ...], now: bool, timeout: float, as_json: bool) -> None:
    """Stop machines. What was forked is gone with its disks; what was started shuts down and keeps them."""
    client = runtime.connect(session.path)
    stopped: Any = client.ask("stop", names=list(names), seconds=0.0 if now else timeout)
    if as_json:
        console.emit(stopped)
    else:
        console.say(f"stopped {', '.join(stopped)}")
