"""Copies of the catalog: small, verified, two of them in turn.

One is made before anything is erased and after a day's work, so that a lost catalog can be rebuilt from it and
from the commit blocks that came later.
"""

from __future__ import annotations

import time
from pathlib import Path

from .environment import Environment, verify_copy
from .errors import NoSpaceError, StoreError
from .files import Disk
from .leases import turn

_DAY = 86400.0  # seconds
_PATIENCE = 30.0  # seconds


class Copies:
    """The two copies beside a catalog.

    Args:
        disk: Makes and renames the directories.
        directory: The store's directory.
        environment: The catalog.
    """

    def __init__(self, disk: Disk, directory: Path, environment: Environment) -> None:
        self._disk = disk
        self._directory = directory
        self._environment = environment

    def paths(self) -> list[Path]:
        """Both places, the older or missing copy first."""
        both = [self._directory / f"catalog.copy.{number}" for number in (0, 1)]
        return sorted(both, key=_made)

    def make(self) -> Path:
        """Copies the catalog over the older copy, once the new one is verified and durable.

        On a full disk the older copy goes first.
        """
        lock = self._directory / "leases" / "copies"
        try:
            with turn(self._disk, lock, "the lock of the catalog's copies", _PATIENCE):
                return self._make_room(self.paths()[0])
        except OSError as error:
            raise StoreError(f"the catalog cannot be copied: {error}") from error

    def _make_room(self, target: Path) -> Path:
        try:
            return self._make(target)
        except NoSpaceError:
            self._disk.remove_tree(target)
            return self._make(target)

    def _make(self, target: Path) -> Path:
        aside = target.with_name(f"{target.name}.tmp")
        self._disk.remove_tree(aside)
        self._disk.make_directory(aside)
        try:
            self._write(aside)
            verify_copy(aside, self._disk)
            old = target.with_name(f"{target.name}.old")
            self._disk.remove_tree(old)
            if target.exists():
                self._disk.rename(target, old)
            self._disk.rename(aside, target)
            self._disk.sync_directory(self._directory)
            self._disk.remove_tree(old)
        except BaseException:
            self._disk.remove_tree(aside)
            raise
        return target

    def _write(self, aside: Path) -> None:
        file = self._disk.open(aside / "data.mdb", write=True, exclusive=True)
        try:
            self._environment.copy(file)
        finally:
            file.close()

    def make_if_due(self) -> None:
        """Makes a copy if the newest one is older than a day."""
        if time.time() - _made(self.paths()[1]) > _DAY:
            try:
                self.make()
            except NoSpaceError:
                return  # the next one to close makes it


def _made(path: Path) -> float:
    try:
        return (path / "data.mdb").stat().st_mtime
    except OSError:
        return 0.0
