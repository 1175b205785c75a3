"""Which kernel the guests get, and in what order its modules are loaded."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from .kernel import UnfitError, find_busybox, find_kernel


def kernel(root: Path, version: str, modules: dict[str, str], builtin: str = "", ending: str = ".ko") -> None:
    """Puts one there: modules by name, with what each depends on."""
    (root / "boot").mkdir(parents=True, exist_ok=True)
    (root / "boot" / f"vmlinuz-{version}").touch()
    folder = root / "lib/modules" / version / "kernel/drivers"
    folder.mkdir(parents=True)
    (folder.parents[1] / "modules.builtin").write_text("".join(f"kernel/{one}.ko\n" for one in builtin.split()))
    for name, needs in modules.items():
        code = b"ELF\0depends=%s\0name=..\0" % needs.encode()
        (folder / f"{name}{ending}").write_bytes(lzma.compress(code) if ending == ".ko.xz" else code)


MODULES = {"virtio_ring": "", "virtio_pci": "virtio,virtio-ring", "virtio": "virtio_ring", "virtio-blk": "virtio"}


@pytest.mark.parametrize("ending", [".ko", ".ko.xz"])
def test_what_a_module_needs_is_loaded_before_it(tmp_path, ending):
    kernel(tmp_path, "1", MODULES, "fs/ext4", ending)
    names = [driver.name for driver in find_kernel([tmp_path]).drivers()]
    assert names == ["virtio_ring", "virtio", "virtio_pci", "virtio_blk"]


def test_checksum_of_ext4_is_loaded_where_it_is_a_module(tmp_path):
    kernel(tmp_path, "1", MODULES | {"crc32c_generic": "", "ext4": "jbd2", "jbd2": ""})
    names = [driver.name for driver in find_kernel([tmp_path]).drivers()]
    assert names[-3:] == ["jbd2", "ext4", "crc32c_generic"]


def test_cloud_kernels_come_first(tmp_path):
    kernel(tmp_path / "a", "9-generic", MODULES, "ext4")
    kernel(tmp_path / "b", "7-cloud-amd64", MODULES, "ext4")
    kernel(tmp_path / "b", "8-cloud-amd64", MODULES, "ext4")
    assert find_kernel([tmp_path / "a", tmp_path / "b"]).image.name == "vmlinuz-8-cloud-amd64"


def test_unfit_kernels_are_passed_over(tmp_path):
    kernel(tmp_path, "2-cloud-amd64", {}, "ext4")
    kernel(tmp_path, "3-cloud-amd64", MODULES, "ext4", ".ko.zst")
    kernel(tmp_path, "1", MODULES, "ext4")
    assert find_kernel([tmp_path]).image.name == "vmlinuz-1"


def test_without_a_kernel_the_reasons_are_said(tmp_path):
    kernel(tmp_path, "2", {}, "ext4")
    (tmp_path / "boot/vmlinuz-3").touch()  # its modules are not there
    with pytest.raises(UnfitError, match="without the module virtio_pci"):
        find_kernel([tmp_path])
    with pytest.raises(UnfitError, match="no Linux kernel"):
        find_kernel([tmp_path / "nowhere"])


def test_busybox_with_libraries_is_passed_over(tmp_path):
    for name, code in {"a": b"ELF /lib64/ld-linux-x86-64.so.2", "b": b"ELF"}.items():
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin/busybox").write_bytes(code)
    assert find_busybox([tmp_path / "a", tmp_path / "b"]) == tmp_path / "b/bin/busybox"
    with pytest.raises(UnfitError, match="busybox"):
        find_busybox([tmp_path / "a"])
