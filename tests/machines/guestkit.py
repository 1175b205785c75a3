"""What the guests of the machine tests are made of: a small Linux with QEMU's guest agent in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.interop.initramfs import write_initramfs
from tests.interop.kernel import ROOTS, find_busybox, find_kernel

from .guestagent import find_agent
from .guestdisk import write_guestdisk

# The agent's port, and a network card that is plugged in later.
DRIVERS = ("virtio_console", "virtio_net")

# A machine that panics resets, and one that resets ends where QEMU runs with -no-reboot. The tests that the kernel
# does of its ciphers are a fifth of the time that a boot takes under emulation.
COMMAND_LINE = "console=ttyS0 panic=-1 quiet loglevel=5 random.trust_cpu=on cryptomgr.notests"


@dataclass(frozen=True)
class Parts:
    """The files that QEMU boots a guest from. The disk is raw, and the guest's /dev/vda."""

    kernel: Path
    initramfs: Path
    disk: Path

    @classmethod
    def make(cls, folder: Path, roots: Iterable[Path] = ROOTS) -> Self:
        """Makes the initramfs and the disk in a folder.

        Raises:
            UnfitError: a kernel, a busybox or an agent is missing; tools/fetch-guest.sh fetches them.
        """
        roots = tuple(roots)
        kernel, busybox, agent = find_kernel(roots, DRIVERS), find_busybox(roots), find_agent(roots)
        parts = cls(kernel.image, folder / "initramfs", folder / "disk.raw")
        write_initramfs(parts.initramfs, busybox.read_bytes(), kernel.drivers(DRIVERS))
        write_guestdisk(parts.disk, busybox, agent)
        return parts
