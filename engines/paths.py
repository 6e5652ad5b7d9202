"""Folders outside of bundles and libraries: caches, and the bundles that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from recallseg.engines.errors import InputError

__all__ = ["SHIPPED", "cache_folder", "shipped_bundles", "state_folder"]

SHIPPED = Path(__file__).parent / "bundles"
"""Folder of the bundles that come with the package."""


def cache_folder() -> Path:
    """Return where plans and other derived files go: ``$RECALLSEG_CACHE``, else the user's cache.

    The folder may not exist yet. It is never inside an installed package.
    """
    chosen = os.environ.get("RECALLSEG_CACHE")
    if chosen:
        return _expanded("RECALLSEG_CACHE", chosen)
    return platformdirs.user_cache_path("recallseg", appauthor=False)


def state_folder() -> Path:
    """Return where this user's own knowledge lies: ``$RECALLSEG_STATE``, else the user's state.

    What is received from others never reaches it, so what stands there is the user's word: which
    search indexes were built here, which bundles were named. The folder may not exist yet.
    """
    chosen = os.environ.get("RECALLSEG_STATE")
    if chosen:
        return _expanded("RECALLSEG_STATE", chosen)
    return platformdirs.user_state_path("recallseg", appauthor=False)


def _expanded(variable: str, chosen: str) -> Path:
    """Return a folder that may begin with a user's home; InputError if there is no such user."""
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise InputError(f"{variable} is '{chosen}', and nobody here has such a home.") from error


def shipped_bundles() -> tuple[str, ...]:
    """Return the names that ``Bundle.open`` knows without a folder."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/manifest.json")))
