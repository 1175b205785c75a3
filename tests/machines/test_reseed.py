"""The program that reseeds a guest's randomness, run on this host."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from cowstore.machines.reseed import program

ENTROPY = bytes(range(256))


def written(folder: Path, entropy: bytes = ENTROPY) -> Path:
    path = folder / "seed"
    path.write_bytes(program(entropy))
    path.chmod(0o700)
    return path


@pytest.mark.root
def test_it_runs_and_ends_well(tmp_path):
    done = subprocess.run([written(tmp_path)], capture_output=True, check=False)
    if done.returncode == errno.EPERM:
        pytest.skip("this host lets nobody add entropy")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.root
def test_what_fails_is_its_status(tmp_path):
    """Without /dev/urandom there is nothing to give entropy to."""
    path = written(tmp_path)
    done = subprocess.run(["/seed"], preexec_fn=lambda: os.chroot(path.parent), check=False)
    assert done.returncode == errno.EBADF


@pytest.mark.program("setpriv")
@pytest.mark.root
def test_a_user_may_not(tmp_path):
    path = written(tmp_path)
    public = Path(shutil.copy(path, "/dev/shm/cowstore-seed-of-a-test"))
    try:
        public.chmod(0o755)
        words = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", str(public)]
        assert subprocess.run(words, check=False).returncode == errno.EPERM
    finally:
        public.unlink()


@pytest.mark.parametrize("length", [1, 16, 256, 1000])
def test_the_entropy_is_all_given_and_stands_at_the_end(length):
    entropy = os.urandom(length)
    made = program(entropy)
    assert made.endswith(struct.pack("<ii", 8 * length, length) + entropy)
    assert b"/dev/urandom\0" in made
    assert len(made) < 400 + length
    (entry,) = struct.unpack_from("<Q", made, 24)
    offset, _, _, in_file, in_memory = struct.unpack_from("<QQQQQ", made, 64 + 8)
    assert (offset, in_file, in_memory) == (0, len(made), len(made))
    assert 0x400000 < entry < 0x400000 + len(made)


def test_another_entropy_is_another_program():
    assert program(b"a" * 16) != program(b"b" * 16)
