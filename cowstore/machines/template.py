"""Templates: the memory of a checkpoint in a sealed file of this host, which any number of children map privately.

The seals matter: a guest that gives memory back, or a hypervisor that does so for it, would punch a hole in the
file under a private mapping, and every other child would read zeros there. Of a sealed file the kernel refuses it.

Source: memfd_create(2), fcntl(2) on file sealing.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

from cowstore.errors import MachineError

from .pages import address_of

Progress = Callable[[str, int, int], None]
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_PIECE = 4 << 20  # bytes that are read at once
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # what is mapped is not counted before it is written
_SPARE = 64 << 20  # bytes of memory that a host keeps beside what is asked for


class Extent(Protocol):
    """A run of bytes that are alike; see cowstore.Extent."""

    @property
    def offset(self) -> int:
        """Bytes from the start."""
        ...

    @property
    def length(self) -> int:
        """Bytes."""
        ...

    @property
    def data(self) -> bool:
        """Whether anything is stored there."""
        ...


class Memory(Protocol):
    """A stored memory, open for reading; see cowstore.Device."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def extents(self) -> Iterator[Extent]:
        """Runs of data or zeros."""
        ...

    def preadinto(self, buffer: Any, offset: int) -> int:
        """Fills a buffer."""
        ...


class Template:
    """A sealed file in memory. Close it when nobody will ask for it any more; those who map it keep it alive.

    Attributes:
        fd: The file.
        size: Bytes.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size

    @classmethod
    def build(cls, name: str, memory: Memory, progress: Progress | None = None) -> Self:
        """Makes one from a stored memory.

        Args:
            name: For those who look into /proc, and for find().
            memory: What it is to hold.
            progress: Told ("template", bytes done, bytes of the memory).

        Raises:
            MachineError: There is not enough memory.
            CorruptError: A block is not what was written.
        """
        extents = [extent for extent in memory.extents() if extent.data]
        check_room(sum(extent.length for extent in extents), f"the memory of {name}")
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, memory.size)
            _fill(fd, memory, extents, progress or (lambda _step, _done, _total: None))
            return cls.seal(fd, memory.size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def seal(cls, fd: int, size: int) -> Self:
        """Makes one of a file in memory that nobody has mapped for writing any more."""
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return cls(fd, size)

    @classmethod
    def find(cls, pid: int, name: str, size: int) -> Self | None:
        """The template of that name which a process has, opened once more; None where it has none."""
        for descriptor in _descriptors(pid):
            try:
                if os.readlink(descriptor) != f"/memfd:{name} (deleted)":
                    continue
                fd = os.open(descriptor, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue
            if _is_sealed(fd) and os.fstat(fd).st_size == size:
                return cls(fd, size)
            os.close(fd)
        return None

    @property
    def path(self) -> str:
        """Where other processes of the same user can open it, as long as this one has it open."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def map(self) -> mmap.mmap:
        """Its content, mapped privately: written pages become the process's own, and nobody else sees them.

        Raises:
            MachineError: The kernel refuses it.
        """
        return _mapped(self.fd, self.size, mmap.MAP_PRIVATE)

    def resident(self) -> int:
        """Bytes of memory that it takes."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Gives it back; harmless when done twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _fill(fd: int, memory: Memory, extents: list[Extent], progress: Progress) -> None:
    """Copies what is stored, by writing: in a mapping, memory that is not there is a signal and no error."""
    buffer = memoryview(bytearray(_PIECE))
    try:
        for extent in extents:
            end = extent.offset + extent.length
            for offset in range(extent.offset, end, _PIECE):
                piece = buffer[: min(_PIECE, end - offset)]
                memory.preadinto(piece, offset)
                if os.pwrite(fd, piece, offset) != len(piece):
                    raise MachineError("no memory left for a template", hint="stop some machines")
                progress("template", offset + len(piece), memory.size)
    except OSError as error:
        raise MachineError(
            f"no memory left for a template: {error.strerror}", hint="stop some machines"
        ) from error


def _mapped(fd: int, size: int, kind: int) -> mmap.mmap:
    """A mapping of a file that keeps no descriptor, which mmap.mmap does: thousands would run out of them.

    The file is laid over a mapping of nothing, so that Python knows who uses it, and ends it.
    """
    access = mmap.PROT_READ | mmap.PROT_WRITE
    try:
        mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, access)
        flags = kind | _MAP_FIXED | _NO_RESERVE
        if _libc.mmap(address_of(mapped), size, access, flags, fd, 0) == _FAILED:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
    except OSError as error:
        raise MachineError(
            f"{size} bytes of memory cannot be mapped: {error.strerror}",
            hint="a process can have /proc/sys/vm/max_map_count mappings, and `ulimit -v` of memory",
        ) from error
    return mapped


def _is_sealed(fd: int) -> bool:
    """Whether a file has all the seals; a host's policy may add one against running it."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        return False  # no file in memory, but one of that name


_MAP_FIXED = 0x10
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip


def _descriptors(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    try:
        return [f"{folder}/{name}" for name in os.listdir(folder)]
    except OSError:
        return []


def check_room(needed: int, what: str) -> None:
    """Refuses what the host has no memory for, before the kernel has to choose somebody to kill.

    Args:
        needed: Bytes.
        what: What they are for, for the message.

    Raises:
        MachineError: There is less.
    """
    free = available()
    if needed + _SPARE > free:
        raise MachineError(
            f"no memory left for {what}: it takes {needed >> 20} MiB, and {free >> 20} MiB are available",
            hint="stop some machines, or take a host with more memory",
        )


def available() -> int:
    """Bytes of memory that the host can still give, by its own estimate; see MemAvailable in proc(5).

    Where a control group has a limit, no more than is left of that; see memory.max in cgroups(7).
    """
    with open("/proc/meminfo") as file:
        found = next((int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:")), None)
    if found is None:
        raise MachineError("/proc/meminfo does not tell how much memory is available")
    return min(found, _left_in_group())


def _left_in_group() -> int:
    """Bytes that are left of the limit of this process's control group; very many where it has none."""
    try:
        with open("/proc/self/cgroup") as file:
            path = next(line.strip().partition("::")[2] for line in file if line.startswith("0::"))
        group = f"/sys/fs/cgroup{path}"
        with open(f"{group}/memory.max") as limit, open(f"{group}/memory.current") as current:
            left = int(limit.read()) - int(current.read())
        with open(f"{group}/memory.stat") as file:  # what is only kept from files is given back when it is needed
            return left + sum(int(line.split()[1]) for line in file if line.split()[0] == "inactive_file")
    except (OSError, ValueError, StopIteration):  # version 1, no such controller, or "max"
        return 1 << 62
