"""What the tests of other people's programs start from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CI

from .guest import Parts
from .kernel import UnfitError


@pytest.fixture(scope="session")
def guest_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A kernel, an initramfs and a disk for guests. Without a kernel the rule is that of missing programs."""
    try:
        return Parts.make(tmp_path_factory.mktemp("guest"))
    except UnfitError as error:
        reason = f"needs a kernel and a busybox for guests, see tools/fetch-guest.sh: {error}"
    if CI:
        pytest.fail(f"{reason}; and CI=true", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A place for a Unix socket: pytest's own folders can be too deep for one."""
    folder = tempfile.mkdtemp(prefix="cowstore-nbd-")
    try:
        yield Path(folder) / "nbd.sock"
    finally:
        shutil.rmtree(folder)
