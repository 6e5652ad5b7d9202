"""The recipe file: read once, passed on as plain tables."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

__all__ = ["load_recipe"]


def load_recipe(path: Path | None = None) -> dict[str, Any]:
    """Read a recipe; without a path the one that made the shipped weights."""
    source = path or Path(__file__).with_name("config.toml")
    # The parser joined the standard library with Python 3.11; before, it is a package of its own.
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    recipe: dict[str, Any] = toml.loads(source.read_text(encoding="utf-8"))
    return recipe
