"""Queries over a library's SQLite file: its state, and its exemplars."""

# ruff: noqa: S608 - statements are put together from constants; values are always bound

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recallseg.engines.errors import InputError, LibraryCorruptError
from recallseg.runtime.checks import check_key, check_name, check_tags
from recallseg.runtime.library.encoding import Origin
from recallseg.runtime.library.exemplar import Exemplar
from recallseg.runtime.library.origins import Origins, origins_note
from recallseg.runtime.library.records import State, StructureRow
from recallseg.runtime.library.search_queries import SearchQueries, check_ascending
from recallseg.runtime.library.values import binary, integer, text, timestamp

__all__ = ["CatalogQueries", "unknown_key"]

_LEAST_BYTES = 64
"""Of an exemplar in the catalog: its digests alone take more. ``list`` and progress bars believe a
library's length, so it is not just any number."""
RETIRED = 2
"""Is added to ``present`` of a retired exemplar's annotations, so that no search sees them."""
_RETIRED = f"EXISTS (SELECT 1 FROM annotations WHERE exemplar = id AND present >= {RETIRED})"


class CatalogQueries(SearchQueries):
    """What can be asked. Each method reads the newest committed state unless within a snapshot."""

    # State

    def notes(self, prefix: str, first: str | None = None) -> list[tuple[str, str]]:
        """Return name and text of all notes whose names begin so, in order of their names.

        ``first`` is where to begin.
        """
        rows = self.database.execute(
            "SELECT name, value FROM settings WHERE name >= ? AND name < ? ORDER BY name",
            (first or prefix, f"{prefix[:-1]}{chr(ord(prefix[-1]) + 1)}"),
        )
        if not all(isinstance(part, str) for row in rows for part in row):
            raise LibraryCorruptError(f"the catalog is damaged: a note '{prefix}' is no text.")
        return [(name, value) for name, value in rows]

    def state(self) -> State:
        """Return the counters."""
        rows = self.database.execute(
            "SELECT revision, generation, exemplars, digest_sum FROM state"
        )
        if len(rows) != 1:
            raise LibraryCorruptError(
                f"the catalog {self.database.path} has {len(rows)} state rows, not 1."
            )
        revision, generation, exemplars, total = rows[0]
        try:
            digest_sum = int(total, 16) if len(total) <= 64 else -1
        except (TypeError, ValueError):
            digest_sum = -1
        return State(
            integer(revision, "the library's revision"),
            integer(generation, "the library's generation", 1),
            integer(
                exemplars,
                "the number of exemplars",
                0,
                self.database.bytes // _LEAST_BYTES,
            ),
            integer(digest_sum, "the sum of the exemplars' digests", 0, 2**256),
        )

    def origins(self, generation: int) -> Origins:
        """Return how the memories of a generation were made, as far as that was recorded."""
        return Origins.from_text(self.note(origins_note(generation)))

    def count_origins(self, generation: int) -> list[tuple[Origin | None, int]]:
        """Return each origin of memories with the number of exemplars, unrecorded ones last."""
        known = self.origins(generation)
        counts = [0] * len(known.origins)
        for span in known.spans:
            counts[span.origin] += self.database.value(
                f"SELECT count(*) FROM exemplars WHERE id BETWEEN ? AND ? AND NOT {_RETIRED}",
                (span.first, span.last),
            )
        total = self.state().exemplars
        found: list[tuple[Origin | None, int]] = [*zip(known.origins, counts, strict=True)]
        return [pair for pair in [*found, (None, total - sum(counts))] if pair[1]]

    def structures(self) -> tuple[StructureRow, ...]:
        """Return all structures ever named, in order of first addition."""
        rows = self.database.execute("SELECT id, name, present, absent FROM structures ORDER BY id")
        return tuple(
            StructureRow(
                integer(number, "a structure's number", 1),
                text(name, "a structure's name", check_name),
                integer(present, f"how many exemplars show '{name}'"),
                integer(absent, f"how many exemplars lack '{name}'"),
            )
            for number, name, present, absent in rows
        )

    # Exemplars

    def next_number(self) -> int:
        """Return the number that the next exemplar gets."""
        rows = self.database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'exemplars'")
        return integer(rows[0][0], "the last exemplar's number") + 1 if rows else 1

    def number(self, key: str) -> int | None:
        """Return an exemplar's number, or None if there is no such key."""
        rows = self.database.execute("SELECT id FROM exemplars WHERE key = ?", (key,))
        return integer(rows[0][0], "an exemplar's number", 1) if rows else None

    def with_content(self, content: str) -> str | None:
        """Return the key of an exemplar with this content, or None; looks at every exemplar."""
        rows = self.database.execute(
            "SELECT key FROM exemplars WHERE content = ? LIMIT 1", (content,)
        )
        return text(rows[0][0], "an exemplar's key", check_key) if rows else None

    def contents(self) -> dict[str, str]:
        """Return the key of an exemplar by content."""
        rows = self.database.execute("SELECT content, key FROM exemplars")
        return {
            text(content, "a content digest", check_key): text(key, "an exemplar's key", check_key)
            for content, key in rows
        }

    def exemplars(
        self, after: int = 0, limit: int = -1, *, retired: bool | None = None
    ) -> list[tuple[int, Exemplar]]:
        """Return exemplars with numbers above ``after``, in order of addition.

        ``retired`` asks for those only that are retired, or that are not.
        """
        which = "" if retired is None else f" AND {'' if retired else 'NOT '}{_RETIRED}"
        rows = self.database.execute(
            f"{_EXEMPLARS} WHERE id > ?{which} ORDER BY id LIMIT ?", (after, limit)
        )
        check_ascending([after, *(row[0] for row in rows)])
        return [self._exemplar(row) for row in rows]

    def exemplar(self, key: str) -> Exemplar | None:
        """Return one exemplar, or None."""
        with self.database.snapshot():
            rows = self.database.execute(_EXEMPLARS + " WHERE key = ?", (key,))
            return self._exemplar(rows[0])[1] if rows else None

    def group(self, number: int) -> str | None:
        """Return the stored group of an exemplar, a keyed hash; None if none was told."""
        if self.database.format_version < 3:
            return None
        rows = self.database.execute("SELECT name FROM groups WHERE exemplar = ?", (number,))
        return text(rows[0][0], "a group", check_key) if rows else None

    def groups(self) -> dict[int, str]:
        """Return stored groups, keyed hashes, by the numbers of the exemplars that have one."""
        if self.database.format_version < 3:
            return {}
        return {
            integer(number, "a number of a group", 1): text(name, "a group", check_key)
            for number, name in self.database.execute(
                "SELECT exemplar, name FROM groups ORDER BY exemplar"
            )
        }

    def in_use(self, first: int, last: int) -> set[int]:
        """Return which numbers from ``first`` to ``last`` are of exemplars that are in use."""
        rows = self.database.execute(
            f"SELECT id FROM exemplars WHERE id BETWEEN ? AND ? AND NOT {_RETIRED}", (first, last)
        )
        return {number for (number,) in rows}

    def is_retired(self, number: int) -> bool:
        """Whether an exemplar is retired."""
        return bool(
            self.database.value(
                "SELECT coalesce(max(present), 0) >= ? FROM annotations WHERE exemplar = ?",
                (RETIRED, number),
            )
        )

    def retired_numbers(self) -> list[int]:
        """Return the numbers of retired exemplars, ascending; few are, or none."""
        rows = self.database.execute(
            "SELECT DISTINCT exemplar FROM annotations WHERE present >= ? ORDER BY exemplar",
            (RETIRED,),
        )
        return [integer(row[0], "an exemplar's number", 1) for row in rows]

    def names_in_source(self, number: int) -> dict[str, str]:
        """Return today's names of structures that an exemplar's image may know by others."""
        if self.database.format_version < 3:
            return {}
        return {
            text(old, "a former name", check_name): text(new, "a structure's name", check_name)
            for old, new in self.database.execute(
                "SELECT f.name, s.name FROM former_names f JOIN structures s ON s.id = f.structure "
                "WHERE f.last = (SELECT min(last) FROM former_names WHERE name = f.name AND last "
                ">= ?)",
                (number,),
            )
        }

    def annotated(self, structure: int) -> list[int]:
        """Return the numbers of all exemplars that name a structure, retired ones too."""
        rows = self.database.execute(
            "SELECT exemplar FROM annotations WHERE structure = ? ORDER BY exemplar", (structure,)
        )
        return [integer(row[0], "an exemplar's number", 1) for row in rows]

    def source_digest(self, number: int) -> bytes | None:
        """Return the SHA-256 of an exemplar's source file, or None if it was not kept."""
        rows = self.database.execute("SELECT source FROM exemplars WHERE id = ?", (number,))
        source = rows[0][0] if rows else None
        return None if source is None else binary(source, "the digest of a source", 32)

    def with_sources(self, first: int, last: int) -> set[int]:
        """Return which numbers from ``first`` to ``last`` are of exemplars that have a source."""
        rows = self.database.execute(
            "SELECT id FROM exemplars WHERE id BETWEEN ? AND ? AND source IS NOT NULL",
            (first, last),
        )
        return {number for (number,) in rows}

    def last_shard(self) -> int:
        """Return the highest number that a shard had; 0 if there was none."""
        rows = self.database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'shards'")
        return integer(rows[0][0], "the number of the last shard") if rows else 0

    def removals(self, revision: int) -> list[int]:
        """Return the numbers of exemplars that were removed after ``revision``."""
        rows = self.database.execute(
            "SELECT exemplar FROM removals WHERE revision > ?", (revision,)
        )
        return [integer(row[0], "an exemplar's number", 1) for row in rows]

    # Encodings

    def not_encoded(self, generation: int, limit: int, after: int) -> list[tuple[int, Exemplar]]:
        """Return exemplars that have no encoding of ``generation`` yet, of numbers above one."""
        rows = self.database.execute(
            _EXEMPLARS + " WHERE id > ? AND id NOT IN (SELECT exemplar FROM encodings WHERE "
            "generation = ?) ORDER BY id LIMIT ?",
            (after, generation, limit),
        )
        return [self._exemplar(row) for row in rows]

    def count_not_encoded(self, generation: int) -> int:
        """Return how many exemplars have no encoding of ``generation`` yet."""
        return int(
            self.database.value(
                "SELECT (SELECT count(*) FROM exemplars) - (SELECT count(*) FROM encodings WHERE "
                "generation = ?)",
                (generation,),
            )
        )

    def _exemplar(self, row: Sequence[Any]) -> tuple[int, Exemplar]:
        number, key, content, height, width, created, has_source = row
        integer(number, "an exemplar's number", 1)
        text(key, "an exemplar's key", check_key)
        what = f"exemplar '{key}'"
        text(content, f"the content digest of {what}", check_key)
        names: dict[int, list[str]] = {0: [], 1: []}
        retired = set()
        for present, name in self.database.execute(
            "SELECT a.present, s.name FROM annotations a JOIN structures s ON s.id = a.structure "
            "WHERE a.exemplar = ? ORDER BY s.id",
            (number,),
        ):
            flag = integer(present, f"a flag of {what}", 0, RETIRED + 1)
            names[flag % RETIRED].append(text(name, "a structure's name", check_name))
            retired.add(flag >= RETIRED)
        if len(retired) > 1:
            raise LibraryCorruptError(
                f"the catalog is damaged: {what} is half retired. Restore it from a backup."
            )
        tags = dict(
            self.database.execute(
                "SELECT name, value FROM tags WHERE exemplar = ? ORDER BY name", (number,)
            )
        )
        try:
            check_tags(tags)
        except InputError as error:
            raise LibraryCorruptError(f"the catalog is damaged: {what}: {error}") from error
        exemplar = Exemplar(
            key,
            tuple(names[1]),
            tuple(names[0]),
            tags,
            integer(height, f"the height of {what}", 1),
            integer(width, f"the width of {what}", 1),
            timestamp(created, f"the time of {what}"),
            content,
            bool(has_source),
            True in retired,
        )
        return number, exemplar


_EXEMPLARS = "SELECT id, key, content, height, width, created, source IS NOT NULL FROM exemplars"


def unknown_key(key: str) -> InputError:
    """Return the error for a key that is not in the library."""
    return InputError(
        f"there is no exemplar '{key}' in the library; list them with 'recallseg library list'."
    )
