"""A Linux kernel and a busybox for guests: those of the machine, or what tools/fetch-guest.sh has unpacked.

What is looked through are roots: folders with `boot`, `lib/modules` and `bin` in them. The variable
COWSTORE_GUEST_ROOT names another one, and then no other is looked at. A package that was only unpacked has no
`modules.dep`, so dependencies are read from the modules themselves.
"""

from __future__ import annotations

import gzip
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parents[2]
NAMED = os.environ.get("COWSTORE_GUEST_ROOT")
ROOTS = (Path(NAMED),) if NAMED else (Path("/"), PROJECT / ".cache" / "guest")

# A guest sees its disk with these. A kernel may have them compiled in.
DRIVERS = ("virtio_pci", "virtio_blk", "ext4")

# Wanted where they are modules: ext4 asks for it at the time of mounting, by a name that no dependency has.
WHERE_PRESENT = ("crc32c_generic",)

UNPACK: dict[str, Callable[[bytes], bytes]] = {".ko": bytes, ".ko.xz": lzma.decompress, ".ko.gz": gzip.decompress}


class UnfitError(Exception):
    """Nothing here that a guest can be made of."""


@dataclass(frozen=True)
class Driver:
    """A module, ready to be loaded."""

    name: str
    code: bytes

    @property
    def needs(self) -> list[str]:
        """The names of the modules that it cannot be loaded without."""
        found = re.search(rb"\bdepends=([\w,-]*)\0", self.code)
        return plain(found[1].decode()).split(",") if found and found[1] else []


class Kernel:
    """One kernel: its image, and the folder of its modules."""

    def __init__(self, image: Path, modules: Path) -> None:
        self.image = image
        self._modules = {plain(path.name.partition(".ko")[0]): path for path in modules.rglob("*.ko*")}
        builtin = (modules / "modules.builtin").read_text().splitlines()
        self._builtin = {plain(Path(line).stem) for line in builtin}

    def drivers(self, further: Iterable[str] = ()) -> list[Driver]:
        """What a guest loads to see its disk, and further ones by name, in the order of loading.

        Raises:
            UnfitError: one is missing, or is compressed in a way that is not known here.
        """
        order: dict[str, Driver] = {}
        for name in [*DRIVERS, *further, *(name for name in WHERE_PRESENT if name in self._modules)]:
            self._add(name, order)
        return list(order.values())

    def _add(self, name: str, order: dict[str, Driver]) -> None:
        """Adds a module behind all that it needs."""
        if name in order or name in self._builtin:
            return
        driver = Driver(name, self._code(name))
        for needed in driver.needs:
            self._add(needed, order)
        order[name] = driver

    def _code(self, name: str) -> bytes:
        path = self._modules.get(name)
        if path is None:
            raise UnfitError(f"{self.image} comes without the module {name}")
        unpack = UNPACK.get("".join(path.suffixes[-2:]) if path.suffix != ".ko" else ".ko")
        if unpack is None:
            raise UnfitError(f"{path} is compressed in a way that is not known here")
        return unpack(path.read_bytes())


def plain(name: str) -> str:
    """The kernel takes `-` and `_` in the name of a module for the same."""
    return name.replace("-", "_")


def kernels(roots: Iterable[Path]) -> Iterator[Kernel]:
    """Every kernel whose modules are there too, the small ones for virtual machines first, new before old."""
    images = [path for root in roots for path in sorted(root.glob("boot/vmlinuz-*"), reverse=True)]
    for image in sorted(images, key=lambda path: "cloud" not in path.name):
        version = image.name.removeprefix("vmlinuz-")
        for libraries in ("lib/modules", "usr/lib/modules"):
            modules = image.parents[1] / libraries / version
            if (modules / "modules.builtin").exists():
                yield Kernel(image, modules)
                break


def find_kernel(roots: Iterable[Path] = ROOTS, further: Iterable[str] = ()) -> Kernel:
    """The first kernel that can be read and that has its drivers, and further ones by name.

    Raises:
        UnfitError: there is none; the message has what is wrong with each.
    """
    reasons = []
    for kernel in kernels(roots):
        try:
            with kernel.image.open("rb"):  # on Ubuntu root alone may read it
                kernel.drivers(further)
                return kernel
        except (UnfitError, OSError) as error:
            reasons.append(str(error))
    raise UnfitError("; ".join(reasons) or "no Linux kernel with its modules is here")


def find_busybox(roots: Iterable[Path] = ROOTS) -> Path:
    """A busybox that runs where there are no libraries.

    Raises:
        UnfitError: there is none; that of Debian's package `busybox` needs libraries.
    """
    for path in (root / folder / "busybox" for root in roots for folder in ("bin", "usr/bin")):
        if path.exists() and b"/ld-linux" not in path.read_bytes():
            return path
    raise UnfitError("no statically linked busybox is here")
