"""Durable writes, the writer's lock, and errors of the file system that say what to do."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recallseg.engines.errors import LibraryLockedError, LibraryWriteError
from recallseg.engines.inside import open_inside

__all__ = ["WriterLock", "write_all", "writing"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while writing ``path`` into a LibraryWriteError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            hint = "The disk or quota is full: free some space. What was stored before is unharmed."
        elif error.errno in _DENIED:
            hint = "Grant write permission, or copy the library to a folder that can be written."
        else:
            hint = "What was stored before is unharmed."
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
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = (
                os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            )
            os.close(descriptor)
            raise LibraryLockedError(
                f"{path.parent} is being written by {holder}. Wait until it is done or close that "
                "library; reading is possible meanwhile."
            ) from error
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        # A Library that is dropped without close() must not keep others out until the process ends.
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Let others write. Harmless when called again."""
        self._close()
