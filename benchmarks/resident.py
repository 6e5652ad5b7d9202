"""Resident memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["resident_bytes", "resident_peak"]

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int | None:
    """Return the resident set now, in bytes; None where the system does not tell."""
    return _field("VmRSS:")


def resident_peak() -> int | None:
    """Return the largest resident set since the program started, in bytes; None where unknown.

    Linux's ``getrusage`` would carry a parent's peak over into the child, ``VmHWM`` does not.
    """
    peak = _field("VmHWM:")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _field(name: str) -> int | None:
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None
