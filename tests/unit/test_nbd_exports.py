"""Exports: each device is opened for its first client and released after its last, whoever comes meanwhile."""

from __future__ import annotations

import random
import threading

import pytest

from cowstore.errors import ClosedError, InUseError, InvalidError, NotFoundError, PoisonedError
from cowstore.nbd.exports import Exports
from tests.unit.nbd_memory import MemoryDevices, MemoryDisk


@pytest.fixture
def devices() -> MemoryDevices:
    return MemoryDevices({"base": bytes(100)}, {"desk": bytes(200), "other": bytes(300)})


def test_clients_share_one_handle_until_the_last_has_gone(devices):
    exports = Exports(devices)
    first, second = exports.acquire("desk"), exports.acquire("desk")
    assert first is second
    exports.release(first)
    assert devices.open_names == ["desk"]
    exports.release(second)
    assert devices.open_names == []
    assert [name for name, _ in devices.opened] == ["desk"]


def test_next_client_opens_it_anew(devices):
    exports = Exports(devices)
    for _ in range(3):
        exports.release(exports.acquire("desk"))
    assert len(devices.opened) == 3
    assert exports.open_count() == 0


def test_devices_are_open_apart(devices):
    exports = Exports(devices)
    one, other = exports.acquire("desk"), exports.acquire("base")
    assert (one.writable, other.writable) == (True, False)
    assert exports.open_count() == 2
    exports.release(one)
    assert devices.open_names == ["base"]
    exports.release(other)


def test_device_that_got_another_name_is_the_same(devices):
    exports = Exports(devices)
    first = exports.acquire("desk")
    devices.described["renamed"] = devices.described.pop("desk")
    second = exports.acquire("renamed")
    assert first is second
    with pytest.raises(NotFoundError):
        exports.acquire("desk")
    exports.release(first)
    exports.release(second)


def test_name_that_is_given_to_another_device_at_this_moment(devices, monkeypatch):
    """Between looking and opening: the other one is closed, and it is looked at once more."""
    exports, opening, turns = Exports(devices), devices.device, iter(["other", "desk"])
    monkeypatch.setattr(devices, "device", lambda name: opening(next(turns)))
    export = exports.acquire("desk")
    assert export.disk.info.number == devices.info("desk").number
    assert devices.open_names == ["desk"]
    exports.release(export)


def test_name_that_is_given_to_another_device_all_the_time(devices, monkeypatch):
    exports, opening = Exports(devices), devices.device
    monkeypatch.setattr(devices, "device", lambda name: opening("other"))
    with pytest.raises(InUseError, match="desk"):
        exports.acquire("desk")
    assert devices.open_names == []
    assert exports.open_count() == 0


def test_opening_that_fails_leaves_nothing_behind(devices):
    exports = Exports(devices)
    devices.failures["desk"] = InUseError("clone 'desk'", 4711)
    with pytest.raises(InUseError):
        exports.acquire("desk")
    assert exports.open_count() == 0
    del devices.failures["desk"]
    exports.release(exports.acquire("desk"))
    assert devices.open_names == []


@pytest.mark.parametrize("failure", [PoisonedError("fsync said EIO"), OSError(5, "Input/output error")])
def test_closing_that_fails_is_logged_and_the_next_client_can_come(devices, caplog, failure):
    exports = Exports(devices)
    devices.prepare = lambda disk: disk.failures.update(close=failure)
    exports.release(exports.acquire("desk"))
    assert "keeps its journal" in caplog.text
    devices.prepare = lambda disk: None
    exports.release(exports.acquire("desk"))
    assert exports.open_count() == 0


def test_store_that_was_closed_first_is_no_failure(devices, caplog):
    exports = Exports(devices)
    devices.prepare = lambda disk: disk.failures.update(close=ClosedError("closed"))
    exports.release(exports.acquire("desk"))
    assert not caplog.records


@pytest.mark.parametrize("name", ["gone", "", "desk\0"])
def test_name_that_is_not_there(devices, name):
    for call in (Exports(devices).describe, Exports(devices).acquire):
        with pytest.raises(NotFoundError):
            call(name)


def test_name_that_can_be_none_is_not_there(devices, monkeypatch):
    def refuse(name: str) -> None:
        raise InvalidError(f"{name!r} is not a name")

    monkeypatch.setattr(devices, "info", refuse)
    with pytest.raises(NotFoundError):
        Exports(devices).describe("../desk")


def test_only_what_is_named_is_offered(devices):
    exports = Exports(devices, ["desk", "base"])
    assert exports.names() == ["base", "desk"]
    with pytest.raises(NotFoundError):
        exports.acquire("other")
    with pytest.raises(NotFoundError):
        exports.describe("")


def test_only_name_is_the_default(devices):
    assert Exports(devices, ["other"]).describe("").name == "other"


def test_closing_everything_closes_what_clients_have(devices):
    exports = Exports(devices)
    held = exports.acquire("desk")
    exports.close()
    assert devices.open_names == []
    exports.release(held)
    assert exports.open_count() == 0


def test_disk_is_flushed_before_it_is_closed(devices):
    exports = Exports(devices)
    export = exports.acquire("desk")
    disk: MemoryDisk = export.disk
    assert export.flusher is not None
    disk.may_flush.clear()
    told = threading.Event()
    export.flusher.ask(lambda failure: told.set())
    assert disk.flushing.wait(60)
    threading.Timer(0.1, disk.may_flush.set).start()
    exports.release(export)
    assert told.is_set()
    assert [call[0] for call in disk.calls] == ["keep_journal", "flush", "close"]


def test_many_come_and_go_and_no_device_is_ever_open_twice(devices):
    exports, wrong = Exports(devices), []

    def alone(disk: MemoryDisk) -> None:
        names = devices.open_names
        if len(names) != len(set(names)):
            wrong.append(names)

    devices.prepare = alone

    def come_and_go(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(200):
            export = exports.acquire(dice.choice(["desk", "base", "other"]))
            if not export.disk.open_now:
                wrong.append(["closed"])
            exports.release(export)

    threads = [threading.Thread(target=come_and_go, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert exports.open_count() == 0
    assert devices.open_names == []
