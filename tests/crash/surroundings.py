"""What surrounds a recorded store: the boot of its host, small limits, time and chance that a seed gives again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from cowstore import (
    backup,
    catalog,
    clones,
    collector,
    draft,
    founding,
    imports,
    index,
    reservations,
    sources,
)  # fmt: skip
from cowstore.layout import Identity
from cowstore.reservations import Reservations
from cowstore.segments import Segments

from .model import BLOCK
from .recording import replaced

FIRST_BOOT, LATER_BOOT, LAST_BOOT = b"A" * 16, b"B" * 16, b"C" * 16


class _Clock:
    """Time that passes only when it is asked for, so that short transactions end at the same place each time."""

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        self._now += 0.0007
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


class _Inline:
    """An executor that does the work at once, so that a seed always gives the same log."""

    def __init__(self, *_: object) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args))
        except BaseException as error:  # noqa: BLE001 - as an executor does
            future.set_exception(error)
        return future

    def shutdown(self) -> None: ...


@contextmanager
def booted(boot: bytes) -> Iterator[None]:
    """The host as it is between two boots."""
    with replaced((catalog, "boot_id", lambda: boot), (reservations, "boot_id", lambda: boot),
                  (index, "boot_id", lambda: boot)):  # fmt: skip
        yield


@contextmanager
def small(rng: random.Random, *, threads: bool = False) -> Iterator[None]:
    """Small limits, so that a small store meets everything that a large one does."""
    search = Reservations._search

    def forgetful(self: Reservations, *args: Any) -> list[int]:
        return [] if rng.random() < 0.03 else search(self, *args)

    limits: list[tuple[Any, str, Any]] = [
        (clones, "_DIRTY_LIMIT", 16), (draft, "CHANGED_LIMIT", 6), (imports, "_SLICE", 48),
        (sources, "PIECE", 16 * BLOCK), (reservations, "_FIRST_REFILL", 8), (reservations, "_LARGEST_REFILL", 64),
        (reservations, "_SEQUENCES", 6), (collector, "_PATIENCE", 0.01), (Reservations, "_search", forgetful),
    ]  # fmt: skip
    if not threads:
        limits += [
            (Segments, "_workers", lambda _: _Inline()), (imports, "ThreadPoolExecutor", _Inline),
            (collector, "time", _Clock()),
            (founding, "Identity", lambda _id, _seed: Identity(rng.randbytes(16), rng.getrandbits(64))),
            (backup, "Identity", lambda _id, seed: Identity(rng.randbytes(16), seed)),
        ]  # fmt: skip
    with replaced(*limits):
        yield
