"""What mkdocs runs: pages made from the source, and files outside of docs/ that pages link to."""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "build" / "docs")]

import reference  # noqa: E402 - from the folder of this file

LINK = re.compile(r"(\]\()([^)#\s<>]+)((?:#[^)\s]*)?\))")
OUTSIDE = "source"
"""Folder of the site for files of the repository that are no pages of docs/."""


def on_config(config: Any) -> Any:
    """Make the reference's pages, and give them their place."""
    config.pages_made = reference.pages()
    titles: dict[str, list[Any]] = {}
    for page in config.pages_made:
        if page.startswith("reference/python/"):
            titles.setdefault("Python", []).append(page)
    rest = [page for page in config.pages_made if not page.startswith("reference/python/")]
    python = titles["Python"]
    config.nav.append({"Reference": [*rest, {"Python": python}]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that were made, and what is linked outside of docs/."""
    for path, text in config.pages_made.items():
        files.append(File.generated(config, path, content=text))
    for path in sorted((ROOT / "docs" / "schemas").glob("*.json")):
        files.append(File.generated(config, f"schemas/{path.name}", abs_src_path=str(path)))
    wanted = set()
    for page in list(files.documentation_pages()):
        for _, link, _ in LINK.findall(page.content_string):
            target = _outside(page.src_uri, link)
            if target is not None:
                wanted.add(target)
    for target in sorted(wanted):
        text = (ROOT / target).read_text(encoding="utf-8")
        if target.endswith(".md"):
            text = _relinked(text, target, Path(target).parent.as_posix())
        added = File.generated(config, f"{OUTSIDE}/{target}", content=text)
        if target.endswith(".md"):
            added.inclusion = added.inclusion.NOT_IN_NAV
        files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links that leave docs/ to the copies of what they lead to."""
    here = PurePosixPath(page.file.src_uri).parent

    def changed(match: re.Match[str]) -> str:
        target = _outside(page.file.src_uri, match[2])
        if target is None:
            return match[0]
        return f"{match[1]}{relpath(f'{OUTSIDE}/{target}', here)}{match[3]}"

    return LINK.sub(changed, markdown)


def _outside(page: str, link: str) -> str | None:
    """Return the file outside docs/, from the repository's root, that a page's link leads to."""
    if "://" in link or link.startswith(("mailto:", "/")) or page.startswith(f"{OUTSIDE}/"):
        return None
    target = normpath(f"docs/{PurePosixPath(page).parent}/{link}")
    if target.startswith("docs/") or not (ROOT / target).is_file():
        return None
    return target


def _relinked(text: str, source: str, folder: str) -> str:
    """Return a page from outside docs/ with links that work from its copy; others lose theirs."""

    def changed(match: re.Match[str]) -> str:
        link = match[2]
        if "://" in link or link.startswith("mailto:"):
            return match[0]
        target = normpath(f"{folder}/{link}")
        if target.startswith("docs/"):
            page = relpath(target.removeprefix("docs/"), f"{OUTSIDE}/{folder}")
            return f"{match[1]}{page}{match[3]}"
        return "](" + relpath("index.md", f"{OUTSIDE}/{folder}") + ")"

    return LINK.sub(changed, text)
