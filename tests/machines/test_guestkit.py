"""The guest that the other tests of machines use does what they count on. One boot serves all tests here."""

from __future__ import annotations

import re
import shutil
import socket
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.process import Process

from .channel import Channel, RefusedError
from .guestdisk import HOSTNAME
from .guestkit import COMMAND_LINE, Parts

pytestmark = pytest.mark.program("qemu-system-x86_64", "mke2fs")

SOON_S = 60


class Guest:
    """A running guest: its console, its agent and QEMU's monitor, each on a socket in the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "console.log"
        self.wait_for_console("guest is up")
        self.connect_agent()
        self.monitor = Channel.monitor(folder / "monitor")
        self._console = socket.socket(socket.AF_UNIX)
        self._console.connect(str(folder / "console"))

    def connect_agent(self) -> None:
        self.agent = Channel.agent(self._folder / "agent")

    def run(self, script: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """What a script ends with: status, output, errors."""
        options = {"capture-output": True} | ({"input-data": b64encode(stdin).decode()} if stdin else {})
        started = self.agent.run("guest-exec", path="/bin/sh", arg=["-c", script], **options)
        while not (ended := self.agent.run("guest-exec-status", pid=started["pid"]))["exited"]:
            time.sleep(0.01)
        return ended["exitcode"], b64decode(ended.get("out-data", "")), b64decode(ended.get("err-data", ""))

    def said(self, script: str) -> str:
        status, output, errors = self.run(script)
        assert status == 0, errors
        return output.decode().strip()

    def type(self, line: str) -> None:
        self._console.sendall(line.encode() + b"\r")

    def wait_for_console(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + SOON_S
        while True:
            said = self._log.read_text("latin-1") if self._log.exists() else ""
            if found := re.search(pattern, said):
                return found
            assert time.monotonic() < end, f"no {pattern!r} in {said[-2000:]!r}"
            time.sleep(0.02)

    def has_card(self, address: str) -> bool:
        return address in self.said("cat /sys/class/net/*/address").split()

    def close(self) -> None:
        self._console.close()
        self.agent.close()
        self.monitor.close()


def machine(parts: Parts, disk: Path, folder: Path) -> list[str]:
    """The command of the machine: the devices that one has which can be forked."""
    agent, console, monitor, log = (folder / name for name in ("agent", "console", "monitor", "console.log"))
    words = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "pc-q35-7.2", "-m", "256", "-no-reboot"]
    words += ["-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-kernel", str(parts.kernel), "-initrd", str(parts.initramfs), "-append", COMMAND_LINE]
    words += ["-blockdev", f"raw,node-name=disk,file.driver=file,file.filename={disk}"]
    words += ["-chardev", f"socket,id=agent,path={agent},server=on,wait=off"]
    words += ["-chardev", f"socket,id=console,path={console},server=on,wait=off,logfile={log}"]
    words += ["-serial", "chardev:console", "-qmp", f"unix:{monitor},server=on,wait=off"]
    devices = ["vmgenid,guid=auto", "pcie-root-port,id=port0,chassis=1,slot=1", "virtio-serial-pci"]
    devices += ["virtserialport,chardev=agent,name=org.qemu.guest_agent.0", "virtio-blk-pci,drive=disk"]
    return [*words, *(word for device in devices for word in ("-device", device))]


@pytest.fixture(scope="module")
def guest(machine_parts: Parts, socket_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("guest")
    disk = Path(shutil.copy(machine_parts.disk, folder))
    with Process(machine(machine_parts, disk, socket_folder), folder / "output", folder / "errors"):
        guest = Guest(socket_folder)
        yield guest
        guest.close()


def test_scripts_run_through_the_agent(guest):
    assert guest.agent.run("guest-ping") == {}
    commands = {one["name"]: one["enabled"] for one in guest.agent.run("guest-info")["supported_commands"]}
    assert commands["guest-exec"]
    assert commands["guest-fsfreeze-freeze"]
    assert guest.run("cat; echo errors >&2; exit 3", stdin=b"typed") == (3, b"typed", b"errors\n")


def test_it_has_an_identity(guest):
    assert guest.agent.run("guest-get-host-name") == {"host-name": HOSTNAME}
    assert guest.said("cat /etc/hostname") == HOSTNAME
    assert re.fullmatch("[0-9a-f]{32}", guest.said("cat /etc/machine-id"))


def test_its_time_can_be_set(guest):
    guest.agent.run("guest-set-time", time=2_000_000_000 * 10**9)
    assert 0 <= int(guest.said("date +%s")) - 2_000_000_000 < SOON_S


def test_it_counts_in_memory_and_on_disk(guest):
    before = int(guest.said("cat /run/count"))
    memory, disk = (int(word) for word in guest.said("cat /run/count; tail -n 1 /data/count").split())
    assert before < memory <= disk + 1
    counts = guest.said("cat /data/count").split()
    assert [int(one) for one in counts] == list(range(1, len(counts) + 1))


def test_frozen_it_writes_nothing_and_thawed_it_goes_on(guest):
    assert guest.agent.run("guest-fsfreeze-freeze") == 1
    try:
        assert guest.agent.run("guest-fsfreeze-status") == "frozen"
        with pytest.raises(RefusedError, match="frozen"):
            guest.run("true")
        guest.type('echo "first $(cat /run/count)"; sleep 0.2; echo "second $(cat /run/count)"')
        second = int(guest.wait_for_console(r"second (\d+)")[1])
        assert second == int(guest.wait_for_console(r"first (\d+)")[1])
    finally:
        assert guest.agent.run("guest-fsfreeze-thaw") == 1
    assert guest.agent.run("guest-fsfreeze-status") == "thawed"
    assert int(guest.said("sleep 0.2; cat /run/count")) > second


@pytest.mark.parametrize("paused", [False, True])
def test_a_network_card_is_plugged_and_unplugged(guest, paused):
    address = f"52:54:00:00:00:0{int(paused)}"
    if paused:
        guest.monitor.run("stop")
    guest.monitor.run("netdev_add", type="hubport", hubid=0, id="net")
    guest.monitor.run("device_add", driver="virtio-net-pci", id="card", bus="port0", netdev="net", mac=address)
    if paused:
        guest.monitor.run("cont")
    end = time.monotonic() + SOON_S
    while not guest.has_card(address):
        assert time.monotonic() < end
    cards = guest.agent.run("guest-network-get-interfaces")
    assert address in [card.get("hardware-address") for card in cards]
    guest.monitor.run("device_del", id="card")
    guest.monitor.wait_for("DEVICE_DELETED", device="card")
    guest.monitor.run("netdev_del", id="net")
    assert not guest.has_card(address)


def test_its_agent_answers_who_comes_next(guest):
    guest.agent.close()
    guest.connect_agent()
    assert guest.agent.run("guest-ping") == {}
