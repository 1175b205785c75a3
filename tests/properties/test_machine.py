"""The public surface against plain bytearrays: with whole digests, and with eight of them for all blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.properties.machine import CollidingMachine, Machine
from tests.properties.neighbour import Neighbour


@pytest.fixture(scope="module")
def neighbour() -> Iterator[Neighbour]:
    neighbour = Neighbour()
    yield neighbour
    neighbour.die()


@pytest.mark.parametrize("machine", [Machine, CollidingMachine])
def test_store_does_what_bytearrays_do(neighbour, machine):
    machine.neighbour = neighbour
    run_state_machine_as_test(machine, settings=settings())
