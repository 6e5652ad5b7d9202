"""Gives back to the system what a service's process has freed."""

from __future__ import annotations

import ctypes
from time import monotonic

__all__ = ["FreeMemory"]

EVERY_S = 60.0


class FreeMemory:
    """What the C library holds free between blocks that are in use; give it back once a minute.

    glibc returns by itself only what lies at the end of an arena. Threads that come and go, as
    those of services do, leave free pages elsewhere: a process whose blocks in use stay the same
    holds more pages with each hour (docs/device/evidence.md, "Services together"). Where the C
    library has no ``malloc_trim`` (musl, macOS), nothing is done.

    Parameters
    ----------
    every_s : seconds from one time to the next; asked earlier, nothing is done.
    """

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if self._trim is not None:
            self._trim.argtypes = [ctypes.c_size_t]
        self._every_s = every_s
        self._next = monotonic() + every_s

    def give_back(self) -> None:
        """Do it, if it is time; other threads that allocate may wait some milliseconds for it."""
        if self._trim is not None and monotonic() >= self._next:
            self._trim(0)
            self._next = monotonic() + self._every_s
