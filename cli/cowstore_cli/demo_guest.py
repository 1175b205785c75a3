"""The guest of the demonstration: a boot sector that counts in memory, and writes each number to its disk.

It stamps each number with the processor's time stamp, so that no two machines write the same, and says on its
console what it has written. Number n lies in sector 8 + n, in as many bytes: the number, then the stamp.
"""

from __future__ import annotations

import struct

SIZE = 1 << 20  # bytes of its disk
SECTOR = 512
FIRST = 8  # the sector of number 0
NUMBERS = 1024  # so many, and then again from the first sector
_RECORD = struct.Struct("<II")

_CODE = bytes.fromhex(
    "fa 31c0 8ed8 8ec0 8ed0 bc007c fb fc"  #        cli; ds, es and ss to 0; the stack below the code; sti; cld
    "88160070 a3007e a3027e"  #                     the disk that was booted; number 0
    "f4 66ff06007e"  #                              again: hlt, until the timer ticks; the next number
    "0f31 66a3047e"  #                              its stamp, by rdtsc
    "66a1007e 6625ff030000 6683c008 66a31870"  #    the sector of the number, into the packet at 0x7010
    "6631c0 66a31c70"
    "66c706107010000100 66c7061470007e0000"  #      one sector, from 0x7e00
    "be1070 8a160070 b80043 cd13 72bb"  #           int 0x13, function 0x43, writes it; on an error again
    "668b0e007e e81400 b020 e82600"  #              print the number, a space,
    "668b0e047e e80700 b00a e81900 eb9f"  #         the stamp and a line feed; again
    "bf0800 66c1c104 88c8 240f 3c0a 1c69 2f e80400 4f 75ed c3"  # print: eight hexadecimal digits
    "88c4 bafd03 ec a820 74fb baf803 88e0 ee c3"  # put: one byte, when the serial port can take it
)  # fmt: skip


def disk() -> bytes:
    """Its disk, ready to boot."""
    return (_CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa").ljust(SIZE, b"\0")


def said(log: bytes) -> dict[int, int]:
    """Stamps by number, from what it has said on its console; a line that is not complete does not count."""
    words = [line.split() for line in log.split(b"\n")[:-1]]
    return {int(pair[0], 16): int(pair[1], 16) for pair in words if len(pair) == 2 and len(pair[0]) == 8}


def written(content: bytes) -> dict[int, int]:
    """Stamps by number, from its disk."""
    found = {}
    for sector in range(FIRST, min(FIRST + NUMBERS, len(content) // SECTOR)):
        number, stamp = _RECORD.unpack_from(content, sector * SECTOR)
        if number:
            found[number] = stamp
    return found
