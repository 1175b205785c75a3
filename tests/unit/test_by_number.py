"""Devices by their numbers, which no renaming changes and nobody gets twice."""

from __future__ import annotations

import pytest

import cowstore
from cowstore import nbd

from .memories import Memory, take

SIZE = 1 << 20


@pytest.fixture
def store(tmp_path):
    with cowstore.open(tmp_path / "s", create=True) as store:
        with store.create("desk", SIZE) as desk:
            desk.pwrite(b"desk", 0)
        yield store


def test_a_device_goes_by_its_number_whatever_it_is_called(store):
    number = store.info("desk").number
    store.rename("desk", "mine")
    store.create("desk", SIZE).close()
    assert store.info(f"#{number}").name == "mine"
    with store.device(f"#{number}") as device:
        assert device.pread(4, 0) == b"desk"
    assert [one.name for one in store.fork(f"#{number}", "child")] == ["child"]
    store.delete(f"#{number}")
    assert [one.name for one in store.devices()] == ["child", "desk"]
    with pytest.raises(cowstore.NotFoundError):
        store.info(f"#{number}")


@pytest.mark.parametrize("name", ["#", "#x", "#-1", "# 1", "#1.", "##1", "#" + "9" * 19])
def test_what_is_no_number_is_no_name_either(store, name):
    with pytest.raises(cowstore.InvalidError, match="is not a name"):
        store.info(name)


def test_no_device_can_be_called_by_a_number(store):
    with pytest.raises(cowstore.InvalidError, match="is not a name"):
        store.create("#1", SIZE)
    with pytest.raises(cowstore.InvalidError, match="is not a name"):
        store.rename("desk", "#1")


def test_the_images_of_a_checkpoint_are_nobodys_to_delete(store):
    moment = take(store, "moment", Memory({0: b"m" * 4096}))
    for number in moment.images:
        with pytest.raises(cowstore.NotFoundError):
            store.delete(f"#{number}")


def test_an_export_goes_by_a_number_too(store):
    number = store.info("desk").number
    exports = nbd.Exports(store)
    export = exports.acquire(f"#{number}")
    store.rename("desk", "mine")
    again = exports.acquire(f"#{number}")
    assert again is export
    exports.release(export)
    exports.release(again)
