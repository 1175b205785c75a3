"""Templates by checkpoint: built when they are first asked for, kept while that may happen again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .stores import Checkpoint, Checkpoints, Progress, no_progress
from .template import Template, available

NAME = "cowstore-memory"  # of the files, for those who look into /proc: a child has one, that of its checkpoint
_KEPT = 4  # templates that nobody uses now; machines keep theirs alive by themselves
_PART = 8  # of the memory that the host has left, what these may hold: one in so many bytes


class Templates:
    """The templates of one store on this host.

    Args:
        checkpoints: What they are built from.
        processes: The processes that may have a checkpoint's template, by its number: those of its children.
    """

    def __init__(self, checkpoints: Checkpoints, processes: Callable[[int], Iterable[int]]) -> None:
        self._checkpoints = checkpoints
        self._processes = processes
        self._lock = threading.Lock()
        self._building: dict[int, threading.Lock] = {}
        self._templates: OrderedDict[int, Template] = OrderedDict()
        self._users: dict[int, int] = {}

    @contextmanager
    def held(self, checkpoint: Checkpoint, progress: Progress = no_progress) -> Iterator[Template]:
        """A checkpoint's template, open at least as long as the block lasts.

        Args:
            checkpoint: The checkpoint.
            progress: Told ("template", bytes done, bytes of the memory) where it has to be built.
        """
        number = checkpoint.number
        with self._lock:
            building = self._building.setdefault(number, threading.Lock())
            self._users[number] = self._users.get(number, 0) + 1
        try:
            with building:
                template = self._templates.get(number)
                if template is None:
                    template = self._find(checkpoint) or self._build(checkpoint, progress)
                    with self._lock:
                        self._templates[number] = template
            yield template
        finally:
            with self._lock:
                self._users[number] -= 1
                if not self._users[number]:
                    del self._users[number], self._building[number]
                if number in self._templates:
                    self._templates.move_to_end(number)
            self._drop_surplus()

    def _find(self, checkpoint: Checkpoint) -> Template | None:
        """The template that children of it have, who have outlived the process that made it."""
        for pid in self._processes(checkpoint.number):
            found = Template.find(pid, NAME, checkpoint.memory_size)
            if found is not None:
                return found
        return None

    def _build(self, checkpoint: Checkpoint, progress: Progress) -> Template:
        with self._checkpoints.memory(checkpoint.name) as memory:
            return Template.build(NAME, memory, progress)

    def put(self, number: int, template: Template) -> None:
        """Keeps a template that was made elsewhere."""
        with self._lock:
            self._templates[number] = template
        self._drop_surplus()

    def forget(self, number: int) -> None:
        """Closes the template of a checkpoint that is gone."""
        with self._lock:
            template = None if self._users.get(number) else self._templates.pop(number, None)
        if template is not None:
            template.close()

    def _drop_surplus(self) -> None:
        room, surplus = available() // _PART, []
        with self._lock:
            idle = [number for number in reversed(self._templates) if not self._users.get(number)]
            for position, number in enumerate(idle):
                room -= self._templates[number].resident()
                if position >= _KEPT or (position and room < 0):  # never the newest: it is about to be used
                    surplus.append(self._templates.pop(number))
        for template in surplus:
            template.close()

    def close(self) -> None:
        """Closes all of them."""
        with self._lock:
            left, self._templates = list(self._templates.values()), OrderedDict()
        for template in left:
            template.close()
