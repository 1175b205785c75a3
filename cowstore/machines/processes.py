"""Processes: whether one still runs that was started before, perhaps by another process, and how it is ended."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path


@functools.cache
def boot_id() -> str:
    """What the host calls the time since it booted."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process_start(pid: int) -> int:
    """When a process began, in clock ticks since the boot; -1 where it has ended.

    Source: proc(5), field 22 of /proc/PID/stat.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def reap(pid: int) -> None:
    """Takes the exit status of a child that has ended; harmless for any other process."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        pass


def kill(pid: int) -> None:
    """Ends a process at once; harmless where it is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
