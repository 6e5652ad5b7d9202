"""Queries that a search asks of a library's SQLite file, and whether its answers were added so."""

# ruff: noqa: S608 - statements are put together from constants; values are always bound

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.checks import check_key, check_name
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.records import Settings, exemplar_digest
from recallseg.runtime.library.shards import Place
from recallseg.runtime.library.stored_queries import StoredQueries
from recallseg.runtime.library.values import binary, integer, text

__all__ = ["SearchQueries", "check_ascending"]

UNIT_TOLERANCE = 1e-2
"""An embedding is stored with length 1; also one rounded to fp16 is within this."""
_BATCH = 400  # below SQLite's oldest limit of 999 variables per statement


class SearchQueries(StoredQueries):
    """Numbers, embeddings, keys and places of memories, each compared with its digest once."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._dimension: int | None = None
        self._intact: set[int] = set()
        self._proven: set[int] = set()

    def forget(self) -> None:
        """Compare embeddings and exemplars with their digests anew; they may be others now."""
        self._intact.clear()
        self._proven.clear()

    def settings(self) -> Settings:
        """Return what the library was made with."""
        settings = Settings.from_text(self.note("library") or "")
        self._dimension = settings.embedding_dim
        return settings

    def note(self, name: str) -> str | None:
        """Return one stored text, or None."""
        rows = self.database.execute("SELECT value FROM settings WHERE name = ?", (name,))
        if rows and not isinstance(rows[0][0], str):
            raise LibraryCorruptError(f"the catalog is damaged: its note '{name}' is no text.")
        return rows[0][0] if rows else None

    def numbers(self, structure: int, present: bool, tags: Mapping[str, str]) -> NDArray[np.int64]:
        """Return the sorted numbers of a structure's exemplars that have all ``tags``."""
        joins = "".join(
            f" JOIN tags t{i} ON t{i}.exemplar = a.exemplar AND t{i}.name = ? AND t{i}.value = ?"
            for i in range(len(tags))
        )
        values = [part for pair in tags.items() for part in pair]
        rows = self.database.execute(
            f"SELECT a.exemplar FROM annotations a{joins} WHERE a.structure = ? AND a.present = ? "
            "ORDER BY a.exemplar",
            (*values, structure, int(present)),
        )
        check_ascending([row[0] for row in rows])
        return np.array([row[0] for row in rows], np.int64)

    def embeddings(
        self, structure: int, present: bool, after: int = 0
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return numbers (N int64, ascending) and embeddings (N x D float32) above ``after``."""
        rows = self.database.execute(
            "SELECT a.exemplar, e.embedding, e.digest FROM annotations a JOIN encodings e ON "
            "e.generation = (SELECT generation FROM state) AND e.exemplar = a.exemplar "
            "WHERE a.structure = ? AND a.present = ? AND a.exemplar > ? ORDER BY a.exemplar",
            (structure, int(present), after),
        )
        self._check_embeddings(rows)
        return self._matrix(rows)

    def embeddings_of(
        self, numbers: Sequence[int]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return numbers and embeddings of those of ``numbers`` that exist, ascending."""
        rows = self._in_batches(
            "SELECT exemplar, embedding, digest FROM encodings WHERE generation = (SELECT "
            "generation FROM state) AND exemplar IN ({}) ORDER BY exemplar",
            sorted(int(number) for number in numbers),
        )
        self._check_embeddings(row for row in rows if row[0] not in self._intact)
        self._intact.update(row[0] for row in rows)
        return self._matrix(rows)

    def found(
        self, numbers: Sequence[int], structure: int
    ) -> dict[int, tuple[str, tuple[Place, bytes] | None]]:
        """Return key, and place and digest of memory (None where it is absent), by number."""
        self._prove([int(number) for number in numbers if number not in self._proven])
        rows = self._in_batches(
            "SELECT x.id, x.key, m.shard, m.slot, m.digest FROM exemplars x LEFT JOIN memories m "
            "ON m.generation = (SELECT generation FROM state) AND m.exemplar = x.id AND "
            f"m.structure = {int(structure)} WHERE x.id IN ({{}})",
            [int(number) for number in numbers],
        )
        _check_all_there(numbers, (row[0] for row in rows))
        return {
            number: (
                text(key, "an exemplar's key", check_key),
                None
                if shard is None
                else (Place(shard, slot), binary(digest, "the digest of a memory", 32)),
            )
            for number, key, shard, slot, digest in rows
        }

    def keys(self, numbers: Sequence[int]) -> list[str]:
        """Return the keys of exemplars, in the order of ``numbers``."""
        wanted = [int(number) for number in numbers]
        keys = dict(self._in_batches("SELECT id, key FROM exemplars WHERE id IN ({})", wanted))
        _check_all_there(wanted, keys)
        return [text(keys[number], "an exemplar's key", check_key) for number in wanted]

    def keys_there(self, numbers: Sequence[int]) -> list[str]:
        """Return the keys of those exemplars that are there, in use or retired."""
        wanted = [int(number) for number in numbers]
        rows = self._in_batches("SELECT key FROM exemplars WHERE id IN ({})", wanted)
        return [text(key, "an exemplar's key", check_key) for (key,) in rows]

    def places(self, keys: Sequence[str], structure: int) -> dict[str, tuple[Place, bytes]]:
        """Return places and digests of a structure's memories, for those of ``keys`` that have."""
        rows = self._in_batches(
            "SELECT x.key, m.shard, m.slot, m.digest FROM exemplars x JOIN memories m ON "
            "m.generation = (SELECT generation FROM state) AND m.exemplar = x.id AND m.structure "
            f"= {int(structure)} WHERE x.key IN ({{}})",
            list(keys),
        )
        return {
            key: (Place(shard, slot), binary(digest, "the digest of a memory", 32))
            for key, shard, slot, digest in rows
        }

    def memories(self, after: int, limit: int) -> list[tuple[int, str, Place, bytes]]:
        """Return (exemplar, structure, place, digest) of exemplars above ``after``."""
        rows = self.database.execute(
            "SELECT m.exemplar, s.name, m.shard, m.slot, m.digest FROM memories m JOIN "
            "structures s ON s.id = m.structure WHERE m.generation = (SELECT generation FROM "
            "state) AND m.exemplar IN (SELECT id FROM exemplars WHERE id > ? ORDER BY id LIMIT "
            "?) ORDER BY m.exemplar",
            (after, limit),
        )
        check_ascending([after, *(row[0] for row in rows)], strictly=False)
        return [
            (
                integer(row[0], "an exemplar's number", 1),
                text(row[1], "a structure's name", check_name),
                Place(row[2], row[3]),
                binary(row[4], "the digest of a memory", 32),
            )
            for row in rows
        ]

    def _in_batches(self, statement: str, values: Sequence[Any]) -> list[Any]:
        rows = []
        for start in range(0, len(values), _BATCH):
            batch = values[start : start + _BATCH]
            rows += self.database.execute(statement.format(",".join("?" * len(batch))), batch)
        return rows

    def _check_embeddings(self, rows: Iterable[Any]) -> None:
        """Raise LibraryCorruptError unless each (number, embedding, digest) belongs together."""
        for number, embedding, digest in rows:
            if not isinstance(embedding, bytes) or hashlib.sha256(embedding).digest() != digest:
                raise LibraryCorruptError(
                    f"the embedding of exemplar '{self._name(number)}' is not what was stored: it "
                    "does not match its digest. Restore the library from a backup, or encode it "
                    "anew with 'recallseg library rebuild'."
                )

    def _prove(self, numbers: Sequence[int]) -> None:
        """Compare key, content and tags of exemplars with their digests."""
        rows = self._in_batches(
            "SELECT id, key, content, digest FROM exemplars WHERE id IN ({})", numbers
        )
        tags: dict[int, dict[str, str]] = {row[0]: {} for row in rows}
        for number, name, value in self._in_batches(
            "SELECT exemplar, name, value FROM tags WHERE exemplar IN ({})", [*tags]
        ):
            tags[number][name] = value
        for number, key, content, digest in rows:
            known = tags[number]
            words = (key, content, *known, *known.values())
            if (
                not all(isinstance(word, str) for word in words)
                or exemplar_digest(key, content, known) != digest
            ):
                raise LibraryCorruptError(
                    f"exemplar '{self._name(number)}' is not what was added: its key, content or "
                    "tags do not match its digest. Restore the library from a backup, or remove "
                    "the exemplar and add it again."
                )
            self._proven.add(number)

    def _name(self, number: object) -> str:
        """Return an exemplar's key for a message, or its number where it has none."""
        rows = self.database.execute("SELECT key FROM exemplars WHERE id = ?", (number,))
        return str(rows[0][0]) if rows else f"number {number}"

    def _matrix(self, rows: Sequence[Any]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        check_ascending([row[0] for row in rows])
        numbers = np.array([row[0] for row in rows], np.int64)
        size = self.settings().embedding_dim if self._dimension is None else self._dimension
        if any(type(row[1]) is not bytes or len(row[1]) != size * 4 for row in rows):
            raise LibraryCorruptError(
                f"the library has embeddings that are not {size} numbers; run 'recallseg library "
                "verify'."
            )
        data = b"".join(row[1] for row in rows)
        vectors = np.frombuffer(data, "<f4").reshape(len(rows), size)
        lengths = np.einsum("ij,ij->i", vectors, vectors)
        if not (np.abs(lengths - 1) <= 2 * UNIT_TOLERANCE).all():  # nor is NaN
            raise LibraryCorruptError(
                "the library has embeddings that are not of length 1; run 'recallseg library "
                "verify'."
            )
        return numbers, vectors.astype(np.float32, copy=False)


def _check_all_there(wanted: Iterable[int], found: Iterable[int]) -> None:
    """Raise LibraryCorruptError if an exemplar that the catalog names is not in it."""
    lost = set(wanted).difference(found)
    if lost:
        raise LibraryCorruptError(
            f"the catalog is damaged: it names exemplar number {min(lost)} and has none. Restore "
            "it from a backup."
        )


def check_ascending(numbers: Sequence[Any], *, strictly: bool = True) -> None:
    """Raise LibraryCorruptError unless numbers ascend: a damaged table repeats rows for ever."""
    if any(type(number) is not int for number in numbers) or any(
        a > b or (strictly and a == b) for a, b in pairwise(numbers)
    ):
        raise LibraryCorruptError(
            "the catalog is damaged: its rows are not in order. Restore it from a backup."
        )
