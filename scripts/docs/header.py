"""The C interface, from its header."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["FUNCTION", "header_page"]

HEADER = Path(__file__).parents[2] / "engines" / "native" / "capi" / "include" / "recallseg.h"
SECTION = re.compile(r"^/\* ---- (.+?) ---- \*/$", re.MULTILINE)
FUNCTION = re.compile(r"^RECALLSEG_API [^;]*?\b(recallseg_\w+)\(", re.MULTILINE)


def header_page() -> str:
    """Return the page of the header, cut at its own headings."""
    head, *rest = SECTION.split(HEADER.read_text(encoding="utf-8"))
    out = [
        "# C: recallseg.h\n",
        "How it is built, linked and used is in [From C and C++](../device/c.md).\n",
        "| functions | |",
        "|---|---|",
    ]
    parts = list(zip(rest[::2], rest[1::2], strict=True))
    for title, text in parts:
        names = ", ".join(f"`{name}`" for name in FUNCTION.findall(text))
        out.append(f"| [{_plain(title)}](#{_slug(title)}) | {names} |")
    comment, _, constants = head.partition("*/")
    told = [line.strip().removeprefix("/*").strip(" *") for line in comment.splitlines()]
    out += ["", "\n".join(told).strip(), "", "## Constants and handles\n"]
    out += ["```c", constants.strip(), "```", ""]
    for title, text in parts:
        out += [f"## {_plain(title)} {{#{_slug(title)}}}\n", "```c", text.strip(), "```", ""]
    return "\n".join(out)


def _plain(title: str) -> str:
    return title.split(":")[0]


def _slug(title: str) -> str:
    return re.sub(r"\W+", "-", _plain(title).lower()).strip("-")
