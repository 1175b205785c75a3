"""A store for the tests of its parts, in memory where there is a place for files in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import cowstore

SHARED_MEMORY = "/dev/shm"


@pytest.fixture
def path() -> Iterator[Path]:
    """Where the test's store is."""
    place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="cowstore-", dir=place) as directory:
        yield Path(directory) / "store"


@pytest.fixture
def store(path: Path) -> Iterator[cowstore.Store]:
    """An empty store, open."""
    with cowstore.open(path, create=True) as store:
        yield store
