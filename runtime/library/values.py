"""Values read from a catalog: what has another type or range than we write is damage.

SQLite keeps any type in any column, and a stranger's catalog may hold anything; from here on a
number is a number in its range, and a text is one that could have been handed in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from recallseg.engines.errors import InputError, LibraryCorruptError

__all__ = ["binary", "hex_digest", "integer", "text", "timestamp"]

LARGEST = 2**53
"""Of any count or number: whole numbers up to here are exact in every format we write."""


def integer(value: Any, what: str, low: int = 0, high: int = LARGEST) -> int:
    """Return a whole number from ``low`` to ``high``; raises LibraryCorruptError otherwise."""
    if type(value) is not int or not low <= value <= high:
        raise _wrong(value, what, f"a whole number from {low} to {high}")
    return value


def text(value: Any, what: str, check: Callable[[Any], str]) -> str:
    """Return what ``check`` (of ``runtime.checks``) takes; raises LibraryCorruptError otherwise."""
    try:
        return check(value)
    except InputError as error:
        raise LibraryCorruptError(f"the catalog is damaged: {what}: {error}") from error


def binary(value: Any, what: str, size: int) -> bytes:
    """Return ``size`` bytes; raises LibraryCorruptError otherwise."""
    if type(value) is not bytes or len(value) != size:
        raise _wrong(value, what, f"{size} bytes")
    return value


def hex_digest(value: Any, what: str) -> str:
    """Return a SHA-256 as 64 hex digits; raises LibraryCorruptError otherwise."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise _wrong(value, what, "64 hex digits")
    return value


def timestamp(value: Any, what: str) -> str:
    """Return a time as ISO 8601 text; raises LibraryCorruptError otherwise."""
    if not isinstance(value, str) or not re.fullmatch("[0-9T:.+Z-]{10,40}", value):
        raise _wrong(value, what, "a time in ISO 8601")
    return value


def _wrong(value: Any, what: str, expected: str) -> LibraryCorruptError:
    return LibraryCorruptError(
        f"the catalog is damaged: {what} is {ascii(value)[:80]}, expected {expected}. Restore the "
        "library from a backup, or ask for it anew from who made it."
    )
