"""The disk of a guest that can be forked: a guest agent, a counter and a shell.

What it offers a test:

* the first serial port says `guest is up`, and then is a terminal with a shell;
* the agent answers on the port `org.qemu.guest_agent.0`;
* /run/count, in memory, has a number that rises; /data/count, on the disk, has each number as a line;
* /etc/hostname and /etc/machine-id are its identity. What replaces them finds busybox's commands for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.interop.rootdisk import write_disk

HOSTNAME = "parent"

# The initramfs has mounted /dev. Busybox's init, which this becomes, starts anew what ends.
INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
hostname -F /etc/hostname
[ -s /etc/machine-id ] || tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
ip link set lo up
exec init
"""

INITTAB = """\
::respawn:/bin/counter
::respawn:/bin/agent
ttyS0::respawn:/bin/console
"""

# Nothing like udev is here to name the port. While it is not there or has no name yet, init tries each second.
AGENT = """\
#!/bin/sh
mkdir -p /dev/virtio-ports
for file in /sys/class/virtio-ports/*/name; do
    port=${file%/name}
    read -r name <"$file" && ln -sf "/dev/${port##*/}" "/dev/virtio-ports/$name"
done
exec qemu-ga -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -t /run -l /run/qemu-ga.log
"""

# Goes on where the disk stands, so that a restart shows. A number in memory is never longer than the next: it is
# written over, and never seen empty. The fifo that nobody writes to is there to wait on, without a process more.
COUNTER = """\
#!/bin/sh
count=$(tail -n 1 /data/count 2>/dev/null)
count=${count:-0}
[ -p /run/never ] || mkfifo /run/never
exec 3<>/run/never 4>>/data/count
while :; do
    count=$((count + 1))
    echo $count 1<>/run/count
    echo $count >&4
    read -r -t 0.01 -u 3
done
"""

CONSOLE = """\
#!/bin/sh
until [ -s /run/count ]; do usleep 10000; done
echo "guest is up"
exec sh -l
"""

# The agent runs it to turn the machine off or to reset it.
SHUTDOWN = """\
#!/bin/sh
case " $* " in
    *" -r "*) reboot -f ;;
    *) poweroff -f ;;
esac
"""

# The agent looks for it here before it sets the time.
HWCLOCK = """\
#!/bin/sh
exec /bin/hwclock "$@"
"""

PROFILE = r"""
export PS1='\h\$ ' HOME=/
"""

FILES = {
    "etc/hostname": f"{HOSTNAME}\n",
    "etc/machine-id": "",
    "etc/inittab": INITTAB,
    "etc/profile": PROFILE,
    "sbin/init": INIT,
    "sbin/shutdown": SHUTDOWN,
    "sbin/hwclock": HWCLOCK,
    "bin/agent": AGENT,
    "bin/counter": COUNTER,
    "bin/console": CONSOLE,
}


def write_guestdisk(path: Path, busybox: Path, agent: Mapping[str, bytes]) -> None:
    write_disk(path, busybox, {name: text.encode() for name, text in FILES.items()} | dict(agent))
