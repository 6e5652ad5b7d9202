"""What is no fault of an input: a disk that does not give or take it, and memory that is short.

Who sets an input aside, or calls it damaged, asks here first: the same input may be read in a
minute. What the machine lacks is told as that.
"""

from __future__ import annotations

import errno
import sqlite3

from recallseg.engines.errors import DeviceMemoryError, HostMemoryError

__all__ = [
    "SHORT_OF_MEMORY",
    "SHORT_OF_MEMORY_ERRORS",
    "SQLITE_BUSY",
    "SQLITE_CANNOT_OPEN",
    "SQLITE_CORRUPT",
    "SQLITE_FULL",
    "SQLITE_INTERRUPT",
    "SQLITE_IO",
    "SQLITE_READ_ONLY",
    "machine_fault",
    "sqlite_code",
]

SHORT_OF_MEMORY = errno.ENOMEM
"""What :func:`machine_fault` says of memory: the input may also be what needs too much of it."""
SHORT_OF_MEMORY_ERRORS = (MemoryError, HostMemoryError, DeviceMemoryError)
_NUMBERS = {
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENXIO, errno.ENODEV),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR),
    *(errno.EACCES, errno.EPERM),
    # Of file systems on a network.
    *(errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN, errno.ECONNRESET),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}
SQLITE_BUSY, SQLITE_READ_ONLY, SQLITE_INTERRUPT, SQLITE_IO = 5, 8, 9, 10
SQLITE_CORRUPT, SQLITE_FULL, SQLITE_CANNOT_OPEN = 11, 13, 14
_SQLITE_SAYS = {
    "locked": SQLITE_BUSY,
    "attempt to write a readonly database": SQLITE_READ_ONLY,
    "interrupted": SQLITE_INTERRUPT,
    "disk I/O error": SQLITE_IO,
    "malformed": SQLITE_CORRUPT,
    "database or disk is full": SQLITE_FULL,
    "unable to open database": SQLITE_CANNOT_OPEN,
}
_SQLITE_LOCKED = 6
_OF_SQLITE = {
    SQLITE_BUSY: errno.EAGAIN,
    SQLITE_READ_ONLY: errno.EROFS,
    SQLITE_IO: errno.EIO,
    SQLITE_FULL: errno.ENOSPC,
}


def sqlite_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code; a table that is locked counts as busy. 0: not known.

    Python 3.10 gives no codes, but SQLite's own words.
    """
    code: int | None = getattr(error, "sqlite_errorcode", None)
    if code is None:
        said = str(error)
        return next((code for words, code in _SQLITE_SAYS.items() if words in said), 0)
    return SQLITE_BUSY if code & 0xFF == _SQLITE_LOCKED else code & 0xFF


def machine_fault(error: BaseException | None) -> int:
    """Return the number of the machine's error that caused another; 0 if there is none.

    A file that the disk does not give, or may not be read by this user, and memory that is short
    say nothing about what is in it.
    """
    while error is not None:
        if isinstance(error, SHORT_OF_MEMORY_ERRORS):
            return SHORT_OF_MEMORY
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return error.errno
        if isinstance(error, sqlite3.Error) and (found := _OF_SQLITE.get(sqlite_code(error))):
            return found
        error = error.__cause__
    return 0
