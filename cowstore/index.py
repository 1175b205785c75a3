"""The digest index: a mapped hash table from digests to the blocks that may have them. A hint, never a fact.

It is one file of 64-byte buckets, a cache line each, of four keys and their four block ids; a key is half a
digest, its bucket the top bits of its hash, and where that one is full the next ones follow. It may lag, miss
or err: callers check state and bytes of every candidate, so searches take no lock, nothing is ever synced, and
a race, a crash or a lost page costs at worst a block stored twice. A table that does not fit the store is thrown
away; one that was not filled since the host booted says that it is ``stale``, and wants the segments' digests.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .digest import DIGEST_SIZE, Buffer, checksum
from .errors import ClosedError, InvalidError, NoSpaceError, ReadOnlyError
from .files import Disk, File, boot_id

Words = NDArray[np.uint64]
Places = NDArray[np.int64]

CANDIDATES = 8  # ids listed under one key, at most
LANES = 4  # entries in a bucket, used from the left: four keys, then four ids
PROBES = 32  # buckets searched for a key; up to the load limit every entry finds a place in them
LOAD_LIMIT = 0.6  # of the places, before the table grows
GROWTH_ROOM = 1.25  # a new table has room for this many times what made it necessary
SMALLEST = 1024  # buckets
PATIENCE = 1.0  # seconds an insert waits for another process before it gives up

# The file, in the host's byte order: the header's page, then the buckets. A file from a host of the other order
# does not pass the checksum, which covers the fields before it. The counters are advisory.
HEADER_SIZE, BUCKET_SIZE = 4096, 64  # bytes
_HEADER = struct.Struct("=8sIIQQQ")  # magic, version, bytes of a bucket, seed, inode, buckets; then the checksum
_MAGIC, _VERSION = b"COWINDEX", 1
_BOOT = slice(64, 80)  # bytes; the boot in which a rebuild last ended, zeros before the first
_PUT, _REMOVED = 16, 17  # words; entries put, and entries removed, since the last rehash
_FIRST, _ROW = HEADER_SIZE // 8, BUCKET_SIZE // 8  # words

# A key of 0 is a place never used, and ends every search. The last key, with id 0, is a removed entry: it ends
# none, since others may have been put behind it. Its place is used again at the next rehash, or by a single put.
_LAST = (1 << 64) - 1
_MIX = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, odd: different keys have different hashes
_FEW_FINDS, _FEW_PUTS = 8, 24  # keys for which a plain loop beats NumPy's constant costs
_CHUNK = 8192  # keys at a time, so that their buckets stay in the processor's second cache
_PIECE = 1 << 21  # bytes written at a time: a large page


def _keys(digests: Buffer) -> Words:
    """The second half of every digest, as a key that is not 0."""
    words = np.frombuffer(digests, np.uint64)
    if len(words) % 2:
        raise InvalidError(f"digests are {DIGEST_SIZE} bytes each, not {words.nbytes} together")
    return np.maximum(words[1::2], np.uint64(1))


def _pairs(digests: Buffer, ids: Words) -> tuple[Words, Words]:
    """Keys and ids, without those whose id is 0."""
    keys = _keys(digests)
    if len(keys) != len(ids):
        raise InvalidError(f"{len(keys)} digests do not go with {len(ids)} block ids")
    some = np.flatnonzero(ids)
    return keys[some], np.asarray(ids, np.uint64)[some]


def _ranks(groups: Places) -> Places:
    """The position of each item within its run of equal items."""
    starts = np.flatnonzero(np.concatenate(([True], groups[1:] != groups[:-1])))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


def _buckets_for(entries: int) -> int:
    """The buckets that entries need with room to grow; a power of two."""
    wanted = int(entries * GROWTH_ROOM / LOAD_LIMIT / LANES)
    return max(SMALLEST, 1 << wanted.bit_length())


def _header(seed: int, buckets: int, file: File) -> bytes:
    """The header of this very file; not of a copy, which may have holes, or share its space as a reflink."""
    head = _HEADER.pack(_MAGIC, _VERSION, BUCKET_SIZE, seed, os.fstat(file.fd).st_ino, buckets)
    return head + struct.pack("=Q", checksum(head))


def _wait_for(lock: File, patience: float) -> bool:
    """Takes a lock, waiting so many seconds at most."""
    deadline = time.monotonic() + patience
    while not lock.try_lock(exclusive=True):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


class _Table:
    """One table in memory: mapped from a file, or this process's own where there is none.

    An id is stored before its key and removed before it, so that a search that races with either misses.
    """

    def __init__(self, memory: mmap.mmap, file: File | None) -> None:
        self.file = file
        self.memory = memory  # never closed by hand: searches may be under way in it
        self.words = memoryview(memory).cast("Q")
        self.flat = np.frombuffer(memory, np.uint64, offset=HEADER_SIZE)
        self.rows = self.flat.reshape(-1, _ROW)
        self.mask = len(self.rows) - 1
        self.shift = 64 - self.mask.bit_length()

    def has_room(self, entries: int) -> bool:
        return bool(self.words[_PUT] + entries <= len(self.rows) * LANES * LOAD_LIMIT)

    def count(self, word: int, more: int) -> None:
        self.words[word] = self.words[word] + more & _LAST  # whatever stood there

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _homes(self, keys: Words) -> Places:
        return ((keys * np.uint64(_MIX)) >> np.uint64(self.shift)).view(np.int64)

    def _gather(self, buckets: Places) -> Words:
        return self.rows.take(buckets, axis=0, mode="clip")  # all are in range; "raise" would copy twice

    def _lanes(self, key: int) -> Iterator[int]:
        """Words in which the key may stand, up to the first never used."""
        home = (key * _MIX & _LAST) >> self.shift
        for bucket in range(home, home + PROBES):
            first = _FIRST + (bucket & self.mask) * _ROW
            for lane in range(first, first + LANES):
                yield lane
                if not self.words[lane]:
                    return

    def ids(self, key: int) -> list[int]:
        """All ids under one key."""
        words = self.words
        found = [words[lane + LANES] for lane in self._lanes(key) if words[lane] == key]
        return [one for one in found if one][:CANDIDATES]

    def _look(self, keys: Words, buckets: Places) -> tuple[Words, Places]:
        """One id for each key from one bucket each, or 0; and which keys may stand in the bucket after it."""
        rows, found = self._gather(buckets), np.zeros(len(keys), np.uint64)
        for lane in range(LANES):
            np.copyto(found, rows[:, LANES + lane], where=rows[:, lane] == keys)
        return found, np.flatnonzero((found == 0) & (rows[:, LANES - 1] != 0))

    def find(self, keys: Words) -> Words:
        """One id for each key, or 0."""
        homes = self._homes(keys)
        if len(keys) > _FEW_FINDS:
            found, left = self._look(keys, homes)
        else:
            found, left = np.zeros(len(keys), np.uint64), np.arange(len(keys))
        for probe in range(1, PROBES):
            if len(left) <= _FEW_FINDS:
                for place in left.tolist():
                    found[place] = next(iter(self.ids(int(keys[place]))), 0)
                break
            found[left], on = self._look(keys[left], (homes[left] + probe) & self.mask)
            left = left[on]
        return found

    def put(self, key: int, block_id: int) -> int:
        """Adds one entry; returns 1, or 0 where it is there, the key has its fill, or no place is left."""
        words, listed, place = self.words, 0, 0
        for lane in self._lanes(key):
            held = words[lane]
            if held == key:
                listed += 1
                if listed == CANDIDATES or words[lane + LANES] == block_id:
                    return 0
            elif not place and held in (0, _LAST):
                place = lane
        if not place:
            return 0
        words[place + LANES], words[place] = block_id, key
        self.count(_PUT, 1)
        return 1

    def _put_each(self, keys: Words, ids: Words) -> int:
        return sum(map(self.put, keys.tolist(), ids.tolist()))

    def put_many(self, keys: Words, ids: Words) -> int:
        """Adds entries in the order of their buckets; keys met a second time go one by one."""
        if len(keys) <= _FEW_PUTS:
            return self._put_each(keys, ids)
        order = (keys * np.uint64(_MIX)).argsort()
        keys, ids = keys[order], ids[order]
        twin = np.concatenate(([False], keys[1:] == keys[:-1]))
        slow, fast = np.flatnonzero(twin), np.flatnonzero(~twin)
        parts = [fast[first : first + _CHUNK] for first in range(0, len(fast), _CHUNK)]
        return sum(self._place(keys[part], ids[part]) for part in parts) + self._put_each(keys[slow], ids[slow])

    def _place(self, keys: Words, ids: Words) -> int:
        """Adds entries of different keys, sorted by bucket; keys that are there already go one by one."""
        added, buckets = 0, self._homes(keys)
        for _ in range(PROBES):
            if len(keys) <= _FEW_PUTS:
                return added + self._put_each(keys, ids)
            rows = self._gather(buckets)
            known, used = np.zeros(len(keys), bool), np.zeros(len(keys), np.int64)
            for lane in range(LANES):
                known |= rows[:, lane] == keys
                used += rows[:, lane] != 0
            again = np.flatnonzero(known)
            if len(again):
                same = (rows[again, :LANES] == keys[again, None]) & (rows[again, LANES:] == ids[again, None])
                again = again[~same.any(axis=1)]
            others = keys[again], ids[again]
            new = np.flatnonzero(~known)
            keys, ids, buckets, used = keys[new], ids[new], buckets[new], used[new]
            lanes = used + _ranks(buckets)
            fits = lanes < LANES
            at = buckets[fits] * _ROW + lanes[fits]
            self.flat[at + LANES] = ids[fits]
            self.flat[at] = keys[fits]
            self.count(_PUT, len(at))
            added += len(at) + self._put_each(*others)
            on = np.flatnonzero(~fits)
            keys, ids, buckets = keys[on], ids[on], (buckets[on] + 1) & self.mask
        return added + self._put_each(keys, ids)

    def drop(self, keys: Words, ids: Words) -> int:
        """Removes entries; returns how many were there."""
        removed, buckets = 0, self._homes(keys)
        for _ in range(PROBES):
            if not len(keys):
                break
            rows = self._gather(buckets)
            for lane in range(LANES):
                pair = (rows[:, lane] == keys) & (rows[:, LANES + lane] == ids)
                at = buckets[pair] * _ROW + lane
                self.flat[at + LANES] = 0
                self.flat[at] = _LAST
                removed += len(at)
            on = np.flatnonzero(rows[:, LANES - 1])
            keys, ids, buckets = keys[on], ids[on], (buckets[on] + 1) & self.mask
        self.count(_REMOVED, removed)
        return removed

    def absorb(self, other: _Table) -> None:
        """Adds all entries of another table, whose order is nearly this one's."""
        for first in range(0, len(other.rows), _CHUNK):
            part = other.rows[first : first + _CHUNK]
            keys, ids = part[:, :LANES].ravel(), part[:, LANES:].ravel()
            live = np.flatnonzero(ids)
            self.put_many(keys[live], ids[live])


class Index:
    """A process's handle on the index of one store. Threads may share it; searches take no lock.

    Nothing fails here for want of space, rights or a lock: the index then lives in this process's memory, or
    forgets what it was given. Ids that come back may be any number at all and must be checked.
    """

    def __init__(self, directory: Path, seed: int, disk: Disk, *, readonly: bool) -> None:
        self._path, self._aside = directory / "table", directory / "table.new"
        self._seed = seed
        self._disk = disk
        self._readonly = readonly
        self._boot = boot_id()
        self._mutex = threading.Lock()
        self._lock: File | None = None
        self._patient = True
        self._missed = 0  # writes given up because the lock stayed busy
        self._table: _Table | None = None

    @classmethod
    def open(cls, directory: Path, seed: int, disk: Disk, *, readonly: bool = False) -> Index:
        """Opens the index of the store of an unsigned 64-bit seed, in a directory of its own.

        What is missing is made, and a table that does not fit is replaced by an empty one; not so if readonly,
        for searching only, which changes nothing on disk.
        """
        index = cls(directory, seed, disk, readonly=readonly)
        index._table = index._open()
        if not readonly:
            with suppress(OSError, NoSpaceError):
                with suppress(FileExistsError):
                    disk.make_directory(directory)
                index._lock = disk.open(directory / "lock", write=True, create=True)
                index._tidy(index._lock)
        if index._table is None:
            index._table = _Table(mmap.mmap(-1, HEADER_SIZE + SMALLEST * BUCKET_SIZE), None)
        return index

    def _tidy(self, lock: File) -> None:
        """Makes what is missing and removes what a crash has left."""
        if not _wait_for(lock, PATIENCE if self._table is None else 0):
            return
        try:
            self._disk.unlink(self._aside)
            if self._table is None:
                self._table = self._open() or self._publish(self._build(SMALLEST))
        finally:
            lock.unlock()

    def _open(self) -> _Table | None:
        """The table at the path, vetted before it is mapped; None where it is missing or does not fit."""
        file = None
        try:
            file = self._disk.open(self._path, write=not self._readonly)
            size = file.size()
            header = _header(self._seed, max(size - HEADER_SIZE, 0) // BUCKET_SIZE, file)
            if file.read_at(len(header), 0) == header and size % BUCKET_SIZE == 0:
                access = mmap.ACCESS_READ if self._readonly else mmap.ACCESS_WRITE
                return _Table(mmap.mmap(file.fd, size, access=access), file)
        except (OSError, NoSpaceError, ValueError):  # ValueError: mmap's word for a file cut off just now
            pass
        if file is not None:
            file.close()
        return None

    def _build(self, buckets: int) -> _Table:
        """An empty table in a file aside, or in memory where there can be no such file."""
        size, file = HEADER_SIZE + buckets * BUCKET_SIZE, None
        try:
            self._disk.unlink(self._aside)
            file = self._disk.open(self._aside, write=True, exclusive=True)
            # All its space now, since a write into a mapping can fail only with a signal. And zeros, so that
            # large pages hold it: mapped page by page it takes 30 times as long to fill.
            file.write_in_place()
            with suppress(OSError):
                file.allocate(size)
            for start in range(0, size, _PIECE):
                file.write_at(bytes(min(_PIECE, size - start)), start)
            file.write_at(_header(self._seed, buckets, file), 0)
            return _Table(mmap.mmap(file.fd, size), file)
        except (OSError, NoSpaceError):
            if file is not None:
                file.close()
            with suppress(OSError):
                self._disk.unlink(self._aside)
            return _Table(mmap.mmap(-1, size), None)

    def _publish(self, table: _Table) -> _Table:
        """Puts a table that was built aside in its place, and takes it in use."""
        if table.file is not None:
            try:
                self._disk.rename(self._aside, self._path)
                table.file.path = self._path
            except (OSError, NoSpaceError):
                table.close()
                table.file = None
        return self._use(table)

    def _use(self, table: _Table) -> _Table:
        if self._table is not None:
            self._table.close()
        self._table = table
        return table

    def _adopt(self) -> _Table:
        """The table to use: the one that another process has put in the place of ours, if one has."""
        table = self._present()
        if table.file.is_at_path() if table.file is not None else not self._readonly:
            return table  # a writer's own memory knows more than the file that it could not make
        found = self._open()
        return table if found is None else self._use(found)

    def _present(self) -> _Table:
        if self._table is None:
            raise ClosedError("the index is closed")
        return self._table

    @contextmanager
    def _writing(self) -> Iterator[_Table | None]:
        """The present table, locked against all other writers; None if the lock stays busy."""
        if self._readonly:
            raise ReadOnlyError("the index")
        if not self._mutex.acquire(timeout=PATIENCE):
            self._missed += 1
            yield None
            return
        try:
            self._present()
            # Who holds the lock may be stopped for ever: after one wait in vain only look, until it is free.
            self._patient = self._lock is None or _wait_for(self._lock, PATIENCE if self._patient else 0)
            self._missed += not self._patient
            try:
                yield self._adopt() if self._patient else None
            finally:
                if self._lock is not None and self._patient:
                    self._lock.unlock()
        finally:
            self._mutex.release()

    def lookup(self, digests: Buffer) -> Words:
        """One candidate for each of N digests of 16 bytes: N block ids as uint64, 0 where none is known."""
        table, keys = self._present(), _keys(digests)
        if len(keys) <= _CHUNK:
            return table.find(keys)
        return np.concatenate([table.find(keys[at : at + _CHUNK]) for at in range(0, len(keys), _CHUNK)])

    def candidates(self, digest: Buffer) -> list[int]:
        """All block ids, at most 8, that may have one digest; for when the one from lookup() has not."""
        return self._present().ids(int(_keys(digest)[0]))

    def insert(self, digests: Buffer, ids: Words) -> int:
        """Adds entries: N digests of 16 bytes, N block ids as uint64; an id of 0 is passed over.

        Returns how many are new and found a place: of one digest, 8 do. 0 if another process is in the way.
        """
        keys, ids = _pairs(digests, ids)
        with self._writing() as table:
            if table is None:
                return 0
            if not table.has_room(len(keys)):
                table = self._grow(table, len(keys))
            return table.put_many(keys, ids)

    def _grow(self, table: _Table, more: int) -> _Table:
        """A larger table with the entries of this one; the same size will do if many were removed."""
        live = int(np.count_nonzero(table.rows[:, LANES:]))
        try:
            grown = self._build(_buckets_for(live + more))
        except OSError:  # no memory: this table takes what still finds a place
            return table
        grown.memory[_BOOT] = table.memory[_BOOT]
        grown.absorb(table)
        return self._publish(grown)

    def remove(self, digests: Buffer, ids: Words) -> int:
        """Removes entries, as hygiene; returns how many were there."""
        keys, ids = _pairs(digests, ids)
        with self._writing() as table:
            return 0 if table is None else table.drop(keys, ids)

    def rebuild(self, batches: Iterable[tuple[Buffer, Words]], expected: int) -> bool:
        """Adds all that the store has, in batches as for insert(), then marks the table complete as of this boot.

        What is there stays and is found meanwhile, and others add to it; it is emptied first if it has more than
        twice the expected entries. Returns whether it is done; False if another process was in the way.
        """
        missed = self._missed
        with self._writing() as table:
            if table is not None and len(self) > 2 * expected + SMALLEST:
                table = self._publish(self._build(_buckets_for(expected)))
            if table is not None and not table.has_room(expected - len(self)):
                self._grow(table, expected - len(self))
        for digests, ids in batches:
            self.insert(digests, ids)
        with self._writing() as table:
            if table is not None and self._missed == missed:
                table.memory[_BOOT] = self._boot
        return self._missed == missed

    def refresh(self) -> None:
        """Turns to the table that another process has put in the place of this one, if one has."""
        if self._mutex.acquire(blocking=False):  # a writer at work does it anyway
            try:
                self._adopt()
            finally:
                self._mutex.release()

    @property
    def stale(self) -> bool:
        """Whether the table may lack much: it is new, or was not rebuilt since the host booted."""
        boot = self._present().memory[_BOOT]
        return boot != self._boot or not any(boot)

    @property
    def capacity(self) -> int:
        """Places for entries in the present table; it grows when 6 of 10 are used."""
        return len(self._present().rows) * LANES

    def __len__(self) -> int:
        """About how many entries there are."""
        words = self._present().words
        return min(max(words[_PUT] - words[_REMOVED], 0), self.capacity)

    def close(self) -> None:
        """Lets go of the table; harmless when done twice."""
        with self._mutex:
            for one in (self._table, self._lock):
                if one is not None:
                    one.close()
            self._table = self._lock = None
