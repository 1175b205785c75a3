"""Foreign formats: qcow2, vmdk, vhdx and vdi in and out, by running qemu-img against an NBD socket of our own.

What is stored is what a guest sees, never a container's bytes, so that equal disks share their blocks whatever
they came in. The socket is in a private directory and serves one device to one program.
"""

from __future__ import annotations

import errno
import json
import os
import re
import selectors
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import nbd
from .catalog import DeviceInfo
from .clones import Lineage as Handles
from .devices import Device
from .errors import InvalidError, NotFoundError, SourceError, StoreError
from .exports import Export
from .imports import Intake, import_disk
from .lineage import Lineage
from .publisher import Workshop
from .sources import FOREIGN

Progress = Callable[[str, int, int], None]
_SOUND = frozenset((0, 3, 63))  # exit codes of a check: sound, only space is lost, and no check for this format
_VDI_START, _VDI_BLOCK, _VDI_ALLOCATED = 0x158, 0x178, 0x184  # in the header: first block's place, size, count
_SLICE = 64 << 20  # bytes: after so many what was taken in is published
_TICK = 0.1  # seconds between two looks at how far it is
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")


class ForeignImage:
    """A file in a foreign format, looked at before it is taken in.

    Attributes:
        path: The file.
        size: What a guest sees, in bytes.
    """

    def __init__(self, source: Any, kind: str) -> None:
        path = self.path = os.fspath(source)
        # With a slash in front: qemu-img takes `nbd:host` and `json:{}` for more than a file's name.
        self._source = ["-f", kind, os.path.abspath(path)]
        facts = self._facts()
        self._refuse_others(facts)
        self._refuse_damaged(kind)
        self.size = int(facts["virtual-size"])

    def _facts(self) -> dict[str, Any]:
        words = [program(), "info", "--output=json", *self._source]
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SourceError(self.path, said(done.stderr))
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    def _refuse_others(self, facts: dict[str, Any]) -> None:
        """An image that leads to other files could have any file of this host read, and its bytes imported."""
        data = facts.get("format-specific", {}).get("data", {})
        extents = [one.get("filename") for one in data.get("extents", ())]
        other = facts.get("backing-filename") or data.get("data-file")
        other = other or next((one for one in extents if one and not self._is_beside(one)), None)
        if other:
            hint = "make one file of it first: qemu-img convert -O qcow2"
            raise SourceError(self.path, f"it leads to another file, {other}", hint=hint)
        if facts.get("encrypted"):
            raise SourceError(self.path, "it is encrypted", hint="decrypt it first: qemu-img convert")

    def _is_beside(self, extent: str) -> bool:
        """Whether a part of a vmdk in several files lies where the file that names it does, under no link."""
        place = os.path.dirname(os.path.realpath(self.path))
        return bool(os.path.dirname(os.path.realpath(extent)) == place)

    def _refuse_damaged(self, kind: str) -> None:
        """qemu-img reads what is missing at the end of a file as zeros, and converts such an image without a word.

        Of a vdi it does not find that when it checks, either.
        """
        words = [program(), "check", "--output=json", *self._source]
        done = subprocess.run(words, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode not in _SOUND:
            raise SourceError(self.path, f"it is damaged: {said(done.stderr)}", hint="try qemu-img check -r all")
        if kind == "vdi":
            with open(self.path, "rb") as file:
                head = file.read(_VDI_ALLOCATED + 4)
                length = os.fstat(file.fileno()).st_size
            start, size, count = (
                int.from_bytes(head[at : at + 4], "little") for at in (_VDI_START, _VDI_BLOCK, _VDI_ALLOCATED)
            )
            if start + size * count > length:
                raise SourceError(self.path, f"it is damaged: {start + size * count - length} bytes are missing")

    def copy_into(self, intake: Intake, progress: Progress) -> None:
        """Writes what a guest sees to a device, publishing it slice by slice."""

        def tell(done: float) -> None:
            progress("import", int(self.size * done), self.size)
            if intake.unpublished >= _SLICE:
                intake.flush()

        with served(intake) as lent:
            reason = convert(["-n", "-W", *self._source, "-O", "raw", lent.uri], tell)
        if reason:
            raise lent.trouble or SourceError(self.path, reason)
        progress("import", self.size, self.size)


def take_in(
    source: Any, kind: str, name: str, handles: Handles, workshop: Workshop, lineage: Lineage,
    progress: Progress,
) -> DeviceInfo:  # fmt: skip
    """Takes a disk image of such a format in, under a name."""
    image = ForeignImage(source, kind)
    return import_disk(workshop, lineage, handles, image.size, name, partial(image.copy_into, progress=progress))


def export(job: Export, device: Device, kind: str, progress: Progress) -> None:
    """Writes a device to a file in a foreign format.

    Args:
        job: The file.
        device: What is written; nothing may change it meanwhile.
        kind: One of sources.FOREIGN.
        progress: Told ("export", bytes done, bytes in all).

    Raises:
        InvalidError: There is no such format.
        NotFoundError: qemu-img is not installed.
        StoreError: It failed; nothing is left behind.
    """
    if kind not in FOREIGN:
        raise InvalidError(f"format {kind!r} is not known", hint=f"raw, {', '.join(FOREIGN)}")
    program()

    def fill(path: Path) -> None:
        with served(device) as lent:
            words = ["-f", "raw", lent.uri, "-O", kind, os.path.abspath(path)]
            reason = convert(words, lambda done: progress("export", int(device.size * done), device.size))
        if lent.trouble:
            raise lent.trouble
        if os.strerror(errno.ENOSPC) in reason:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if reason:
            raise StoreError(f"qemu-img cannot write {kind}: {reason.replace(os.fspath(path), 'the file')}")

    job.write_by(fill)
    progress("export", device.size, device.size)


def program() -> str:
    """The path of qemu-img.

    Raises:
        NotFoundError: It is not installed.
    """
    found = shutil.which("qemu-img")
    if found is None:
        raise NotFoundError("program", "qemu-img", hint="install it; Debian has it in the package qemu-utils")
    return found


def convert(words: list[str], tell: Callable[[float], None]) -> str:
    """Runs `qemu-img convert`, telling how far it is, from 0 to 1; returns why it failed, or nothing."""
    child = subprocess.Popen(
        [program(), "convert", "-p", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with child:
        try:
            errors = _follow(child, tell)
        except BaseException:
            child.kill()
            raise
    return said(errors) if child.returncode else ""


def _follow(child: subprocess.Popen[bytes], tell: Callable[[float], None]) -> bytes:
    """Reads what a child prints until it ends; returns what it said on stderr."""
    errors, done = b"", 0.0
    with selectors.DefaultSelector() as selector:
        for stream in (child.stdout, child.stderr):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ, stream is child.stderr)
        while selector.get_map():
            for key, _ in selector.select(_TICK):
                text = os.read(key.fd, 65536)
                if not text:
                    selector.unregister(key.fileobj)
                elif key.data:
                    errors = (errors + text)[-4096:]
                else:
                    done = max([done, *(float(one) / 100 for one in _PERCENT.findall(text))])
            tell(done)
    return errors


def said(errors: bytes) -> str:
    """What qemu-img complained about first, in one line and without its name."""
    lines = errors.decode(errors="replace").strip().splitlines()
    return lines[0].removeprefix("qemu-img: ") if lines else "qemu-img failed without a word"


@contextmanager
def served(device: Device) -> Iterator[_Lent]:
    """Serves one device to one program while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="cowstore-") as place:
        listener = nbd.listen_unix(Path(place) / "nbd.sock")
        lent = _Lent(device, f"nbd+unix:///{device.name}?socket={quote(place)}/nbd.sock")
        server = nbd.Server(_One(lent), [listener], names=[device.name])
        server.start()
        try:
            yield lent
        finally:
            server.stop()


class _One:
    """A single device, for the server."""

    def __init__(self, lent: _Lent) -> None:
        self._lent = lent
        self._info = lent.info

    def devices(self) -> list[DeviceInfo]:
        """It alone."""
        return [self._info]

    def info(self, name: str) -> DeviceInfo:
        """What is known of it."""
        if name != self._info.name:
            raise NotFoundError("export", name)
        return self._info

    def device(self, name: str) -> _Lent:
        """The device, however often a client comes and goes."""
        self.info(name)
        return self._lent


class _Lent:
    """A device that stays open when its borrower closes it, and remembers what went wrong.

    Attributes:
        uri: Where it is served.
        info: What it is.
        trouble: Its first failure, of which a client is told no more than a number.
    """

    def __init__(self, device: Device, uri: str) -> None:
        self._device = device
        self.uri = uri
        self.info = replace(device.info, kind="clone" if device.writable() else "image")
        self.trouble: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._device, name)
        return partial(self._call, found) if callable(found) else found

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            self.trouble = self.trouble or error
            raise

    def close(self) -> None:
        """Not yet."""
