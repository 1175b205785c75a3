"""Which accelerator a machine gets: KVM where a guest has been seen to run under it, else emulation.

That /dev/kvm opens and QEMU starts proves little. A host that is itself a virtual machine may have a KVM that does
without the processor's help (PVM). It is made for kernels that know it; of any other, every instruction is
interpreted, a thousand times slower, and some it cannot interpret at all. There Linux unpacks itself for two
minutes, and stops for good at its first `cmpxchg16b`, while QEMU stays. So a small guest is run, and is believed
only when it reports in time that it did what a kernel does.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from cowstore.errors import InvalidError

WANTED = ("auto", "kvm", "tcg")
PROBE_SECONDS = 5.0

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DONE = 0x2A  # what the guest reports
_STATUS = _DONE << 1 | 1  # the exit status that isa-debug-exit makes of it; QEMU's own are 0 and 1

# The guest, as QEMU's multiboot loader takes it: a flat image, entered at _ENTRY in 32-bit mode. It is bytes here,
# so that nothing has to be built or installed. Its parts, by their address:
_LOAD = 0x100000  # the header, and the code behind it
_TABLES = 0x101000  # what the registers of the descriptor tables are loaded from, and the tables
_PAGES = 0x102000  # three levels of page tables: the first GiB, mapped to itself
_END = 0x105000
_STACK = 0x106000  # its top; the page below is not in the image
_GDT, _IDT = _TABLES + 0x20, _TABLES + 0x100

_MAGIC, _ADDRESSES_GIVEN = 0x1BADB002, 1 << 16
_HEADER = struct.Struct("<8I")
_ENTRY = _LOAD + _HEADER.size
_LONG_MODE, _TICK = _LOAD + 0x56, _LOAD + 0xAC  # of the code below

# It goes the way of a kernel: firmware, long mode, a timer that wakes it. Then come the two things by which it
# tells a KVM that interprets: an instruction that Linux needs and KVM's interpreter lacks, and 20 million rounds
# of a loop. QEMU's emulation does them in 0.2 s, a processor in less; where KVM interprets, the loop alone takes
# over a minute.
_CODE = """
    fa                      ; cli
    0f 01 15 00 10 10 00    ; lgdt [_TABLES]
    b8 00 20 10 00          ; mov eax, _PAGES
    0f 22 d8                ; mov cr3, eax
    0f 20 e0                ; mov eax, cr4
    0c 20                   ; or al, 0x20                   PAE, which long mode asks for
    0f 22 e0                ; mov cr4, eax
    b9 80 00 00 c0          ; mov ecx, 0xc0000080           EFER
    0f 32                   ; rdmsr
    80 cc 01                ; or ah, 1                      long mode ...
    0f 30                   ; wrmsr
    0f 20 c0                ; mov eax, cr0
    0d 00 00 00 80          ; or eax, 0x80000000            ... begins with paging
    0f 22 c0                ; mov cr0, eax
    ea 56 00 10 00 08 00    ; jmp 8:_LONG_MODE
    b8 10 00 00 00          ; mov eax, 0x10                 _LONG_MODE: from here on 64-bit code
    8e d0                   ; mov ss, eax
    bc 00 60 10 00          ; mov esp, _STACK
    0f 01 1c 25 10 10 10 00 ; lidt [_TABLES + 0x10]
    b0 11 e6 20             ; out 0x20, 0x11                interrupt controller: set up anew,
    b0 20 e6 21             ; out 0x21, 0x20                its first vector is 0x20,
    b0 04 e6 21             ; out 0x21, 4                   the second controller sits at line 2,
    b0 01 e6 21             ; out 0x21, 1                   8086 mode,
    b0 fe e6 21             ; out 0x21, 0xfe                all but the timer masked
    b0 34 e6 43             ; out 0x43, 0x34                timer: again and again,
    b0 a9 e6 40             ; out 0x40, 0xa9                every 0x4a9 cycles of 1.19 MHz,
    b0 04 e6 40             ; out 0x40, 4                   a thousand times a second
    31 db                   ; xor ebx, ebx                  counts the ticks
    fb                      ; sti
    f4                      ; hlt                           until ten ticks have woken it
    83 fb 0a                ; cmp ebx, 10
    72 fa                   ; jb hlt
    f0 48 0f c7 4c 24 e0    ; lock cmpxchg16b [rsp - 32]    for itself: what it compares is all the same
    b9 00 2d 31 01          ; mov ecx, 20000000             the work, with the ticks going on
    51                      ; push rcx
    59                      ; pop rcx
    ff c9                   ; dec ecx
    75 fa                   ; jnz push
    b0 2a e6 f4             ; out 0xf4, _DONE               the report, which ends QEMU
    f4                      ; hlt                           where nothing listens at 0xf4
    eb fd                   ; jmp hlt
    ff c3                   ; inc ebx                       _TICK: the timer's interrupt
    b0 20 e6 20             ; out 0x20, 0x20                it is dealt with
    48 cf                   ; iretq
"""


class Accelerators:
    """Which accelerator a machine gets. `auto` takes KVM only where a guest has been seen to run under it.

    Args:
        remembered: The file that keeps the answer until the host boots or QEMU changes.
        qemu: The program that runs the machines, a name or a path.
        device: KVM's device.
        seconds: How long the guest of a probe may take.
    """

    def __init__(
        self,
        remembered: Path,
        *,
        qemu: str = "qemu-system-x86_64",
        device: Path = Path("/dev/kvm"),
        seconds: float = PROBE_SECONDS,
    ) -> None:
        self._remembered = remembered
        self._qemu = qemu
        self._device = device
        self._seconds = seconds

    def choose(self, wanted: str) -> str:
        """What QEMU's `-accel` is to be: ``kvm`` or ``tcg``.

        Args:
            wanted: ``auto``, or one of the two. KVM by name is taken unseen where its device can be opened.

        Raises:
            InvalidError: There is no such accelerator, or KVM by name where its device cannot be opened.
        """
        if wanted not in WANTED:
            raise InvalidError(f"accelerator {wanted!r} is not known", hint=f"one of {', '.join(WANTED)}")
        if wanted == "kvm":
            self._refuse_missing_device()
        return self._found() if wanted == "auto" else wanted

    def _refuse_missing_device(self) -> None:
        if not os.path.exists(self._device):
            hint = "load kvm_intel or kvm_amd and enable virtualization in the firmware, or take tcg"
            raise InvalidError(f"there is no KVM here: {self._device} is missing", hint=hint)
        if not self._may_open():
            hint = "join the group that owns it, most often kvm, and log in again; or take tcg"
            raise InvalidError(f"no permission to use KVM's device {self._device}", hint=hint)

    def _may_open(self) -> bool:
        return os.access(self._device, os.R_OK | os.W_OK)

    def _found(self) -> str:
        """What is remembered, or else what a probe shows."""
        # What has nothing to do with KVM's guests is not remembered: a missing device, right or QEMU may be there
        # a moment later, and so may the memory or the descriptors that a probe takes.
        program = shutil.which(self._qemu)
        if program is None or not self._may_open():
            return "tcg"
        asked = _circumstances(os.path.abspath(program))
        answer = self._recall(asked)
        if answer is None:
            try:
                answer = "kvm" if guest_runs(program, "kvm", self._seconds) else "tcg"
            except OSError:
                return "tcg"
            with suppress(OSError):  # then the next one asks again
                self._remember(asked, answer)
        return answer

    def _recall(self, asked: dict[str, object]) -> str | None:
        """The remembered answer; None where there is none, it was for something else, or the file is damaged."""
        try:
            known = json.loads(self._remembered.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(known, dict) or known.get("asked") != asked:
            return None
        return next((one for one in ("kvm", "tcg") if known.get("answer") == one), None)

    def _remember(self, asked: dict[str, object], answer: str) -> None:
        """Puts the file in place whole, so that no reader sees a part of it; only its owner may read it."""
        folder = self._remembered.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".accelerator-", dir=folder) as aside:
            file = Path(aside, "new")
            file.touch(mode=0o600)
            file.write_text(json.dumps({"asked": asked, "answer": answer}) + "\n")
            file.replace(self._remembered)


def _circumstances(program: str) -> dict[str, object]:
    """What may change the answer: the host's kernel and its settings, which last for a boot, and QEMU."""
    boot = ""
    with suppress(OSError):
        boot = _BOOT_ID.read_text().strip()
    facts = os.stat(program)
    return {"boot": boot, "qemu": program, "mtime_ns": facts.st_mtime_ns, "size": facts.st_size}


def guest_runs(qemu: str, accelerator: str, seconds: float, guest: bytes | None = None) -> bool:
    """Whether the probe's guest does its work and says so in time.

    Args:
        qemu: The program that runs it.
        accelerator: ``kvm``; ``tcg`` shows that the guest itself is sound.
        seconds: How long it may take.
        guest: Another multiboot image.

    Raises:
        OSError: QEMU cannot be started.
    """
    with _in_memory(probe_guest() if guest is None else guest) as image:
        return _status(_words(qemu, accelerator, image), image, seconds) == _STATUS


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """A file that has no name, so it is gone with the processes that have it open, however they end."""
    with os.fdopen(os.memfd_create("cowstore-probe"), "wb") as file:
        file.write(content)
        file.flush()
        yield file.fileno()


def _words(qemu: str, accelerator: str, image: int) -> list[str]:
    """QEMU's command line. A guest that faults resets, and one that resets ends with status 0."""
    machine = ["-accel", accelerator, "-m", "32", "-nodefaults", "-no-user-config"]
    machine += ["-display", "none", "-no-reboot"]
    report = ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"]
    return [qemu, *machine, *report, "-kernel", f"/proc/self/fd/{image}"]


def _status(words: list[str], image: int, seconds: float) -> int:
    """Runs a program for no longer than that; its exit status, negative where it was killed."""
    with (
        _lifeline() as line,
        subprocess.Popen(
            words,
            stdin=line,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(image,),
            start_new_session=True,
        ) as child,
    ):
        try:
            _tie(line, child.pid)
            _wait(child.pid, seconds)
        finally:
            # It is not waited for yet, so its group's number is still its own, even if it has ended.
            os.killpg(child.pid, signal.SIGKILL)
    return child.returncode


@contextmanager
def _lifeline() -> Iterator[int]:
    """The reading end of a pipe whose other end this process alone has, and loses when it dies."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _tie(line: int, group: int) -> None:
    """Has the system kill a process group when this process ends, were it by a SIGKILL that nothing can handle.

    A pipe signals, by any signal that is asked for, when there is news; here, that its other end is gone. The
    group has it as its stdin, which keeps it watched. The system notes the group and not its number, so no other
    is hit that gets the number later.
    """
    fcntl.fcntl(line, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(line, fcntl.F_SETOWN, -group)
    fcntl.fcntl(line, fcntl.F_SETFL, fcntl.fcntl(line, fcntl.F_GETFL) | fcntl.FASYNC)


def _wait(pid: int, seconds: float) -> None:
    """Until a child ends or the time is up. It is left to be waited for."""
    ended = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.poll(seconds * 1000)
    finally:
        os.close(ended)


@cache
def probe_guest() -> bytes:
    """A multiboot image: long mode, paging, ten timer ticks out of HLT, work, and the report to port 0xf4."""
    return flat_guest(bytes.fromhex("".join(line.partition(";")[0] for line in _CODE.splitlines())))


def flat_guest(code: bytes) -> bytes:
    """A multiboot image around 32-bit code, with the tables that the probe's guest needs."""
    checksum = -(_MAGIC + _ADDRESSES_GIVEN) % (1 << 32)
    header = _HEADER.pack(_MAGIC, _ADDRESSES_GIVEN, checksum, _LOAD, _LOAD, _END, _STACK, _ENTRY)
    return b"".join(page.ljust(4096, b"\0") for page in (header + code, _descriptors(), *_page_tables()))


def _descriptors() -> bytes:
    """The page of the descriptor tables; of the interrupts only the timer's has a gate, so a fault is the end."""
    registers = struct.pack("<HI10x", 23, _GDT) + struct.pack("<HQ6x", 0x20F, _IDT)
    segments = struct.pack("<3Q", 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF)  # none, 64-bit code, data
    gate = struct.pack("<HHBBHII", _TICK & 0xFFFF, 8, 0, 0x8E, _TICK >> 16, 0, 0)
    return (registers + segments).ljust(_IDT - _TABLES, b"\0") + bytes(16 * 0x20) + gate


def _page_tables() -> list[bytes]:
    """Tables that map the first GiB to itself in pages of 2 MiB; 3: present and writable, 0x80: a large page."""
    upper = [struct.pack("<Q", _PAGES + 0x1000 * level | 3) for level in (1, 2)]
    return [*upper, struct.pack("<512Q", *(number << 21 | 0x83 for number in range(512)))]
