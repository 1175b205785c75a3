"""The command `cowstore vm`, with a store, a runtime directory and a server of its own, which can die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from cowstore.machines import Client
from cowstore_cli.main import cli
from tests.conftest import SYSTEM_PATH

from .desk import end_all, processes, short_folder, wait
from .guestkit import COMMAND_LINE, Parts

MEMORY = "160M"


class Commands:
    """See above; everything lies in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "s"
        self.runtime = folder / "run"
        self.runtime.mkdir(mode=0o700)
        self.environment = {
            **os.environ, "XDG_RUNTIME_DIR": str(self.runtime), "COWSTORE": str(self.store), "PATH": SYSTEM_PATH,
        }  # fmt: skip

    def run(self, *words: str, code: int = 0, stdin: bytes = b"") -> str:
        """What a command prints; it ends with that code."""
        if self._answers():  # then nothing is lost by running it in this process, and a second is won
            done = CliRunner().invoke(cli, list(words), input=stdin, env=self.environment)
            status, output, self.errors = done.exit_code, done.stdout, done.stderr
        else:
            ended = self.ended(*words, stdin=stdin)
            status, output, self.errors = ended.returncode, ended.stdout.decode(), ended.stderr.decode()
        assert status == code, (output, self.errors)
        return output

    def _answers(self) -> bool:
        try:
            return bool(self.client.ask("ping"))
        except (OSError, ValueError):
            return False

    def ended(self, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """A command that has run in a process of its own."""
        command = [sys.executable, "-m", "cowstore_cli", *words]
        return subprocess.run(
            command, input=stdin, capture_output=True, check=False, timeout=120, env=self.environment
        )

    def refused(self, *words: str, code: int) -> str:
        """The one line of a command that fails."""
        self.run(*words, code=code)
        (line,) = self.errors.splitlines()
        return line.removeprefix("cowstore: ")

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self.run(*words, "--json", code=code))

    def start(self, parts: Parts, name: str, *more: str) -> None:
        """Boots the guest of guestkit from a clone of that name."""
        self.run("clone", "disk", name)
        self.run(*self.starting(parts, name, *more))
        wait(lambda: "guest is up" in self.run("vm", "console", name, "--log"), "the guest is up")
        wait(lambda: not self.ended("vm", "exec", name, "/bin/true").returncode, "its agent answers")
        self.said(name, "kill -STOP $(busybox pidof counter)")

    def starting(self, parts: Parts, name: str, *more: str) -> list[str]:
        words = ["vm", "start", name, "--disk", name, "--memory", MEMORY, "--accel", "tcg"]
        words += ["--kernel", str(parts.kernel), "--initrd", str(parts.initramfs), "--append", COMMAND_LINE]
        return [*words, "--nic", "virtio-net-pci", *more]

    def said(self, name: str, script: str) -> str:
        """What a script in a guest says."""
        return self.run("vm", "exec", name, "--", "/bin/sh", "-c", script).strip()

    @property
    def place(self) -> Path:
        """The store's runtime directory, which a server has made."""
        (found,) = (self.runtime / "cowstore").glob("*")
        return found

    @property
    def client(self) -> Client:
        return Client(self.place / "vm.sock")

    def servers(self) -> list[int]:
        """The processes of servers: those that have the store in their command line."""
        found, mark = [], f"--store\0{self.store}\0serve".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
            except OSError:
                pass  # it has just ended
        return found

    def kill_server(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends every process of ours but the machines, and waits for that."""
        for pid in self.servers():
            os.kill(pid, number)
        wait(lambda: not self.servers(), "the server ends")

    def machines(self) -> list[str]:
        return [one["name"] for one in self.json("vm", "ls")]

    def clean(self) -> None:
        """Stops everything; what machine outlives that is a failure."""
        try:
            if names := self.machines():
                self.run("vm", "stop", "--now", *names)
            assert not processes(self.folder)
        finally:
            self.kill_server(signal.SIGTERM)
            left = end_all(self.folder)
        assert not left, "machines that no command knew"
        assert not list((self.place / "m").glob("*/")), "folders of machines"


@contextmanager
def commands() -> Iterator[Commands]:
    """Commands in a folder of their own, and nothing of it afterwards."""
    with short_folder() as folder:
        made = Commands(folder)
        try:
            made.run("init")
            yield made
            made.clean()
        finally:
            made.kill_server()
