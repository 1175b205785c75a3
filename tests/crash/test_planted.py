"""The crash test is known to be able to fail: each of these bugs, planted, is found by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cowstore import committer, slots
from cowstore.catalog import DeviceInfo
from cowstore.collector import Collector
from cowstore.committer import Committer, Flush
from cowstore.draft import Draft
from cowstore.errors import StoreError
from cowstore.layout import DATA, MAP_KINDS, SLOT_BITS
from cowstore.lineage import Lineage
from cowstore.segments import Segments

from .checking import BrokenPromiseError
from .driver import Driver
from .hunting import Workload, hunt
from .model import BLOCK
from .recording import RecordingDisk, RecordingFile, replaced
from .workloads import garbage

Change = tuple[Any, str, Any]  # an object, the name of an attribute, its other value

_sync, _write, _erase = Segments.sync, Segments.write, Segments.erase
_file_sync, _sync_directory = RecordingFile.sync, RecordingDisk.sync_directory


def no_sync_before_the_transaction() -> list[Change]:
    return [(Segments, "sync", lambda self, numbers: None)]


def map_segments_are_not_synced() -> list[Change]:
    def sync(self: Segments, numbers: Iterable[int]) -> None:
        _sync(self, [number for number in numbers if self.get(number).kind not in MAP_KINDS])

    return [(Segments, "sync", sync)]


def data_segments_are_not_synced() -> list[Change]:
    def sync(self: Segments, numbers: Iterable[int]) -> None:
        _sync(self, [number for number in numbers if self.get(number).kind != DATA])

    return [(Segments, "sync", sync)]


def sync_after_the_transaction() -> list[Change]:
    def commit_group(self: Committer, group: list[Flush]) -> None:
        with self._environment.write() as writer:
            self._publish(writer, group)
        self._segments.sync(sorted({first >> SLOT_BITS for flush in group for first, _ in flush.written}))
        for flush in group:
            flush.done = True

    return [(Committer, "_commit_group", commit_group)]


def nodes_are_written_after_the_transaction() -> list[Change]:
    commit_group, write = Committer._commit_group, Draft._write
    late: list[tuple[int, list[bytes], bytes]] = []

    def put_off(self: Segments, first: int, buffers: Sequence[Any], digests: bytes) -> None:
        late.append((first, [bytes(one) for one in buffers], digests))

    def write_late(self: Draft, *args: Any) -> None:
        with replaced((Segments, "write", put_off)):
            write(self, *args)

    def commit_then_write(self: Committer, group: list[Flush]) -> None:
        commit_group(self, group)
        while late:
            _write(self._segments, *late.pop())

    return [(Draft, "_write", write_late), (Committer, "_commit_group", commit_then_write)]


def new_segments_are_not_synced_in_their_directory() -> list[Change]:
    def sync_directory(self: RecordingDisk, path: Path) -> None:
        if path.name != "segments":
            _sync_directory(self, path)

    return [(RecordingDisk, "sync_directory", sync_directory)]


def headers_of_new_segments_are_not_synced() -> list[Change]:
    def sync(self: RecordingFile) -> None:
        if self.path.suffix != ".tmp":
            _file_sync(self)

    return [(RecordingFile, "sync", sync)]


def erased_before_doomed() -> list[Change]:
    doom = Collector._doom

    def erase_first(self: Collector, garbage: dict[int, slots.Mask]) -> int:
        for number, mask in garbage.items():
            runs = [((number << SLOT_BITS) + first, count) for first, count in slots.array_runs(mask)]
            self._segments.erase(runs, 0, 1)
        return doom(self, garbage)

    return [(Collector, "_doom", erase_first)]


def pins_are_not_waited_for() -> list[Change]:
    return [(Collector, "_wait_for_pins", lambda self: ())]


def hits_are_not_checked() -> list[Change]:
    return [(committer, "stale_hits", lambda writer, flush: np.empty(0, np.uint64))]


def freed_before_the_erasure_is_durable() -> list[Change]:
    def erase(self: Segments, *args: Any) -> None:
        syncs = iter((_sync,))  # the first, of the stamps

        def sync_once(segments: Segments, numbers: Iterable[int]) -> None:
            for sync in syncs:
                sync(segments, numbers)

        with replaced((Segments, "sync", sync_once)):
            _erase(self, *args)

    return [(Segments, "erase", erase)]


def many_clones_take_many_transactions() -> list[Change]:
    clone = Lineage.clone

    def one_by_one(self: Lineage, parent: str, names: Sequence[str], *, ephemeral: bool) -> list[DeviceInfo]:
        return [info for name in names for info in clone(self, parent, [name], ephemeral=ephemeral)]

    return [(Lineage, "clone", one_by_one)]


def small_files_are_not_synced() -> list[Change]:
    def sync(self: RecordingFile) -> None:
        if "store.json" not in self.path.name:
            _file_sync(self)

    return [(RecordingFile, "sync", sync)]


def beginning(d: Driver) -> None:
    """The first flushes of a store."""
    d.found()
    d.create("a", 50 * BLOCK)
    d.write("a", d.blocks(8), 7 * BLOCK)
    d.flush("a")
    d.write("a", d.blocks(2), 9 * BLOCK)
    d.fork("a", ["b", "c"])
    d.clone_many("a", ["d", "e", "f"])
    d.close_store()


def erasing(d: Driver) -> None:
    """Garbage that a clone has taken, collected; and freed slots, taken again."""
    d.found()
    d.import_image("image", d.content(40 * BLOCK))
    d.clone("image", "clone")
    garbage(d, "image", ["clone"])
    d.write("taker", d.blocks(9), 0)
    d.close_store()


BUGS: dict[Callable[[], list[Change]], Workload] = {
    no_sync_before_the_transaction: beginning,
    map_segments_are_not_synced: beginning,
    data_segments_are_not_synced: beginning,
    sync_after_the_transaction: beginning,
    nodes_are_written_after_the_transaction: beginning,
    new_segments_are_not_synced_in_their_directory: beginning,
    headers_of_new_segments_are_not_synced: beginning,
    many_clones_take_many_transactions: beginning,
    small_files_are_not_synced: beginning,
    erased_before_doomed: erasing,
    pins_are_not_waited_for: erasing,
    hits_are_not_checked: erasing,
    freed_before_the_erasure_is_durable: erasing,
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_planted_bug_is_found(arena, bug):
    """By a broken promise after a crash, or while the workload still runs."""
    with replaced(*bug()), pytest.raises((BrokenPromiseError, AssertionError, StoreError)) as caught:
        hunt(arena, BUGS[bug], 5, points=60, manners_each=2)
    print(caught.value)


@pytest.mark.parametrize("workload", [beginning, erasing])
def test_nothing_is_found_without_them(arena, workload):
    assert hunt(arena, workload, 5, points=20, manners_each=2) == 40
