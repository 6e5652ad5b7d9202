"""The catalog: what the library knows, and the changes that its one writer makes to it.

Only what a committed row here names exists; shards, sources and index files are filled first and
mean nothing until then. Exemplar numbers are never used again after a removal.
"""

# ruff: noqa: S608 - statements are put together from constants; values are always bound

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.library.database import Database
from recallseg.runtime.library.encoding import Origin
from recallseg.runtime.library.origins import origins_note
from recallseg.runtime.library.queries import CatalogQueries
from recallseg.runtime.library.records import (
    NewExemplar,
    Settings,
    State,
    StoredIndex,
    exemplar_digest,
)
from recallseg.runtime.library.shards import Place
from recallseg.runtime.library.values import integer

__all__ = ["ADDING", "Catalog"]

DIGEST_MODULUS = 1 << 256
ADDING = "adding"
"""The note, first and last number, of exemplars whose images are written before one commit makes
all of them visible: a process that dies meanwhile leaves images that belong to nothing."""


class Catalog(CatalogQueries):
    """Queries and changes."""

    @classmethod
    def create(cls, path: Path, settings: Settings) -> Catalog:
        """Make an empty catalog."""
        rows: list[tuple[str, Sequence[Any]]] = [
            ("INSERT INTO settings VALUES ('library', ?)", (settings.to_text(),)),
            ("INSERT INTO state VALUES (0, 1, 0, '0')", ()),
        ]
        return cls(Database.create(path, rows, settings.format_version))

    def set_note(self, name: str, value: str | None) -> None:
        """Store one text, or remove it."""
        if value is None:
            self.database.execute("DELETE FROM settings WHERE name = ?", (name,))
        else:
            self.database.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def allocate(
        self, count: int, capacity: int, generation: int, *, fresh: bool = False
    ) -> list[Place]:
        """Return places for ``count`` memories after the last in use, in new shards as they fill.

        ``fresh`` begins a new shard in any case.
        """
        rows = self.database.execute(
            "SELECT id, slots FROM shards WHERE generation = ? ORDER BY id DESC LIMIT 1",
            (generation,),
        )
        highest = self.last_shard()
        shard, slot = rows[0] if rows and not fresh else (highest + 1, 0)
        integer(slot, "the slots of a shard")
        places = []
        for _ in range(count):
            if slot >= capacity:
                shard, slot = max(highest, shard) + 1, 0
            places.append(Place(shard, slot))
            slot += 1
        return places

    def adding(self) -> range:
        """Return the numbers of exemplars that are being added together, and not there yet."""
        note = self.note(ADDING)
        if note is None:
            return range(0)
        numbers = [int(part) if part.isdecimal() else part for part in note.split()]
        first, last = (*numbers, None, None)[:2]
        first = integer(first, "the first number of exemplars being added", 1)
        last = integer(last, "the last number of exemplars being added", first)
        return range(first, last + 1) if first == self.next_number() else range(0)

    def add(self, *exemplars: NewExemplar, instead: str | None = None) -> None:
        """Make exemplars visible, ``instead`` of the one with that key, in one commit."""
        with self.database.transaction():
            if instead is not None:
                self._remove(instead)
            for new in exemplars:
                self._add(new)
            self.set_note(ADDING, None)

    def _add(self, new: NewExemplar) -> None:
        db = self.database
        state = self.state()
        db.execute(
            "INSERT INTO exemplars VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                new.number,
                new.key,
                new.content,
                new.height,
                new.width,
                new.created,
                new.source,
                new.digest,
            ),
        )
        for present, names in ((1, tuple(new.memories)), (0, new.absent)):
            for name in names:
                db.execute(
                    "INSERT INTO annotations VALUES (?, ?, ?)",
                    (self._count_structure(name, bool(present), 1), present, new.number),
                )
        rows = [(new.number, name, value) for name, value in new.tags.items()]
        db.execute_many("INSERT INTO tags VALUES (?, ?, ?)", rows)
        self.add_encoding(new.number, state.generation, new.embedding, new.memories, new.origin)
        self._advance(state, 1, int.from_bytes(new.digest, "big"))

    def add_encoding(
        self,
        number: int,
        generation: int,
        embedding: NDArray[np.float32],
        memories: Mapping[str, tuple[Place, bytes]],
        origin: Origin | None,
    ) -> None:
        """Record embedding and memories of an exemplar for a generation, within a transaction."""
        db = self.database
        if origin is not None:
            self.set_note(
                origins_note(generation),
                self.origins(generation).with_one(number, origin).to_text(),
            )
        blob = np.ascontiguousarray(embedding, "<f4").tobytes()
        db.execute(
            "INSERT INTO encodings VALUES (?, ?, ?, ?)",
            (generation, number, blob, hashlib.sha256(blob).digest()),
        )
        for name, (place, digest) in memories.items():
            db.execute(
                "INSERT INTO memories SELECT ?, ?, id, ?, ?, ? FROM structures WHERE name = ?",
                (generation, number, place.shard, place.slot, digest, name),
            )
            db.execute(
                "INSERT INTO shards VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "slots = max(slots, excluded.slots)",
                (place.shard, generation, place.slot + 1),
            )

    def remove(self, key: str) -> int | None:
        """Forget an exemplar in one commit and return its number; None if there is no such key."""
        with self.database.transaction():
            return self._remove(key)

    def _remove(self, key: str) -> int | None:
        db = self.database
        rows = db.execute("SELECT id, digest FROM exemplars WHERE key = ?", (key,))
        if not rows:
            return None
        state = self.state()
        number, digest = rows[0]
        for present, name in db.execute(
            "SELECT a.present, s.name FROM annotations a JOIN structures s ON s.id = "
            "a.structure WHERE a.exemplar = ?",
            (number,),
        ):
            self._count_structure(name, bool(present), -1)
        db.execute("DELETE FROM exemplars WHERE id = ?", (number,))
        for table in ("annotations", "tags", "encodings", "memories"):
            db.execute(f"DELETE FROM {table} WHERE exemplar = ?", (number,))
        db.execute("INSERT INTO removals VALUES (?, ?)", (state.revision + 1, number))
        self._advance(state, -1, -int.from_bytes(digest, "big"))
        return int(number)

    def retag(self, key: str, tags: Mapping[str, str]) -> bool:
        """Give an exemplar other tags, in one commit; False if there is no such key."""
        db = self.database
        with db.transaction():
            rows = db.execute("SELECT id, content, digest FROM exemplars WHERE key = ?", (key,))
            if not rows:
                return False
            number, content, before = rows[0]
            digest = exemplar_digest(key, content, tags)
            db.execute("UPDATE exemplars SET digest = ? WHERE id = ?", (digest, number))
            db.execute("DELETE FROM tags WHERE exemplar = ?", (number,))
            values = [(number, name, value) for name, value in tags.items()]
            db.execute_many("INSERT INTO tags VALUES (?, ?, ?)", values)
            change = int.from_bytes(digest, "big") - int.from_bytes(before, "big")
            self._advance(self.state(), 0, change)
        return True

    def _advance(self, state: State, exemplars: int, digest: int) -> None:
        total = (state.digest_sum + digest) % DIGEST_MODULUS
        self.database.execute(
            "UPDATE state SET revision = revision + 1, exemplars = exemplars + ?, digest_sum = ?",
            (exemplars, f"{total:x}"),
        )

    def _count_structure(self, name: str, present: bool, change: int) -> int:
        column = "present" if present else "absent"
        self.database.execute(
            "INSERT OR IGNORE INTO structures (name, present, absent) VALUES (?, 0, 0)", (name,)
        )
        self.database.execute(
            f"UPDATE structures SET {column} = {column} + ? WHERE name = ?", (change, name)
        )
        return int(self.database.value("SELECT id FROM structures WHERE name = ?", (name,)))

    # Generations: all exemplars encoded anew

    def switch(self, generation: int, settings: Settings) -> None:
        """Make a complete generation the current one and forget all others, in one commit."""
        db = self.database
        with db.transaction():
            self.set_note("library", settings.to_text())
            self.set_note("rebuild", None)
            self.set_note(origins_note(self.state().generation), None)
            for table in ("encodings", "memories", "shards"):
                db.execute(f"DELETE FROM {table} WHERE generation <> ?", (generation,))
            db.execute("DELETE FROM indexes")
            db.execute("DELETE FROM removals")
            db.execute("UPDATE state SET generation = ?, revision = revision + 1", (generation,))

    def discard(self, generation: int) -> None:
        """Forget the encodings of an unfinished generation, within a transaction."""
        for table in ("encodings", "memories", "shards"):
            self.database.execute(f"DELETE FROM {table} WHERE generation = ?", (generation,))
        self.set_note(origins_note(generation), None)

    def move(self, moves: Sequence[tuple[Place, Place]], generation: int) -> None:
        """Give memories new places in new shards and forget the old shards, in one commit."""
        db = self.database
        with db.transaction():
            db.execute("DELETE FROM shards WHERE generation = ?", (generation,))
            db.execute_many(
                "UPDATE memories SET shard = ?, slot = ? WHERE generation = ? AND shard = ? AND "
                "slot = ?",
                [(to.shard, to.slot, generation, at.shard, at.slot) for at, to in moves],
            )
            last: dict[int, int] = {}
            for _, to in moves:
                last[to.shard] = max(to.slot + 1, last.get(to.shard, 0))
            db.execute_many(
                "INSERT INTO shards VALUES (?, ?, ?)",
                [(shard, generation, slots) for shard, slots in last.items()],
            )
            db.execute("UPDATE state SET revision = revision + 1")

    def store_index(self, structure: int, present: bool, stored: StoredIndex) -> None:
        """Record a structure's index file in place of the one before."""
        self.database.execute(
            "INSERT OR REPLACE INTO indexes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                structure,
                int(present),
                stored.revision,
                stored.last,
                stored.count,
                stored.file,
                stored.size,
                stored.quick,
                stored.digest,
            ),
        )
