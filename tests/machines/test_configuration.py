"""Configurations: what a machine may be like, and above all what it may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cowstore.errors import InvalidError, NotFoundError
from cowstore.machines import Configuration
from cowstore.machines.configuration import DEVICES, NIC_MODELS, OBJECTS, check_extra

MIB = 1 << 20


def made(**changes: Any) -> Configuration:
    wanted: dict[str, Any] = {"memory": 64 * MIB, "disks": ("a",)} | changes
    return Configuration(**wanted)


@pytest.mark.parametrize(
    "changes",
    [{}, {"memory": 16 * MIB}, {"memory": 1 << 40}, {"cpus": 255}, {"cpu": "Skylake-Client,-hle"},
     {"accelerator": "kvm"}, {"machine": "pc-q35-7.2"}, {"disks": tuple("abcdefgh")},
     {"disks": (), "kernel": __file__}, {"kernel": __file__, "initrd": __file__, "append": "x"},
     *({"nic": model} for model in NIC_MODELS)],
    ids=str,
)  # fmt: skip
def test_what_can_be(changes):
    one = made(**changes)
    one.check()
    assert Configuration.read(one.facts()) == one


@pytest.mark.parametrize(
    "changes",
    [{"memory": 0}, {"memory": -MIB}, {"memory": MIB}, {"memory": 64 * MIB + 4096}, {"memory": 1 << 43},
     {"cpus": 0}, {"cpus": 256}, {"cpus": -1}, {"disks": ()}, {"disks": ("a", "a")}, {"disks": tuple("abcdefghi")},
     {"accelerator": "auto"}, {"accelerator": "xen"}, {"accelerator": "tcg,thread=multi"}, {"machine": ""},
     {"machine": "q35,memory-backend=x"}, {"machine": "-q35"}, {"cpu": "max -device x"}, {"cpu": ",x"},
     {"nic": "virtio-net"}, {"nic": "virtio-net-pci,romfile=/x"}, {"initrd": __file__}, {"append": "quiet"},
     {"extra": ("-device",)}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be(changes):
    with pytest.raises(InvalidError):
        made(**changes).check()


@pytest.mark.parametrize("changes", [{"kernel": "/no/kernel"}, {"kernel": __file__, "initrd": "/no/initrd"}])
def test_files_that_are_missing(changes):
    with pytest.raises(NotFoundError, match="no file named '/no/"):
        made(**changes).check()
    with pytest.raises(NotFoundError):
        made(kernel=str(Path(__file__).parent)).check()


@pytest.mark.parametrize("device", sorted(DEVICES))
def test_devices_that_may_be_added(device):
    check_extra(["-device", device])


@pytest.mark.parametrize("kind", sorted(OBJECTS))
def test_objects_that_may_be_added(kind):
    check_extra(["-object", f"{kind},id=x"])


@pytest.mark.parametrize(
    "device",
    ["virtio-balloon-pci", "virtio-balloon", "virtio-balloon-pci-transitional", "virtio-mem-pci,memdev=x",
     "virtio-pmem-pci", "driver=virtio-balloon-pci"],
)  # fmt: skip
def test_what_gives_memory_back_is_refused(device):
    with pytest.raises(InvalidError, match=r"gives memory back|is not allowed|cannot") as refused:
        made(extra=("-device", device)).check()
    assert refused.value.hint


@pytest.mark.parametrize(
    "words",
    [("-device", "vfio-pci,host=1"), ("-device", "ivshmem-plain,memdev=x"), ("-device", "pc-dimm,memdev=x"),
     ("-device", "nvdimm"), ("-device", "virtio-blk-pci,drive=x"), ("-device", "virtio-net-pci"), ("-device", ""),
     ("-object", "memory-backend-ram,id=x,size=1M"), ("-object", "secret,id=x,file=/etc/shadow"),
     ("-device", "VIRTIO-RNG-PCI"), ("-m", "1G"), ("-qmp", "tcp::1"), ("-snapshot", ""), ("-daemonize", ""),
     ("-global", "x=y"), ("-balloon", "virtio"), ("--device", "virtio-rng-pci"), ("device", "virtio-rng-pci"),
     ("-drive", "file=/etc/passwd"), ("", "")],
    ids=str,
)  # fmt: skip
def test_what_is_not_known_to_be_harmless_is_refused(words):
    with pytest.raises(InvalidError):
        made(extra=words).check()
    with pytest.raises(InvalidError):
        made(extra=("-device", "virtio-rng-pci", *words)).check()


@pytest.mark.parametrize(
    "facts", [{}, {"memory": 1}, {"memory": 1, "disks": [], "extra": [], "colour": 1}, {"disks": 1}]
)
def test_facts_that_make_no_sense(facts):
    with pytest.raises(InvalidError, match="makes no sense"):
        Configuration.read(facts)


@pytest.mark.parametrize(
    "words",
    [("-device", "virtio-rng-pci,driver=e1000"), ("-device", "usb-tablet,driver=ivshmem-plain"),
     ("-object", "rng-builtin,qom-type=memory-backend-ram,size=1M"), ("-device", "virtio-rng-pci,bus=port0"),
     ("-device", "virtio-rng-pci,addr=0x10"), ("-device", "virtio-rng-pci,id=nic1"),
     ("-device", "virtio-rng-pci,rng"), ("-device", '{"driver": "virtio-rng-pci"}')],
    ids=lambda words: words[1],
)  # fmt: skip
def test_a_device_is_no_other_and_in_no_others_place(words):
    """The last of two drivers wins, in QEMU, so the first word alone says nothing."""
    with pytest.raises(InvalidError):
        check_extra(words)


def test_objects_have_names_and_devices_properties():
    check_extra(("-object", "rng-random,id=dice,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=dice"))
