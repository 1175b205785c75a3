"""A store for the tests of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import cowstore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the test's store is."""
    return tmp_path / "store"


@pytest.fixture
def store(path: Path) -> Iterator[cowstore.Store]:
    """An empty store, open."""
    with cowstore.open(path, create=True) as store:
        yield store
