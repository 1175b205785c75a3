"""An ext4 file system in a raw image, looked at with e2fsprogs and not with the kernel that wrote it."""

from __future__ import annotations

import subprocess
from pathlib import Path

NOTHING_TO_DO, REPAIRED = 0, 1  # exit statuses of e2fsck


class FileSystem:
    """One image."""

    def __init__(self, image: Path) -> None:
        self.image = image

    def check(self) -> None:
        """Finds nothing at all to repair, and no journal to replay."""
        status, said = self._e2fsck("-fn")
        assert status == NOTHING_TO_DO, said
        assert "journal" not in said.lower(), said

    def recover(self) -> None:
        """Replays the journal, as the next boot would, and finds nothing that a person has to decide."""
        status, said = self._e2fsck("-p")
        assert status in (NOTHING_TO_DO, REPAIRED), said

    def folder(self, name: str) -> dict[str, bytes]:
        """Every file of a folder, by name; files that are not readable as they should be are left out."""
        out = self.image.with_suffix(".files")
        out.mkdir()
        subprocess.run(["debugfs", "-R", f"rdump {name} {out}", self.image], check=True, capture_output=True)
        return {path.name: path.read_bytes() for path in (out / Path(name).name).iterdir()}

    def _e2fsck(self, how: str) -> tuple[int, str]:
        done = subprocess.run(["e2fsck", how, self.image], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
