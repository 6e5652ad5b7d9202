"""The pages of the repository: README, docs, and the others that people read."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(
    r"^(<!-- run -->\n)?^( *)```(\w*)[^\n]*\n(.*?)^\2```$", re.DOTALL | re.MULTILINE
)


class Block(NamedTuple):
    """A fenced block: its language, its text, and whether it is marked to be run."""

    language: str
    text: str
    run: bool


def pages() -> list[Path]:
    """Every page that is kept in git."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, from its top."""
    for run, indent, language, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        flush = "\n".join(line.removeprefix(indent) for line in text.split("\n"))
        yield Block(language, flush, bool(run))


def anchors(page: Path) -> set[str]:
    """Where links can lead within a page, as both GitHub and the site name headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found = set()
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", title).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found
