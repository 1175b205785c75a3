"""Memory images: mapped copy-on-write from a store, for whoever runs code without a hypervisor.

    from cowstore.machines import memory
    with memory.open(store, "boot") as image:
        with image.map() as ram:
            ram.view[0:4] = b"abcd"
            ram.snapshot("boot-2")
            ram.restore()

An image is read from the store once, into a sealed file in memory. Each mapping of it costs address space alone,
until a page is written: that page is then the mapping's own, and the kernel knows which those are.

Threads: any of them may call map() at any time, and different mappings have nothing to do with each other. One
mapping is plain memory, without locks: nobody may write it while its dirty(), snapshot(), restore() or close()
runs. Who does so all the same damages nothing, but gets a snapshot whose pages are of different times.

os.fork(): the child has its own copy of each mapping, own pages included, and view, dirty(), restore() and
image.map() go on there. The store is its parent's, so snapshot() raises ClosedError; the child opens the store and
the image anew.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, Self

from cowstore.errors import ClosedError, InvalidError, MachineError

from . import pages, template
from .pages import PAGE_SIZE, Numbers
from .template import Template

_PIECE = 256  # pages, 1 MiB: so many are handed to the store at once


class Description(Protocol):
    """What is known of an image; see cowstore.DeviceInfo."""

    @property
    def number(self) -> int:
        """Never used twice, whatever becomes of the name."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...


class Origin(Protocol):
    """A moment that a store holds, and what can be made of it; see cowstore.checkpoints.Origin."""

    @property
    def device(self) -> template.Memory:
        """The moment, open for reading."""
        ...

    def seal(self, name: str, pages: Any) -> Description:
        """Makes an image of the moment with pages laid over it, whole or not at all."""
        ...

    def close(self) -> None:
        """Lets the moment go."""
        ...


class Origins(Protocol):
    """Where origins come from; see cowstore.checkpoints.Checkpoints."""

    def origin(self, name: str, *, checkpoint: bool) -> Origin:
        """Of a device, or of a checkpoint's memory."""
        ...


class Store(Protocol):
    """What is needed of a store; see cowstore.Store."""

    @property
    def readonly(self) -> bool:
        """Whether nothing can be written."""
        ...

    @property
    def checkpoints(self) -> Origins:
        """Gives origins."""
        ...


def open(store: Store, name: str = "", *, checkpoint: str = "") -> MemoryImage:  # noqa: A001 - as cowstore.open
    """Takes a memory image from a store, into the memory of this host.

    Args:
        store: The store; it has to stay open for snapshots.
        name: An image, or a clone: then it is its last flushed moment.
        checkpoint: Instead of a name: a checkpoint, whose memory is meant.

    Raises:
        NotFoundError: There is no such device or checkpoint.
        InvalidError: Its size is not one of whole pages. It is not rounded: a snapshot has its origin's size.
        MachineError: There is not enough memory.
        CorruptError: A block is not what was written.
    """
    if bool(name) == bool(checkpoint):
        raise InvalidError("a memory image is that of a device or of a checkpoint", hint="name one of them")
    name = name or checkpoint
    origin = store.checkpoints.origin(name, checkpoint=bool(checkpoint))
    try:
        size = origin.device.size
        if not size or size % PAGE_SIZE:
            hint = f"make it a multiple of {PAGE_SIZE} bytes"
            raise InvalidError(f"{name!r} has {size} bytes, which are no whole pages", hint=hint)
        image = MemoryImage(name, origin, Template.build(name, origin.device))
    except BaseException:
        origin.close()
        raise
    if store.readonly:
        origin.close()  # no snapshot can be made, and nothing else is read: what it holds may be erased
    return image


class MemoryImage:
    """A memory image of this host, of which any number of mappings can be made. open() gives one.

    Closing it ends map(), and snapshots of what is mapped. The mappings themselves stay.

    Args:
        name: For messages.
        origin: The moment in the store, closed with the image.
        content: The same in memory, closed with the image.

    Attributes:
        name: What it was opened by.
        size: Bytes.
    """

    def __init__(self, name: str, origin: Origin, content: Template) -> None:
        self.name = name
        self.size = content.size
        self._origin = origin
        self._content = content
        self._lock = threading.Lock()  # the descriptor must not be closed, and be another file's, within map()

    def map(self) -> Ram:
        """A private, writable mapping of the image, as it was in the store.

        Raises:
            ClosedError: The image is closed.
            MachineError: The kernel gives no more mappings.
        """
        with self._lock:
            if self._content.fd < 0:
                raise ClosedError(f"memory image {self.name!r} is closed", hint="open it again")
            return Ram(self, self._content.map())

    def seal(self, name: str, source: Dirty) -> Description:
        """Makes an image in the store of this one and the pages of a mapping; see Ram.snapshot."""
        return self._origin.seal(name, source)

    def close(self) -> None:
        """Gives it back; harmless when done twice."""
        with self._lock:
            self._content.close()
        self._origin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Dirty:
    """The pages that a mapping has made its own, as a store takes them; see cowstore.checkpoints.Pages.

    Attributes:
        name: For messages.
        size: Bytes of the whole memory.
        view: The mapping.
        numbers: The pages.
    """

    name: str
    size: int
    view: memoryview
    numbers: Numbers

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Offset and bytes, in order."""
        for first, count in pages.runs(self.numbers):
            for start in range(first, first + count, _PIECE):
                end = min(start + _PIECE, first + count)
                # A copy: if it changed after the store has its digest, the block would be damaged for everybody.
                yield start * PAGE_SIZE, memoryview(bytes(self.view[start * PAGE_SIZE : end * PAGE_SIZE]))

    def close(self) -> None:
        """Nothing to give back."""


class Ram:
    """One private mapping of a memory image. MemoryImage.map() gives one.

    Args:
        image: What is mapped.
        mapped: The mapping, closed with this.
    """

    def __init__(self, image: MemoryImage, mapped: mmap.mmap) -> None:
        self.size = image.size
        self._image = image
        self._map: mmap.mmap | None = mapped
        self._view = memoryview(mapped)
        self._address = pages.address_of(mapped)

    @property
    def view(self) -> memoryview:
        """All of it, readable and writable; `numpy.frombuffer(ram.view, ...)` makes an array of it."""
        self._opened()
        return self._view

    def _opened(self) -> mmap.mmap:
        if self._map is None:
            raise ClosedError(f"a mapping of memory image {self._image.name!r} is closed", hint="map it again")
        return self._map

    def dirty(self) -> Numbers:
        """The numbers of the pages that were written since map() or restore(), sorted.

        A page that got the bytes it had is one of them, and one that was only read is not.

        Raises:
            MachineError: The kernel does not tell.
        """
        self._opened()
        return pages.own_pages(os.getpid(), self._address, self.size)

    def snapshot(self, name: str) -> Description:
        """Makes an image of the present content in the store; the mapping goes on, and its pages stay dirty.

        The image is there when it is complete, or not at all. The cost follows the dirty pages.

        Args:
            name: The image's name.

        Raises:
            ExistsError: The name is taken.
            ReadOnlyError: The store was opened read-only.
            ClosedError: The mapping, its memory image or the store is closed, or it is a forked child's.
        """
        return self._image.seal(name, Dirty(name, self.size, self.view, self.dirty()))

    def restore(self) -> None:
        """Goes back to the image: what was written is dropped, and its memory given back.

        Raises:
            MachineError: The kernel refuses it.
        """
        try:
            self._opened().madvise(mmap.MADV_DONTNEED)
        except OSError as error:
            raise MachineError(
                f"memory image {self._image.name!r} cannot be restored: {error.strerror}",
                hint="memory that is locked, by mlockall() for example, cannot be given back",
            ) from error

    def close(self) -> None:
        """Gives it back, or leaves that to the last one who has a part of its view; harmless when done twice."""
        mapped, self._map = self._map, None
        view, self._view = self._view, memoryview(b"")
        if mapped is None:
            return
        try:
            view.release()
            mapped.close()
        except BufferError:
            pass  # somebody's array; what it shows must not become an access to nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
