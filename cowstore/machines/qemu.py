"""QEMU: its command line, and the recipe by which it saves and loads the state of a machine.

A machine that boots has anonymous memory; a child maps a sealed template privately. In both its own pages are
private to its process, so one way of saving serves them all: the state of the devices without the memory
(`xen-save-devices-state`), and the pages from the process. A child takes the state for a migration that comes in;
`send-configuration=off` says that the section is missing that only a whole one begins with.

A QEMU that waits for a migration leaves its BIOS empty, for the stream to fill, and ours does not. So the BIOS is
kept with the state, and written into the child's process: it would find none when it reboots. The command that is
made for such states, `xen-load-devices-state`, ends QEMU 7.2 with a failed assertion.

Source: docs/devel/migration.rst, qapi/migration.json and hmp-commands-info.hx of QEMU 7.2.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cowstore.errors import InvalidError, MachineError, NotFoundError

from .configuration import MIB, Configuration
from .hypervisor import AGENT, CONSOLE, CONSOLE_LOG, LOG, QMP, Launch, Nic
from .monitor import Monitor
from .pages import copy_process, write_process
from .processes import kill

PROGRAM = "qemu-system-x86_64"
AGENT_PORT = "org.qemu.guest_agent.0"
_CONTROL = "control.sock"  # a monitor of the manager's own: whoever talks to QMP keeps nobody waiting
_RECONNECT_SECONDS = 86_400  # how long requests to the disks wait for a server to come back
_START_SECONDS = 60.0
_STATUS_SECONDS = 10.0
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"  # for a guest that breaks out
_BIOS_SIZE = struct.Struct("<Q")  # the last bytes of a saved state
_FIRST_DISK = 0x10  # its slot on the bus
_TAIL = 2000  # bytes of the log that an error shows


class Qemu:
    """Starts machines in QEMU.

    Args:
        program: Its name or path.
    """

    def __init__(self, program: str = PROGRAM) -> None:
        self._program = program
        self._answers: dict[tuple[object, ...], str] = {}

    @functools.cached_property
    def _path(self) -> str:
        path = shutil.which(self._program)
        if path is None:
            raise NotFoundError("program", self._program, hint="on Debian: apt install qemu-system-x86")
        return path

    def _asked(self, *words: str) -> str:
        """What the program says of itself; asked once, until it is another one."""
        found = os.stat(self._path)
        key = (found.st_ino, found.st_mtime_ns, found.st_size, words)
        if key not in self._answers:
            self._answers[key] = self._ask(*words)
        return self._answers[key]

    def _ask(self, *words: str) -> str:
        done = subprocess.run(
            [self._path, *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise MachineError(f"{self._path} {' '.join(words)} failed: {done.stderr.strip()}")
        return done.stdout

    def _machines(self) -> dict[str, str]:
        """Every machine type, and what an alias stands for."""
        found = {}
        for line in self._asked("-machine", "help").splitlines()[1:]:
            name, alias = line.split()[0], re.search(r"\(alias of (\S+)\)", line)
            found[name] = alias[1] if alias else name
        return found

    def version(self) -> str:
        """Major and minor version: within one, QEMU keeps what a state looks like."""
        found = re.search(r"version (\d+\.\d+)", self._asked("--version"))
        if found is None:
            raise MachineError(f"{self._path} does not tell its version")
        return f"QEMU {found[1]}"

    def settled(self, configuration: Configuration) -> Configuration:
        """See Hypervisor."""
        machine = self._machines().get(configuration.machine)
        if machine is None or "q35" not in machine:
            raise InvalidError(
                f"machine type {configuration.machine!r} is not known to {self.version()}",
                hint="q35, or a version of it that `qemu-system-x86_64 -machine help` lists",
            )
        cpu = configuration.cpu or ("host" if configuration.accelerator == "kvm" else "max")
        return replace(configuration, machine=machine, cpu=cpu)

    def start(self, launch: Launch) -> RunningQemu:
        """See Hypervisor."""
        state, bios = (None, b"") if launch.state is None else _apart(launch.state)
        with _listening(launch.directory / _CONTROL) as control, _state_file(state) as file:
            pid = _spawn(self._path, launch, control, file)
        try:
            running = RunningQemu(launch.name, pid, launch.directory)
            if state is not None:
                running.wait_loaded()
                running.write_bios(bios)
        except BaseException as error:
            kill(pid)
            os.waitpid(pid, 0)
            if isinstance(error, MachineError):
                said = _said(launch.directory)
                raise MachineError(f"machine {launch.name} did not start: {said or error}") from error
            raise
        return running

    def attach(self, pid: int, directory: Path) -> RunningQemu:
        """See Hypervisor."""
        return RunningQemu(f"process {pid}", pid, directory)

    def find(self, directory: Path) -> Sequence[int]:
        """See Hypervisor."""
        mark = f"path={_quoted(directory)}/{QMP},".encode()
        return [pid for pid in _processes() if mark in _command_line_of(pid)]


class RunningQemu:
    """One QEMU process; see hypervisor.Running.

    Args:
        name: The machine, for messages.
        pid: The process.
        directory: Where its sockets are.

    Attributes:
        pid: The process.
    """

    def __init__(self, name: str, pid: int, directory: Path) -> None:
        self.pid = pid
        self._name = name
        self._monitor = Monitor(name, directory / _CONTROL, _START_SECONDS)

    @property
    def lost(self) -> bool:
        """See Running."""
        return self._monitor.lost

    def wait_loaded(self) -> None:
        """Waits until its state is loaded."""
        deadline = time.monotonic() + _START_SECONDS
        while (status := self.status()) == "inmigrate":
            if time.monotonic() > deadline:
                raise MachineError(f"machine {self._name} does not come to the end of loading its state")
            time.sleep(0.001)
        if status not in ("paused", "prelaunch"):
            raise MachineError(f"machine {self._name} is {status} after loading its state")

    def write_bios(self, bios: bytes) -> None:
        """Writes a BIOS where the machine has none yet."""
        address, size = self._bios()
        if size != len(bios):
            raise MachineError(f"machine {self._name} has a BIOS of {size} bytes, and its parent had {len(bios)}")
        write_process(self.pid, address, bios)

    def _bios(self) -> tuple[int, int]:
        """Where the BIOS is in the process, and how many bytes it has. It ends where 32 bits of addresses do."""
        listed = self._monitor.execute("human-monitor-command", command_line="info ramblock")
        found = re.search(r"^\s*pc\.bios\s+\S+ \S+\s+0x\w+\s+(0x\w+)", str(listed), re.MULTILINE)
        if found is None:
            raise MachineError(f"QEMU does not tell how large the BIOS of {self._name} is: {listed}")
        size = int(found[1], 16)
        return self._host_address((1 << 32) - size, "pc.bios"), size

    def version(self) -> str:
        """See Running."""
        found = self._monitor.execute("query-version")["qemu"]
        return f"QEMU {found['major']}.{found['minor']}"

    def status(self) -> str:
        """See Running."""
        return str(self._monitor.execute("query-status", _STATUS_SECONDS)["status"])

    def stop(self) -> None:
        """See Running."""
        self._monitor.execute("stop")

    def resume(self) -> None:
        """See Running."""
        self._monitor.execute("cont")

    def save_state(self) -> bytes:
        """See Running. Not live: the disks would be let go of, for another host to take over."""
        fd = os.memfd_create("cowstore-state", os.MFD_CLOEXEC)
        try:
            path = f"/proc/{os.getpid()}/fd/{fd}"
            self._monitor.execute("xen-save-devices-state", filename=path, live=False)
            state = os.pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)
        bios = copy_process(self.pid, *self._bios())
        return state + bios + _BIOS_SIZE.pack(len(bios))

    def address(self) -> int:
        """See Running."""
        return self._host_address(0, "ram")

    def _host_address(self, address: int, block: str) -> int:
        """Where a place of the guest's memory is in the process."""
        said = self._monitor.execute("human-monitor-command", command_line=f"gpa2hva {address:#x}")
        found = re.search(rf"\({re.escape(block)}\) is (0x[0-9a-f]+)", str(said))
        if found is None:
            raise MachineError(f"QEMU does not tell where the memory of {self._name} is: {said}")
        return int(found[1], 16)

    def replace_nic(self, old: Nic | None, new: Nic) -> None:
        """See Running. The back end of the old card goes first: with it, whatever the card would still send."""
        if old is not None:
            self._monitor.execute("netdev_del", id=f"net{old.port}")
        self._monitor.execute("netdev_add", type="user", id=f"net{new.port}")
        self._monitor.execute("device_add", **nic_properties(new))

    def remove_nic(self, old: Nic, seconds: float) -> None:
        """See Running."""
        self._monitor.execute("device_del", id=f"nic{old.port}")
        self._monitor.wait_deleted(f"nic{old.port}", seconds)

    def has_agent(self) -> bool:
        """See Running."""
        devices = self._monitor.execute("query-chardev")
        return any(one["label"] == "agent" and one["frontend-open"] for one in devices)

    def power_down(self) -> None:
        """See Running."""
        self._monitor.execute("system_powerdown")

    def quit(self) -> None:
        """See Running."""
        try:
            self._monitor.execute("quit")
        except MachineError:
            pass  # it may be gone before it has answered

    def close(self) -> None:
        """See Running."""
        self._monitor.close()


def nic_properties(nic: Nic) -> dict[str, Any]:
    """What `device_add` and `-device` need for a card. Its boot ROM would only take time and memory."""
    port = f"port{nic.port}"
    return {"driver": nic.model, "id": f"nic{nic.port}", "bus": port, "netdev": f"net{nic.port}", "mac": nic.mac,
            "romfile": ""}  # fmt: skip


def _spawn(program: str, launch: Launch, control: socket.socket, state: int | None) -> int:
    """Starts the process, in a session of its own and with no signal blocked; it is to outlive us.

    A descriptor that is duplicated onto itself stays open in the new process.
    """
    passed = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (control.fileno(), state) if fd is not None]
    with (launch.directory / LOG).open("ab") as log, open(os.devnull, "rb") as nothing:
        standard = [(os.POSIX_SPAWN_DUP2, file.fileno(), fd) for fd, file in enumerate((nothing, log, log))]
        words = [program, *command_line(launch, control.fileno(), state)]
        return os.posix_spawn(
            program, words, {"PATH": os.defpath}, file_actions=[*standard, *passed], setsid=True, setsigmask=[],
            setsigdef=[signal.SIGPIPE],
        )  # fmt: skip


def command_line(launch: Launch, control: int, state: int | None) -> list[str]:
    """QEMU's arguments. Every device has its place by number, so that none moves when another is left out.

    Args:
        launch: What is to be started.
        control: The descriptor of a listening socket for the manager's monitor.
        state: The descriptor of the state to be loaded.
    """
    one, at = launch.configuration, _quoted(launch.directory)
    memory = f"size={one.memory}"
    if launch.template:
        memory = f"memory-backend-file,id=ram,{memory},mem-path={launch.template},share=off"
    else:
        memory = f"memory-backend-ram,id=ram,{memory}"
    words = [
        "-name", f"{launch.name},process=cowstore-vm", "-nodefaults", "-no-user-config", "-display", "none",
        "-sandbox", _SANDBOX,
        "-machine", f"{one.machine},memory-backend=ram,mem-merge=off,suppress-vmdesc=on",
        "-accel", one.accelerator, "-cpu", one.cpu, "-smp", str(one.cpus), "-m", f"{one.memory // MIB}M",
        "-object", memory,
        "-device", f"vmgenid,guid={launch.generation}",
        "-device", "pcie-root-port,id=port0,chassis=1,slot=1,addr=0x2",
        "-device", "pcie-root-port,id=port1,chassis=2,slot=2,addr=0x3",
        "-device", "virtio-serial-pci,id=serial0,addr=0x4",
        "-chardev", f"socket,id=agent,path={at}/{AGENT},server=on,wait=off",
        "-device", f"virtserialport,bus=serial0.0,chardev=agent,name={AGENT_PORT}",
        "-chardev", f"socket,id=console,path={at}/{CONSOLE},server=on,wait=off,"
        f"logfile={at}/{CONSOLE_LOG},logappend=on",
        "-serial", "chardev:console",
        "-chardev", f"socket,id=control,fd={control},server=on,wait=off",
        "-mon", "chardev=control,mode=control",
        "-chardev", f"socket,id=qmp,path={at}/{QMP},server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
    ]  # fmt: skip
    for number, name in enumerate(launch.exports):
        words += disk(number, name, launch.socket)
    if launch.nic is not None:
        card = nic_properties(launch.nic)
        driver = card.pop("driver")
        words += ["-netdev", f"user,id=net{launch.nic.port}"]
        words += ["-device", ",".join([driver, *(f"{key}={value}" for key, value in card.items())])]
    if one.kernel:
        words += ["-kernel", one.kernel, "-append", one.append]
        words += ["-initrd", one.initrd] if one.initrd else []
    words += one.extra
    if state is not None:
        words += ["-S", "-incoming", f"fd:{state}", "-global", "migration.send-configuration=off"]
    return words


def _quoted(path: Path) -> str:
    """A path as a value in one of QEMU's options: its commas doubled."""
    return str(path).replace(",", ",,")


def disk(number: int, export: str, server: Path) -> list[str]:
    """A disk's arguments. Requests wait for the server where it is gone; nothing is written back late."""
    node = {
        "driver": "nbd", "node-name": f"disk{number}", "server": {"type": "unix", "path": str(server)},
        "export": export, "reconnect-delay": _RECONNECT_SECONDS, "discard": "unmap",
    }  # fmt: skip
    place = f"addr={_FIRST_DISK + number:#x}"
    card = f"virtio-blk-pci,id=vd{number},drive=disk{number},{place},serial=cowstore-{number}"
    return ["-blockdev", json.dumps(node), "-device", card]


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """A socket that clients can connect to before QEMU has begun; nobody has to look for it again and again."""
    path.unlink(missing_ok=True)  # of a process that has ended
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(1)
        yield sock


@contextmanager
def _state_file(state: bytes | None) -> Iterator[int | None]:
    """The state as a file in memory that the new process inherits."""
    if state is None:
        yield None
        return
    fd = os.memfd_create("cowstore-state", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(state)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def _apart(saved: bytes) -> tuple[bytes, bytes]:
    """State and BIOS of what save_state() gave.

    Raises:
        MachineError: It is not that.
    """
    end = len(saved) - _BIOS_SIZE.size
    size = _BIOS_SIZE.unpack_from(saved, end)[0] if end > 0 else 0
    if not 0 < size < end:
        raise MachineError("that is no state of a machine's devices")
    return saved[: end - size], saved[end - size : end]


def _said(directory: Path) -> str:
    """What QEMU has said before it went, for an error's message."""
    try:
        text = (directory / LOG).read_bytes()[-_TAIL:].decode(errors="replace").strip()
    except OSError:
        return ""
    return "QEMU said: " + "; ".join(text.splitlines()) if text else ""


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _command_line_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
