"""What this user did here, kept where nothing received from others ever comes: the state folder.

A received library cannot be told from one's own by looking at it. What would be dangerous to take
from a stranger (a search index, which native code maps; the path of a bundle, which is opened) is
taken only if it stands here. Losing this folder costs an index's time and naming a bundle again.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from recallseg.engines.durable import replace_file
from recallseg.engines.inside import read_inside, remove_inside
from recallseg.engines.ownership import foreign
from recallseg.engines.paths import state_folder

__all__ = ["forget_index", "known_bundles", "knows_index", "remember_bundle", "remember_index"]

_INDEXES, _BUNDLES = "indexes", "bundles"
_MOST = 2**20
_MOST_PLACES = 100


def remember_index(digest: bytes, found: os.stat_result) -> None:
    """Note that a search index was built here: the SHA-256 of its file, and which file that is."""
    _write(_INDEXES, digest.hex(), _identity(found))


def knows_index(digest: bytes, found: os.stat_result) -> bool | None:
    """Whether a file is an index that was built here.

    True: this very file, unchanged since (its change time cannot be set). None: one with that
    digest was, so that it is enough to compare the digest. False: none was.
    """
    noted = _read(_INDEXES, digest.hex())
    if noted is None:
        return False
    return True if noted == _identity(found) else None


def forget_index(digest: bytes) -> None:
    """Forget an index that was replaced."""
    with suppress(OSError):
        remove_inside(state_folder(), f"{_INDEXES}/{digest.hex()}")


def remember_bundle(identity: str, path: Path) -> None:
    """Note where this user had a bundle, the newest place first."""
    place = str(path.absolute())
    known = known_bundles(identity)
    if not known or known[0] != place:
        _write(_BUNDLES, identity, [place, *(p for p in known if p != place)][:_MOST_PLACES])


def known_bundles(identity: str) -> list[str]:
    """Return the folders where this user had a bundle, newest first."""
    noted = _read(_BUNDLES, identity)
    return [place for place in noted if isinstance(place, str)] if isinstance(noted, list) else []


def _identity(found: os.stat_result) -> list[int]:
    times = [found.st_mtime_ns, found.st_ctime_ns]
    return [found.st_dev, found.st_ino, found.st_size, *times]


def _read(kind: str, name: str) -> object:
    """Return what is noted; None if nothing is, or others could have written it."""
    if not name.isalnum():
        return None
    try:
        root = state_folder()
        for place in (root, root / kind, root / kind / name):
            found = place.lstat() if place != root else place.stat()
            if foreign(place, found):
                return None
        noted: object = json.loads(read_inside(root, f"{kind}/{name}", _MOST))
        return noted
    except (OSError, ValueError, RecursionError):
        return None


def _write(kind: str, name: str, value: object) -> None:
    """Note something; where there is no home that can be written, nothing is known later."""
    if not name.isalnum():
        return
    folder = state_folder() / kind
    with suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        replace_file(folder / name, json.dumps(value).encode(), mode=0o600)
