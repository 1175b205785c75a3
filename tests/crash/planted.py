"""`cowstore` with a planted fault: `python planted.py FAULT WORDS...`. Each is one that a server might have."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

from cowstore.clones import Clone
from cowstore.nbd.flusher import Flusher, Told
from cowstore.nbd.requests import Request
from cowstore.nbd.transmission import Transmission
from cowstore_cli.main import main

BLOCK = 4096
_ask, _succeed = Flusher.ask, Transmission._succeed
_flush, _read, _write = Transmission._flush, Transmission._read, Transmission._write
_pwrite, _zero, _flush_clone, _close = Clone.pwrite, Clone.zero, Clone.flush, Clone.close
_numbers = itertools.count(1)


def _every(count: int) -> bool:
    return next(_numbers) % count == 0


def _change(owner: type, **methods: Callable[..., Any]) -> None:
    for name, method in methods.items():
        setattr(owner, name, method)


def _flush_slowly(clone: Clone) -> None:
    """As a disk does that is not memory."""
    time.sleep(0.01)
    _flush_clone(clone)


def flushes_are_answered_at_once() -> None:
    """And done afterwards."""

    def ask(self: Flusher, told: Told) -> None:
        told(None)
        _ask(self, lambda failure: None)

    _change(Flusher, ask=ask)
    _change(Clone, flush=_flush_slowly)


def fua_is_ignored() -> None:
    def succeed(self: Transmission, request: Request) -> None:
        _succeed(self, request._replace(flags=0))

    _change(Transmission, _succeed=succeed)


def every_other_flush_does_nothing() -> None:
    def flush(self: Clone) -> None:
        if _every(2):
            _flush_clone(self)

    _change(Clone, flush=flush)


def writes_are_dropped() -> None:
    def pwrite(self: Clone, data: Any, offset: int) -> int:
        return len(data) if _every(50) else _pwrite(self, data, offset)

    _change(Clone, pwrite=pwrite)


def writes_are_torn() -> None:
    def pwrite(self: Clone, data: Any, offset: int) -> int:
        _pwrite(self, data[: len(data) - 512] if _every(200) else data, offset)
        return len(data)

    _change(Clone, pwrite=pwrite)


def writes_go_elsewhere() -> None:
    def pwrite(self: Clone, data: Any, offset: int) -> int:
        return _pwrite(self, data, offset - BLOCK if _every(200) and offset >= BLOCK else offset)

    _change(Clone, pwrite=pwrite)


def trims_are_dropped() -> None:
    def zero(self: Clone, length: int, offset: int) -> None:
        if not _every(20):
            _zero(self, length, offset)

    _change(Clone, zero=zero)


def some_writes_wait_for_a_flush() -> None:
    """Readers see them, and a flush takes them along; but later writes with FUA overtake them."""
    aside: dict[Any, dict[int, bytes]] = {}

    def take(disk: Any, start: int = 0, end: int = 1 << 63) -> None:
        """Does those that lie between two offsets, on time for what comes next."""
        waiting = aside.get(disk, {})
        for offset, data in list(waiting.items()):
            if offset < end and start < offset + len(data):
                _pwrite(disk, waiting.pop(offset), offset)

    def read(self: Transmission, request: Request) -> None:
        take(self._disk, request.offset, request.offset + request.length)
        _read(self, request)

    def flush(self: Transmission, request: Request) -> None:
        take(self._disk)
        _flush(self, request)

    def write(self: Transmission, request: Request) -> None:
        take(self._disk, request.offset, request.offset + request.length)
        if request.flags or not _every(5):
            _write(self, request)
        else:
            aside.setdefault(self._disk, {})[request.offset] = bytes(request.payload)
            self._succeed(request)

    def zero(self: Clone, length: int, offset: int) -> None:
        take(self, offset, offset + length)
        _zero(self, length, offset)

    def close(self: Clone) -> None:
        take(self)
        _close(self)

    _change(Transmission, _read=read, _flush=flush, _write=write)
    _change(Clone, zero=zero, close=close, flush=_flush_slowly)


def nothing_is_recorded() -> None:
    """What every fault here goes with: a journal would save what it loses."""
    _change(Clone, keep_journal=lambda clone: None)


FAULTS: tuple[Callable[[], None], ...] = (
    flushes_are_answered_at_once,
    fua_is_ignored,
    every_other_flush_does_nothing,
    writes_are_dropped,
    writes_are_torn,
    writes_go_elsewhere,
    trims_are_dropped,
    some_writes_wait_for_a_flush,
)

if __name__ == "__main__":
    nothing_is_recorded()
    {fault.__name__: fault for fault in (*FAULTS, nothing_is_recorded)}[sys.argv.pop(1)]()
    main()
