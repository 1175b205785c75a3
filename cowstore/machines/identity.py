"""Identities: what tells a child from its parent, given to it and then asked of it.

A hypervisor may report a new address while the guest goes on with the old one. So nothing here is believed before
the guest has said it itself.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Self

from cowstore.errors import GuestError

from .agent import Agent
from .reseed import program

HOOK_SECONDS = 20.0
_CLOCK_SECONDS = 5.0  # that a guest's clock may be off after it was set
_ENTROPY = 256  # bytes

# Run by the guest's shell, with the reseeding program on its standard input, which needs a place where programs
# may be run. The address of a card that was plugged a moment ago takes a while to appear. Whatever fails ends the
# script with a status, and what it says is compared on this side.
_SCRIPT = """\
set -e
umask 077
seed=/run/cowstore-seed
cat >$seed
seeded=
for place in /run /dev/shm /tmp /var/tmp /root; do
    [ $place = /run ] || cp $seed $place/cowstore-seed 2>/dev/null || continue
    chmod 700 $place/cowstore-seed
    ! $place/cowstore-seed 2>/dev/null || seeded=yes
    [ $place = /run ] || rm -f $place/cowstore-seed
    [ -z "$seeded" ] || break
done
cat $seed >/dev/urandom
rm -f $seed
[ -n "$seeded" ] || [ -d /sys/bus/acpi/drivers/vmgenid ] || { echo "its randomness is its parent's" >&2; exit 1; }
umask 022
printf '%s' "$COWSTORE_HOSTNAME" >/proc/sys/kernel/hostname
[ ! -e /etc/hostname ] || printf '%s\\n' "$COWSTORE_HOSTNAME" >/etc/hostname
printf '%s\\n' "$COWSTORE_MACHINE_ID" >/etc/machine-id
[ ! -f /var/lib/dbus/machine-id ] || [ -L /var/lib/dbus/machine-id ] ||
    printf '%s\\n' "$COWSTORE_MACHINE_ID" >/var/lib/dbus/machine-id
rm -f /var/lib/systemd/random-seed
tries=0
while [ -n "$COWSTORE_MAC" ] && ! grep -qsx "$COWSTORE_MAC" /sys/class/net/*/address; do
    tries=$((tries + 1))
    [ $tries -lt 100 ] || break
    sleep 0.05
done
cat /proc/sys/kernel/hostname /etc/machine-id
cat /sys/class/net/*/address 2>/dev/null || true
"""


@dataclass(frozen=True)
class Identity:
    """What one machine is called and known by.

    Attributes:
        hostname: Its name in the guest.
        machine_id: 32 hexadecimal digits; see machine-id(5).
        generation: The GUID by which the hypervisor tells the guest that it was forked.
        mac: The address of its network card; empty where it has none.
    """

    hostname: str
    machine_id: str
    generation: str
    mac: str = ""

    @classmethod
    def make(cls, name: str, mac: str) -> Self:
        """A fresh one, for a machine of that name and with that address; without one where there is no card."""
        hostname = re.sub(r"[^a-z0-9-]", "-", name.lower()).strip("-")[:63].rstrip("-") or "machine"
        return cls(hostname, uuid.uuid4().hex, str(uuid.uuid4()), mac)

    def facts(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def fresh_mac(taken: Collection[str]) -> str:
    """An address of QEMU's own range, by chance, that nobody has."""
    while True:
        mac = "52:54:00:" + ":".join(f"{byte:02x}" for byte in os.urandom(3))
        if mac not in taken:
            return mac


def apply(agent: Agent, machine: str, identity: Identity, former_mac: str) -> None:
    """Gives a running guest its identity, entropy and the time, and asks it for all of that.

    Args:
        agent: Its agent.
        machine: Its name, for messages.
        identity: What it is to be.
        former_mac: The address of the card that it must not have any more; empty where there was none.

    Raises:
        GuestError: It did not take it.
    """
    set_clock(agent, machine)
    variables = {
        "COWSTORE_HOSTNAME": identity.hostname,
        "COWSTORE_MACHINE_ID": identity.machine_id,
        "COWSTORE_MAC": identity.mac,
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }
    done = agent.run(["/bin/sh", "-c", _SCRIPT], data=program(os.urandom(_ENTROPY)), environment=variables)
    if done.status:
        said = done.errors.decode(errors="replace").strip()
        raise GuestError(machine, "identity", said or f"status {done.status}")
    check_told(machine, identity, former_mac, done.output.decode(errors="replace").split())


def check_told(machine: str, identity: Identity, former_mac: str, words: list[str]) -> None:
    """Compares what the guest says of itself with what it is to be: hostname, machine id, and its addresses.

    Raises:
        GuestError: They differ.
    """
    if words[:2] != [identity.hostname, identity.machine_id]:
        raise GuestError(machine, "identity", f"it calls itself {' '.join(words[:2])!r}")
    addresses = words[2:]
    if identity.mac and (identity.mac not in addresses or former_mac in addresses):
        seen = ", ".join(addresses) or "no network card"
        raise GuestError(
            machine, "identity", f"it has {seen}, and not {identity.mac}",
            hint="has it the driver for its network card, and is that loaded?",
        )  # fmt: skip


def set_clock(agent: Agent, machine: str) -> None:
    """Sets the guest's clock. The agent may complain of the hardware's; what counts is what it tells afterwards.

    Raises:
        GuestError: It tells another time.
    """
    refused = ""
    try:
        agent.ask("set-time", time=time.time_ns())
    except GuestError as error:
        refused = f": {error}"
    before = time.time()
    told = agent.number("get-time") / 1e9
    off = min(told - before, 0.0) or max(told - time.time(), 0.0)  # it may be any time while it was asked
    if abs(off) > _CLOCK_SECONDS:
        raise GuestError(machine, "clock", f"it is {off:.1f} s off after it was set{refused}")


def run_hook(agent: Agent, machine: str, hook: bytes, identity: Identity, parent: str) -> None:
    """Runs a user's script in the guest, by its shell.

    Raises:
        GuestError: It failed, or took longer than HOOK_SECONDS.
    """
    variables = {
        "COWSTORE_NAME": machine,
        "COWSTORE_PARENT": parent,
        "COWSTORE_HOSTNAME": identity.hostname,
        "COWSTORE_MACHINE_ID": identity.machine_id,
        "COWSTORE_MAC": identity.mac,
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    }
    done = agent.run(["/bin/sh", "-s"], data=hook, environment=variables, seconds=HOOK_SECONDS)
    if done.status:
        said = (done.errors or done.output).decode(errors="replace").strip()
        raise GuestError(machine, "hook", f"it ended with status {done.status}: {said[-500:]}")
