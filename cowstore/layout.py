"""Every structure on disk: sizes, offsets, encoding and decoding, nothing else.

``docs/format.md`` describes the same fields in prose. All integers are little-endian, except those in catalog
keys, which are big-endian so that they sort. Decoders take bytes that may be damaged and answer with
``ValueError``; the caller knows the file and makes it a proper error.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from .digest import BLOCK_SIZE, DIGEST_SIZE, Buffer, checksum

FORMAT_VERSION = 1
NAME_LIMIT = 128
MAX_SIZE = 1 << 60  # bytes of one device

# Block ids. The top 8 bits are reserved and zero; the rest is the place.
SLOT_BITS = 18
SLOT_MASK = (1 << SLOT_BITS) - 1
SLOTS_PER_SEGMENT = 1 << SLOT_BITS
BLOCK_ID_LIMIT = 1 << 56
HOLE = 0

# Nodes.
FANOUT_BITS = 9
FANOUT = 1 << FANOUT_BITS
MAX_HEIGHT = 6

# Segments: a header block, the digests, the slots.
DATA, MAP, EPHEMERAL_DATA, EPHEMERAL_MAP = 1, 2, 3, 4
KIND_NAMES = {DATA: "data", MAP: "map", EPHEMERAL_DATA: "ephemeral data", EPHEMERAL_MAP: "ephemeral map"}
DATA_KINDS = frozenset((DATA, EPHEMERAL_DATA))
MAP_KINDS = frozenset((MAP, EPHEMERAL_MAP))
DIGESTS_OFFSET = BLOCK_SIZE
SLOTS_OFFSET = DIGESTS_OFFSET + SLOTS_PER_SEGMENT * DIGEST_SIZE
SEGMENT_SIZE = SLOTS_OFFSET + SLOTS_PER_SEGMENT * BLOCK_SIZE
STAMP_OFFSETS = (512, 1024)

_SEGMENT_HEADER = struct.Struct("<8sHBxI Q 16s Q")
_SEGMENT_MAGIC = b"COWSEGMT"
_STAMP = struct.Struct("<8sQQ")
_STAMP_MAGIC = b"COWERASE"
_CHECKSUM = struct.Struct("<Q")


# Journals: a header, then changes, of which those of data have it behind them.
JOURNAL_DATA, JOURNAL_ZEROS, JOURNAL_SIZE = 1, 2, 3
_JOURNAL_HEADER = struct.Struct("<8sQ16sQ")
CHANGE = struct.Struct("<QQQ")  # kind, offset, length


def encode_journal_header(boot: bytes, number: int) -> bytes:
    """How every journal of a clone begins during one boot of the host."""
    return _JOURNAL_HEADER.pack(b"COWJOURN", FORMAT_VERSION, boot, number)


def encode_segment_header(number: int, kind: int, store_id: bytes) -> bytes:
    """The first 48 bytes of a segment file, written once."""
    head = _SEGMENT_HEADER.pack(_SEGMENT_MAGIC, FORMAT_VERSION, kind, 0, number, store_id, 0)
    body = head[:-8]
    return body + _CHECKSUM.pack(checksum(body))


def decode_segment_header(data: bytes) -> tuple[int, int, bytes]:
    """Segment number, kind and store id. Raises ValueError."""
    if len(data) < _SEGMENT_HEADER.size:
        raise ValueError("the header is cut off")
    magic, version, kind, _, number, store_id, stored = _SEGMENT_HEADER.unpack_from(data)
    if magic != _SEGMENT_MAGIC:
        raise ValueError("it does not begin like a segment")
    if stored != checksum(data[: _SEGMENT_HEADER.size - 8]):
        raise ValueError("its header does not match its checksum")
    if version != FORMAT_VERSION or kind not in KIND_NAMES:
        raise ValueError(f"version {version}, kind {kind} is not known")
    return number, kind, store_id


def encode_stamp(erasure: int) -> bytes:
    """One of a segment's two erasure stamps, which are written in turn."""
    body = _STAMP.pack(_STAMP_MAGIC, erasure, 0)[:-8]
    return body + _CHECKSUM.pack(checksum(body))


def decode_stamps(header: bytes) -> int:
    """The newest erasure number that verifies in a segment's header block, 0 if there was none."""
    newest = 0
    for offset in STAMP_OFFSETS if len(header) >= BLOCK_SIZE else ():
        magic, erasure, stored = _STAMP.unpack_from(header, offset)
        if magic == _STAMP_MAGIC and stored == checksum(header[offset : offset + _STAMP.size - 8]):
            newest = max(newest, erasure)
    return newest


def next_stamp_offset(header: bytes) -> int:
    """Where the next stamp goes: over the older one, so that a torn write loses nothing."""
    first, second = STAMP_OFFSETS
    newest = decode_stamps(header)
    holds_newest = newest and header[first : first + _STAMP.size] == encode_stamp(newest)
    return second if holds_newest else first


# Catalog records. The key is kept with the payload under the checksum, so that a value cannot stand in
# another's place.


def seal_record(table: bytes, key: bytes, payload: bytes) -> tuple[bytes, int]:
    """The value to store for a payload, and its checksum."""
    check = checksum(b"%b\0%b\0%b" % (table, key, payload))
    return payload + _CHECKSUM.pack(check), check


def open_record(table: bytes, key: bytes, value: Buffer) -> tuple[bytes, int]:
    """The payload of a stored value, and its checksum. Raises ValueError."""
    raw = bytes(value)
    if len(raw) < _CHECKSUM.size:
        raise ValueError("the record is cut off")
    payload = raw[: -_CHECKSUM.size]
    (stored,) = _CHECKSUM.unpack_from(raw, len(payload))
    if stored != checksum(b"%b\0%b\0%b" % (table, key, payload)):
        raise ValueError("the record does not match its checksum")
    return payload, stored


_NUMBER = struct.Struct(">Q")


def number_key(number: int) -> bytes:
    """A catalog key made of one number."""
    return _NUMBER.pack(number)


def key_number(key: Buffer) -> int:
    """The number in such a key."""
    (number,) = _NUMBER.unpack(key)
    return int(number)


_STATE = struct.Struct("<HHI QQQQQ QQ")


@dataclass
class State:
    """The catalog's own record.

    Attributes:
        revision: Counts write transactions.
        next_number: The next number for a device, lease or segment; none is used twice.
        sequence: The last sequence number of a commit.
        dooms: Counts the transactions that doomed slots.
        erasure: The number of the last erasure begun.
        records: How many other records the catalog holds.
        total: The sum of their checksums, modulo 2**64.
    """

    revision: int = 0
    next_number: int = 1
    sequence: int = 0
    dooms: int = 0
    erasure: int = 0
    records: int = 0
    total: int = 0

    def encode(self) -> bytes:
        """The payload of its record."""
        return _STATE.pack(
            FORMAT_VERSION, 0, 0, self.revision, self.next_number, self.sequence, self.dooms, self.erasure,
            self.records, self.total,
        )  # fmt: skip

    @classmethod
    def decode(cls, payload: bytes) -> State:
        """The inverse of encode(). Raises ValueError."""
        if len(payload) != _STATE.size:
            raise ValueError("the state record has a wrong length")
        version, _, _, *numbers = _STATE.unpack(payload)
        if version != FORMAT_VERSION:
            raise ValueError(f"the state record has version {version}")
        return cls(*numbers)


IMAGE, CLONE = 1, 2
EPHEMERAL, HIDDEN, DELETED = 1, 2, 4
_DEVICE = struct.Struct("<BBBBI QQQQ QQQQ 16s HH4x")


@dataclass(frozen=True)
class Root:
    """One moment of a device: a tree and the bytes it stands for.

    Attributes:
        node: Block id of the top node; 0 where all is zero.
        height: Levels of nodes, at least 1.
        size: Bytes.
    """

    node: int
    height: int
    size: int


@dataclass(frozen=True)
class DeviceRecord:
    """A device as the catalog keeps it, under its number.

    Attributes:
        number: Never used twice.
        name: Unique among those that are neither hidden nor deleted.
        kind: IMAGE or CLONE.
        flags: EPHEMERAL, HIDDEN (owned by a process lease), DELETED (kept because children name it).
        base: The parent's moment at the time of cloning; an image's own root.
        root: The present root.
        parent: Number of the parent, 0 for none.
        children: How many records name this one as their parent.
        sequence: The last commit that moved the root.
        created: Nanoseconds since 1970.
        owner: The process lease of a hidden device, else 0.
        boot: Boot id under which an ephemeral device was made, else zeros.
    """

    number: int
    name: str
    kind: int
    base: Root
    root: Root
    flags: int = 0
    parent: int = 0
    children: int = 0
    sequence: int = 0
    created: int = 0
    owner: int = 0
    boot: bytes = bytes(16)

    @property
    def ephemeral(self) -> bool:
        """Whether it is gone after a reboot."""
        return bool(self.flags & EPHEMERAL)

    @property
    def visible(self) -> bool:
        """Whether it goes by its name."""
        return not self.flags & (HIDDEN | DELETED)

    def encode(self) -> bytes:
        """The payload of its record."""
        name = self.name.encode()
        return _DEVICE.pack(
            self.kind, self.flags, self.base.height, self.root.height, self.children,
            self.base.node, self.base.size, self.root.node, self.root.size,
            self.parent, self.sequence, self.created, self.owner, self.boot, len(name), 0,
        ) + name  # fmt: skip

    @classmethod
    def decode(cls, number: int, payload: bytes) -> DeviceRecord:
        """The inverse of encode(). Raises ValueError."""
        if len(payload) < _DEVICE.size:
            raise ValueError("a device record is cut off")
        (kind, flags, base_height, height, children, base, base_size, root, size,
         parent, sequence, created, owner, boot, length, _) = _DEVICE.unpack_from(payload)  # fmt: skip
        name = payload[_DEVICE.size :]
        heights = range(1, MAX_HEIGHT + 1)
        if (
            kind not in (IMAGE, CLONE)
            or len(name) != length
            or height not in heights
            or base_height not in heights
        ):
            raise ValueError("a device record makes no sense")
        return cls(
            number, name.decode(), kind, Root(base, base_height, base_size), Root(root, height, size),
            flags, parent, children, sequence, created, owner, boot,
        )  # fmt: skip


Run = tuple[int, int]  # first block id, number of slots
_RUN = struct.Struct("<QI")
_LEASE = struct.Struct("<I4xQ16s")


@dataclass(frozen=True)
class LeaseRecord:
    """A process that reserves slots or owns hidden devices.

    Attributes:
        number: The lock file's number.
        pid: For people; the lock tells whether it lives.
        created: Nanoseconds since 1970.
        boot: Boot id of the host when the lease was taken.
        runs: The slots reserved and not yet published.
    """

    number: int
    pid: int
    created: int
    boot: bytes = bytes(16)
    runs: tuple[Run, ...] = ()

    def encode(self) -> bytes:
        """The payload of its record."""
        return _LEASE.pack(self.pid, self.created, self.boot) + encode_runs(self.runs)

    @classmethod
    def decode(cls, number: int, payload: bytes) -> LeaseRecord:
        """The inverse of encode(). Raises ValueError."""
        if len(payload) < _LEASE.size:
            raise ValueError("a lease record is cut off")
        pid, created, boot = _LEASE.unpack_from(payload)
        return cls(number, pid, created, boot, decode_runs(payload[_LEASE.size :]))


def encode_runs(runs: Iterable[Run]) -> bytes:
    """Runs of slots, 12 bytes each."""
    return b"".join(_RUN.pack(*run) for run in runs)


def decode_runs(data: bytes) -> tuple[Run, ...]:
    """The inverse of encode_runs. Raises ValueError."""
    if len(data) % _RUN.size:
        raise ValueError("a list of runs is cut off")
    return tuple((int(first), int(count)) for first, count in _RUN.iter_unpack(data))


_SEGMENT = struct.Struct("<B3xI")


def encode_segment_record(kind: int, free: int) -> bytes:
    """A segment's kind and its number of free slots."""
    return _SEGMENT.pack(kind, free)


def decode_segment_record(payload: bytes) -> tuple[int, int]:
    """Kind and free slots. Raises ValueError."""
    if len(payload) != _SEGMENT.size:
        raise ValueError("a segment record has a wrong length")
    kind, free = _SEGMENT.unpack(payload)
    return kind, free


# Slot states: a record for 4,096 slots, absent where all are free, one byte where all are alike, else two
# bit planes. Bounded whatever the fragmentation, and changed by whole-array operations.
FREE, RESERVED, USED, DOOMED = 0, 1, 2, 3
CHUNK_SLOTS = 4096
CHUNKS_PER_SEGMENT = SLOTS_PER_SEGMENT // CHUNK_SLOTS
CHUNK_BYTES = CHUNK_SLOTS // 4
_CHUNK_KEY = struct.Struct(">QH")


def chunk_key(segment: int, chunk: int) -> bytes:
    """The catalog key of one chunk of slot states."""
    return _CHUNK_KEY.pack(segment, chunk)


def key_chunk(key: Buffer) -> tuple[int, int]:
    """Segment and chunk of such a key."""
    segment, chunk = _CHUNK_KEY.unpack(key)
    return segment, chunk


# Commit blocks: written beside the nodes of a flush, so that a lost catalog can be made anew.
_COMMIT = struct.Struct("<8sHHHH QQQQQQQ BB2xI QQQ 16s HH")
_COMMIT_MAGIC = b"COWCOMIT"
_COMMIT_ROOM = BLOCK_SIZE - _COMMIT.size - NAME_LIMIT - _CHECKSUM.size
COMMIT_RUNS = _COMMIT_ROOM // _RUN.size


@dataclass(frozen=True)
class Commit:
    """What one flush says of itself in the map segment.

    Attributes:
        device: The record as this flush publishes it.
        sequence: Never used twice in a store.
        next_block: Block id reserved for the device's next commit block, 0 for none.
        runs: All slots that the flush wrote, this block's own included.
    """

    device: DeviceRecord
    sequence: int
    runs: tuple[Run, ...] = field(default=())
    next_block: int = 0


def commit_parts(run_count: int) -> int:
    """How many commit blocks a flush with that many runs needs."""
    return max(1, -(-run_count // COMMIT_RUNS))


def encode_commit(commit: Commit, parts: int) -> list[bytes]:
    """The commit blocks, each 4,096 bytes; more than one only where the runs do not fit."""
    return [_encode_commit_part(commit, part, parts) for part in range(parts)]


def _encode_commit_part(commit: Commit, part: int, parts: int) -> bytes:
    device = commit.device
    runs = commit.runs[part * COMMIT_RUNS : (part + 1) * COMMIT_RUNS]
    name = device.name.encode()
    head = _COMMIT.pack(
        _COMMIT_MAGIC, FORMAT_VERSION, part, parts, len(runs),
        commit.sequence, device.number, device.parent, device.base.node, device.base.size,
        device.root.node, device.root.size, device.base.height, device.root.height, device.flags,
        commit.next_block, device.created, device.owner, device.boot, device.kind, len(name),
    )  # fmt: skip
    body = head + name.ljust(NAME_LIMIT, b"\0") + encode_runs(runs)
    body = body.ljust(BLOCK_SIZE - _CHECKSUM.size, b"\0")
    return body + _CHECKSUM.pack(checksum(body))


def decode_commit(block: bytes) -> tuple[Commit, int, int]:
    """A commit block, its part and the number of parts. Raises ValueError."""
    if len(block) != BLOCK_SIZE or not block.startswith(_COMMIT_MAGIC):
        raise ValueError("not a commit block")
    body, (stored,) = block[: -_CHECKSUM.size], _CHECKSUM.unpack_from(block, BLOCK_SIZE - _CHECKSUM.size)
    if stored != checksum(body):
        raise ValueError("a commit block does not match its checksum")
    (_, version, part, parts, count, sequence, number, parent, base, base_size, root, size, base_height, height,
     flags, next_block, created, owner, boot, kind, length) = _COMMIT.unpack_from(body)  # fmt: skip
    heights = range(1, MAX_HEIGHT + 1)
    if version != FORMAT_VERSION or count > COMMIT_RUNS or length > NAME_LIMIT:
        raise ValueError("a commit block is of another version, or makes no sense")
    if kind not in (IMAGE, CLONE) or height not in heights or base_height not in heights:
        raise ValueError("a commit block makes no sense")
    runs_at = _COMMIT.size + NAME_LIMIT
    device = DeviceRecord(
        number, body[_COMMIT.size : _COMMIT.size + length].decode(), kind, Root(base, base_height, base_size),
        Root(root, height, size), flags, parent, 0, sequence, created, owner, boot,
    )  # fmt: skip
    runs = decode_runs(body[runs_at : runs_at + count * _RUN.size])
    return Commit(device, sequence, runs, next_block), part, parts


def height_for(size: int) -> int:
    """Levels of nodes that a device of so many bytes needs."""
    blocks = -(-size // BLOCK_SIZE)
    height = 1
    while blocks > 1 << (FANOUT_BITS * height):
        height += 1
    return height


@dataclass(frozen=True)
class Identity:
    """A store's identity: the content of store.json.

    Attributes:
        store_id: 16 random bytes.
        seed: The digests' seed.
        incompatible: Features that a reader must know.
        compatible: Features that a reader may ignore.
    """

    store_id: bytes
    seed: int
    incompatible: tuple[str, ...] = ()
    compatible: tuple[str, ...] = ()


KNOWN_FEATURES: frozenset[str] = frozenset()


class UnknownFormatError(ValueError):
    """A sound store.json of a version or with a feature that is not known here."""


def encode_identity(identity: Identity) -> bytes:
    """The text of store.json."""
    facts: dict[str, object] = {
        "format": FORMAT_VERSION,
        "id": identity.store_id.hex(),
        "seed": f"{identity.seed:016x}",
        "compatible": list(identity.compatible),
        "incompatible": list(identity.incompatible),
    }
    return json.dumps({**facts, "checksum": _identity_checksum(facts)}, indent=2).encode() + b"\n"


def _identity_checksum(facts: dict[str, object]) -> str:
    return f"{checksum(json.dumps(facts, sort_keys=True).encode()):016x}"


def decode_identity(text: bytes) -> Identity:
    """The content of store.json. Raises ValueError, UnknownFormatError where it is only too new."""
    try:
        facts = json.loads(text)
        stored = facts.pop("checksum")
        version = facts["format"]
        if stored != _identity_checksum(facts):
            raise ValueError("it does not match its checksum")
        unknown = set(facts["incompatible"]) - KNOWN_FEATURES
        if version != FORMAT_VERSION or unknown:
            needs = f"format {version}" + "".join(f", feature {name}" for name in sorted(unknown))
            raise UnknownFormatError(f"it needs {needs}; this version reads format {FORMAT_VERSION}")
        seed = int(facts["seed"], 16)
        return Identity(bytes.fromhex(facts["id"]), seed, tuple(facts["incompatible"]), tuple(facts["compatible"]))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not what a store writes ({error!r})") from error
