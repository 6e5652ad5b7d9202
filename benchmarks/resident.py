"""Memory of a process."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["held_bytes", "resident_bytes", "resident_peak"]

_SELF = Path("/proc/self/status")
_HELD = ("RssAnon", "RssShmem", "VmSwap")


def resident_bytes() -> int | None:
    """Return the resident set now, in bytes; None where the system does not tell."""
    return _fields(_SELF).get("VmRSS")


def held_bytes(status: Path = _SELF) -> int | None:
    """Return what a process holds and nobody can take from it, in bytes; None where unknown.

    That is all but pages of files (libraries, mapped weights): the system drops those from the
    resident set when it needs memory, so a resident set that stays may hide what grows.
    """
    fields = _fields(status)
    return sum(fields[name] for name in _HELD) if fields.keys() >= {*_HELD} else None


def resident_peak() -> int | None:
    """Return the largest resident set since the program started, in bytes; None where unknown.

    Linux's ``getrusage`` would carry a parent's peak over into the child, ``VmHWM`` does not.
    """
    peak = _fields(_SELF).get("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _fields(status: Path) -> dict[str, int]:
    """Return what a process's status tells in kB, in bytes; nothing where there is none."""
    if not status.is_file():
        return {}
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    parts = [line.split() for line in lines]
    return {part[0][:-1]: int(part[1]) * 1024 for part in parts if part[-1:] == ["kB"]}
