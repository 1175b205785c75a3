"""From an error to one line and one exit code.

The library's errors carry facts and know nothing of processes; what a shell script gets to see of them is
decided here, in one table. A class without a row of its own has the code of its nearest ancestor.
"""

from __future__ import annotations

import errno

from cowstore import errors

OK = 0
OTHER = 1
USAGE = 2
NO_SPACE = 7
MACHINE = 12
HUNG_UP = 129
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

CODES: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.StoreError, OTHER, "any other failure"),
    (errors.InvalidError, USAGE, "a wrong command line, a bad name, a range outside the device"),
    (errors.NotFoundError, 3, "no device, store or directory of that name"),
    (errors.ExistsError, 4, "the name or the file is taken"),
    (errors.InUseError, 5, "the device or the store is held by another process"),
    (errors.CorruptError, 6, "stored bytes are not what was written"),
    (errors.NoSpaceError, NO_SPACE, "the file system is full"),
    (errors.ReadOnlyError, 8, "a write to an image, or to a store that is read-only"),
    (errors.FormatError, 9, "not a store, or one of an unknown version"),
    (errors.SourceError, 10, "an import source cannot be read, or changed meanwhile"),
    (errors.PoisonedError, 11, "a write or sync failed: the disk may be failing"),
    (errors.MachineError, MACHINE, "a machine, its hypervisor or the system inside did not do what was asked"),
)
"""Each class of error, its exit code, and what the code means; the reference is made from it."""

SIGNALS: tuple[tuple[int, str], ...] = (
    (HUNG_UP, "the terminal was closed"),
    (INTERRUPTED, "interrupted from the keyboard"),
    (BROKEN_PIPE, "whoever read the output has gone"),
    (TERMINATED, "ended by a signal"),
)
"""Codes that shells know: 128 and the number of a signal."""


def code_of(error: BaseException) -> int:
    """The exit code for an error."""
    codes = {kind: code for kind, code, _ in CODES}
    for kind in type(error).__mro__:
        if kind in codes:
            return codes[kind]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE
    return OTHER


def line_of(error: BaseException) -> str:
    """The one line that tells a person what went wrong and, in parentheses, what to do about it."""
    if isinstance(error, errors.StoreError):
        message, hint = str(error), error.hint
    elif isinstance(error, OSError) and error.strerror:
        message, hint = error.strerror, ""
        if error.filename is not None:
            message = f"{error.filename}: {message}"
    elif isinstance(error, MemoryError):
        message, hint = "out of memory", ""
    else:
        message = f"unexpected {type(error).__name__}: {error}"
        hint = "this is a bug in cowstore; --debug shows where"
    line = f"cowstore: {message} ({hint})" if hint else f"cowstore: {message}"
    return " ".join(line.split())
