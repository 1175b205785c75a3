"""Where worlds are made: in memory where there is room. Each is a whole store, and real syncs prove nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = Path("/dev/shm")
_ROOM = 2 << 30  # bytes


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Path]:
    """An empty directory."""
    if not _MEMORY.is_dir() or shutil.disk_usage(_MEMORY).free < _ROOM:
        yield tmp_path
        return
    place = Path(tempfile.mkdtemp(prefix="cowstore-crash-", dir=_MEMORY))
    try:
        yield place
    finally:
        shutil.rmtree(place)
