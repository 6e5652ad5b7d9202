"""A library as earlier versions made it: what identifies is in its tags, and not hashed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from recallseg.runtime.library.records import exemplar_digest

__all__ = ["in_the_clear"]


def in_the_clear(library: Path, value: str) -> None:
    """Write tags as an earlier version did, with the digests that belong to them."""
    database = sqlite3.connect(library / "library.sqlite")
    database.execute("DELETE FROM settings WHERE name = 'identifiers'")
    database.execute("UPDATE tags SET value = ? WHERE name = 'patient'", (value,))
    total = 0
    for number, key, content in database.execute("SELECT id, key, content FROM exemplars"):
        tags = dict(
            database.execute(
                "SELECT name, value FROM tags WHERE exemplar = ? ORDER BY name", (number,)
            )
        )
        digest = exemplar_digest(key, content, tags)
        total += int.from_bytes(digest, "big")
        database.execute("UPDATE exemplars SET digest = ? WHERE id = ?", (digest, number))
    database.execute("UPDATE state SET digest_sum = ?", (f"{total % 2**256:x}",))
    database.commit()
    database.close()
