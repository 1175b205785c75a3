"""QEMU's guest agent and the libraries it needs: the machine's, or what tools/fetch-guest.sh has unpacked."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.interop.kernel import ROOTS, UnfitError

PROGRAM = "usr/sbin/qemu-ga"
LOADER = "lib64/ld-linux-x86-64.so.2"  # the name by which the program asks for it

# Debian's first: in a tree that was only unpacked, its `lib64` is a link that leads out of the tree.
LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64", "usr/lib64")


def find_agent(roots: Iterable[Path] = ROOTS) -> dict[str, bytes]:
    """The files of an agent by their paths: the program, its loader, its libraries.

    Raises:
        UnfitError: there is none; the message has what is wrong with each.
    """
    reasons = []
    for root in roots:
        if not (root / PROGRAM).exists():
            continue
        try:
            return agent_of(root)
        except UnfitError as error:
            reasons.append(str(error))
    raise UnfitError("; ".join(reasons) or "no QEMU guest agent is here")


def agent_of(root: Path) -> dict[str, bytes]:
    folders = [root / folder for folder in LIBRARIES]
    loader = next((path for folder in folders if (path := folder / Path(LOADER).name).exists()), None)
    if loader is None:
        raise UnfitError(f"no {LOADER} is in {root}")
    # The loader is asked itself. It runs nothing of the program for that.
    search = ":".join(str(folder) for folder in folders)
    words = [str(loader), "--inhibit-cache", "--library-path", search, "--list", str(root / PROGRAM)]
    asked = subprocess.run(words, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        raise UnfitError(f"{root / PROGRAM}: {asked.stderr.strip()}")
    files = {PROGRAM: root / PROGRAM, LOADER: loader}
    files |= {inside(root, path): path for path in map(Path, re.findall(r"\tlib\S+ => (/\S+)", asked.stdout))}
    return {name: path.read_bytes() for name, path in files.items()}


def inside(root: Path, library: Path) -> str:
    """Where a library has its place. The loader also looks outside the tree for what the tree does not have."""
    if not library.is_relative_to(root):
        raise UnfitError(f"{library.name} is not in {root}")
    return str(library.relative_to(root))
