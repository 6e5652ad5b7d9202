"""Durable writes, the writer's lock, and errors of the file system that say what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recallseg.engines.errors import (
    LibraryCorruptError,
    LibraryError,
    LibraryLockedError,
    LibraryWriteError,
)
from recallseg.engines.inside import open_inside
from recallseg.engines.machine_fault import machine_fault

__all__ = ["NOT_GIVEN", "WriterLock", "advice", "unreadable", "write_all", "writing"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NOTE_BYTES = 200
NOT_GIVEN = (
    "The disk does not give it; it need not be damaged. Try again, and look at the disk, or the "
    "network to it, if that stays so."
)
RESERVE_BYTES = 1 << 18
"""What the journal of a removal takes is less."""


def advice(error: OSError) -> str:
    """Return how to mend what the file system said; empty if that is not known."""
    if error.errno in _FULL:
        return "The disk or quota is full: free some space."
    if error.errno in _DENIED:
        return "Grant the permission, or copy the library to a folder that can be written."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Close files that this process does not need, or raise the limit (ulimit -n)."
    if error.errno == errno.ENOMEM:
        return "Free some memory."
    return ""


def unreadable(what: str, error: OSError, mend: str) -> LibraryError:
    """Return the error for a stored file that cannot be read.

    LibraryCorruptError with ``mend`` if the file is at fault; where the disk does not give it, or
    permission, memory or open files lack, a LibraryError that says so: what is stored is not known
    to be damaged, and must not be removed.
    """
    said = error.strerror or str(error)
    if machine_fault(error):
        hint = f"{advice(error)} It is not damaged." if advice(error) else NOT_GIVEN
        return LibraryError(f"{what} cannot be read: {said}. {hint}")
    return LibraryCorruptError(f"{what} cannot be read: {said}. {mend}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while writing ``path`` into a LibraryWriteError."""
    try:
        yield
    except OSError as error:
        hint = f"{advice(error)} What was stored before is unharmed.".lstrip()
        raise LibraryWriteError(
            f"cannot write {path}: {error.strerror or error}. {hint}"
        ) from error


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; ``os.pwrite`` may write less than it is given."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


class WriterLock:
    """The right to write one library: an advisory lock that the kernel drops when its holder dies.

    The file stays behind, with who held the lock last; only the lock on it counts.

    Raises
    ------
    LibraryLockedError
        If another process, or another Library object of this one, holds it.
    LibraryWriteError
        If the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with writing(path):
            descriptor = open_inside(path.parent, path.name, os.O_RDWR | os.O_CREAT)
        self._descriptor = descriptor
        # A Library that is dropped without close() must not keep others out until the process ends.
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            with writing(path):
                holder = _lock(descriptor)
        except BaseException:
            self._close()
            raise
        if holder is not None:
            self._close()
            raise LibraryLockedError(
                f"{path.parent} is being written by {holder}. Wait until it is done or close that "
                "library; reading is possible meanwhile."
            )

    def hold_room(self) -> None:
        """Hold room on the disk back, in the lock's file, that a removal needs when it is full."""
        with suppress(OSError):  # there is none, and then nothing can be held back
            os.posix_fallocate(self._descriptor, 0, RESERVE_BYTES)

    def give_room(self) -> bool:
        """Give back what :meth:`hold_room` holds; return whether that was anything."""
        with suppress(OSError):
            if os.fstat(self._descriptor).st_size >= RESERVE_BYTES:
                os.ftruncate(self._descriptor, _NOTE_BYTES)
                return True
        return False

    def release(self) -> None:
        """Let others write. Harmless when called again."""
        self._close()


def _lock(descriptor: int) -> str | None:
    """Lock a file and note in it who did so; return who holds it if that is another."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        found = os.pread(descriptor, _NOTE_BYTES, 0).partition(b"\n")[0]
        return found.decode(errors="replace").strip("\0 ") or "another process"
    note = f"process {os.getpid()} on {socket.gethostname()}\n".encode()
    with suppress(OSError):  # it is for a message only: a full disk must not refuse a removal
        os.pwrite(descriptor, note, 0)
    return None
