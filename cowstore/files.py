"""The one module that opens, writes, syncs and locks files.

Everything the store writes to its own directory goes through a ``Disk`` and the ``File`` objects that it
opens (LMDB's two files excepted, which only LMDB touches). Tests put another Disk in its place to count
syncs, to crash between any two calls and to make calls fail. A full file system becomes NoSpaceError here;
every other OSError passes through.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .digest import Buffer
from .errors import NoSpaceError

_IOV_MAX = 1024
_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_SET_FLAGS, _NO_COPY_ON_WRITE = 0x40086602, 0x00800000  # FS_IOC_SETFLAGS and FS_NOCOW_FL of linux/fs.h
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@functools.cache
def boot_id() -> bytes:
    """16 bytes that change when the host boots."""
    try:
        return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


def _full(error: OSError, path: Path) -> OSError | NoSpaceError:
    return NoSpaceError(str(path)) if error.errno in _FULL else error


class File:
    """An open file. Offsets and lengths are bytes."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    def size(self) -> int:
        """The file's length."""
        return os.fstat(self.fd).st_size

    def read_at(self, length: int, offset: int) -> bytes:
        """Up to length bytes; fewer only at the end of the file."""
        return os.pread(self.fd, length, offset)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills the buffer, or less at the end of the file; returns the bytes read."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.fd, [buffer[done:]], offset + done)
            if not count:
                break
            done += count
        return done

    def prefetch(self, offset: int, length: int) -> None:
        """Asks for a range to be read into the page cache; does not wait for it."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def write_at(self, data: Buffer, offset: int) -> None:
        """Writes all of the data."""
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self.fd, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise _full(error, self.path) from error

    def write_many(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Writes all buffers one behind the other."""
        for first in range(0, len(buffers), _IOV_MAX):
            batch = buffers[first : first + _IOV_MAX]
            total = sum(map(len, batch))
            try:
                count = os.pwritev(self.fd, batch, offset)
            except OSError as error:
                raise _full(error, self.path) from error
            if count != total:
                self.write_at(b"".join(batch)[count:], offset + count)
            offset += total

    def truncate(self, size: int) -> None:
        """Sets the file's length; what is new reads as zeros and takes no space."""
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise _full(error, self.path) from error

    def allocate(self, size: int) -> None:
        """Gives the first size bytes their space now."""
        try:
            os.posix_fallocate(self.fd, 0, size)
        except OSError as error:
            raise _full(error, self.path) from error

    def write_in_place(self) -> None:
        """Asks btrfs to overwrite an empty file's blocks in place, so that a mapped write finds its space."""
        with suppress(OSError):
            fcntl.ioctl(self.fd, _SET_FLAGS, struct.pack("i", _NO_COPY_ON_WRITE))

    def punch(self, offset: int, length: int) -> None:
        """Makes a range a hole. Where the file system cannot, the range is written with zeros."""
        if _fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, offset, length) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(self.path))
        for start in range(offset, offset + length, 1 << 20):
            self.write_at(bytes(min(1 << 20, offset + length - start)), start)

    def sync(self) -> None:
        """Makes what was written durable, with fdatasync.

        A failure must never be tried again: the second call would succeed without the data.
        """
        os.fdatasync(self.fd)

    def map(self, length: int) -> mmap.mmap:
        """A shared, read-only mapping of the first length bytes."""
        return mmap.mmap(self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ)

    def try_lock(self, *, exclusive: bool) -> bool:
        """A flock, without waiting; a lock of the other sort is given up for it. False if somebody holds it."""
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        """Gives the flock up."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def sign(self) -> None:
        """Writes this process's id into a lock file, for people; a full disk must not keep anybody from a lock."""
        with suppress(OSError, NoSpaceError):
            self.write_at(b"%-20d\n" % os.getpid(), 0)

    def holder(self) -> int:
        """The process id in a lock file, 0 where there is none."""
        text = self.read_at(32, 0).strip()
        return int(text) if text.isdigit() else 0

    def is_at_path(self) -> bool:
        """Whether the path still leads to this file: somebody may have replaced or removed it."""
        try:
            there, here = os.stat(self.path, follow_symlinks=False), os.fstat(self.fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def close(self) -> None:
        """Closes the file; harmless when done twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Disk:
    """Opens files and changes directories. Files are private (0600), directories too (0700)."""

    def open(self, path: Path, *, write: bool = False, create: bool = False, exclusive: bool = False) -> File:
        """Opens a file. Links are not followed.

        Args:
            path: The file.
            write: For reading and writing, else for reading.
            create: Make it if it is not there.
            exclusive: Make it; FileExistsError if it is there.
        """
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW
        if create or exclusive:
            flags |= os.O_CREAT
        if exclusive:
            flags |= os.O_EXCL
        try:
            return self._file(path, os.open(path, flags, 0o600))
        except OSError as error:
            raise _full(error, path) from error

    def allocate_mapped(self, path: Path, size: int) -> None:
        """Gives a file that others write through a mapping its first bytes' space; makes it if it is not there.

        Unlike File.allocate() it never writes zeros where the file system cannot: others may be writing.
        """
        file = File(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        try:
            if not file.size():
                file.write_in_place()
            has_its_space = os.fstat(file.fd).st_blocks * 512 >= size  # asked again, a full XFS would refuse
            if not has_its_space and _fallocate(file.fd, 0, 0, size):
                code = ctypes.get_errno()
                raise _full(OSError(code, os.strerror(code), str(path)), path)
        finally:
            file.close()

    def _file(self, path: Path, fd: int) -> File:
        return File(path, fd)

    def make_directory(self, path: Path) -> None:
        """Makes a private directory; FileExistsError if it is there."""
        try:
            os.mkdir(path, 0o700)
        except OSError as error:
            raise _full(error, path) from error

    def sync_directory(self, path: Path) -> None:
        """Makes the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Renames a file or directory, replacing a file of the new name."""
        try:
            os.rename(old, new)
        except OSError as error:
            raise _full(error, new) from error

    def unlink(self, path: Path) -> None:
        """Removes a file; harmless when there is none."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

    def remove_tree(self, path: Path) -> None:
        """Removes a directory and all in it, as far as it goes; harmless when there is none."""
        import shutil  # late: opening a store does not need it, and it takes a few milliseconds

        shutil.rmtree(path, ignore_errors=True)

    def write_whole(self, path: Path, data: bytes) -> None:
        """Makes or replaces a small file, durably and all at once."""
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self.unlink(aside)
        file = self.open(aside, write=True, exclusive=True)
        try:
            file.write_at(data, 0)
            file.sync()
        except BaseException:
            self.unlink(aside)
            raise
        finally:
            file.close()
        self.rename(aside, path)
        self.sync_directory(path.parent)
