"""Pages: what counts as a process's own, and whether what is read of it is what it has."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowstore.errors import MachineError
from cowstore.machines import pages
from cowstore.machines import template as template_module
from cowstore.machines.pages import PAGE_SIZE, Capture, own, own_pages, read_process, runs
from cowstore.machines.template import Template

from .children import Child, in_child, opened, standing

PRESENT, SWAPPED, FILE, SOFT_DIRTY, EXCLUSIVE = 1 << 63, 1 << 62, 1 << 61, 1 << 55, 1 << 56
NOBODY = 65534
NO_RESERVE, MAP_FIXED = 0x4000, 0x10  # of mmap(2)


def page(seed: object) -> bytes:
    return random.Random(repr(seed)).randbytes(PAGE_SIZE)


def sealed(count: int, name: str = "template") -> Template:
    """A template of so many pages, each with its own content."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"".join(page(number) for number in range(count)))
    return Template.seal(fd, count * PAGE_SIZE)


def put(memory: mmap.mmap, number: int, data: bytes) -> None:
    memory[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] = data


def taken(capture: Capture) -> dict[int, bytes]:
    """What a capture hands out, by page."""
    found, end = {}, 0
    for offset, piece in capture.pieces():
        assert offset >= end, "in order, and nothing twice"
        assert offset % PAGE_SIZE == len(piece) % PAGE_SIZE == 0
        end = offset + len(piece)
        for start in range(0, len(piece), PAGE_SIZE):
            found[(offset + start) // PAGE_SIZE] = bytes(piece[start : start + PAGE_SIZE])
    return found


# What counts as own.


@pytest.mark.parametrize(
    ("entry", "mine"),
    [
        (0, False),
        (PRESENT, True),
        (PRESENT | FILE, False),
        # The trap: a page that was written and then swapped out is own. Who asks for "present and not of a file"
        # takes the parent's bytes instead, and nothing tells.
        (SWAPPED, True),
        (SWAPPED | FILE, False),
        (SOFT_DIRTY, False),
        (PRESENT | SOFT_DIRTY | EXCLUSIVE | 0x1234, True),
        (PRESENT | FILE | SOFT_DIRTY | EXCLUSIVE | 0x1234, False),
        (SWAPPED | SOFT_DIRTY | 0x3FF << 5, True),
    ],
)
def test_an_entry_of_the_page_map(entry, mine):
    assert own(np.array([entry, 0, entry], np.uint64)).tolist() == [mine, False, mine]


@given(st.sets(st.integers(0, 60)))
def test_runs_are_the_numbers_and_as_long_as_can_be(numbers):
    found = runs(np.array(sorted(numbers), np.int64))
    assert [number for first, count in found for number in range(first, first + count)] == sorted(numbers)
    assert all(first + count < after for (first, count), (after, _) in pairwise(found))
    assert all(count for _, count in found)


@pytest.fixture
def template() -> Iterator[Template]:
    made = sealed(64)
    yield made
    made.close()


def test_written_pages_are_own_and_read_ones_are_not(template):
    def work() -> Iterator[int]:
        ours = template.map()
        assert all(ours[number * PAGE_SIZE] == page(number)[0] for number in range(64))  # all are read ...
        ours[5 * PAGE_SIZE + 7] ^= 1
        put(ours, 63, page(63))  # ... and this one gets what it had
        yield pages.address_of(ours)

    with standing(work) as child:
        assert own_pages(child.pid, child.said, template.size).tolist() == [5, 63]


def test_pages_of_a_shared_mapping_are_nobodys_own():
    shared = mmap.mmap(-1, 8 * PAGE_SIZE)

    def work() -> Iterator[int]:
        put(shared, 3, page(3))
        yield pages.address_of(shared)

    with standing(work) as child:
        assert shared[3 * PAGE_SIZE : 4 * PAGE_SIZE] == page(3), "it did write"
        assert own_pages(child.pid, child.said, len(shared)).tolist() == []


def test_the_page_map_is_read_in_parts(template, monkeypatch):
    monkeypatch.setattr(pages, "_ENTRIES_AT_ONCE", 7)
    ours = template.map()
    wanted = [0, 6, 7, 13, 14, 62, 63]
    for number in wanted:
        put(ours, number, page("own"))
    assert own_pages(os.getpid(), pages.address_of(ours), template.size).tolist() == wanted


@contextmanager
def swap(file: Path) -> Iterator[None]:
    """A little swap, in a file; skips where the host does not let it be had."""
    with file.open("wb") as out:
        out.write(bytes(16 << 20))
        os.fsync(out.fileno())
    file.chmod(0o600)
    subprocess.run(["mkswap", file], check=True, capture_output=True)
    done = subprocess.run(["swapon", file], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"swap cannot be had here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["swapoff", file], check=True)


@pytest.mark.root
@pytest.mark.program("mkswap", "swapon", "swapoff")
def test_a_page_that_was_written_and_swapped_out_is_own(template, tmp_path):
    page_out = 21  # MADV_PAGEOUT, which Python has no name for yet

    def work() -> Iterator[int]:
        ours = template.map()
        put(ours, 7, page("seven"))
        put(ours, 8, page("eight"))
        ours.madvise(page_out)
        assert ours[9 * PAGE_SIZE] == page(9)[0]
        yield pages.address_of(ours)

    with swap(tmp_path / "swap"), standing(work) as child:
        with open(f"/proc/{child.pid}/pagemap", "rb") as file:
            file.seek((child.said // PAGE_SIZE + 7) * 8)
            entries = np.frombuffer(file.read(24), np.uint64)
        if not (entries[:2] & np.uint64(SWAPPED)).all():
            pytest.skip("the kernel does not swap out on request here")
        naive = (entries & np.uint64(PRESENT) != 0) & (entries & np.uint64(FILE) == 0)
        assert not naive.any(), "what is present and not of a file is not all that is own"
        capture = Capture("swapped", child.pid, child.said, template.size)
        capture.take()
        assert taken(capture) == {7: page("seven"), 8: page("eight")}
        capture.close()


# Reading.


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=30), st.integers(1, 9), st.integers(1, 50)
)
def test_batches_are_the_ranges_and_within_both_limits(gaps, most, room):
    ranges, at = [], 0
    for gap, count in gaps:
        ranges.append((at + gap, count))
        at += gap + count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "_AT_ONCE", most)
        patch.setattr(pages, "_PAGES_AT_ONCE", room)
        batches = list(pages._batches(ranges))
    numbers = [n for first, count in ranges for n in range(first, first + count)]
    assert [n for batch in batches for first, count in batch for n in range(first, first + count)] == numbers
    assert all(len(batch) <= most and sum(count for _, count in batch) <= room for batch in batches)


def test_more_than_a_call_reads_in_one_run():
    """The kernel stops a call short of 2 GiB without an error; a machine's memory is often one such run."""
    size, piece = (2 << 30) + PAGE_SIZE, 32 << 20
    kind, access = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    source, target = mmap.mmap(-1, size, kind, access), mmap.mmap(-1, size, kind, access)
    source[size - 4 :] = b"last"  # what is in front was never touched, and takes no memory
    start = pages.address_of(target)
    fd = os.memfd_create("folded")  # nor does the target: it is the same few pages again and again
    os.ftruncate(fd, piece)
    for offset in range(0, size, piece):
        length = min(piece, size - offset)
        place = template_module._libc.mmap(start + offset, length, access, mmap.MAP_SHARED | MAP_FIXED, fd, 0)
        assert place == start + offset
    os.close(fd)
    read_process(os.getpid(), pages.address_of(source), [(0, size // PAGE_SIZE)], start)
    assert target[size - 4 :] == b"last"


def test_more_runs_than_a_call_takes():
    count = 6000
    content = b"".join(number.to_bytes(8, "little") * 512 for number in range(count))

    def work() -> Iterator[int]:
        ours = mmap.mmap(-1, len(content), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        for number in range(1, count, 2):
            put(ours, number, content[number * PAGE_SIZE : (number + 1) * PAGE_SIZE])
        yield pages.address_of(ours)

    with standing(work) as child:
        capture = Capture("many", child.pid, child.said, len(content))
        assert capture.prepare() == count // 2
        assert len(runs(capture.pages)) > 2 * 1024
        capture.take()
        found = taken(capture)
        capture.close()
    assert found == {n: content[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] for n in range(1, count, 2)}


# Capture.


def test_what_changes_between_the_two_steps(template):
    def work() -> Iterator[int]:
        ours = template.map()
        for number in (1, 2, 3, 40):
            put(ours, number, page(("before", number)))
        yield pages.address_of(ours)
        put(ours, 2, page(("after", 2)))  # changes
        put(ours, 50, page(("after", 50)))  # comes
        ours.madvise(mmap.MADV_DONTNEED, 40 * PAGE_SIZE, PAGE_SIZE)  # goes: the template's again
        yield 0

    with standing(work) as child:
        capture = Capture("changing", child.pid, child.said, template.size)
        assert capture.prepare() == 4
        child.go_on()
        capture.take()
        wanted = {1: page(("before", 1)), 2: page(("after", 2)), 3: page(("before", 3)), 50: page(("after", 50))}
        assert taken(capture) == wanted
        assert capture.pages.tolist() == sorted(wanted)
        file = os.pread(capture.fd, template.size + 1, 0)
        capture.close()
    blank = bytes(PAGE_SIZE)
    assert file == b"".join(wanted.get(number, blank) for number in range(64)), "and nothing of what has gone"


def test_it_takes_the_stopped_process_without_being_prepared(template):
    def work() -> Iterator[int]:
        ours = template.map()
        put(ours, 9, page("nine"))
        yield pages.address_of(ours)

    with standing(work) as child:
        capture = Capture("at once", child.pid, child.said, template.size)
        capture.take()
        assert taken(capture) == {9: page("nine")}
        capture.close()


def test_pieces_are_a_mebibyte_at_most():
    size = (1 << 20) * 2 + PAGE_SIZE
    content = np.arange(size // 8, dtype=np.uint64).tobytes()
    ours = mmap.mmap(-1, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    ours[:] = content
    capture = Capture("long", os.getpid(), pages.address_of(ours), size)
    capture.take()
    assert [(offset, len(piece)) for offset, piece in capture.pieces()] == [
        (0, 1 << 20), (1 << 20, 1 << 20), (2 << 20, PAGE_SIZE),
    ]  # fmt: skip
    assert b"".join(bytes(piece) for _, piece in capture.pieces()) == content
    capture.close()


def test_a_capture_becomes_a_template(template):
    def work() -> Iterator[int]:
        ours = template.map()
        put(ours, 9, page("nine"))
        yield pages.address_of(ours)

    with standing(work) as child:
        capture = Capture("child", child.pid, child.said, template.size)
        capture.take()
        made = Template.seal(capture.detach(), template.size)
    assert made.map()[9 * PAGE_SIZE : 10 * PAGE_SIZE] == page("nine")
    capture.close()
    assert os.fstat(made.fd).st_size == template.size, "closing the capture leaves the file to who has it now"
    made.close()


def stopped(template: Template) -> Iterator[int]:
    ours = template.map()
    put(ours, 0, page("mine"))
    yield pages.address_of(ours)


@pytest.mark.parametrize("waited_for", [False, True])
@pytest.mark.parametrize("step", ["prepare", "take"])
def test_a_process_that_is_dead(template, step, waited_for):
    before = opened()
    child: Child
    with standing(lambda: stopped(template)) as child:
        capture = Capture("gone", child.pid, child.said, template.size)
        if not waited_for:
            child.kill()
            with pytest.raises(MachineError, match=r"cannot be read|cut off"):
                getattr(capture, step)()
    if waited_for:
        with pytest.raises(MachineError, match="cannot be read"):
            getattr(capture, step)()
    capture.close()
    capture.close()
    assert opened() == before


def test_a_process_that_dies_between_the_page_map_and_the_pages(template):
    with standing(lambda: stopped(template)) as child:
        numbers = own_pages(child.pid, child.said, template.size)
        child.kill()
        target = mmap.mmap(-1, template.size)
        with pytest.raises(MachineError, match="No such process"):
            read_process(child.pid, child.said, runs(numbers), pages.address_of(target))


def test_pages_that_are_not_there_at_the_end():
    """The kernel reads what it can, and calls that no error."""
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    source, target = mmap.mmap(-1, 5 * PAGE_SIZE, kind, access), mmap.mmap(-1, 5 * PAGE_SIZE)
    start = pages.address_of(source)
    guard = template_module._libc.mmap(start + 4 * PAGE_SIZE, PAGE_SIZE, 0, kind | MAP_FIXED, -1, 0)
    assert guard == start + 4 * PAGE_SIZE
    with pytest.raises(MachineError, match=f"only {4 * PAGE_SIZE} of {5 * PAGE_SIZE} bytes of process"):
        read_process(os.getpid(), start, [(0, 4), (4, 1)], pages.address_of(target))
    with pytest.raises(MachineError, match="Bad address"):
        read_process(os.getpid(), start, [(4, 1)], pages.address_of(target))


@pytest.mark.root
def test_a_process_of_somebody_else(template):
    ours = template.map()
    put(ours, 1, page(1))
    pid, start = os.getpid(), pages.address_of(ours)

    def others() -> None:
        before = opened()
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        target = mmap.mmap(-1, template.size)
        with pytest.raises(MachineError, match="cannot be read") as refused:
            own_pages(pid, start, template.size)
        assert "CAP_SYS_PTRACE" in refused.value.hint
        with pytest.raises(MachineError, match="cannot be read"):
            read_process(pid, start, [(1, 1)], pages.address_of(target))
        capture = Capture("not mine", pid, start, template.size)
        with pytest.raises(MachineError):
            capture.take()
        capture.close()
        with suppress(PermissionError):  # its own descriptors are root's from before
            assert opened() == before

    in_child(others)


def test_a_capture_that_cannot_be_made_leaves_nothing():
    before = opened()
    with pytest.raises(ValueError, match="cannot mmap an empty file"):
        Capture("empty", os.getpid(), 0, 0)
    assert opened() == before


def test_what_fails_on_the_way_is_what_is_raised(template):
    """The exception's frames have pieces; closing the capture must neither hide it nor keep a descriptor."""
    before = opened()

    def consume(capture: Capture) -> None:
        for _, piece in capture.pieces():
            raise RuntimeError(f"no place for {len(piece)} bytes")

    def whole() -> None:
        with standing(lambda: stopped(template)) as child:
            capture = Capture("child", child.pid, child.said, template.size)
            try:
                capture.take()
                consume(capture)
            finally:
                capture.close()

    with pytest.raises(RuntimeError, match="no place for 4096 bytes"):
        whole()
    del whole
    left = {name: target for name, target in opened().items() if name not in before}
    assert not left
