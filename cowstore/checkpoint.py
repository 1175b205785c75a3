"""The record of a checkpoint: which devices make up one consistent moment of a machine.

What they hold is kept by hidden images whose owner is the checkpoint. ``docs/format.md`` has the same fields.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

AUTOMATIC = 1
RECORD_LIMIT = 1 << 16  # bytes
_CHECKPOINT = struct.Struct("<QQQ HHHH")
_DISK = struct.Struct("<Q")


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint as the catalog keeps it, under its number.

    Attributes:
        number: Never used twice; the owner of the images.
        name: Unique among checkpoints.
        created: Nanoseconds since 1970.
        memory: Number of the hidden image that holds the memory.
        state: Number of the hidden image that holds the devices' state, in as many bytes as it has.
        disks: Numbers of the hidden images of the disks, in the machine's order.
        configuration: What the machine was like; any JSON object.
        flags: AUTOMATIC where a fork made it and nobody asked for it by name.
    """

    number: int
    name: str
    created: int
    memory: int
    state: int
    disks: tuple[int, ...]
    configuration: dict[str, Any] = field(default_factory=dict)
    flags: int = 0

    @property
    def images(self) -> tuple[int, ...]:
        """The numbers of all its images."""
        return (self.memory, self.state, *self.disks)

    def encode(self) -> bytes:
        """The payload of its record."""
        name = self.name.encode()
        head = _CHECKPOINT.pack(self.created, self.memory, self.state, self.flags, len(self.disks), len(name), 0)
        disks = b"".join(_DISK.pack(number) for number in self.disks)
        return head + disks + name + json.dumps(self.configuration, sort_keys=True).encode()

    @classmethod
    def decode(cls, number: int, payload: bytes) -> CheckpointRecord:
        """The inverse of encode(). Raises ValueError."""
        if len(payload) < _CHECKPOINT.size:
            raise ValueError("a checkpoint record is cut off")
        created, memory, state, flags, count, length, _ = _CHECKPOINT.unpack_from(payload)
        names_at = _CHECKPOINT.size + count * _DISK.size
        text_at = names_at + length
        if len(payload) < text_at:
            raise ValueError("a checkpoint record is cut off")
        disks = tuple(one for (one,) in _DISK.iter_unpack(payload[_CHECKPOINT.size : names_at]))
        try:
            configuration = json.loads(payload[text_at:])
        except RecursionError:
            raise ValueError("a checkpoint record's configuration is too deep") from None
        if not isinstance(configuration, dict):
            raise ValueError("a checkpoint record has no configuration")
        name = payload[names_at:text_at].decode()
        return cls(number, name, created, memory, state, disks, configuration, flags)
