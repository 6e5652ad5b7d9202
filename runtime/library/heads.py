"""Where a library keeps its head, and what it was fitted on: groups of exemplars, and logits.

A head is data: numbers for the one graph that ships with RecallSeg, and what was found when they
were fitted (:mod:`recallseg.runtime.segmenting.fitting`). It is checked when it is read, since a
library may come from anybody: sizes, finite numbers, its digest, and that it is of these exemplars.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError, LibraryCorruptError
from recallseg.engines.heads import feature_count
from recallseg.runtime.checks import check_origin
from recallseg.runtime.library.choices import Choice, choice_values, parse_choice
from recallseg.runtime.library.database import MOST_BYTES_OF_VALUE
from recallseg.runtime.library.kept import KEPT_FORMAT, Kept, kept_values, parse_kept
from recallseg.runtime.library.values import binary, hex_digest, integer, timestamp

if TYPE_CHECKING:
    from recallseg.runtime.library.store import Store

__all__ = ["Head", "Heads", "Units"]

FORMAT_VERSION = 2
READ = {"heads": (1, FORMAT_VERSION), "kept_logits": (1, 2, KEPT_FORMAT)}
"""Formats that are read, by table. Heads of 1 know exemplars by their content, which changes with a
structure's name; those of 2 by what the encoder made of them."""
MOST_UNITS, MOST_FOLDS = 1024, 64
_MEND = "Fit it anew with 'recallseg library fit', or segment without it (--no-refine)."

Value = TypeVar("Value")
Units = tuple[NDArray[np.float32], ...]
"""Weights and biases of three layers: UxF, U, VxU, V, nxV, n."""


@dataclass(frozen=True, eq=False)
class Head:
    """A fitted head.

    Attributes
    ----------
    structures : whose logits it takes, and gives, in order.
    choices : by structure.
    units, folds : fitted on all exemplars, and on all but those of each fold.
    fold_of : fold that has not seen an exemplar, by its number.
    groups : number of its group, by an exemplar's number.
    grouping : ``groups`` that were told, ``exemplars`` each by itself, or ``blocks`` within one
        patient.
    recipe : settings that it was fitted with, as JSON values.
    generation : of the memories.
    graph : digest of the graph that it is for.
    created : ISO 8601, UTC.
    last, of : number of the newest exemplar then, and how many there were.
    digest : SHA-256 of all of it, hex.
    """

    structures: tuple[str, ...]
    choices: Mapping[str, Choice]
    units: Units = field(repr=False)
    folds: tuple[Units, ...] = field(repr=False)
    fold_of: Mapping[int, int] = field(repr=False)
    groups: Mapping[int, int] = field(repr=False)
    grouping: str
    recipe: Mapping[str, Any] = field(repr=False)
    generation: int
    graph: str
    created: str
    last: int = 0
    of: int = 0
    digest: str = ""

    @property
    def used(self) -> bool:
        """Whether it changes anything for any structure."""
        return any(choice.used for choice in self.choices.values())


class Heads:
    """The part of a catalog that heads are in."""

    def __init__(self, store: Store) -> None:
        self._store, self._catalog = store, store.catalog

    def groups(self) -> dict[int, str]:
        """Return hashed groups by exemplars' numbers, of those that have one."""
        return self._catalog.groups()

    def set_group(self, key: str, group: str | None) -> None:
        """Say what an exemplar belongs to."""
        store, number = self._store, self._store.number(key)
        told, hashed = check_origin(group), None
        if told:
            hashed = store.identifiers.keyed_hash("group", told, adding=True)
        exemplar = self._catalog.exemplar(key)
        known = store.identifiers.of(key, {} if exemplar is None else exemplar.tags)
        with store.identifiers.telling([replace(known, group=told)]):
            self._set_group(number, hashed)

    def _set_group(self, number: int, hashed: str | None) -> None:
        with self._catalog.database.transaction():
            self._catalog.database.upgrade()
            self._catalog.database.execute("DELETE FROM groups WHERE exemplar = ?", (number,))
            if hashed is not None:
                self._catalog.database.execute("INSERT INTO groups VALUES (?, ?)", (number, hashed))

    def keep(self, number: int, kept: Kept) -> None:
        """Store what was made of an exemplar, in one commit."""
        ids = {name: self._store.structure(name).id for name in kept.apart.logits}
        self._write("kept_logits", number, *kept_values(kept, ids))

    def kept(self, number: int) -> Kept | None:
        """Return what is kept of an exemplar; None if nothing is, or it is damaged.

        What is damaged is made anew by whoever asks: nothing else depends on it.
        """
        try:
            return self._kept(number)
        except LibraryCorruptError:
            return None

    def _kept(self, number: int) -> Kept | None:
        found = self._read("kept_logits", number)
        if found is None or found[0]["format_version"] < KEPT_FORMAT:
            return None  # what was kept before says too little to fit by
        parse = partial(parse_kept, *found, self._names())
        return _parsed(_called("kept_logits", number), parse)

    def check(self) -> tuple[int, list[str]]:
        """Return how many heads, and logits kept for them, there are, and what is wrong."""
        numbers = [row[0] for row in self._rows("SELECT exemplar FROM kept_logits ORDER BY 1")]
        heads = len(self._rows("SELECT id FROM heads"))
        reads: list[Callable[[], object]] = [self.groups, self.head]
        reads += [partial(self._kept, number) for number in numbers]
        problems = []
        for read in reads:
            try:
                read()
            except LibraryCorruptError as error:
                problems.append(str(error))
        return heads + len(numbers), problems

    def store(self, head: Head) -> None:
        """Store a head in the place of the one before, in one commit."""
        arrays = [array for units in (head.units, *head.folds) for array in units]
        about = {
            "format_version": FORMAT_VERSION,
            "bundle": self._store.settings.identity,
            "generation": head.generation,
            "graph": head.graph,
            "units": [len(head.units[1]), len(head.units[3])],
            "folds": len(head.folds),
            "structures": [
                [self._store.structure(name).id, *choice_values(head.choices[name])]
                for name in head.structures
            ],
            "exemplars": [
                [number, self._made(number), fold, head.groups[number]]
                for number, fold in head.fold_of.items()
            ],
            "grouping": head.grouping,
            "recipe": dict(head.recipe),
            "created": head.created,
            "last": head.last,
            "of": head.of,
        }
        data = np.concatenate([array.ravel() for array in arrays]).astype("<f4").tobytes()
        self._write("heads", 1, about, data)

    def remove(self) -> None:
        """Forget the head."""
        if self._catalog.database.format_version >= 3:
            with self._catalog.database.transaction():
                self._catalog.database.execute("DELETE FROM heads")

    def head(self) -> Head | None:
        """Return the head; None if there is none.

        Raises
        ------
        LibraryCorruptError
            If it is damaged, of a newer RecallSeg, or of another library.
        """
        found = self._read("heads", 1)
        return None if found is None else self._parse_head(*found)

    @property
    def mark(self) -> bytes | None:
        """What differs when the head is another one; None without one. Very fast."""
        rows = self._rows("SELECT digest FROM heads WHERE id = 1")
        return bytes(rows[0][0]) if rows else None

    def _parse_head(self, about: dict[str, Any], data: bytes) -> Head:
        def parse() -> Head:
            names = self._names()
            listed = about["structures"]
            if any(one[0] not in names for one in listed):
                raise ValueError("it is of structures that are not here: it is another library's")
            structures = tuple(names[one[0]] for one in listed)
            count = len(structures)
            u, v = (integer(size, "a head's units", 1, MOST_UNITS) for size in about["units"])
            folds = integer(about["folds"], "a head's folds", 0, MOST_FOLDS)
            shapes = [(u, feature_count(count)), (u,), (v, u), (v,), (count, v), (count,)]
            each = sum(map(prod, shapes))
            if len(data) != 4 * each * (1 + folds):
                raise ValueError(f"{len(data)} bytes for {1 + folds} times {each} numbers")
            numbers = np.frombuffer(data, "<f4").astype(np.float32).reshape(1 + folds, each)
            if not np.isfinite(numbers).all():
                raise ValueError("numbers that are not finite")
            now = about["generation"] == self._store.state.generation
            if now and about["bundle"] != self._store.settings.identity:
                former = "it was fitted for another bundle"
                raise ValueError(former)
            exemplars = [
                (
                    integer(number, "an exemplar of a head", 1),
                    made,
                    integer(fold, "a fold of a head", 0, max(0, folds - 1)),
                    integer(group, "a group of a head", 0),
                )
                for number, made, fold, group in about["exemplars"]
            ]
            if about["format_version"] == 1:
                self._belong(exemplars, self._content)
            elif now:  # after a rebuild all is made anew, and the head left out
                self._belong(exemplars, self._made)
            if about["grouping"] not in ("groups", "exemplars", "blocks"):
                raise ValueError(f"a grouping {about['grouping']!r}")
            return Head(
                structures,
                {name: parse_choice(one[1:]) for name, one in zip(structures, listed, strict=True)},
                _cut(numbers[0], shapes),
                tuple(_cut(row, shapes) for row in numbers[1:]),
                {number: fold for number, _, fold, _ in exemplars},
                {number: group for number, _, _, group in exemplars},
                about["grouping"],
                dict(about["recipe"]),
                integer(about["generation"], "the generation of a head", 1),
                hex_digest(about["graph"], "the graph of a head"),
                timestamp(about["created"], "when a head was fitted"),
                integer(about["last"], "the newest exemplar of a head"),
                integer(about["of"], "the exemplars of a head"),
                _digest(about, data).hex(),
            )

        return _parsed("head", parse)

    def _belong(
        self, exemplars: list[tuple[int, str, int, int]], find: Callable[[int], str]
    ) -> None:
        """Raise ValueError for a head of other exemplars; some may have been removed since."""
        here = 0
        for number, stated, _, _ in exemplars:
            found = find(number)
            here += found == stated
            if found not in ("", stated):
                raise ValueError("it was fitted on other exemplars: it is another library's")
        if not here:
            raise ValueError("none of the exemplars that it was fitted on is here")

    def _made(self, number: int) -> str:
        """Return a digest of an exemplar's embedding and memories; empty if there is none."""
        rows = self._catalog.database.execute(
            "SELECT e.digest, m.digest FROM encodings e LEFT JOIN memories m ON m.generation = "
            "e.generation AND m.exemplar = e.exemplar WHERE e.generation = (SELECT generation FROM "
            "state) AND e.exemplar = ? ORDER BY m.structure",
            (number,),
        )
        parts = [part for row in rows for part in row if part is not None]
        return hashlib.sha256(b"".join(map(bytes, parts))).hexdigest()[:32] if rows else ""

    def _content(self, number: int) -> str:
        rows = self._catalog.database.execute(
            "SELECT content FROM exemplars WHERE id = ?", (number,)
        )
        return str(rows[0][0])[:32] if rows else ""

    def _names(self) -> dict[int, str]:
        return {row.id: row.name for row in self._catalog.structures()}

    def _rows(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if self._catalog.database.format_version < 3:
            return []
        return self._catalog.database.execute(statement, values)

    def _write(self, table: str, number: int, about: dict[str, Any], data: bytes) -> None:
        self._store.check_writable("store what a head is fitted on")
        if len(data) > MOST_BYTES_OF_VALUE:
            raise InputError(
                f"the {_called(table, number)} would have {len(data)} bytes, and at most "
                f"{MOST_BYTES_OF_VALUE} are read again. Fit it for fewer structures at a time "
                "(--structures)."
            )
        # As it will be read: lists and plain numbers.
        written = json.dumps(about, sort_keys=True, allow_nan=False)
        digest = _digest(json.loads(written), data)
        database = self._catalog.database
        with self._store.lock, database.transaction():
            database.upgrade()
            database.execute(
                f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)",  # noqa: S608 - constants
                (number, written, data, digest),
            )

    def _read(self, table: str, number: int) -> tuple[dict[str, Any], bytes] | None:
        column = "id" if table == "heads" else "exemplar"
        rows = self._rows(
            f"SELECT about, data, digest FROM {table} WHERE {column} = ?",  # noqa: S608
            (number,),
        )
        if not rows:
            return None
        written, data, digest = rows[0]

        def parse() -> tuple[dict[str, Any], bytes]:
            about = json.loads(written)
            if not isinstance(data, bytes) or _digest(about, data) != binary(
                digest, "a digest of a head", 32
            ):
                raise ValueError("it does not match its digest")
            if about["format_version"] not in READ[table]:
                raise ValueError(f"its format is {about['format_version']!r}")
            return about, data

        return _parsed(_called(table, number), parse)


def _called(table: str, number: int) -> str:
    return "head" if table == "heads" else f"kept logits of exemplar number {number}"


def _parsed(what: str, parse: Callable[[], Value]) -> Value:
    try:
        return parse()
    except LibraryCorruptError as error:
        raise LibraryCorruptError(
            f"the library's {what} cannot be used: {error} {_MEND}"
        ) from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, zlib.error) as error:
        raise LibraryCorruptError(
            f"the library's {what} cannot be used: damaged, or of a newer RecallSeg or another "
            f"library ({error}). {_MEND}"
        ) from error


def _digest(about: Mapping[str, Any], data: bytes) -> bytes:
    state = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    state.update(b"\0" + data)
    return state.digest()


def _cut(numbers: NDArray[np.float32], shapes: list[tuple[int, ...]]) -> Units:
    arrays, at = [], 0
    for shape in shapes:
        arrays.append(numbers[at : at + prod(shape)].reshape(shape))
        at += prod(shape)
    return tuple(arrays)
