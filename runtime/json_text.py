"""JSON for records and answers: UTF-8 whatever bytes a file name is made of."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["json_text", "printable"]


def json_text(value: Any, *, indent: int | None = 1) -> str:
    """Return JSON that can be encoded as UTF-8.

    Bytes of a file name that are no UTF-8 are lone surrogates in Python (PEP 383). They are escaped
    as JSON writes any character, so a reader gets the same name back.

    Raises
    ------
    ValueError
        For NaN and infinity, which JSON does not know.
    """
    return printable(json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False))


def printable(text: object) -> str:
    """Return text that can be encoded: lone surrogates are written as escapes."""
    return str(text).encode("utf-8", "backslashreplace").decode()
