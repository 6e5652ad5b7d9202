"""The reference, made from what the program itself says: a page's text by its place in the site."""

from __future__ import annotations

from configuration import configuration_page
from header import header_page
from metrics import metrics_page
from options import command_pages, status_page
from public import python_pages
from schemas import schemas_page

__all__ = ["pages"]


def pages() -> dict[str, str]:
    """Return all pages of the reference."""
    return {
        "reference/index.md": INDEX,
        **command_pages(),
        "reference/status.md": status_page(),
        "reference/configuration.md": configuration_page(),
        "reference/metrics.md": metrics_page(),
        "reference/records.md": schemas_page(),
        "reference/c.md": header_page(),
        **python_pages(),
    }


INDEX = """# Reference

Made from the source of this version by `scripts/build-docs`, so it says what the program does.

| | |
|---|---|
| [Commands](commands.md) | every command with every option |
| [Exit status](status.md) | what a command's status means |
| [Configuration of services](configuration.md) | every setting of the TOML file |
| [Metrics](metrics.md) | what Prometheus gets |
| [Records](records.md) | JSON that is written, and its schemas |
| [C](c.md) | `recallseg.h` |
| [Python](python/index.md) | every public name |
"""
