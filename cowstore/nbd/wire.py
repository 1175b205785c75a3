"""The NBD protocol's numbers and structures, encoded and decoded; nothing here reads or writes a socket.

Source: the NBD protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. Everything on the
wire is big-endian. Names are those of the specification without their NBD_ prefix.
"""

from __future__ import annotations

import struct
from enum import IntEnum

STRING_BYTES = 4096  # of a string, at most
Buffer = bytes | bytearray | memoryview

# Handshake.

GREETING_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
OPTION_HEADER = struct.Struct(">QII")  # magic, option, length
OPTION_REPLY = struct.Struct(">QIII")  # magic, option, reply type, length
GREETING = struct.Struct(">QQH")  # two magics, handshake flags
CLIENT_FLAGS = struct.Struct(">I")
EXPORT = struct.Struct(">QH")  # size in bytes, transmission flags
NUMBER = struct.Struct(">I")
SHORT = struct.Struct(">H")
INFO_EXPORT = struct.Struct(">HQH")  # information type, size in bytes, transmission flags
INFO_BLOCK_SIZE = struct.Struct(">HIII")  # information type, minimum, preferred, maximum, in bytes
EXPORT_NAME_PADDING = 124

FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1


class Option(IntEnum):
    """What a client asks for in the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Answer(IntEnum):
    """How a server answers an option; from ERROR on it is an error with a message."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERROR = 1 << 31
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_TOO_BIG = (1 << 31) + 9


class Info(IntEnum):
    """Pieces of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


def option_reply(option: int, answer: int, data: bytes = b"") -> bytes:
    """One answer to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, answer, len(data)) + data


# Transmission.

REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length of what follows
DATA_CHUNK = struct.Struct(">IHHQIQ")  # the same, and the offset of the data
HOLE_CHUNK = struct.Struct(">IHHQIQI")  # the same, and the length of the hole
ERROR_CHUNK = struct.Struct(">IHHQIIH")  # a chunk's header, error, length of the message
DESCRIPTOR = struct.Struct(">II")  # length in bytes, status flags

# Transmission flags.
HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
SEND_DF = 1 << 7
CAN_MULTI_CONN = 1 << 8
SEND_CACHE = 1 << 10
SEND_FAST_ZERO = 1 << 11

# Command flags.
FUA = 1 << 0
NO_HOLE = 1 << 1
DF = 1 << 2
REQ_ONE = 1 << 3
FAST_ZERO = 1 << 4

# Chunk flags and types.
DONE = 1 << 0
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_ERROR = 0, 1, 2, 5, (1 << 15) + 1

# Status flags of base:allocation.
STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1


class Command(IntEnum):
    """What a client asks for in the transmission."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class Error(IntEnum):
    """The error numbers of the protocol; they are its own, whatever the host's are."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


def text(message: str) -> bytes:
    """A message as the specification wants strings: UTF-8, and not too long."""
    return message.encode(errors="replace")[:STRING_BYTES].decode(errors="ignore").encode()


def error_chunk(cookie: int, error: int, message: str) -> bytes:
    """The last chunk of a reply that says what went wrong."""
    said = text(message)
    return ERROR_CHUNK.pack(CHUNK_MAGIC, DONE, CHUNK_ERROR, cookie, 6 + len(said), error, len(said)) + said


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A reply without data."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)
