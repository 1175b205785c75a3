"""What is drawn with rich, on terminals only. Imported late: rich costs more than most commands take."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cowstore_cli import sizes
from cowstore_cli.lineage import Branch


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], flush_right: Sequence[bool]) -> None:
    """Print a table with a rule under its head."""
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for header, right in zip(headers, flush_right, strict=True):
        drawn.add_column(header, justify="right" if right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    Console().print(drawn)


def tree(roots: Sequence[Branch]) -> None:
    """Print the lineage. Walked with a list, not by recursion: a line of a thousand forks is a thousand deep."""
    for root in roots:
        drawn = Tree(_label(root), guide_style="dim")
        waiting = [(root, drawn, 1)]
        deepest = 0
        while waiting:
            branch, node, depth = waiting.pop()
            deepest = max(deepest, depth)
            waiting.extend((child, node.add(_label(child)), depth + 1) for child in branch.children)
        console = Console()
        # What is too deep for the terminal runs over its edge; rich would squeeze the names away.
        console.width = max(console.width, 4 * deepest + 80)
        console.print(drawn, soft_wrap=True)


def _label(branch: Branch) -> Text:
    style = {"image": "bold cyan", "deleted": "dim strike", "rest": "dim"}.get(branch.style, "")
    return Text.assemble((branch.title, style), " ", (branch.remark, "dim"))


_IN_BYTES = {"import", "export", "backup"}


class Bars:
    """Progress bars on stderr, one for each step of a long job; they vanish when it is done."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[amount]}", style="dim"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show a step's state; a total of 0 is not known."""
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=None, amount="")
        amount = _amount(step, done, total)
        self._progress.update(self._tasks[step], completed=done, total=total or None, amount=amount)


def _amount(step: str, done: int, total: int) -> str:
    """How far a step has come, in bytes or in things."""
    show = sizes.show if step in _IN_BYTES else "{:,}".format
    return f"{show(done)} of {show(total)}" if total else show(done)
