"""What the tests of running machines start from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CI
from tests.interop.kernel import UnfitError

from .guestkit import Parts


@pytest.fixture(scope="session")
def machine_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """What guests boot from. Without a kernel or an agent the rule is that of missing programs."""
    try:
        return Parts.make(tmp_path_factory.mktemp("machine"))
    except UnfitError as error:
        reason = f"needs a kernel, a busybox and QEMU's agent for guests, see tools/fetch-guest.sh: {error}"
    if CI:
        pytest.fail(f"{reason}; and CI=true", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def socket_folder() -> Iterator[Path]:
    """A place for Unix sockets: pytest's own folders can be too deep for them."""
    folder = tempfile.mkdtemp(prefix="cowstore-vm-")
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)
