"""The disk of a guest: a raw image of an ext4 file system, whose init is a shell on the second serial port."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import find_program

SIZE = "128M"

# Commands come through the second serial port, one a line: the kernel's messages go to the first. A shell that
# reads them itself would take the port for a person's terminal, prompt and edit. The open descriptor keeps the
# port's settings.
INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs run /run
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo clocal
echo "guest is up" >&3
console <&3 >&3 2>&3
poweroff -f
"""

# Not process 1, and nothing runs beside it that is its child: the end of a child interrupts busybox's `read`,
# which then begins anew and forgets the half of a line that it had.
CONSOLE = """#!/bin/sh
while IFS= read -r command; do eval "$command"; done
"""

# `sync FILE` is fsync, and says whether it worked; `sync` alone never does. Each file's content follows from its
# number, and its size is anything. A failure ends the machine, so that nobody waits for more.
WRITER = """\
#!/bin/sh
number=0
until [ -e /run/stop ]; do
    number=$((number + 1))
    if seq $number $((number + number * 997 % 9000)) >/data/$number && sync /data/$number; then
        echo "synced $number"
    else
        echo "failed $number"
        poweroff -nf
    fi
done
echo "stopped"
"""

SCRIPTS = {"sbin/init": INIT, "bin/console": CONSOLE, "bin/writer": WRITER}
FOLDERS = ("bin", "sbin", "etc", "dev", "proc", "sys", "run", "tmp", "data")


def written(number: int) -> bytes:
    """What the writer puts into the file with this number."""
    return b"".join(b"%d\n" % line for line in range(number, number + number * 997 % 9000 + 1))


def write_rootdisk(path: Path, busybox: Path) -> None:
    write_disk(path, busybox, {name: script.encode() for name, script in SCRIPTS.items()})


def write_disk(path: Path, busybox: Path, files: Mapping[str, bytes]) -> None:
    """Writes an image with busybox, its commands and these files in it, which all may be run."""
    tree = path.with_suffix(".tree")
    for folder in FOLDERS:
        (tree / folder).mkdir(parents=True)
    for name, data in {"bin/busybox": busybox.read_bytes(), **files}.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
        (tree / name).chmod(0o755)
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for applet in {*listed.stdout.split()} - {"busybox"}:
        (tree / "bin" / applet).symlink_to("busybox")
    mke2fs = find_program("mke2fs")
    assert mke2fs is not None
    # A guest to which it is left clears the inode tables in the background, while something else is looked at.
    words = [mke2fs, "-q", "-t", "ext4", "-b", "4096", "-E", "lazy_itable_init=0"]
    words += ["-d", str(tree), str(path), SIZE]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
