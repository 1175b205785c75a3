"""The rooms of the house: what may import what, how long things may be, and who may touch the disk.

These rules are the ones that codebases of this kind lose first, so they are tests from the first day.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "cowstore"
COMMAND = ROOT / "cli" / "cowstore_cli"

MODULE_LINES = 500
FUNCTION_LINES = 70
COMMAND_MODULE_LINES = 300
FACADE_FUNCTION_LINES = 25

# Hot paths that are longer on purpose, as "module.function": the reason.
LONG_FUNCTIONS: dict[str, str] = {}

# Whoever needs one of these has not found the noun yet.
DRAWERS = {"utils", "util", "helpers", "helper", "common", "base", "misc", "tools", "lib", "core", "shared"}

# Only files.py does these, so that the crash tests see, count and interrupt every write and sync.
DISK_CALLS = {
    "os.open",
    "os.write",
    "os.pwrite",
    "os.pwritev",
    "os.writev",
    "os.fsync",
    "os.fdatasync",
    "os.truncate",
    "os.ftruncate",
    "os.posix_fallocate",
    "os.rename",
    "os.replace",
    "os.unlink",
    "os.remove",
    "os.mkdir",
    "os.makedirs",
    "os.rmdir",
    "os.link",
    "os.sendfile",
    "os.copy_file_range",
    "fcntl.flock",
    "fcntl.ioctl",
    "fcntl.fallocate",
    "open",
}

# Parts of the library that are public as modules of their own.
PUBLIC = ("cowstore.errors", "cowstore.machines", "cowstore.nbd")

# These work on files of other people's, not on the store's.
OUTSIDE = {
    "sources": "reads what is imported",
    "exports": "writes what is exported: aside, synced, renamed",
    "listeners": "makes sockets and their directories",
}

# The same of a whole package: what runs has its files in memory, and in a directory that goes with the boot.
OUTSIDE_PACKAGES = {"machines"}

# Where another module may touch the store's, as (module, call): the reason.
DISK_EXCEPTIONS = {
    ("environment", "os.truncate"): "LMDB's own file, made long enough before LMDB's own commit",
}


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), path)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(parsed(path)) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """From `def` to the last line, the docstring apart: explaining more must not be what breaks a limit."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return lines


def imported(path: Path) -> Iterator[str]:
    """Full names of what a module imports; those in a function's body too."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


everything = pytest.mark.parametrize("path", sources(LIBRARY, COMMAND, ROOT / "tests", ROOT / "tools"), ids=named)
library = pytest.mark.parametrize("path", sources(LIBRARY), ids=named)
command = pytest.mark.parametrize("path", sources(COMMAND), ids=named)


@everything
def test_module_is_short(path):
    assert len(path.read_text().splitlines()) < MODULE_LINES


@everything
def test_functions_are_short(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    long = {
        f"{module}.{one.name}": body_lines(one) for one in functions(path) if body_lines(one) >= FUNCTION_LINES
    }
    assert {name: lines for name, lines in long.items() if name not in LONG_FUNCTIONS} == {}


def test_long_functions_are_still_long():
    """An exception that is no longer needed is taken back."""
    for name in LONG_FUNCTIONS:
        module, _, function = name.rpartition(".")
        lengths = [
            body_lines(one) for one in functions(ROOT / f"{module.replace('.', '/')}.py") if one.name == function
        ]
        assert max(lengths, default=0) >= FUNCTION_LINES, f"{name} is short enough now"


@everything
def test_module_is_named_for_what_it_holds(path):
    assert path.stem not in DRAWERS


@everything
def test_no_star_imports(path):
    assert not [name for name in imported(path) if name.endswith(".*")]


@library
def test_library_does_not_know_its_command_line(path):
    assert not {name.partition(".")[0] for name in imported(path)} & {"click", "rich", "cowstore_cli"}


@library
def test_library_leaves_process_and_terminal_alone(path):
    """Exit codes, environment variables and printing are the command's affair."""
    found = {ast.unparse(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Name | ast.Attribute)}
    assert not found & {"print", "sys.exit", "sys.argv", "sys.stdout", "sys.stderr", "os.environ", "os.getenv"}


def disk_calls(path: Path) -> set[tuple[str, str]]:
    """What a module does to the disk itself. Opening a file to read it is free."""
    calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    touching = [one for one in calls if ast.unparse(one.func) in DISK_CALLS]
    return {(path.stem, ast.unparse(one.func)) for one in touching if "'rb'" not in map(ast.unparse, one.args)}


def test_only_files_touches_the_disk():
    """Every exception is needed, too."""
    inside = [
        path for path in sources(LIBRARY)
        if path.stem not in {"files", *OUTSIDE} and path.parent.name not in OUTSIDE_PACKAGES
    ]  # fmt: skip
    found = {call for path in inside for call in disk_calls(path)}
    assert found == DISK_EXCEPTIONS.keys()


@library
def test_docstring_is_there(path):
    assert ast.get_docstring(parsed(path))


@command
def test_command_uses_the_public_surface_only(path):
    inner = {name for name in imported(path) if re.fullmatch(r"cowstore\.[a-z_]+(\..*)?", name)}
    assert {name for name in inner if not name.startswith(PUBLIC)} == set()


@command
def test_command_modules_stay_small(path):
    assert len(path.read_text().splitlines()) < COMMAND_MODULE_LINES


def test_facade_wires_and_does_not_think():
    lengths = {one.name: body_lines(one) for one in functions(LIBRARY / "store.py")}
    assert {name: lines for name, lines in lengths.items() if lines > FACADE_FUNCTION_LINES} == {}


def test_imports_point_down():
    """The layers stand in pyproject.toml; import-linter reads them."""
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("heavy", ["numpy", "rich", "click"])
def test_import_is_cheap(heavy):
    program = f"import sys, cowstore; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
