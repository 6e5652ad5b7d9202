"""Pieces of Markdown."""

from __future__ import annotations

import inspect
import re

__all__ = ["attributes", "cell", "flowing"]

ENTRY = re.compile(r"^(\w+(?:, \w+)*) ?: (.+(?:\n    .+)*)", re.MULTILINE)


def cell(text: str) -> str:
    """Return text for a cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def flowing(text: str) -> str:
    """Return a docstring's text as Markdown, its roles and double backticks as code."""
    text = inspect.cleandoc(text)
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def attributes(docstring: str) -> dict[str, str]:
    """Return what a class's docstring says of each of its attributes."""
    body = inspect.cleandoc(docstring or "").partition("Attributes\n----------\n")[2]
    found = {}
    for names, said in ENTRY.findall(body):
        for name in names.split(", "):
            found[name] = flowing(" ".join(said.split()))
    return found
