"""Let griffe read our docstrings: ``name : what it is`` is a description and no type."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?([^`]+)`")
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*) ?: (.+)$")


def as_numpydoc(text: str) -> str:
    """Give each name of an entry a line of its own, and what is said of it; make roles code."""
    lines: list[str] = []
    inside = False
    every = text.split("\n")
    for at, line in enumerate(every):
        underlined = at + 1 < len(every) and re.fullmatch(r"-{3,}", every[at + 1])
        if underlined:
            inside = line in ("Parameters", "Other Parameters", "Attributes")
        found = ENTRY.match(line) if inside else None
        if found:
            names, said = found.groups()
            rest = takewhile(lambda each: each.startswith("    "), every[at + 1 :])
            whole = [f"    {said}", *rest]
            for name in names.split(", "):
                lines += [name, *whole]
        elif not (inside and line.startswith("    ")):
            lines.append(line)
    return ROLE.sub(r"`\1`", "\n".join(lines))


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_numpydoc(obj.docstring.value)
