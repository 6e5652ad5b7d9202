"""Text that may hold anything, such as a file's name, made fit to be written and shown."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

__all__ = ["json_text", "printable"]

_NOT_ASCII_PRINTABLE = re.compile(r"[^ -~]")


def json_text(value: Any, *, indent: int | None = 1) -> str:
    """Return JSON that can be encoded as UTF-8 and shown on a terminal.

    What cannot be printed is escaped as JSON writes any character, so a reader gets the same text
    back. Bytes of a file name that are no UTF-8 are lone surrogates in Python (PEP 383).

    Raises
    ------
    ValueError
        For NaN and infinity, which JSON does not know.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return printable(text, lines=True)


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return text that can be encoded, and that does nothing to the terminal that shows it.

    Escaped as ``\u001b`` is what is no letter, sign or space: control characters, which move the
    cursor or begin another line of a log, marks that turn the direction of writing, and lone
    surrogates.

    Parameters
    ----------
    lines : leave newlines as they are.
    """
    return _NOT_ASCII_PRINTABLE.sub(lambda found: _shown(found[0], lines), str(text))


def _shown(character: str, lines: bool) -> str:
    if character == "\n":
        return "\n" if lines else r"\n"
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
