"""Take what identifies out of a library that has it in keys and tags, from earlier versions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recallseg.engines.digest import digest_json
from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library.calibrations import PREFIX, parse_stored, split_name
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.exemplar import Exemplar
from recallseg.runtime.library.identifiers import is_hashed
from recallseg.runtime.library.identifiers_file import Identity
from recallseg.runtime.library.identifying import identifies, is_random_key, random_key
from recallseg.runtime.library.store import Store

__all__ = ["AnonymisingReport", "anonymise"]

_PAGE = 256

Conceal = Callable[[Mapping[str, str]], dict[str, str]]


@dataclass(frozen=True)
class AnonymisingReport:
    """What was taken out of a library.

    Attributes
    ----------
    exemplars : how many there are.
    keys : how many got a key that says nothing.
    tags : how many values were hashed, by tag.
    unknown : values that were hashed by whoever made the library, whose table is not here.
    calibrations : structures whose calibration is now under a tag's hash.
    removed : structures whose calibration cannot be read, or names tags under a former identity of
        the bundle: calibrate them again.
    digest_before, digest : of the library; keys and tags are part of it.
    """

    exemplars: int
    keys: int
    tags: Mapping[str, int]
    unknown: int
    calibrations: tuple[str, ...]
    removed: tuple[str, ...]
    digest_before: str
    digest: str


def anonymise(store: Store) -> AnonymisingReport:
    """Replace keys and hash tags, in one commit; see :meth:`recallseg.Library.anonymise`."""
    store.check_writable("anonymise")
    with store.changing, store.lock:
        store.refresh()
        before, catalog, identifiers = store.digest, store.catalog, store.identifiers
        found = _all(catalog)
        shown = [tag for _, exemplar in found for tag in exemplar.tags.items()]
        clear = [name for name, value in shown if identifies(name, value) and not is_hashed(value)]
        hashed = [value for _, value in shown if is_hashed(value)]
        strange = len(hashed) if hashed and not identifiers.own else 0
        if clear or strange:
            identifiers.adopt()
        changed: list[tuple[int, str, dict[str, str]]] = []
        told: list[Identity] = []
        keys = 0
        for number, exemplar in found:
            tags = identifiers.conceal(exemplar.tags, beside_clear=True)
            keep = is_random_key(exemplar.key) or exemplar.key == exemplar.content[:32]
            if keep and tags == exemplar.tags:
                continue
            key = exemplar.key if keep else random_key()
            known = identifiers.of(exemplar.key, exemplar.tags)
            hidden = {n: value for n, value in exemplar.tags.items() if tags[n] != value}
            changed.append((number, key, tags))
            told.append(
                replace(
                    known,
                    key=key,
                    name=known.name or ("" if keep else exemplar.key),
                    tags={**known.tags, **hidden},
                    former=known.former if keep else exemplar.key,
                )
            )
            keys += not keep
        former = [identity.former for identity in told if identity.former]
        notes = _calibrations(catalog, lambda tags: identifiers.conceal(tags, beside_clear=True))
        if changed or notes:
            with identifiers.telling(told, instead=former):
                catalog.rename(changed, {old: new for old, _, new in notes})
            store.see_newest()
        return AnonymisingReport(
            len(found),
            keys,
            dict(Counter(clear)),
            strange,
            tuple(name for _, name, new in notes if new is not None),
            tuple(name for _, name, new in notes if new is None),
            before,
            store.digest,
        )


def _all(catalog: Catalog) -> list[tuple[int, Exemplar]]:
    found: list[tuple[int, Exemplar]] = []
    while page := catalog.exemplars(found[-1][0] if found else 0, _PAGE):
        found += page
    return found


def _calibrations(
    catalog: Catalog, conceal: Conceal
) -> list[tuple[str, str, tuple[str, str] | None]]:
    """Return calibrations of recipes with tags in the clear: note, structure, its successor.

    A recipe's digest is that of its fields, and a calibration is found by it.
    """
    found: list[tuple[str, str, tuple[str, str] | None]] = []
    for name, text in catalog.notes(PREFIX):
        digest, structure = split_name(name)
        try:
            parse_stored(name, text, 0)
        except LibraryCorruptError:  # nobody can tell whom it names
            found.append((name, structure, None))
            continue
        try:
            stored = json.loads(text)
            made = stored["data"]["provenance"]
            recipe = _without_digest(made["recipe"])
            tags = conceal(recipe["tags"])
            if tags == recipe["tags"]:
                continue
            whole = digest_json(recipe) == digest == made["recipe"]["digest"]
        except (KeyError, TypeError, AttributeError):  # of no recipe, so of no tags
            continue
        if not whole:  # under a former identity of the bundle
            found.append((name, structure, None))
            continue
        recipe["tags"] = tags
        fields = {**_without_digest(made), "recipe": recipe}
        shown = {"digest": digest_json(recipe), **recipe}
        stored["data"]["provenance"] = {
            "digest": digest_json(fields),
            **fields,
            "recipe": shown,
        }
        new = f"{PREFIX}{shown['digest']} {structure}", json.dumps(stored, allow_nan=False)
        found.append((name, structure, new))
    return found


def _without_digest(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "digest"}
