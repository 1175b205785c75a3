"""A store on media that cannot be written: everything that only looks works, the rest is refused at once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowstore
from cowstore import ReadOnlyError
from tests.sample import facts

pytestmark = [pytest.mark.root, pytest.mark.program("mount", "umount")]

CONTENT = os.urandom(300 * 4096)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A store with an image and a clone, seen through a read-only mount."""
    path, frozen = tmp_path / "s", tmp_path / "frozen"
    (tmp_path / "disk").write_bytes(CONTENT)
    with cowstore.open(path, create=True) as store:
        store.import_image(tmp_path / "disk", "image")
        with store.clone("image", "clone") as clone:
            clone.pwrite(b"own", 0)
    frozen.mkdir()
    command = ["mount", "--bind", "-o", "ro", str(path), str(frozen)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount here: {mounted.stderr.strip()}")
    before = {one: one.stat().st_mtime_ns for one in path.rglob("*")}
    yield frozen
    subprocess.run(["umount", "--lazy", frozen], check=True)  # mappings end when they are collected
    assert {one: one.stat().st_mtime_ns for one in path.rglob("*")} == before


def test_it_is_read(frozen, tmp_path):
    with cowstore.open(frozen, readonly=True) as store:
        assert [one.name for one in store.devices()] == ["clone", "image"]
        for name, start in (("image", CONTENT[:3]), ("clone", b"own")):
            with store.device(name) as device:
                assert device.pread(device.size, 0) == start + CONTENT[3:]
                assert len(list(device.delta())) == (300 if name == "image" else 1)
        assert [(one.offset, one.length) for one in store.diff("image", "clone")] == [(0, 4096)]
        assert store.usage("clone") == store.usages()["clone"]
        assert store.stats().used == store.exclusive("image", "clone") + 4096 * 2  # and two commit blocks
        store.export("clone", tmp_path / "out")
        store.backup(tmp_path / "copy")
    assert (tmp_path / "out").read_bytes() == b"own" + CONTENT[3:]
    with cowstore.open(tmp_path / "copy") as copy, copy.device("clone") as device:
        assert device.pread(3, 0) == b"own"


def test_it_is_not_opened_to_be_written(frozen):
    with pytest.raises(ReadOnlyError, match="is read-only") as refused:
        cowstore.open(frozen)
    assert "read-only" in refused.value.hint


def test_it_is_not_changed(frozen, tmp_path):
    with cowstore.open(frozen, readonly=True) as store:
        calls: list[Callable[[], object]] = [
            lambda: store.create("new", 1), lambda: store.delete("clone"), store.collect,
            lambda: store.import_image(tmp_path / "disk", "new"),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(ReadOnlyError):
                call()


def test_nothing_is_founded_there(frozen):
    with pytest.raises(cowstore.StoreError, match=r"cannot make a store at .*Read-only"):
        cowstore.open(frozen / "new", create=True)


def test_commands_that_look(frozen, run, tmp_path):
    assert [one["name"] for one in facts(run("-s", str(frozen), "ls", "--json"))] == ["clone", "image"]
    for words in (["tree"], ["show", "clone"], ["du"], ["stats"], ["diff", "image", "clone"], ["backup", "copy"]):
        run("-s", str(frozen), *words)
    assert run("-s", str(frozen), "read", "clone", "--length", "3").stdout_bytes == b"own"
    run("-s", str(frozen), "export", "clone", "out.raw")


def test_commands_that_change(frozen, run):
    for words in (["rm", "clone"], ["create", "new", "1M"], ["gc"], ["write", "clone"], ["fork", "clone", "new"]):
        assert "read-only" in run("-s", str(frozen), *words, code=8, stdin=b"x").stderr
