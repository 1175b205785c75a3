"""Pages: which of a process's pages are its own, and their bytes.

A machine's memory is mapped privately, from nothing or from a template. What it has written lies in pages of the
process itself, and the kernel's page map tells which those are. They are read while the machine stands still.

Source: Documentation/admin-guide/mm/pagemap.rst of the kernel, process_vm_readv(2).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cowstore.errors import MachineError

PAGE_SIZE = 4096
_PRESENT, _SWAPPED, _FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)
_AT_ONCE = 1024  # IOV_MAX: ranges that one call can read
_PAGES_AT_ONCE = 1 << 18  # 1 GiB: a call reads no more than 2 GiB less a page, and stops there without an error
_ENTRIES_AT_ONCE = 1 << 17  # of the page map: 1 MiB, half a GiB of memory
_PIECE = 1 << 20  # bytes of a piece, at most
_MANY = 4096  # pages: for fewer of them it takes longer to make room than to do without
Numbers = npt.NDArray[np.int64]
Runs = list[tuple[int, int]]


class _Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def own(entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which entries of a page map stand for pages of the process's own.

    Present or swapped out, and not of a file: one that was written and then swapped out is no less its own.
    """
    mine: npt.NDArray[np.bool_] = ((entries & (_PRESENT | _SWAPPED)) != 0) & ((entries & _FILE) == 0)
    return mine


def own_pages(pid: int, address: int, size: int) -> Numbers:
    """The numbers of the pages that a process has made its own, in order.

    Args:
        pid: The process.
        address: Where its memory begins, a multiple of the page size.
        size: Bytes of it.

    Raises:
        MachineError: The kernel does not tell.
    """
    found, count = [], size // PAGE_SIZE
    try:
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
            for first in range(0, count, _ENTRIES_AT_ONCE):
                wanted = min(_ENTRIES_AT_ONCE, count - first) * 8
                data = os.pread(file.fileno(), wanted, (address // PAGE_SIZE + first) * 8)
                if len(data) != wanted:
                    raise MachineError(f"the page map of process {pid} is cut off")
                found.append(np.flatnonzero(own(np.frombuffer(data, np.uint64))) + first)
    except OSError as error:
        raise _unreadable(pid, error) from error
    return np.concatenate(found) if found else np.empty(0, np.int64)


def runs(numbers: Numbers) -> Runs:
    """Sorted numbers as runs: first one, and how many in a row."""
    if not len(numbers):
        return []
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 2) != 1)
    counts = np.diff(starts, append=len(numbers))
    return list(zip(numbers[starts].tolist(), counts.tolist(), strict=True))


def read_process(pid: int, address: int, ranges: Runs, target: int) -> None:
    """Copies pages of another process to the same places of a memory of this one.

    Args:
        pid: The process.
        address: Where its memory begins.
        ranges: First page and number of pages each.
        target: Where ours begins; it has to be writable there.

    Raises:
        MachineError: They cannot be read, or not all of them.
    """
    for part in _batches(ranges):
        ours, theirs = _vectors(part, target), _vectors(part, address)
        done = _libc.process_vm_readv(pid, ours, len(part), theirs, len(part), 0)
        _check_done(pid, done, sum(count for _, count in part) * PAGE_SIZE)


def copy_process(pid: int, address: int, size: int) -> bytes:
    """A few bytes of another process's memory. Raises MachineError where they cannot be read."""
    target = bytearray(size)
    ours = _Vector(ctypes.addressof(ctypes.c_char.from_buffer(target)), size)
    theirs = _Vector(address, size)
    _check_done(pid, _libc.process_vm_readv(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0), size)
    return bytes(target)


def write_process(pid: int, address: int, data: bytes) -> None:
    """Writes a few bytes into another process's memory. Raises MachineError where that cannot be."""
    source = (ctypes.c_char * len(data)).from_buffer_copy(data)
    ours = _Vector(ctypes.addressof(source), len(data))
    theirs = _Vector(address, len(data))
    _check_done(pid, _libc.process_vm_writev(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0), len(data))


def _check_done(pid: int, done: int, wanted: int) -> None:
    if done < 0:
        error = ctypes.get_errno()
        raise _unreadable(pid, OSError(error, os.strerror(error)))
    if done != wanted:
        raise MachineError(f"only {done} of {wanted} bytes of process {pid}'s memory could be reached")


def _batches(ranges: Runs) -> Iterator[Runs]:
    """The ranges in parts that one call can read; long ones are cut."""
    batch: Runs = []
    room = _PAGES_AT_ONCE
    for first, count in ranges:
        while count:
            part = min(count, room)
            batch.append((first, part))
            first, count, room = first + part, count - part, room - part
            if not room or len(batch) == _AT_ONCE:
                yield batch
                batch, room = [], _PAGES_AT_ONCE
    if batch:
        yield batch


def address_of(buffer: mmap.mmap) -> int:
    """Where a mapping begins in this process."""
    return int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


def _vectors(ranges: Runs, start: int) -> ctypes.Array[_Vector]:
    made = [_Vector(start + first * PAGE_SIZE, count * PAGE_SIZE) for first, count in ranges]
    return (_Vector * len(made))(*made)


def _unreadable(pid: int, error: OSError) -> MachineError:
    return MachineError(
        f"the memory of process {pid} cannot be read: {error.strerror}",
        hint="be its user; where /proc/sys/kernel/yama/ptrace_scope is not 0, be root or have CAP_SYS_PTRACE",
    )


_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
    )  # fmt: skip


class Capture:
    """The pages of a process, taken in two steps, so that it has to stand still for the second one only.

    prepare() copies what is there while the process goes on: the copy is worth nothing, but the memory that it
    lies in is there then, and the second copy takes a tenth of the time. take() is for the stopped process.

    Args:
        name: For messages, and for people who look into /proc.
        pid: The process.
        address: Where its memory begins.
        size: Bytes of it, whole pages.

    Attributes:
        name: See above.
        size: See above.
        fd: A file in memory with the pages at their places and holes between them.
        pages: The numbers of the pages that were taken.
    """

    def __init__(self, name: str, pid: int, address: int, size: int) -> None:
        self.name = name
        self.size = size
        self.pages: Numbers = np.empty(0, np.int64)
        self._pid = pid
        self._address = address
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    def prepare(self) -> int:
        """Makes room for what is the process's own now, if that is much; returns how many pages that are."""
        self.pages = own_pages(self._pid, self._address, self.size)
        if len(self.pages) >= _MANY:
            read_process(self._pid, self._address, runs(self.pages), self._start())
        return len(self.pages)

    def take(self) -> None:
        """Takes the pages of the process, which stands still."""
        before, self.pages = self.pages, own_pages(self._pid, self._address, self.size)
        for first, count in runs(np.setdiff1d(before, self.pages, assume_unique=True)):
            self._map[first * PAGE_SIZE : (first + count) * PAGE_SIZE] = bytes(count * PAGE_SIZE)
        read_process(self._pid, self._address, runs(self.pages), self._start())

    def _start(self) -> int:
        return address_of(self._map)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Offset and bytes of what was taken, in order."""
        with memoryview(self._map) as view:
            for first, count in runs(self.pages):
                for offset in range(first * PAGE_SIZE, (first + count) * PAGE_SIZE, _PIECE):
                    yield offset, view[offset : min(offset + _PIECE, (first + count) * PAGE_SIZE)]

    def detach(self) -> int:
        """The file alone, to be kept by the caller; nothing more can be taken."""
        self._map.close()
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Gives the memory back; harmless when done twice."""
        if self.fd < 0:
            return
        try:
            self._map.close()
        except BufferError:
            pass  # an exception on its way holds a piece; the mapping goes with it
        fd, self.fd = self.fd, -1
        os.close(fd)
