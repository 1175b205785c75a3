"""Which runs an export shares, with a call of our own in place of the kernel's: it copies and counts, or fails."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cowstore
from cowstore import BlockCorruptError, InvalidError, NoSpaceError, StoreError, exports
from cowstore.layout import FANOUT, SLOT_BITS, SLOT_MASK, SLOTS_OFFSET, SLOTS_PER_SEGMENT
from cowstore.segments import Segments
from tests.unit.stored import BLOCK, blocks, damage, ids_of, left_in

CLONE_RANGE = 0x4020940D
MIB = 1 << 20
LEAF = FANOUT * BLOCK


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Puts a call in the kernel's place that copies: (source offset, length, target offset) of each, in blocks."""
    made: list[tuple[int, int, int]] = []
    kernel = fcntl.ioctl

    def clone_range(fd: int, request: int, argument: bytes) -> None:
        if request != CLONE_RANGE:
            kernel(fd, request, argument)
            return
        source, offset, length, target = struct.unpack("=qQQQ", argument)
        assert os.pwrite(fd, os.pread(source, length, offset), target) == length
        made.append(((offset - SLOTS_OFFSET) // BLOCK, length // BLOCK, target // BLOCK))

    monkeypatch.setattr(fcntl, "ioctl", clone_range)
    return made


def refusing(monkeypatch: pytest.MonkeyPatch, code: int, *, after: int = 0) -> list[bytes]:
    """Has every call fail, after a number of calls that go through; what was asked for, as it is."""
    go_on, asked = fcntl.ioctl, []

    def fail(fd: int, request: int, argument: bytes) -> None:
        if request == CLONE_RANGE:
            asked.append(argument)
        if len(asked) > after:
            raise OSError(code, os.strerror(code))
        go_on(fd, request, argument)

    monkeypatch.setattr(fcntl, "ioctl", fail)
    return asked


# --------------------------------------------------------------------------------------------- which runs


MOST = 64  # runs of a leaf that are shared


@pytest.fixture
def fragmented(store: cowstore.Store) -> tuple[cowstore.Store, bytes]:
    """A clone of three leaves and a tail: cut into 64 runs, into 65, and whole with a hole at its end."""
    content = bytearray(blocks("image", 3 * FANOUT) + b"tail")
    store.import_image(io.BytesIO(content), "image")
    with store.clone("image", "clone") as clone:
        changed = [1 + 8 * at for at in range(MOST // 2)]
        changed[-1] = FANOUT - 1  # at the leaf's end, which leaves 64 runs
        for block in changed + [FANOUT + 1 + 8 * at for at in range(MOST // 2)]:
            content[block * BLOCK : (block + 1) * BLOCK] = blocks(block)
            clone.pwrite(blocks(block), block * BLOCK)
        clone.zero(10 * BLOCK, (3 * FANOUT - 10) * BLOCK)
        content[(3 * FANOUT - 10) * BLOCK : 3 * FANOUT * BLOCK] = bytes(10 * BLOCK)
    return store, bytes(content)


@pytest.mark.parametrize("verify", [True, False])
def test_a_run_is_one_call(store, calls, tmp_path, verify):
    content = blocks("image", 5000)
    store.import_image(io.BytesIO(content), "image")
    store.export("image", tmp_path / "out", verify=verify)
    assert [(count, target) for _, count, target in calls] == [(5000, 0)]
    assert (tmp_path / "out").read_bytes() == content


def test_slots_in_a_row_for_blocks_that_are_not(store, calls, tmp_path):
    content = blocks("one", FANOUT) + bytes(LEAF) + blocks("two", 2 * FANOUT)
    store.import_image(io.BytesIO(content), "image")
    store.export("image", tmp_path / "out")
    (first, _, _), (second, _, _) = calls
    assert calls == [(first, FANOUT, 0), (second, 2 * FANOUT, 2 * FANOUT)]
    assert second == first + FANOUT
    assert (tmp_path / "out").read_bytes() == content


def by_leaf(calls: list[tuple[int, int, int]]) -> list[int]:
    """How many calls were made for each leaf, and what was shared of it is nothing twice."""
    targets = [block for _, count, target in calls for block in range(target, target + count)]
    assert targets == sorted(set(targets))
    return np.bincount([target // FANOUT for _, _, target in calls], minlength=4).tolist()


def test_a_leaf_of_many_runs_is_copied_where_nobody_insists(fragmented, calls, tmp_path):
    store, content = fragmented
    store.export("clone", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
    assert by_leaf(calls) == [MOST, 0, 1, 0]
    assert sum(count for _, count, _ in calls) == FANOUT + FANOUT - 10


def test_every_run_is_shared_where_somebody_insists(fragmented, calls, tmp_path):
    """But for the tail."""
    store, content = fragmented
    store.export("clone", tmp_path / "out", reflink="always")
    assert (tmp_path / "out").read_bytes() == content
    assert by_leaf(calls) == [MOST, MOST + 1, 0, 0], "the last run of the second leaf goes on in the third"
    assert sum(count for _, count, _ in calls) == 3 * FANOUT - 10


def test_nothing_is_shared_where_nobody_wants_it(fragmented, calls, tmp_path):
    store, content = fragmented
    store.export("clone", tmp_path / "out", reflink="never")
    assert (tmp_path / "out").read_bytes() == content
    assert calls == []


def test_a_run_ends_with_its_segment():
    last = SLOTS_PER_SEGMENT - 600
    ids = np.arange(last, last + 3 * FANOUT, dtype=np.uint64)
    at_the_end = [(0, ids[:512]), (512, ids[512:600]), (600, ids[600:1024]), (1024, ids[1024:])]
    parts = [(number, int(part[0]), part) for number, part in at_the_end]
    joined = list(exports._joined(iter(parts)))
    assert [(number, first, len(run)) for number, first, run in joined] == [
        (0, last, 600), (600, 1 << SLOT_BITS, 3 * FANOUT - 600),
    ]  # fmt: skip
    assert not joined[1][1] & SLOT_MASK
    assert np.array_equal(np.concatenate([run for _, _, run in joined]), ids)


# ----------------------------------------------------------------------------------------------- verified


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many data blocks are read in each call, from now on."""
    counts: list[int] = []
    read = Segments.read

    def counting(self, ids, buffer):
        counts.append(len(ids))
        read(self, ids, buffer)

    monkeypatch.setattr(Segments, "read", counting)
    return counts


def test_blocks_are_verified_once(store, calls, tmp_path, monkeypatch):
    store.import_image(io.BytesIO(blocks("image", 1500)), "image")
    counts = reads(monkeypatch)
    for name in ("first", "second"):
        store.export("image", tmp_path / name)
        assert sum(counts) == 1500


def test_nothing_is_read_where_nobody_verifies(store, calls, tmp_path, monkeypatch):
    store.import_image(io.BytesIO(blocks("image", 1500)), "image")
    counts = reads(monkeypatch)
    store.export("image", tmp_path / "out", verify=False)
    assert counts == []
    assert (tmp_path / "out").read_bytes() == blocks("image", 1500)


def test_what_is_copied_is_verified_all_the_same(store, tmp_path, monkeypatch):
    content = blocks("image", 20)
    store.import_image(io.BytesIO(content), "image")
    refusing(monkeypatch, errno.EOPNOTSUPP)
    damage(store, ids_of(store, "image")[11])
    with pytest.raises(BlockCorruptError):
        store.export("image", tmp_path / "out", verify=False)
    assert left_in(tmp_path) == []


def test_slots_that_another_process_wrote_again_are_verified_anew(store, calls, tmp_path):
    """What this process knew of a slot says nothing of the block that is there now."""
    store.import_image(io.BytesIO(blocks("old", 50)), "old")
    store.export("old", tmp_path / "old")
    before = ids_of(store, "old")
    program = """
import io, random, sys, cowstore
with cowstore.open(sys.argv[1]) as store:
    store.delete("old")
    assert store.collect().freed
    store.import_image(io.BytesIO(random.Random(repr("new")).randbytes(50 * 4096)), "new")
    with store.device("new") as device:
        print(*device._tree.ids(0, 50).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program, store.path], check=True, capture_output=True)
    again = sorted({*before} & {*map(int, done.stdout.split())})
    damage(store, again[0])
    with pytest.raises(BlockCorruptError):
        store.export("new", tmp_path / "new")
    assert left_in(tmp_path) == ["old"]


# ------------------------------------------------------------------------------------------------ refusals

CANNOT = ["EXDEV", "EOPNOTSUPP", "ENOTTY", "ENOSYS", "EBADF", "EINVAL", "ETXTBSY", "EPERM", "EACCES"]
FULL = ["ENOSPC", "EDQUOT"]


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("name", CANNOT + FULL)
def test_auto_copies_what_cannot_be_shared(fragmented, calls, tmp_path, monkeypatch, name, after):
    """From the first call on, or in the middle."""
    store, content = fragmented
    refusing(monkeypatch, getattr(errno, name), after=after)
    store.export("clone", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == content
    assert len(calls) == after


def test_a_refusal_is_taken_for_an_answer(store, tmp_path, monkeypatch):
    """Where nothing can be shared, the call is not tried for every run."""
    content = (blocks("image", 100) + bytes(LEAF)) * 20
    store.import_image(io.BytesIO(content), "image")
    asked = refusing(monkeypatch, errno.EOPNOTSUPP)
    store.export("image", tmp_path / "out")
    assert 1 <= len(asked) <= 3
    assert (tmp_path / "out").read_bytes() == content


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("name", CANNOT)
def test_always_fails_where_it_cannot(fragmented, calls, tmp_path, monkeypatch, name, after):
    store, _ = fragmented
    code = getattr(errno, name)
    refusing(monkeypatch, code, after=after)
    with pytest.raises(StoreError, match=f"cannot share blocks with .*out: {os.strerror(code)}") as refused:
        store.export("clone", tmp_path / "out", reflink="always")
    assert refused.value.hint
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_a_full_disk(fragmented, calls, tmp_path, monkeypatch, name):
    store, _ = fragmented
    refusing(monkeypatch, getattr(errno, name), after=2)
    with pytest.raises(NoSpaceError) as refused:
        store.export("clone", tmp_path / "out", reflink="always")
    assert refused.value.path == str(tmp_path / "out")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("reflink", ["auto", "always"])
def test_a_failing_disk_is_no_reason_to_copy(fragmented, calls, tmp_path, monkeypatch, reflink):
    store, _ = fragmented
    refusing(monkeypatch, errno.EIO, after=2)
    with pytest.raises(StoreError, match=r"cannot write .*out: Input/output error"):
        store.export("clone", tmp_path / "out", reflink=reflink)
    assert left_in(tmp_path) == []


def test_only_raw_files_share(tmp_path):
    """What another program writes, in a format of its own, has no slots in it."""
    job = exports.Export(tmp_path / "out", overwrite=False, reflink="always", verify=True)
    with pytest.raises(InvalidError, match="only a raw file"):
        job.write_by(Path.touch)
    assert left_in(tmp_path) == []


def test_another_mode(store, tmp_path):
    store.create("clone", MIB).close()
    with pytest.raises(InvalidError, match="reflink cannot be 'sometimes'") as refused:
        store.export("clone", tmp_path / "out", reflink="sometimes")
    assert refused.value.hint


# ----------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("option", "tried", "code"),
    [("", True, 0), ("--reflink", True, 1), ("--reflink=always", True, 1), ("--reflink=auto", True, 0),
     ("--reflink=never", False, 0)],
)  # fmt: skip
def test_command_shares_as_it_is_told_to(run, stocked, monkeypatch, option, tried, code):
    """The word behind a bare `--reflink` is the device, wherever the option stands."""
    asked = refusing(monkeypatch, errno.EOPNOTSUPP)
    for words in (["export", option, "debian", "one.raw"], ["export", "debian", "two.raw", option]):
        run(*filter(None, words), code=code)
        assert bool(asked) == tried
        asked.clear()
    for path in (Path("one.raw"), Path("two.raw")):
        assert path.exists() == (code == 0)
        assert code or path.read_bytes() == Path("disk.raw").read_bytes()


def test_command_knows_three_ways(run, stocked):
    run("export", "--reflink=sometimes", "debian", "out.raw", code=2)


def test_command_reads_when_it_is_not_told_otherwise(run, stocked, calls, monkeypatch):
    counts = reads(monkeypatch)
    run("export", "--reflink", "--no-verify", "debian", "unread.raw")
    assert counts == [1], "the tail, which is copied"
    run("export", "--reflink", "debian", "read.raw")
    assert len(counts) > 2
    assert Path("unread.raw").read_bytes() == Path("read.raw").read_bytes() == Path("disk.raw").read_bytes()


def test_command_says_where_nothing_can_be_shared(run, stocked, monkeypatch):
    refusing(monkeypatch, errno.EOPNOTSUPP)
    result = run("export", "--reflink", "debian", "out.raw", code=1)
    assert result.stderr.startswith("cowstore: cannot share blocks with out.raw: Operation not supported (")
    assert not Path("out.raw").exists()
    assert "standard output" in run("export", "--reflink", "debian", "-", code=2).stderr
    assert run("export", "debian", "-").stdout_bytes == Path("disk.raw").read_bytes()


def test_command_takes_a_file_of_that_name(run, stocked, monkeypatch):
    refusing(monkeypatch, errno.EOPNOTSUPP)
    run("export", "debian", "--", "--reflink")
    assert Path("--reflink").read_bytes() == Path("disk.raw").read_bytes()
