"""Let griffe read our docstrings: ``name : what it is`` is a description and no type."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?([^`]+)`")
ENTRY = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*) ?: (.+)$")


def as_numpydoc(text: str) -> str:
    """Move what stands behind the colon of an entry to a line of its own; make roles code."""
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
            lines += [names, f"    {said}"]
        else:
            lines.append(line)
    return ROLE.sub(r"`\1`", "\n".join(lines))


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_numpydoc(obj.docstring.value)
