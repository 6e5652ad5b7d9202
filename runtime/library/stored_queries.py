"""Queries for what a library's catalog records of files, and whether its rows are whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.checks import check_key
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.exemplar import Exemplar
from recallseg.runtime.library.records import StoredIndex, exemplar_digest
from recallseg.runtime.library.values import binary, integer, text

__all__ = ["StoredQueries"]


class StoredQueries:
    """The part of the catalog's queries that looks after what is stored."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # Rows

    def exemplar_digest(self, number: int) -> bytes:
        """Return the recorded digest of what was annotated."""
        value = self.database.value("SELECT digest FROM exemplars WHERE id = ?", (number,))
        return binary(value, "the digest of an exemplar", 32)

    def check_rows(self, page: Sequence[tuple[int, Exemplar]], embedding_dim: int) -> list[str]:
        """Return what is wrong with exemplars' rows: digests, embeddings, memories."""
        problems = []
        for number, exemplar in page:
            if exemplar_digest(
                exemplar.key, exemplar.content, exemplar.tags
            ) != self.exemplar_digest(number):
                problems.append(
                    f"exemplar '{exemplar.key}': key, content or tags do not match its digest"
                )
            rows = self.database.execute(
                "SELECT embedding, digest FROM encodings WHERE generation = (SELECT generation "
                "FROM state) AND exemplar = ?",
                (number,),
            )
            if (
                len(rows) != 1
                or not isinstance(rows[0][0], bytes)
                or len(rows[0][0]) != 4 * embedding_dim
            ):
                problems.append(
                    f"exemplar '{exemplar.key}' has no embedding of {embedding_dim} numbers"
                )
            elif hashlib.sha256(rows[0][0]).digest() != rows[0][1]:
                problems.append(
                    f"the embedding of exemplar '{exemplar.key}' does not match its digest"
                )
            stored = self.database.value(
                "SELECT count(*) FROM memories WHERE generation = (SELECT generation FROM state) "
                "AND exemplar = ?",
                (number,),
            )
            if stored != len(exemplar.structures):
                problems.append(
                    f"exemplar '{exemplar.key}' has {stored} memories of "
                    f"{len(exemplar.structures)} structures"
                )
        return problems

    # Files

    def stored_index(self, structure: int, present: bool) -> StoredIndex | None:
        """Return what is recorded of a structure's index file, or None."""
        rows = self.database.execute(
            "SELECT revision, last, count, file, bytes, quick, digest FROM indexes WHERE "
            "structure = ? AND present = ?",
            (structure, int(present)),
        )
        if not rows:
            return None
        revision, last, count, file, size, quick, digest = rows[0]
        return StoredIndex(
            integer(revision, "the revision of an index"),
            integer(last, "the last exemplar of an index"),
            integer(count, "the size of an index"),
            text(file, "the file of an index", check_key),
            integer(size, "the size of an index"),
            binary(quick, "the digest of an index", 32),
            binary(digest, "the digest of an index", 32),
        )

    def stored_indexes(self) -> list[tuple[int, bool]]:
        """Return structure and presence of every recorded index file."""
        rows = self.database.execute("SELECT structure, present FROM indexes")
        return [(integer(row[0], "a structure's number", 1), bool(row[1])) for row in rows]

    def shards(self) -> dict[int, int]:
        """Return the slots written in every shard, whatever its generation."""
        return {
            integer(shard, "the number of a shard", 1): integer(slots, "the slots of a shard")
            for shard, slots in self.database.execute("SELECT id, slots FROM shards")
        }

    def misplaced(self) -> int:
        """Return how many memories lie outside of their shard's slots, or where another lies."""
        return integer(
            self.database.value(
                "SELECT (SELECT count(*) FROM memories m LEFT JOIN shards s ON s.id = m.shard AND "
                "s.generation = m.generation WHERE s.id IS NULL OR m.slot >= s.slots) + (SELECT "
                "count(*) - count(DISTINCT shard || ':' || slot) FROM memories)"
            ),
            "the number of misplaced memories",
        )

    def check_room(self) -> None:
        """Raise LibraryCorruptError if the next memory would be written over another."""
        rows = self.database.execute(
            "SELECT id, slots, (SELECT max(slot) FROM memories WHERE shard = id) FROM shards ORDER "
            "BY id DESC LIMIT 1"
        )
        for shard, slots, last in rows:
            if last is not None and integer(last, "the slot of a memory") >= integer(
                slots, "the slots of a shard"
            ):
                raise LibraryCorruptError(
                    f"the catalog is damaged: shard {shard} has {slots} slots, and a memory in "
                    f"slot {last}. Restore the library from a backup."
                )
