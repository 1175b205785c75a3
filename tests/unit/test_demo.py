"""The demonstration: it ends well, leaves nothing behind, and cannot end well where a disk is wrong."""

from __future__ import annotations

import tempfile

import pytest
from click.testing import CliRunner, Result

import cowstore
from cowstore_cli import demo, demo_disk, demo_proofs

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


def test_all_proofs_hold():
    done = run()
    assert done.exit_code == 0, done.output
    assert "All 19 proofs hold" in " ".join(done.output.split())


WRONG = [("desk-1", "desk-1"), ("desk-2", "machine-2"), ("desk-3", "desk-3")]


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
