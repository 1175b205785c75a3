"""Templates: nobody can change one, whatever a child does, and what is in it is what was stored."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
import resource
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cowstore
from cowstore.errors import CorruptError, MachineError
from cowstore.machines import template
from cowstore.machines.template import Template
from tests.unit.stored import damage, ids_of

from .children import in_child, opened, standing

PAGE = 4096
MIB = 1 << 20
PUNCH_HOLE, KEEP_SIZE = 2, 1  # of fallocate(2)
NOEXEC_SEAL = 8  # MFD_NOEXEC_SEAL: what a host with vm.memfd_noexec=1 adds by itself
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)


@pytest.fixture
def store() -> Iterator[cowstore.Store]:
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder, cowstore.open(Path(folder, "s"), create=True) as store:
        yield store


def memory_file(name: str, content: bytes, flags: int = 0) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.write(fd, content)
    return fd


@pytest.fixture
def made() -> Iterator[Template]:
    one = Template.seal(memory_file("made", CONTENT), len(CONTENT))
    yield one
    one.close()


CONTENT = random.Random(3).randbytes(16 * PAGE)


def punch(fd: int) -> None:
    if _libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, 0, PAGE):
        raise OSError(ctypes.get_errno(), "refused")


# What a child might do to it.

ATTACKS: dict[str, Callable[[Template], object]] = {
    "write": lambda made: os.pwrite(made.fd, b"x", 0),
    "write through its path": lambda made: Path(made.path).write_bytes(b"x"),
    "map shared": lambda made: mmap.mmap(made.fd, made.size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
    "cut off": lambda made: os.ftruncate(made.fd, PAGE),
    "empty": lambda made: os.truncate(made.path, 0),
    "grow": lambda made: os.ftruncate(made.fd, made.size + PAGE),
    "punch a hole": lambda made: punch(made.fd),
    "allocate": lambda made: os.posix_fallocate(made.fd, made.size, PAGE),
    "remove what is mapped": lambda made: made.map().madvise(mmap.MADV_REMOVE),
    "seal more": lambda made: fcntl.fcntl(made.fd, fcntl.F_ADD_SEALS, 0x10),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_it_cannot_be_changed(made, attack):
    child = made.map()
    assert child[:PAGE] == CONTENT[:PAGE]
    with pytest.raises((OSError, ValueError)) as refused:
        attack(made)
    assert getattr(refused.value, "errno", errno.EPERM) in (errno.EPERM, errno.EACCES)
    assert os.fstat(made.fd).st_size == made.size == len(CONTENT)
    assert child[:] == made.map()[:] == os.pread(made.fd, made.size + 1, 0) == CONTENT


@pytest.mark.parametrize("attack", ["write", "map shared", "cut off", "punch a hole"])
def test_an_unsealed_file_could_be(attack):
    """The attacks are real ones: without the seals they do what they are after."""
    bare = Template(memory_file("bare", CONTENT), len(CONTENT))
    ATTACKS[attack](bare)
    bare.close()


def test_without_seals_a_child_destroys_what_all_others_see():
    bare = Template(memory_file("bare", CONTENT), len(CONTENT))
    sibling = bare.map()
    in_child(lambda: punch(bare.fd))
    assert sibling[:PAGE] == bytes(PAGE)
    bare.close()


def test_children_are_private(made):
    ours, other = made.map(), made.map()
    ours[:4] = b"ours"

    def work() -> Iterator[int]:
        assert ours[:4] == b"ours", "a forked child has what its parent had"
        ours[:4] = b"kids"
        other[PAGE : PAGE + 4] = b"kids"
        yield 0

    with standing(work):
        assert ours[:4] == b"ours"
        assert other[:] == CONTENT
        assert ours[4:] == CONTENT[4:]
    assert os.pread(made.fd, made.size, 0) == CONTENT


def test_mappings_take_no_descriptors_and_outlive_it(made):
    before = opened()
    mapped = [made.map() for _ in range(200)]
    assert opened() == before
    made.close()
    made.close()
    assert all(one[:] == CONTENT for one in mapped)
    with pytest.raises(MachineError, match="cannot be mapped: Bad file descriptor"):
        made.map()


def test_a_mapping_is_gone_when_it_is_closed(made):
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("/memfd:made")

    before = mappings()
    mapped, dropped = made.map(), made.map()
    assert mappings() == before + 2
    mapped.close()
    assert mappings() == before + 1
    del dropped
    assert mappings() == before


def test_a_mapping_that_the_kernel_refuses(made):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (64 * MIB, 64 * MIB))
        with pytest.raises(MachineError, match="cannot be mapped: Cannot allocate memory") as refused:
            Template(made.fd, 1 << 30).map()
        assert "max_map_count" in refused.value.hint

    in_child(limited)


# Finding one that another process has.


def holder(fd: int) -> Callable[[], Iterator[int]]:
    def work() -> Iterator[int]:
        yield fd

    return work


def test_it_is_found_in_another_process(made):
    with standing(holder(made.fd)) as child:
        fd, size = made.fd, made.size
        identity = os.fstat(fd).st_ino
        made.close()
        found = Template.find(child.pid, "made", size)
        assert found is not None
        assert os.fstat(found.fd).st_ino == identity
        assert not os.get_inheritable(found.fd)
    assert found.map()[:] == CONTENT, "it is ours now, whatever becomes of the other"
    found.close()
    assert not any("/memfd:made" in target for target in opened().values())


@pytest.mark.parametrize(
    ("name", "size"), [("made", len(CONTENT) - PAGE), ("made", len(CONTENT) + PAGE), ("mad", len(CONTENT))]
)
def test_another_name_or_size_is_not_taken(made, name, size):
    with standing(holder(made.fd)) as child:
        before = opened()
        assert Template.find(child.pid, name, size) is None
        assert opened() == before


@pytest.mark.parametrize(
    "seals", [0, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL]
)
def test_an_unsealed_file_is_not_taken(seals):
    fd = memory_file("half", CONTENT)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    before = opened()
    assert Template.find(os.getpid(), "half", len(CONTENT)) is None
    assert opened() == before
    os.close(fd)


def test_a_file_that_its_host_sealed_against_running_is_taken():
    try:
        fd = memory_file("guarded", CONTENT, NOEXEC_SEAL)
    except OSError:
        pytest.skip("a kernel before 6.3")
    one = Template.seal(fd, len(CONTENT))
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) != template.SEALS
    found = Template.find(os.getpid(), "guarded", len(CONTENT))
    assert found is not None
    for each in (one, found):
        each.close()


def test_a_plain_file_of_such_a_name_is_not_taken(tmp_path, monkeypatch):
    with (tmp_path / "plain").open("wb") as file:
        file.write(CONTENT)
        file.flush()
        before = set(os.listdir("/proc/self/fd"))
        ours = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        monkeypatch.setattr(os, "readlink", lambda path: f"/memfd:{'plain' if path == ours else ''} (deleted)")
        assert Template.find(os.getpid(), "plain", len(CONTENT)) is None
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_process_that_is_gone_has_none(made):
    with standing(holder(made.fd)) as child:
        pass
    assert Template.find(child.pid, "made", made.size) is None


def test_others_open_it_by_its_path(made):
    path = made.path

    def read() -> None:
        os.close(made.fd)
        with open(path, "rb") as file:
            assert file.read() == CONTENT

    in_child(read)


# Building.


def device(store: cowstore.Store, size: int, *writes: tuple[bytes, int]) -> cowstore.Device:
    with store.create("clone", size) as clone:
        for data, offset in writes:
            clone.pwrite(data, offset)
        clone.seal("image")
    return store.device("image")


def test_it_holds_what_is_stored_and_no_more(store):
    long, short = random.Random(1).randbytes(9 * MIB + PAGE), random.Random(2).randbytes(3 * PAGE)
    size = 64 * MIB
    with device(store, size, (long, 2 * PAGE), (short, size - len(short))) as image:
        made = Template.build("image", image)
    expected = bytearray(size)
    expected[2 * PAGE : 2 * PAGE + len(long)] = long
    expected[-len(short) :] = short
    assert os.pread(made.fd, size + 1, 0) == expected
    status = os.fstat(made.fd)
    assert status.st_blocks * 512 == len(long) + len(short), "holes take no memory"
    assert fcntl.fcntl(made.fd, fcntl.F_GET_SEALS) == template.SEALS
    assert stat.S_ISREG(status.st_mode)
    made.close()


def test_no_descriptor_but_its_own_is_left(store):
    with device(store, MIB, (b"content", 0)) as image:
        before = opened()
        made = Template.build("image", image)
        assert sorted(set(opened()) - set(before)) == [str(made.fd)]
        made.close()
        assert opened() == before


@pytest.mark.parametrize("missing", [1, 64 << 20])
def test_what_the_host_has_no_memory_for_is_refused(store, monkeypatch, missing):
    data = random.Random(1).randbytes(3 * MIB)
    with device(store, 64 * MIB, (data, MIB)) as image:
        before = opened()
        enough = len(data) + template._SPARE
        monkeypatch.setattr(template, "available", lambda: enough - missing)
        with pytest.raises(MachineError, match="no memory left for the memory of image: it takes 3 MiB"):
            Template.build("image", image)
        assert opened() == before
        monkeypatch.setattr(template, "available", lambda: enough)
        Template.build("image", image).close()


def test_available_is_what_the_kernel_says():
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    assert abs(template.available() - int(line.split()[1]) * 1024) < 256 * MIB


def test_damage_in_the_store_is_an_error_and_leaves_nothing(store):
    with device(store, 16 * MIB, (random.Random(1).randbytes(6 * MIB), 0)) as image:
        damage(store, ids_of(store, "image")[1500])  # in the second piece
        next(iter(image.extents()))
        before = opened()
        with pytest.raises(CorruptError, match="at offset 6144000") as refused:
            Template.build("image", image)
        assert opened() == before, "also while the exception is still looked at"
        del refused
        assert "/memfd:image" not in Path("/proc/self/maps").read_text()
