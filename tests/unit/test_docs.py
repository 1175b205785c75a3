"""The documentation is run: every Python block of README.md and docs/library.md, and README's shell commands.

The blocks of a page are one program, in a directory with a small disk. Lines that are no code become empty ones,
so that a traceback names the line of the page.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cowstore
from cowstore import errors

ROOT = Path(__file__).parents[2]
README, LIBRARY = ROOT / "README.md", ROOT / "docs" / "library.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MIB = 1 << 20


def program(page: Path, language: str) -> str:
    """The blocks of one language, each line where it stands on the page."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == f"```{language}"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path):
    """Where the examples run: there is a `debian.raw`."""
    with open(tmp_path / "debian.raw", "wb") as disk:
        disk.write(random.Random(1).randbytes(3 * MIB))
        disk.truncate(16 * MIB)
    return tmp_path


def run(words: list[str], folder: Path) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "never closed" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [README, LIBRARY], ids=lambda page: page.name)
def test_python_examples_run(page, folder):
    text = program(page, "python")
    assert text.strip()
    (folder / page.name).with_suffix(".py").write_text(text)
    run([sys.executable, "-W", "default", page.with_suffix(".py").name], folder)
    left = [one.name for one in folder.iterdir() if one.name.endswith(".tmp")]
    assert left == []


def test_shell_example_runs(folder):
    text = program(README, "sh")
    assert text.strip()
    command = f'cowstore() {{ "{sys.executable}" -m cowstore_cli "$@"; }}\n'
    shown = run(["sh", "-euc", command + text], folder)
    assert "debian-v2" in shown, "the tree at its end"


def test_tree_of_errors_is_that_of_the_code():
    _, _, text = LIBRARY.read_text().partition("```text\nStoreError\n")
    tree, _, _ = text.partition("```")
    assert errors.__doc__ is not None
    drawn = [line.strip() for line in errors.__doc__.splitlines() if "-- " in line]
    assert [line.strip() for line in tree.splitlines()] == drawn
    classes = {name for name, one in vars(errors).items() if isinstance(one, type)}
    assert set(re.findall(r"\w+Error", tree)) == classes - {"StoreError"}


def test_library_page_shows_every_method():
    text = LIBRARY.read_text()
    public = {name for name in vars(cowstore.Store) if not name.startswith("_")} - {"fork_number", "seal_number"}
    device = {"pread", "preadinto", "extents", "delta", "close"}
    clone = {"pwrite", "zero", "trim", "resize", "flush", "fork", "seal", "reset", "discard", "write"}
    missing = [name for name in sorted(public | device | clone) if not re.search(rf"\b{name}[.(]", text)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            text = (page.parent / target).read_text() if target else page.read_text()
            headings = re.findall(r"^#+ (.+)$", text, re.M)
            slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
            assert anchor in slugs
