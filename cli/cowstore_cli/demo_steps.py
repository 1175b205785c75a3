"""The demonstration's account: what was done, step by step, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


class Steps:
    """What was done, how long it took, and what there is to say of it."""

    def __init__(self, console: Console) -> None:
        self.rows: list[tuple[str, float, str]] = []
        self.proofs = 0
        self._console = console

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """One step; its remarks go into the list."""
        remarks: list[str] = []
        begun = time.monotonic()
        with self._console.status(f"{what} ..."):
            yield remarks
        self.rows.append((what, time.monotonic() - begun, ", ".join(remarks)))

    def proved(self) -> None:
        """One proof more holds."""
        self.proofs += 1

    def show(self, facts: list[tuple[str, str]]) -> None:
        """Prints the table of all steps, and some facts below."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column("step", no_wrap=True)
        table.add_column("time", justify="right", no_wrap=True)
        table.add_column("", style="dim")
        for what, seconds, remark in self.rows:
            table.add_row(what, f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms", remark)
        total = sum(seconds for _, seconds, _ in self.rows)
        table.add_section()
        table.add_row("[bold]all of it[/]", f"[bold]{total:.1f} s[/]", "")
        table.add_section()
        for what, remark in facts:
            table.add_row(what, "", remark, style="bold")
        self._console.print(table)
