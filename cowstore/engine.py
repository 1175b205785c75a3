"""The engine: everything of an open store that touches blocks, wired together.

It is made at the first call that needs it, so that commands which only look at names import no NumPy.
"""

from __future__ import annotations

from pathlib import Path

from .blocks import Interner
from .collector import rebuild_index
from .committer import Committer
from .copies import Copies
from .digest import Hasher, HashFunction
from .environment import Environment
from .files import Disk
from .index import Index
from .layout import Identity, Root
from .leases import Leases
from .publisher import Workshop
from .reservations import Reservations
from .segments import Segments
from .tree import TreeView


class Engine:
    """Segments, index, reservations and committer of one open store.

    Attributes:
        segments: The slots.
        reservations: Those that this process may write.
        index: The hint where equal blocks may be.
        workshop: What writers work with.
        copies: The catalog's copies.
    """

    def __init__(
        self, disk: Disk, directory: Path, identity: Identity, environment: Environment, leases: Leases,
        function: HashFunction, *, readonly: bool,
    ) -> None:  # fmt: skip
        self.hasher = Hasher(identity.seed, function)
        self._environment = environment

        def erasure() -> int:
            with environment.read() as snapshot:
                return snapshot.state.erasure

        self.segments = Segments(
            disk, directory / "segments", self.hasher, identity.store_id, erasure, writable=not readonly
        )
        self.reservations = Reservations(environment, self.segments, leases)
        self.index = Index.open(directory / "index", identity.seed, disk, readonly=readonly)
        self.copies = Copies(disk, directory, environment)
        self._readonly = readonly
        committer = Committer(environment, self.segments, self.reservations)
        self.workshop = Workshop(
            environment, self.segments, self.reservations, self.hasher, committer, self._interner
        )

    def _interner(self, ephemeral: bool) -> Interner:
        self.index.refresh()
        return Interner(
            self._environment, self.segments, self.reservations, self.index, self.hasher, ephemeral=ephemeral
        )

    def view(self, root: Root) -> TreeView:
        """A tree to be read."""
        return TreeView(self.segments, root)

    def restore_index(self) -> None:
        """Fills an index that was lost from the segments; a writer calls this before it looks anything up."""
        if self.index.stale and not len(self.index):
            with self._environment.read() as snapshot:
                rebuild_index(self.index, self.segments, snapshot)

    def close(self) -> None:
        """Gives reservations back and closes every file."""
        try:
            self.reservations.close()
            if not self._readonly and not self.segments.poisoned:
                self.copies.make_if_due()
        finally:
            self.index.close()
            self.segments.close()
