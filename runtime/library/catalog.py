"""The catalog: what the library knows, and the changes that its one writer makes to it.

Only what a committed row here names exists; shards, sources and index files are filled first and
mean nothing until then. Exemplar numbers are never used again after a removal.
"""

# ruff: noqa: S608 - statements are put together from constants; values are always bound

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.library.database import Database
from recallseg.runtime.library.encoding import Origin
from recallseg.runtime.library.history import PREFIX, next_note, note_text
from recallseg.runtime.library.origins import origins_note
from recallseg.runtime.library.queries import RETIRED, CatalogQueries
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

    @contextmanager
    def change(
        self,
        what: str,
        numbers: Iterable[int] = (),
        details: Mapping[str, str] | None = None,
        former: int | None = None,
    ) -> Iterator[None]:
        """Make a change in one commit, with a note on what is done to which exemplars.

        ``former`` is the number that the one exemplar of the change had before.
        """
        with self.database.transaction(), self._noted(what, numbers, details or {}, former):
            yield

    @contextmanager
    def _noted(
        self,
        what: str,
        numbers: Iterable[int],
        details: Mapping[str, str],
        former: int | None = None,
    ) -> Iterator[None]:
        before = self.state().revision
        yield
        revision = self.state().revision
        name = self.database.value(
            "SELECT max(name) FROM settings WHERE name >= ? AND name < ?", (PREFIX, "at!")
        )
        text = note_text(what, before, revision, numbers, details, former)
        self.set_note(next_note(name), text)

    def add(
        self,
        *exemplars: NewExemplar,
        instead: str | None = None,
        what: str = "add",
        details: Mapping[str, str] | None = None,
    ) -> None:
        """Make exemplars visible, ``instead`` of the one with that key, in one commit."""
        numbers = [new.number for new in exemplars]
        former = None if instead is None else self.number(instead)
        with self.change(what, numbers, details, former):
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
        if new.group is not None:
            db.upgrade()
            db.execute("INSERT INTO groups VALUES (?, ?)", (new.number, new.group))
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

    def remove(self, key: str, note: str | None = None) -> int | None:
        """Forget an exemplar in one commit and return its number; None if there is no such key.

        ``note`` is set to the key with it.
        """
        number = self.number(key)
        if number is None:
            return None
        with self.change("remove", [number]):
            self._remove(key)
            if note is not None:
                self.set_note(note, key)
        return number

    def _remove(self, key: str) -> None:
        db = self.database
        state = self.state()
        [(number, digest)] = db.execute("SELECT id, digest FROM exemplars WHERE key = ?", (key,))
        counted = not self.is_retired(number)
        if counted:
            self._count(number, -1)
        db.execute("DELETE FROM exemplars WHERE id = ?", (number,))
        later = ("groups", "kept_logits") if db.format_version >= 3 else ()
        for table in ("annotations", "tags", "encodings", "memories", *later):
            db.execute(f"DELETE FROM {table} WHERE exemplar = ?", (number,))
        db.execute("INSERT INTO removals VALUES (?, ?)", (state.revision + 1, number))
        if counted:
            self._advance(state, -1, -int.from_bytes(digest, "big"))
        else:
            self._advance(state, 0, 0)

    def retire(self, numbers: Sequence[int], back: Sequence[int] = ()) -> None:
        """Take exemplars out of recall, counts and digest, and others back in, in one commit.

        What they consist of stays. Search indexes learn of it as of a removal.
        """
        with self.database.transaction():
            if numbers:
                self.database.upgrade()
                with self._noted("retire", numbers, {}):
                    self._mark(numbers, retired=True)
            if back:
                with self._noted("reinstate", back, {}):
                    self._mark(back, retired=False)

    def _mark(self, numbers: Sequence[int], *, retired: bool) -> None:
        db, sign = self.database, -1 if retired else 1
        for number in numbers:
            state = self.state()
            if retired:
                self._count(number, -1)
                db.execute("INSERT INTO removals VALUES (?, ?)", (state.revision + 1, number))
            else:
                db.execute("DELETE FROM removals WHERE exemplar = ?", (number,))
            db.execute(
                "UPDATE annotations SET present = present - ? WHERE exemplar = ?",
                (sign * RETIRED, number),
            )
            if not retired:
                self._count(number, 1)
            self._advance(state, sign, sign * int.from_bytes(self.exemplar_digest(number), "big"))

    def _count(self, number: int, change: int) -> None:
        """Count an exemplar that is not retired in the rows of its structures."""
        for present, name in self.database.execute(
            "SELECT a.present, s.name FROM annotations a JOIN structures s ON s.id = "
            "a.structure WHERE a.exemplar = ?",
            (number,),
        ):
            self._count_structure(name, bool(present), change)

    def retag(self, key: str, tags: Mapping[str, str]) -> bool:
        """Give an exemplar other tags, in one commit; False if there is no such key."""
        db, number = self.database, self.number(key)
        if number is None:
            return False
        with self.change("retag", [number]):
            content = db.value("SELECT content FROM exemplars WHERE id = ?", (number,))
            self._set_tags(number, tags)
            self._set_digest(number, exemplar_digest(key, content, tags))
        return True

    def rename(
        self,
        exemplars: Iterable[tuple[int, str, Mapping[str, str]]],
        notes: Mapping[str, tuple[str, str] | None],
    ) -> None:
        """Give exemplars other keys and tags, in one commit, and notes other names and texts.

        Parameters
        ----------
        exemplars : number, key, tags.
        notes : what takes the place of a note; None: nothing.
        """
        db, exemplars = self.database, [*exemplars]
        with self.change("anonymise", [number for number, _, _ in exemplars]):
            for number, key, tags in exemplars:
                content = db.value("SELECT content FROM exemplars WHERE id = ?", (number,))
                db.execute("UPDATE exemplars SET key = ? WHERE id = ?", (key, number))
                self._set_tags(number, tags)
                self._set_digest(number, exemplar_digest(key, content, tags))
            for name, new in notes.items():
                self.set_note(name, None)
                if new is not None:
                    self.set_note(*new)

    def _set_tags(self, number: int, tags: Mapping[str, str]) -> None:
        self.database.execute("DELETE FROM tags WHERE exemplar = ?", (number,))
        values = [(number, name, value) for name, value in tags.items()]
        self.database.execute_many("INSERT INTO tags VALUES (?, ?, ?)", values)

    def _set_digest(self, number: int, digest: bytes) -> None:
        """Give an exemplar another digest, and the library with it."""
        before = self.exemplar_digest(number)
        self.database.execute("UPDATE exemplars SET digest = ? WHERE id = ?", (digest, number))
        change = int.from_bytes(digest, "big") - int.from_bytes(before, "big")
        self._advance(self.state(), 0, 0 if self.is_retired(number) else change)

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

    def rename_structure(
        self,
        structure: int,
        old: str,
        new: str,
        contents: Mapping[int, str],
        moved: Mapping[str, str],
    ) -> None:
        """Give a structure another name, in one commit.

        ``contents`` are the digests of its exemplars' contents under that name, by number;
        ``moved`` are notes that get other names. Images keep the name that they were stored with.
        """
        db = self.database
        with self.change("rename_structure", contents, {"from": old, "to": new}):
            db.upgrade()
            for (other,) in db.execute(
                "SELECT id FROM structures WHERE name = ? AND id != ?", (new, structure)
            ):
                # Of exemplars that are all removed.
                db.execute("DELETE FROM structures WHERE id = ?", (other,))
                for table in ("indexes", "former_names"):
                    db.execute(f"DELETE FROM {table} WHERE structure = ?", (other,))
            db.execute("UPDATE structures SET name = ? WHERE id = ?", (new, structure))
            # Where there is a row already, nothing was stored under this name since.
            db.execute(
                "INSERT OR IGNORE INTO former_names VALUES (?, ?, ?)",
                (old, self.next_number() - 1, structure),
            )
            for number, content in contents.items():
                [(key,)] = db.execute("SELECT key FROM exemplars WHERE id = ?", (number,))
                tags = dict(
                    db.execute("SELECT name, value FROM tags WHERE exemplar = ?", (number,))
                )
                db.execute("UPDATE exemplars SET content = ? WHERE id = ?", (content, number))
                self._set_digest(number, exemplar_digest(key, content, tags))
            for before, after in moved.items():
                text = self.note(before)
                self.set_note(before, None)
                self.set_note(after, text)
            self._advance(self.state(), 0, 0)

    # Generations: all exemplars encoded anew

    def switch(self, generation: int, settings: Settings) -> None:
        """Make a complete generation the current one and forget all others, in one commit."""
        db = self.database
        with self.change("rebuild", details={"bundle": settings.bundle_name}):
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
        with self.change("compact"):
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
