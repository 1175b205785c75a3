"""Commands that move bytes: import, export, read, write."""

from __future__ import annotations

import os
import stat
import sys
from typing import Any, BinaryIO

import click

import cowstore
from cowstore_cli import console, sizes
from cowstore_cli.options import Decorator, common_options, device_argument, json_option, size_option
from cowstore_cli.session import Session, pass_session, writing

CHUNK = 4 << 20

_FILE = click.Path(allow_dash=True)


def _format_option(default: str, text: str) -> Decorator[Any]:
    return click.option("--format", "kind", metavar="FORMAT", default=default, help=text)


@click.command("import")
@click.argument("source", metavar="FILE", type=_FILE)
@click.argument("name", metavar="NAME")
@_format_option("auto", "What FILE is: auto, raw, qcow2, vmdk, vhdx or vdi.  [default: auto, by its first bytes]")
@json_option
@common_options
@pass_session
def import_(session: Session, source: str, name: str, kind: str, as_json: bool) -> None:
    """Import FILE, a disk image or a block device, as image NAME.

    `-` reads standard input. Holes of a sparse file are not read, and take no room. What is no raw disk is read by
    qemu-img; an image that leads to other files is refused. Say `--format raw` of a raw disk that somebody you do
    not trust has written: its first bytes may pretend.
    """
    with session.open() as store, console.progress() as progress:
        stream = sys.stdin.buffer if source == "-" else source
        made = store.import_image(stream, name, format=kind, progress=progress)
    console.tell(made, f"imported {source} as image {name}, {sizes.show(made.size)}", as_json)


class _ReflinkAlone(click.Command):
    """`--reflink` takes its value behind a `=` only, as in cp: the word after it is the device."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Gives a bare one its value, before click takes the next word for it."""
        end = args.index("--") if "--" in args else len(args)
        words = ["--reflink=always" if word == "--reflink" else word for word in args[:end]]
        return super().parse_args(ctx, words + args[end:])


@click.command(cls=_ReflinkAlone)
@device_argument("name")
@click.argument("file", metavar="FILE", type=_FILE)
@_format_option("raw", "What FILE is to be: raw, qcow2, vmdk, vhdx or vdi.  [default: raw]")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option(
    "--reflink",
    metavar="[=WHEN]",
    type=click.Choice(["auto", "always", "never"]),
    is_flag=False,
    flag_value="always",
    default="auto",
    help="Share space with the store instead of copying, as XFS and btrfs can: auto does where possible, always "
    "does or fails, never copies. Without the option it is auto, without a value always.",
)
@click.option(
    "--no-verify",
    is_flag=True,
    help="Do not read what is shared, so that damage in it goes unnoticed. What is copied is always verified.",
)
@json_option
@common_options
@pass_session
def export(
    session: Session, name: str, file: str, kind: str, force: bool, reflink: str, no_verify: bool, as_json: bool
) -> None:
    """Write device NAME to FILE, by default a sparse raw disk.

    Other formats are written by qemu-img, and count in sectors of 512 bytes. `-` writes standard output. The file
    appears under its name only when it is whole, readable by its owner only; of a clone it holds the last flush.
    """
    if reflink == "always" and kind != "raw":
        raise click.UsageError(f"a {kind} file cannot share space with the store; leave --reflink or --format")
    if file == "-":
        if reflink == "always" or kind != "raw":
            raise click.UsageError("standard output takes a raw copy only; name a file")
        _export_to_stdout(session, name, as_json)
        return
    with session.copy() as store, console.progress() as progress:
        try:
            how: dict[str, Any] = {"format": kind, "reflink": reflink, "verify": not no_verify}
            store.export(name, file, overwrite=force, progress=progress, **how)
        except cowstore.ExistsError as error:
            error.hint = "--force replaces it"
            raise
        device = store.info(name)
    if as_json:
        console.emit(console.plain(device) | {"file": file})
    else:
        console.say(f"exported {name} to {file}, {sizes.show(device.size)}")


def _export_to_stdout(session: Session, name: str, as_json: bool) -> None:
    if as_json:
        raise click.UsageError("--json and the disk cannot both go to standard output")
    _refuse_terminal()
    with session.copy() as store, console.progress() as progress, store.device(name, readonly=True) as device:
        _copy_out(device, 0, device.size, progress)


def _refuse_terminal() -> None:
    if console.on_terminal():
        raise click.UsageError(
            "a terminal cannot show a disk; redirect standard output, or look at it through `xxd`"
        )


@click.command()
@device_argument("name")
@size_option("--offset", "Where to start.  [default: 0]")
@size_option("--length", "How much to read.  [default: to the end]")
@common_options
@pass_session
def read(session: Session, name: str, offset: int | None, length: int | None) -> None:
    """Print bytes of device NAME.

    Of a clone they are those of its last flush, also while another process writes it.
    """
    _refuse_terminal()
    with session.look() as store, store.device(name, readonly=True) as device:
        start = offset or 0
        count = max(device.size - start, 0) if length is None else length
        if start + count > device.size:
            raise cowstore.RangeError(name, start, count, device.size)
        _copy_out(device, start, count, console.no_bars)


def _copy_out(device: cowstore.Device, offset: int, length: int, progress: console.Progress) -> None:
    output = sys.stdout.buffer
    for done in range(0, length, CHUNK):
        _write_all(output, device.pread(min(CHUNK, length - done), offset + done))
        progress("export", done, length)
    output.flush()


def _write_all(output: BinaryIO, content: bytes) -> None:
    """Under PYTHONUNBUFFERED standard output is a bare file, whose write() may take only a part."""
    rest = memoryview(content)
    while rest:
        rest = rest[output.write(rest) :]


@click.command()
@device_argument("name", kind="clone")
@size_option("--offset", "Where to start.  [default: 0]")
@click.option(
    "--input", "source", metavar="FILE", type=click.File("rb"), default="-", help="Read FILE, not stdin."
)
@json_option
@common_options
@pass_session
def write(session: Session, name: str, offset: int | None, source: BinaryIO, as_json: bool) -> None:
    """Write standard input, or a file, into clone NAME.

    All of it is written and flushed, or nothing.
    """
    start = offset or 0
    with session.open() as store:
        with writing(store, name) as device:
            _refuse_too_long(device, start, source)
            length = _copy_in(device, start, source)
        now = store.info(name)
    if as_json:
        console.emit(console.plain(now) | {"offset": start, "length": length})
    else:
        console.say(f"wrote {sizes.exact(length)} into {name} at offset {start}")


def _refuse_too_long(device: cowstore.Clone, offset: int, source: BinaryIO) -> None:
    """A file whose length is known is refused before its first byte is written."""
    try:
        found = os.fstat(source.fileno())
    except OSError:
        return
    if stat.S_ISREG(found.st_mode) and offset + found.st_size - source.tell() > device.size:
        raise cowstore.RangeError(device.info.name, offset, found.st_size, device.size)


def _copy_in(device: cowstore.Clone, offset: int, source: BinaryIO) -> int:
    position = offset
    while chunk := source.read(CHUNK):
        position += device.pwrite(chunk, position)
    return position - offset
