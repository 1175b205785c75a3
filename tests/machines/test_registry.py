"""The registry, and what a manager makes of what an earlier one has left. No guest is needed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from cowstore.errors import ExistsError, InvalidError, MachineError, NotFoundError, StoreError
from cowstore.machines import Configuration
from cowstore.machines.hypervisor import Nic
from cowstore.machines.identity import Identity
from cowstore.machines.processes import boot_id, process_start
from cowstore.machines.registry import Machine, Registry

from .desk import Desk, desk


@pytest.fixture
def registry(socket_folder: Path) -> Iterator[Registry]:
    folder = socket_folder / os.urandom(4).hex()
    made = Registry(folder)
    yield made
    made.close()


def machine(name: str = "desk", **changes: object) -> Machine:
    one = Machine("", name, Configuration(64 << 20, ("disk",), extra=("-device", "virtio-rng-pci")), created=1.5)
    return replace(one, **changes)  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(registry):
    full = machine(
        parent="p", checkpoint="c", disposable=True, identity=Identity("h", "0" * 32, "g", "m"), generation="g",
        nic=Nic("e1000", 1, "m"), held=True, pid=1, started=2, address=3,
    )  # fmt: skip
    for one in (machine("plain"), full):
        added = registry.add(one)
        assert added.key
        assert Machine.read(added.write()) == added == registry.get(one.name)
        folder = registry.directory(added)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert Machine.read((folder / "machine.json").read_text()) == added
    assert [one.name for one in registry.all()] == ["desk", "plain"]


def test_names_are_there_once(registry):
    first = registry.add(machine())
    with pytest.raises(ExistsError, match="machine 'desk' exists already"):
        registry.add(machine())
    assert registry.get("desk") == first
    registry.remove(first)
    registry.remove(first)
    assert not registry.has("desk")
    second = registry.add(machine())
    assert second.key != first.key
    registry.remove(first)  # of the same name, and another machine
    assert registry.get("desk") == second
    with pytest.raises(NotFoundError):
        registry.change(first, pid=5)
    assert registry.get("desk").pid == 0


def test_a_machine_that_cannot_be_put_on_record_is_none(registry, monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "planted")))
    with pytest.raises(OSError, match="planted"):
        registry.add(machine())
    assert not registry.has("desk")


def test_a_record_that_cannot_be_replaced_stays(registry, monkeypatch):
    added = registry.add(machine())
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "planted")))
    with pytest.raises(OSError, match="planted"):
        registry.change(added, pid=5)
    assert registry.get("desk") == added


def test_a_record_is_changed_by_many_at_once(registry):
    added = registry.add(machine())
    with ThreadPoolExecutor(4) as pool:
        for work in [
            pool.submit(registry.change, added, **{field: 7}) for field in ("pid", "address", "started") * 50
        ]:
            work.result()
    found = registry.get("desk")
    assert (found.pid, found.address, found.started) == (7, 7, 7)
    assert Machine.read((registry.directory(added) / "machine.json").read_text()) == found


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "null", "{", "{}", '{"configuration": {}}', '{"configuration": 5, "identity": null}']
)
def test_a_record_that_makes_no_sense(text):
    with pytest.raises(ValueError, match=r"\S"):
        Machine.read(text)


def test_whether_a_process_lives(registry):
    with subprocess.Popen(["sleep", "1000"]) as child:
        started = process_start(child.pid)
        assert started > 0
        one = registry.add(machine())
        alive = registry.change(one, pid=child.pid, started=started, boot=boot_id())
        assert alive.is_alive
        assert not replace(alive, started=started - 1).is_alive, "the number was given to another one"
        assert not replace(alive, pid=0).is_alive
        assert not replace(alive, boot="another").is_alive
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not alive.is_alive, "one that is only not waited for yet has ended"
    assert process_start(child.pid) == -1
    assert not alive.is_alive


def test_a_process_that_ended_before_it_was_on_record():
    with subprocess.Popen(["true"]) as child:
        pass
    assert not machine(pid=child.pid, started=process_start(child.pid), boot=boot_id()).is_alive


def test_a_place_that_will_not_do(tmp_path, socket_folder):
    with pytest.raises(InvalidError, match="too long for sockets"):
        Registry(tmp_path / ("x" * 100))
    open_to_all = socket_folder / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(StoreError, match="is not private"):
        Registry(open_to_all)


# What an earlier manager has left.


@pytest.fixture
def place() -> Iterator[Desk]:
    with desk() as made:
        yield made


def test_what_was_half_made_is_removed(place):
    place.store.create("mine", 1 << 20).close()
    folder = place.folder / "m"
    (folder / "0000000a").mkdir()
    dead = machine("dead", key="0000000b", pid=2**22 + 1, started=1, disposable=True, checkpoint="gone")
    (folder / dead.key).mkdir()
    (folder / dead.key / "machine.json").write_text(dead.write())
    place.close()
    place.open()
    assert [path for path in folder.iterdir() if path.is_dir()] == []
    assert place.manager.machines() == []
    assert place.manager.idle
    assert [one.name for one in place.store.devices()] == ["mine"]


def test_a_record_of_another_version_is_left_alone(place):
    other = place.folder / "m" / "0000000c"
    other.mkdir()
    (other / "machine.json").write_text('{"version": 99}')
    place.close()
    place.open()
    assert (other / "machine.json").exists()
    assert place.manager.machines() == []


def test_there_is_one_manager_a_place(place):
    with pytest.raises(StoreError, match="in use"):
        Registry(place.folder / "m")


def test_nothing_is_added_beside_a_record_that_cannot_be_read(registry):
    """Nobody here knows which name and which disks that machine has."""
    left = registry.place / "0badf00d"
    left.mkdir()
    (left / "machine.json").write_text('{"version": "of tomorrow"}')
    assert list(registry.load()) == []
    assert registry.unread == [left]
    with pytest.raises(MachineError, match=r"0badf00d cannot be read") as refused:
        registry.add(machine())
    assert "remove that directory" in refused.value.hint
    assert left.exists()
