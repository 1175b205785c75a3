"""What every test can count on: how hard Hypothesis tries, and which programs a test needs.

`@pytest.mark.program("qemu-img", "mkfs.xfs")` says that a test runs these. Where one is missing the test is
skipped, with its name; where `CI=true`, it fails: a machine that is meant to run everything does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, settings

from tests.sample import CONTENT

CI = os.environ.get("CI", "").lower() in ("1", "true")
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

# Examples write files and sync them, so their time says more about the disk than about the code: no deadlines.
# Nor is it a fault that a stateful test makes much data.
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", deadline=None, suppress_health_check=_SLOW, max_examples=50)
settings.register_profile("ci", deadline=None, suppress_health_check=_SLOW, max_examples=100, print_blob=True)
settings.register_profile("deep", deadline=None, suppress_health_check=_SLOW, max_examples=5000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if CI else "dev"))


def find_program(name: str) -> str | None:
    """The path of a program, also of one that only root has on the path."""
    return shutil.which(name, path=SYSTEM_PATH)


def needs_program(*names: str) -> None:
    """Skip the running test by name where a program is missing; fail it where CI=true."""
    missing = [name for name in names if find_program(name) is None]
    if not missing:
        return
    reason = f"needs {', '.join(missing)}, which is not installed here"
    if CI:
        pytest.fail(f"{reason}, and CI=true", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("program"):
        needs_program(*marker.args)
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs the rights of root")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in an empty directory, in this process; the store is `s`."""
    from cowstore_cli.main import cli

    monkeypatch.chdir(tmp_path)

    def run(*words: str, code: int = 0, stdin: bytes | None = None) -> Result:
        result = CliRunner().invoke(cli, list(words), input=stdin, env={"COWSTORE": str(tmp_path / "s")})
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def stocked(run: Callable[..., Result]) -> Path:
    """The store `s`, with CONTENT as its image `debian`."""
    run("init")
    Path("disk.raw").write_bytes(CONTENT)
    run("import", "disk.raw", "debian")
    return Path("s").resolve()


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the person who runs the tests decide nothing in them, and tests find programs of /sbin."""
    for name in ("COWSTORE", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", SYSTEM_PATH)
