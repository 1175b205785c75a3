"""A virtual machine with a real Linux on a disk that comes over NBD, and a shell in it.

The machine is emulated by QEMU without KVM: slowly, and everywhere. Its first serial port has the kernel's
messages, its second a shell; what both say is kept in files.
"""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .initramfs import write_initramfs
from .kernel import find_busybox, find_kernel
from .process import TIMEOUT, Process
from .rootdisk import write_rootdisk

RECONNECT_S = 600  # how long QEMU holds requests back while there is no server

# A machine that panics resets, and one that resets ends.
KERNEL_COMMAND_LINE = "console=ttyS0 panic=-1 quiet loglevel=5 random.trust_cpu=on"
TROUBLE = "I/O error|EXT4-fs (error|warning)|JBD2: .*error|Aborting journal|Remounting|blocked for more than"


class GuestError(AssertionError):
    """A guest did not do what it was told; the message ends with all that was said."""


@dataclass(frozen=True)
class Parts:
    """What a guest is made of."""

    kernel: Path
    busybox: Path
    initramfs: Path
    disk: Path

    @classmethod
    def make(cls, folder: Path) -> Self:
        """Makes them in a folder.

        Raises:
            UnfitError: there is no kernel or no busybox to make them of.
        """
        kernel, busybox = find_kernel(), find_busybox()
        parts = cls(kernel.image, busybox, folder / "initramfs", folder / "disk.raw")
        write_initramfs(parts.initramfs, busybox.read_bytes(), kernel.drivers())
        write_rootdisk(parts.disk, busybox)
        return parts


class Guest:
    """A running guest. Leaving the `with` block kills it, if it still runs."""

    def __init__(self, parts: Parts, socket: Path, export: str, folder: Path, *, write_cache: bool = True) -> None:
        """Boots it, and waits for its shell.

        Args:
            parts: What it is made of; the kernel and the initramfs of it.
            socket: Where the NBD server listens.
            export: The name of its disk there.
            folder: Keeps what it says.
            write_cache: Whether it is told that its disk has one; without, every write waits to be durable.
        """
        self._folder = folder
        self.kernel_log, self.shell_log, qemu_log = (
            folder / f"{export}.{name}.log" for name in ("kernel", "shell", "qemu")
        )
        self._seen = 0  # characters of the shell's log
        self._commands = 0
        words = machine(parts, disk(socket, export), self.kernel_log, write_cache=write_cache)
        self._process = Process(words, self.shell_log, qemu_log)
        try:
            self.wait_for("^guest is up")
        except BaseException:
            self._process.__exit__()
            raise

    def run(self, command: str, timeout: float = TIMEOUT) -> str:
        """Runs a command of one line in a subshell; returns what it said, its errors too.

        Raises:
            GuestError: it failed, or took too long.
        """
        status, output = self.attempt(command, timeout)
        if status != 0:
            raise self._error(f"{command!r} ended with status {status}: {output}")
        return output

    def attempt(self, command: str, timeout: float = TIMEOUT) -> tuple[int, str]:
        """Runs a command of one line in a subshell; returns its exit status and what it said."""
        self._commands += 1
        self._say(f'({command}) </dev/null; echo "<{self._commands}:$?>"')
        found = self.wait_for(rf"\A((?s:.*?))<{self._commands}:(\d+)>", timeout)
        return int(found[2]), found[1]

    def begin(self, command: str) -> None:
        """Starts a command that goes on beside others, as nobody's child, for `wait_for` to watch."""
        self._say(f"( ({command}) </dev/null & )")

    def wait_for(self, pattern: str, timeout: float = TIMEOUT) -> re.Match[str]:
        """The next line in what the shell says that ends with a match; what is before it is not looked at again.

        Raises:
            GuestError: the time is up, or the guest has ended.
        """
        end = time.monotonic() + timeout
        while True:
            status = self._process.status  # before looking: what it said last may be it
            if found := re.search(f"{pattern}\n", self.said()[self._seen :], re.MULTILINE):
                self._seen += found.end()
                return found
            if status is not None:
                raise self._error(f"QEMU ended with status {status} before {pattern!r}")
            if time.monotonic() > end:
                raise self._error(f"no {pattern!r} within {timeout} s")
            time.sleep(0.02)

    def said(self) -> str:
        """Everything that the shell has said."""
        return self.shell_log.read_text("latin-1")

    def trouble(self) -> list[str]:
        """What the kernel has to say about its disk that it should not."""
        return self.run(f"dmesg | grep -E '{TROUBLE}' || true").splitlines()

    def kill(self) -> None:
        """Pulls the plug."""
        self._process.end(signal.SIGKILL)

    def _say(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error(f"QEMU ended before {line!r}") from None

    def _error(self, what: str) -> GuestError:
        logs = sorted([*self._folder.glob("*.log"), *self._folder.glob("*.err")])  # the server's is there, too
        tails = [(log.name, log.read_text("latin-1")[-5000:]) for log in logs]
        return GuestError("\n".join([what, *(f"--- {name}\n{tail}" for name, tail in tails)]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__()


def disk(socket: Path, export: str) -> dict[str, object]:
    """The disk as QEMU's own NBD client sees it."""
    server = {"type": "unix", "path": str(socket)}
    return {
        "driver": "nbd",
        "node-name": "disk",
        "server": server,
        "export": export,
        "reconnect-delay": RECONNECT_S,
        "discard": "unmap",
    }


def machine(parts: Parts, blockdev: dict[str, object], kernel_log: Path, *, write_cache: bool) -> list[str]:
    words = ["qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-nodefaults", "-no-user-config"]
    words += ["-display", "none", "-no-reboot"]
    starts = ["-kernel", str(parts.kernel), "-initrd", str(parts.initramfs), "-append", KERNEL_COMMAND_LINE]
    cache = "on" if write_cache else "off"
    drive = ["-blockdev", json.dumps(blockdev), "-device", f"virtio-blk-pci,drive=disk,write-cache={cache}"]
    ports = ["-serial", f"file:{kernel_log}", "-chardev", "stdio,id=shell,signal=off", "-serial", "chardev:shell"]
    return [*words, *starts, *drive, *ports]
