"""SHA-256 of files and of JSON values: what every artefact on disk is checked against."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from recallseg.engines.reading import naming

__all__ = ["digest_file", "digest_json", "digest_stream"]


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as lower-case hex."""
    with naming(path), path.open("rb") as file:
        return digest_stream(file)


def digest_stream(file: BinaryIO) -> str:
    """Return the SHA-256 of what is left to read, as lower-case hex."""
    state = hashlib.sha256()
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return state.hexdigest()


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form: sorted keys, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
