"""What a guest starts from: an archive in memory that loads the drivers and changes over to the disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from stat import S_IFDIR, S_IFLNK, S_IFREG

from .kernel import Driver

# Whatever fails here ends process 1, so the kernel panics, and with that the machine: nobody waits for it.
INIT = """\
#!/bin/busybox sh
set -e
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*; do
    [ ! -f "$module" ] || insmod "$module"
done
tries=0
until [ -b /dev/vda ]; do
    tries=$((tries + 1))
    [ $tries -lt 100 ]
    sleep 0.1
done
mount -t ext4 -o rw /dev/vda /root
umount /sys /proc
mount -o move /dev /root/dev
exec switch_root /root /sbin/init
"""

# Links to busybox for the commands of that, and for no others: to make them all in the guest takes a while.
COMMANDS = ("insmod", "mount", "sleep", "switch_root", "umount")
FOLDERS = ("bin", "dev", "proc", "sys", "root", "modules")


def member(number: int, name: str, mode: int, data: bytes = b"") -> bytes:
    """One file of a cpio archive in the format "newc": a header of hexadecimal fields, the name, the content.

    Source: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
    """
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return padded(header) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def write_initramfs(path: Path, busybox: bytes, drivers: Iterable[Driver]) -> None:
    files = {"init": INIT.encode(), "bin/busybox": busybox}
    files |= {f"modules/{order:03}-{one.name}.ko": one.code for order, one in enumerate(drivers)}
    members = [(folder, S_IFDIR | 0o755, b"") for folder in FOLDERS]
    members += [(f"bin/{command}", S_IFLNK | 0o777, b"busybox") for command in COMMANDS]
    members += [(name, S_IFREG | 0o755, data) for name, data in files.items()]
    members += [("TRAILER!!!", 0, b"")]
    path.write_bytes(b"".join(member(number, *one) for number, one in enumerate(members, 1)))
