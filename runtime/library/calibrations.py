"""Where a library keeps what was learnt from its exemplars: for a recipe and a structure.

As notes in the catalog, whose contents are the business of :mod:`recallseg.runtime.segmenting`.
What an older program stored under the name ``calibration`` says neither k nor reach of its
queries: it is kept, and used for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError, LibraryCorruptError
from recallseg.runtime.checks import check_name
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.store import Store
from recallseg.runtime.library.values import hex_digest, integer, text

__all__ = [
    "Learnt",
    "StoredCalibration",
    "calibrations",
    "learnt",
    "marks",
    "notes_of",
    "split_name",
    "store_calibrations",
]

FORMAT_VERSION = 1
FORMER = "calibration"
PREFIX = "calibration "


@dataclass(frozen=True)
class StoredCalibration:
    """What was learnt for one recipe and structure.

    Attributes
    ----------
    recipe : digest of the recipe that it was made for.
    structure : that it holds for.
    data : JSON values.
    last : number of the newest exemplar that it was made with.
    without : numbers of those that were retired then.
    current : whether the memories are those that it was made with; not so after a rebuild.
    """

    recipe: str
    structure: str
    data: Mapping[str, Any]
    last: int
    current: bool
    without: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Learnt:
    """A calibration, if there is one, beside the exemplars as they are now.

    Attributes
    ----------
    calibration : None if there is none for this recipe, or it is damaged. One that was made under a
        former identity of the bundle holds until there is one under today's.
    damage : what is wrong with it; empty if nothing is.
    others : whether there are any of the structure for other recipes.
    embeddings : N x D, of the exemplars that show the structure: those that ``calibration`` was
        made with, then the others, both in order of addition.
    made_with : how many these are.
    numbers : N, of these exemplars.
    told : groups of exemplars that one was told of, keyed hashes, by number.
    """

    calibration: StoredCalibration | None
    damage: str
    others: bool
    embeddings: NDArray[np.float32] = field(repr=False)
    made_with: int
    numbers: NDArray[np.int64] = field(repr=False)
    told: Mapping[int, str] = field(repr=False)


def store_calibrations(
    store: Store, recipe: str, data: Mapping[str, Mapping[str, Any]], newest: str
) -> None:
    """Store JSON values by structure, each in the place of the one before of its recipe."""
    store.check_writable("store a calibration")
    with store.lock:
        last, retired = store.number(newest), store.catalog.retired_numbers()
        try:
            notes = {
                f"{PREFIX}{recipe} {check_name(structure)}": json.dumps(
                    {
                        "format_version": FORMAT_VERSION,
                        "generation": store.state.generation,
                        "last": last,
                        **({"without": retired} if retired else {}),
                        "data": dict(values),
                    },
                    allow_nan=False,
                )
                for structure, values in data.items()
            }
        except (TypeError, ValueError) as error:
            raise InputError(
                f"a calibration must consist of finite JSON values: {error}."
            ) from error
        with store.catalog.change("calibrate", details={"recipe": recipe}):
            for name, value in notes.items():
                store.catalog.set_note(name, value)


def calibrations(store: Store) -> tuple[StoredCalibration, ...]:
    """Return all that are stored, in order of recipe and structure."""
    with store.catalog.database.snapshot():
        generation = store.catalog.state().generation
        return tuple(parse_stored(*note, generation) for note in store.catalog.notes(PREFIX))


def marks(store: Store, recipes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return what changes whenever a calibration of one of these recipes does; fast."""
    return tuple(note for one in recipes for note in store.catalog.notes(f"{PREFIX}{one} "))


def notes_of(catalog: Catalog, old: str, new: str) -> dict[str, str]:
    """Return the names of a structure's notes, and those that they get if it is renamed."""
    names = [name for name, _ in catalog.notes(PREFIX) if split_name(name)[1] == old]
    return {name: f"{PREFIX}{split_name(name)[0]} {new}" for name in names}


def learnt(
    store: Store, recipes: Sequence[str], structures: Sequence[str], tags: Mapping[str, str]
) -> dict[str, Learnt]:
    """Return what is known of each structure; only exemplars with all ``tags`` count.

    Of several recipes, which mean the same, the first that was calibrated counts.
    """
    with store.lock:
        store.refresh()
        with store.catalog.database.snapshot():
            store.see_newest()
            notes, told = dict(store.catalog.notes(PREFIX)), store.catalog.groups()
            return {name: _learnt(store, recipes, name, tags, notes, told) for name in structures}


def _learnt(
    store: Store,
    recipes: Sequence[str],
    structure: str,
    tags: Mapping[str, str],
    notes: Mapping[str, str],
    told: Mapping[int, str],
) -> Learnt:
    row = store.structure(structure)
    numbers, vectors = store.catalog.embeddings(row.id, True)
    if tags:
        wanted = np.isin(numbers, store.catalog.numbers(row.id, True, tags))
        numbers, vectors = numbers[wanted], vectors[wanted]
    names = [f"{PREFIX}{recipe} {structure}" for recipe in recipes]
    own, damage = None, ""
    for name in (name for name in names if name in notes):
        try:
            own = parse_stored(name, notes[name], store.state.generation)
        except LibraryCorruptError as error:  # told in every result, and replaced by the next one
            damage = str(error)
        break
    others = any(split_name(each)[1] == structure and each not in names for each in notes)
    made_with = 0
    if own is not None:
        used = (numbers <= own.last) & ~np.isin(numbers, own.without)
        made_with = int(used.sum())
        vectors = np.concatenate([vectors[used], vectors[~used]])
        numbers = np.concatenate([numbers[used], numbers[~used]])
    return Learnt(own, damage, others, vectors, made_with, numbers, told)


def parse_stored(name: str, value: str, generation: int) -> StoredCalibration:
    """Return what a note says; raises LibraryCorruptError if that cannot be told."""
    recipe, structure = split_name(name)
    try:
        stored = json.loads(value)
        version, data = stored["format_version"], stored["data"]
        made, last, without = stored["generation"], stored["last"], stored.get("without", [])
        if not isinstance(without, list):
            raise ValueError("what it was made without")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(structure, repr(error)) from error
    if version != FORMAT_VERSION or not isinstance(data, dict):
        raise _damaged(structure, f"its format is {version!r}")
    return StoredCalibration(
        hex_digest(recipe, "the recipe of a calibration"),
        text(structure, "the structure of a calibration", check_name),
        data,
        integer(last, "the newest exemplar of a calibration"),
        integer(made, "the generation of a calibration", 1) == generation,
        tuple(integer(number, "an exemplar's number", 1) for number in without),
    )


def split_name(name: str) -> tuple[str, str]:
    """Return the recipe's digest and the structure, which may have spaces, of a note's name."""
    recipe, _, structure = name.removeprefix(PREFIX).partition(" ")
    return recipe, structure


def _damaged(structure: str, why: str) -> LibraryCorruptError:
    return LibraryCorruptError(
        f"the stored calibration of '{ascii(structure)[1:-1]}' is damaged or of a newer RecallSeg: "
        f"{why}. Make it anew with 'recallseg library calibrate', or update RecallSeg."
    )
