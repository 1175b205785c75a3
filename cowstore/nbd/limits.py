"""What a client may ask of the server: it is hostile until shown otherwise."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds on what one client, or all of them, can make the server hold.

    Attributes:
        connections: Open at once; further ones are closed as soon as they are accepted.
        handshake_seconds: From the connection to the end of the handshake, TLS included.
        options: In one handshake.
        option_bytes: Of one option's data.
        name_bytes: Of an export's name, and of any other string; the specification's own limit.
        payload_bytes: Of one write, and of one read.
        batch_bytes: Of replies that are gathered before they are sent.
        batch_seconds: Of work on the requests of one client before others have their turn.
        journal_bytes: Unflushed writes of a clone; then it is flushed, though nobody asks for it.
        flushes: Unanswered on one connection; further requests wait.
        send_seconds: How long a client may leave its replies unread before it is dropped.
        stop_seconds: How long a stopping server waits for its clients' last requests.
        extents: Descriptors in one answer to BLOCK_STATUS.
    """

    connections: int = 1024
    handshake_seconds: float = 10.0
    options: int = 64
    option_bytes: int = 64 * KIB
    name_bytes: int = 4096
    payload_bytes: int = 32 * MIB
    batch_bytes: int = 2 * MIB
    batch_seconds: float = 0.005
    journal_bytes: int = 128 * MIB
    flushes: int = 128
    send_seconds: float = 60.0
    stop_seconds: float = 10.0
    extents: int = 8192
