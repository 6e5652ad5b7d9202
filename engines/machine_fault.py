"""What is no fault of an input: a disk that does not give or take it, and memory that is short.

Who sets an input aside, or calls it damaged, asks here first: the same input may be read in a
minute. What the machine lacks is told as that.
"""

from __future__ import annotations

import errno

from recallseg.engines.errors import DeviceMemoryError, HostMemoryError

__all__ = ["SHORT_OF_MEMORY", "SHORT_OF_MEMORY_ERRORS", "machine_fault"]

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
        error = error.__cause__
    return 0
