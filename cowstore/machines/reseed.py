"""Reseeding: a program of some hundred bytes that gives a guest's random number generator entropy to use at once.

A child has its parent's generator, state and all, until that is reseeded, which may take a minute. A kernel that
knows vmgenid does it by itself, and Debian's kernel for clouds is one that does not. Bytes that are written to
/dev/urandom wait for the next reseeding; to have one now takes two calls that no shell can make.

Source: random(4), elf(5), System V Application Binary Interface, AMD64 Architecture Processor Supplement.
"""

from __future__ import annotations

import struct

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
_INFO = struct.Struct("<ii")  # struct rand_pool_info: bits of entropy, bytes that follow
_PLACE = 0x400000  # where the kernel loads it
_CODE = bytes.fromhex(
    "488d3d40000000"  # lea   rdi, [path]
    "be01000000"      # mov   esi, O_WRONLY
    "b802000000"      # mov   eax, SYS_open
    "0f05"            # syscall
    "89c3"            # mov   ebx, eax
    "89df"            # mov   edi, ebx
    "be03520840"      # mov   esi, RNDADDENTROPY
    "488d1531000000"  # lea   rdx, [info]
    "b810000000"      # mov   eax, SYS_ioctl
    "0f05"            # syscall
    "85c0"            # test  eax, eax
    "750e"            # jnz   done
    "89df"            # mov   edi, ebx
    "be07520000"      # mov   esi, RNDRESEEDCRNG
    "b810000000"      # mov   eax, SYS_ioctl
    "0f05"            # syscall
    "f7d8"            # done: neg eax
    "89c7"            # mov   edi, eax
    "b83c000000"      # mov   eax, SYS_exit
    "0f05"            # syscall
)  # fmt: skip
_PATH = b"/dev/urandom\0"


def program(entropy: bytes) -> bytes:
    """An executable for Linux on x86-64 that ends with status 0, or with the number of the error.

    Args:
        entropy: What it gives, all of it unpredictable; it stands at the end of the program.
    """
    body = _CODE + _PATH + _INFO.pack(8 * len(entropy), len(entropy)) + entropy
    start = _HEADER.size + _SEGMENT.size
    size = start + len(body)
    header = _HEADER.pack(
        b"\x7fELF\2\1\1".ljust(16, b"\0"), 2, 62, 1, _PLACE + start, _HEADER.size, 0, 0, _HEADER.size,
        _SEGMENT.size, 1, 0, 0, 0,
    )  # fmt: skip
    return header + _SEGMENT.pack(1, 5, 0, _PLACE, _PLACE, size, size, 0x1000) + body
