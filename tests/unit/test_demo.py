"""The demonstration: it ends well, leaves nothing behind, and cannot end well where a disk is wrong."""

from __future__ import annotations

import tempfile

import pytest
from click.testing import CliRunner, Result

import cowstore
from cowstore_cli import demo, demo_disk, demo_guest, demo_machine, demo_proofs

SMALL = ["--content", "6M", "--size", "64M", "--clones", "20"]

pytestmark = pytest.mark.program("mke2fs", "e2fsck", "debugfs")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The demonstration's folder comes to lie here, and is gone afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def run() -> Result:
    return CliRunner().invoke(demo.main, SMALL)


@pytest.fixture
def without_qemu(monkeypatch):
    monkeypatch.setattr(demo_machine, "PROGRAM", "no-such-program")


@pytest.mark.program("qemu-system-x86_64")
def test_all_proofs_hold():
    done = run()
    assert done.exit_code == 0, done.output
    assert "All 27 proofs hold" in " ".join(done.output.split())


@pytest.mark.usefixtures("without_qemu")
def test_without_qemu_it_says_how_to_install_it():
    done = run()
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "All 19 proofs hold" in said
    assert "apt install qemu-system-x86" in said


@pytest.mark.program("qemu-system-x86_64")
def test_one_wrong_number_on_a_childs_disk_is_found(monkeypatch):
    genuine = demo_guest.written

    def damaged(content):
        numbers = genuine(content)
        return numbers | {min(numbers): 0}

    monkeypatch.setattr(demo_guest, "written", damaged)
    done = run()
    assert done.exit_code == 1
    assert "is not what" in done.output


@pytest.mark.program("qemu-system-x86_64")
def test_children_that_are_one_machine_are_found(monkeypatch):
    """As if they shared their memory: what all say is what one says."""
    genuine = demo_machine.LiveFork._said
    monkeypatch.setattr(demo_machine.LiveFork, "_prove_disk", lambda *_: None)

    def said(self, name):
        return genuine(self, name if name == "counting" else "counting-1")

    monkeypatch.setattr(demo_machine.LiveFork, "_said", said)
    done = run()
    assert done.exit_code == 1
    assert "two machines wrote the same" in done.output


WRONG = [("desk-1", "desk-1"), ("desk-2", "machine-2"), ("desk-3", "desk-3")]


@pytest.mark.usefixtures("without_qemu")
@pytest.mark.parametrize(("victim", "accused"), WRONG)
def test_one_wrong_block_is_found(monkeypatch, victim, accused):
    genuine = demo_proofs.bring_back

    def careless(copy, clone):
        changed = genuine(copy, clone)
        if clone.name == victim:
            offset = next(one.offset for one in clone.extents() if one.data)
            clone.pwrite(bytes(byte ^ 1 for byte in clone.pread(1, offset + 100)), offset + 100)
        return changed

    monkeypatch.setattr(demo_proofs, "bring_back", careless)
    done = run()
    assert done.exit_code == 1
    assert f"{accused} is not what it should be: 1 block differs" in done.output


def test_a_lost_record_is_found(monkeypatch):
    genuine = cowstore.Clone.pwrite

    def forgetful(clone, data, offset):
        return len(data) if bytes(data) == demo_disk.record(7) else genuine(clone, data, offset)

    monkeypatch.setattr(cowstore.Clone, "pwrite", forgetful)
    done = run()
    assert done.exit_code == 1
    assert "the log of child is not one moment" in done.output


def test_damage_of_the_file_system_is_found(monkeypatch):
    def ruin(name, path, expected):
        path.write_bytes(bytes(1 << 20))

    monkeypatch.setattr(demo_proofs, "prove_file_equal", ruin)
    done = run()
    assert done.exit_code == 1
    assert "e2fsck does not like machine" in done.output


def test_missing_programs_are_named(monkeypatch):
    monkeypatch.setattr(demo_disk, "_ADMIN", "/nowhere")
    done = run()
    assert done.exit_code == 1
    assert "install e2fsprogs" in done.output
