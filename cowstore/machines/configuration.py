"""Configurations: what a machine is like, so exactly that its state fits the next one of the same kind."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from cowstore.errors import InvalidError, NotFoundError

MIB = 1 << 20
_LEAST_MEMORY, _MOST_MEMORY = 16 * MIB, 1 << 42
_MOST_CPUS, _MOST_DISKS = 255, 8
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*\Z")
_CPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*\Z")

NIC_MODELS = ("virtio-net-pci", "e1000e", "e1000", "igb", "rtl8139", "vmxnet3")
DEVICES = frozenset(
    (
        "virtio-rng-pci", "virtio-keyboard-pci", "virtio-tablet-pci", "virtio-mouse-pci", "qemu-xhci",
        "usb-tablet", "usb-kbd", "usb-mouse", "i6300esb", "pvpanic-pci", "isa-debug-exit",
    )
)  # fmt: skip
"""What `-device` may add: devices whose whole state is in the device state, and none that touches the memory."""

OPTIONS = frozenset(("-device", "-object", "-rtc", "-boot", "-smbios", "-uuid"))
OBJECTS = frozenset(("rng-builtin", "rng-random"))
_NOT_OURS = frozenset(("driver", "qom-type", "bus", "addr"))
_GIVES_BACK = re.compile(r"balloon|virtio-mem|virtio-pmem")


@dataclass(frozen=True)
class Configuration:
    """A machine's hardware, as its guest sees it.

    Attributes:
        memory: Bytes, whole MiB.
        disks: The names of its clones, in order.
        cpus: Virtual processors.
        machine: The hypervisor's machine type; an alias is replaced by what it stands for.
        accelerator: ``kvm`` or ``tcg``.
        cpu: The processor's model; empty for the hypervisor's choice.
        kernel: A kernel to boot; empty boots from the first disk.
        initrd: What goes with the kernel.
        append: The kernel's command line.
        nic: The model of its network card; empty for none.
        extra: Further options of the hypervisor, from OPTIONS.
    """

    memory: int
    disks: tuple[str, ...]
    cpus: int = 1
    machine: str = "q35"
    accelerator: str = "tcg"
    cpu: str = ""
    kernel: str = ""
    initrd: str = ""
    append: str = ""
    nic: str = ""
    extra: tuple[str, ...] = ()

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Self:
        """The inverse of facts(). Raises InvalidError."""
        try:
            return cls(**{**facts, "disks": tuple(facts["disks"]), "extra": tuple(facts["extra"])})
        except (KeyError, TypeError) as error:
            raise InvalidError(f"a machine's configuration makes no sense: {error}") from error

    def facts(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)

    def with_disks(self, disks: Sequence[str]) -> Self:
        """The same machine with other clones."""
        return replace(self, disks=tuple(disks))

    def check(self) -> None:
        """Refuses what cannot be a machine.

        Raises:
            InvalidError: Something of it can never be right.
            NotFoundError: A file is missing.
        """
        if self.memory % MIB or not _LEAST_MEMORY <= self.memory <= _MOST_MEMORY:
            raise InvalidError(f"{self.memory} bytes are no memory for a machine", hint="whole MiB, at least 16")
        if not 1 <= self.cpus <= _MOST_CPUS:
            raise InvalidError(f"{self.cpus} processors are no machine", hint=f"1 to {_MOST_CPUS}")
        if len(self.disks) > _MOST_DISKS or len(set(self.disks)) != len(self.disks):
            raise InvalidError("a machine has up to 8 disks, each of them once")
        if self.accelerator not in ("kvm", "tcg"):
            raise InvalidError(f"accelerator {self.accelerator!r} is not known", hint="kvm or tcg")
        if not _WORD.match(self.machine) or (self.cpu and not _CPU.match(self.cpu)):
            raise InvalidError(f"machine {self.machine!r} with processor {self.cpu!r} cannot be")
        if self.nic and self.nic not in NIC_MODELS:
            raise InvalidError(f"network card {self.nic!r} is not known", hint=", ".join(NIC_MODELS))
        self._check_boot()
        check_extra(self.extra)

    def _check_boot(self) -> None:
        if not self.kernel and (self.initrd or self.append):
            raise InvalidError("an initrd and a command line go with a kernel", hint="name the kernel, too")
        if not self.kernel and not self.disks:
            raise InvalidError("there is nothing to boot from", hint="name a disk, or a kernel")
        for path in filter(None, (self.kernel, self.initrd)):
            if not Path(path).is_file():
                raise NotFoundError("file", path)


def processor() -> str:
    """The model of this host's processors, for machines that have its own."""
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")


def check_extra(words: Sequence[str]) -> None:
    """Refuses options that are not known to be harmless.

    Raises:
        InvalidError: One is not.
    """
    if len(words) % 2:
        raise InvalidError("further options come as pairs: -device virtio-rng-pci")
    for option, value in zip(words[::2], words[1::2], strict=True):
        kind, *properties = value.split(",")
        if option in ("-device", "-object"):
            _check_properties(value, properties, _NOT_OURS | {"id"} if option == "-device" else _NOT_OURS)
        if _GIVES_BACK.search(value):
            raise InvalidError(
                f"{value!r} gives memory back while the machine runs, and all children share it",
                hint="leave it out: a child's memory is given back when it is stopped",
            )
        allowed = {"-device": DEVICES, "-object": OBJECTS}.get(option)
        if option not in OPTIONS or (allowed is not None and kind not in allowed):
            known = sorted(allowed) if allowed and option in OPTIONS else sorted(OPTIONS)
            raise InvalidError(f"{option} {value} is not allowed here", hint=f"allowed are {', '.join(known)}")


def _check_properties(value: str, properties: Sequence[str], refused: Set[str]) -> None:
    """Refuses properties that make another device of it, or move it to where one of ours is."""
    for one in properties:
        key, equals, _ = one.partition("=")
        if not equals or key in refused:
            raise InvalidError(
                f"{one!r} in {value!r} is not allowed here",
                hint=f"key=value, without {', '.join(sorted(refused))}",
            )
