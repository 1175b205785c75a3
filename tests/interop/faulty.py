"""`cowstore` with a planted fault: `python faulty.py FAULT WORDS...`, so that the tests are known to find such."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

from cowstore.clones import Clone
from cowstore_cli.main import main


def forgetful_flush(clone: Clone) -> None:
    """Says yes and does nothing."""


def failing_pwrite(clone: Clone, data: Any, offset: int) -> int:
    raise OSError(errno.EIO, "a planted fault")


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "forgetful": ("flush", forgetful_flush),
    "failing": ("pwrite", failing_pwrite),
}

if __name__ == "__main__":
    setattr(Clone, *FAULTS[sys.argv.pop(1)])
    main()
