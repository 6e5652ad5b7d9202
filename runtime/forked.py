"""What a process that was forked must not touch: it belongs to the process that opened it.

A forked process has the memory of its parent and none of its threads. Locks may be held by threads
that are gone, engines have lost theirs, and a connection of SQLite is the parent's alone. Where
other threads were at work, one may have held SQLite's own lock, and opening anew waits for ever.
"""

from __future__ import annotations

import os
import threading

from recallseg.engines.errors import ForkedError

__all__ = ["Opener", "OwnLock"]


class Opener:
    """The process that opened something.

    Parameters
    ----------
    what : that was opened, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what, self._process = what, os.getpid()

    @property
    def elsewhere(self) -> bool:
        """Whether this is another process: one that was forked from it."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise ForkedError in a process that was forked from it."""
        if self.elsewhere:
            raise ForkedError(
                f"{self._what} was opened by process {self._process}, from which this process was "
                "forked, and cannot be used here. Fork before anything is opened (multiprocessing: "
                "start method 'spawn' or 'forkserver'), or open it again in this process if no "
                "other thread was at work when it was forked."
            )


class OwnLock:
    """A lock that its thread may take again, and that a forked process is refused, not kept from.

    Parameters
    ----------
    opener : of what it guards.
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._opener.check()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
