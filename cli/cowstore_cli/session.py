"""What every command starts from: which store."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import click

import cowstore


@dataclass
class Session:
    """The options that stand before a command, kept while it runs.

    Attributes:
        store: The path of the store; None where neither the option nor the variable names one.
    """

    store: str | None = None

    @property
    def path(self) -> str:
        """The store's path; a usage error where there is none."""
        if self.store is None:
            raise click.UsageError("no store named: give --store PATH or set the variable COWSTORE")
        return self.store

    def allow_many_files(self) -> None:
        """Raise the limit of open files as far as it goes: every device at work has a lock file open."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def open(self) -> cowstore.Store:
        """Open the store for commands that change it."""
        self.allow_many_files()
        return cowstore.open(self.path)

    def look(self) -> cowstore.Store:
        """Open the store for commands that only look: without write access, and in nobody's way."""
        return cowstore.open(self.path, readonly=True)

    def copy(self) -> cowstore.Store:
        """Open the store for commands that read it for long.

        Where it can be written, what they read is held by a record, which is in nobody's way.
        """
        try:
            return self.open()
        except cowstore.ReadOnlyError:
            return self.look()


@contextmanager
def writing(store: cowstore.Store, name: str) -> Iterator[cowstore.Clone]:
    """A clone open for writing: flushed when the block ends well, left as it was when it does not."""
    if store.info(name).kind != "clone":
        raise cowstore.ReadOnlyError(f"image {name!r}", hint="clone it and write to the clone")
    device = cast("cowstore.Clone", store.device(name))
    try:
        yield device
    except BaseException:
        device.discard()
        raise
    device.close()


pass_session = click.make_pass_decorator(Session, ensure=True)


def of(context: click.Context) -> Session:
    """The session that a context belongs to, made at its first use."""
    return context.find_root().ensure_object(Session)
