"""Folders outside of bundles and libraries: caches, and the bundles that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["SHIPPED", "cache_folder", "shipped_bundles", "state_folder"]

SHIPPED = Path(__file__).parent / "bundles"
"""Folder of the bundles that come with the package."""


def cache_folder() -> Path:
    """Return where plans and other derived files go: ``$RECALLSEG_CACHE``, else the user's cache.

    The folder may not exist yet. It is never inside an installed package.
    """
    chosen = os.environ.get("RECALLSEG_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("recallseg", appauthor=False)


def state_folder() -> Path:
    """Return where this user's own knowledge lies: ``$RECALLSEG_STATE``, else the user's state.

    What is received from others never reaches it, so what stands there is the user's word: which
    search indexes were built here, which bundles were named. The folder may not exist yet.
    """
    chosen = os.environ.get("RECALLSEG_STATE")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_state_path("recallseg", appauthor=False)


def shipped_bundles() -> tuple[str, ...]:
    """Return the names that ``Bundle.open`` knows without a folder."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/manifest.json")))
