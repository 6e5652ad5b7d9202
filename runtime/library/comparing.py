"""What became of a library: exemplars added, removed and changed between two states of it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recallseg.runtime.library.exemplar import Exemplar

if TYPE_CHECKING:
    from recallseg.runtime.library.library import Library

__all__ = ["SCHEMA", "Dices", "Difference", "compare"]

SCHEMA = "recallseg-difference/1"
_NONE = "none"


@dataclass(frozen=True)
class Dices:
    """Mean Dice of a structure before and after, over the same held-out cases.

    Attributes
    ----------
    before, after : of both.
    cases : how many show the structure.
    """

    before: float
    after: float
    cases: int


@dataclass(frozen=True)
class Difference:
    """What a library has that another has not.

    Attributes
    ----------
    added, removed : keys of exemplars in use, in the order of the library that has them.
    retired, reinstated : keys of those that are there still, and out of use, or in use again.
    renamed : keys of equal images and masks, before and after.
    changed : by key, what differs: ``structures`` (which it shows, or says to be absent), ``masks``
        (image or masks of the same structures) and ``tags``.
    structures_added, structures_removed : names.
    bundle : identities before and after, where they differ.
    settings : before and after, where they differ: ``memories`` (their format), ``intensity``,
        ``head`` (its digest), ``calibrated`` (structures, and for which recipes) and ``evaluated``
        (with which k and recipe).
    dice : by structure, where both were evaluated on the same cases.
    uncompared : why Dice was not compared; empty if it was.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    reinstated: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    changed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    structures_added: tuple[str, ...] = ()
    structures_removed: tuple[str, ...] = ()
    bundle: tuple[str, str] | None = None
    settings: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    dice: Mapping[str, Dices] = field(default_factory=dict)
    uncompared: str = ""

    def __bool__(self) -> bool:
        """Whether anything differs but Dice."""
        return any(v for name, v in vars(self).items() if name not in ("dice", "uncompared"))

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "schema": SCHEMA,
            **{name: [*v] if isinstance(v, tuple) else v for name, v in vars(self).items()},
            "changed": {key: [*parts] for key, parts in self.changed.items()},
            "settings": {name: [*both] for name, both in self.settings.items()},
            "dice": {name: vars(one) for name, one in self.dice.items()},
        }


def compare(
    before: Library,
    after: Library,
    evaluations: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None] = (None, None),
) -> Difference:
    """Return what is new in ``after``.

    Parameters
    ----------
    evaluations : of both on held-out images, as releases bring them
        (:func:`recallseg.runtime.reports.released.released`); Dice is compared where the cases are
        the same.
    """
    old, new = _by_key(before), _by_key(after)
    old_out, new_out = _by_key(before.retired), _by_key(after.retired)
    added = [key for key in new if key not in old and key not in old_out]
    removed = [key for key in old if key not in new and key not in new_out]
    renamed = _renamed({key: old[key] for key in removed}, {key: new[key] for key in added})
    former = {**old, **old_out, **{key: old[was] for was, key in renamed.items()}}
    changed = {key: _changed(former[key], one) for key, one in new.items() if key in former}
    dice, uncompared = _dices(*evaluations)
    settings = _settings(before, evaluations[0]), _settings(after, evaluations[1])
    was, now = before.structures, after.structures
    identities = before.bundle_identity, after.bundle_identity
    return Difference(
        added=tuple(key for key in added if key not in renamed.values()),
        removed=tuple(key for key in removed if key not in renamed),
        retired=tuple(key for key in old if key in new_out),
        reinstated=tuple(key for key in new if key in old_out),
        renamed=renamed,
        changed={key: parts for key, parts in changed.items() if parts},
        structures_added=tuple(name for name in now if name not in was),
        structures_removed=tuple(name for name in was if name not in now),
        bundle=None if identities[0] == identities[1] else identities,
        settings={
            name: (value, settings[1][name])
            for name, value in settings[0].items()
            if name in settings[1] and value != settings[1][name]
        },
        dice=dice,
        uncompared=uncompared,
    )


def _by_key(exemplars: Iterable[Exemplar]) -> dict[str, Exemplar]:
    return {one.key: one for one in exemplars}


def _renamed(old: Mapping[str, Exemplar], new: Mapping[str, Exemplar]) -> dict[str, str]:
    """Return keys of equal content, before and after."""
    waiting = defaultdict[str, deque[str]](deque)
    for key, one in new.items():
        waiting[one.content].append(key)
    return {key: waiting[one.content].popleft() for key, one in old.items() if waiting[one.content]}


def _changed(before: Exemplar, after: Exemplar) -> tuple[str, ...]:
    shows = [({*one.structures}, {*one.absent}) for one in (before, after)]
    found = []
    if shows[0] != shows[1]:
        found.append("structures")
    elif before.content != after.content:
        found.append("masks")
    return (*found, "tags") if before.tags != after.tags else tuple(found)


def _settings(library: Library, evaluation: Mapping[str, Any] | None) -> dict[str, str]:
    """Return what a library is asked with, and with what it was evaluated, as texts."""
    head = library.heads.mark
    calibrated = sorted(
        f"{one.structure} (recipe {one.recipe[:12]})" for one in library.calibrations if one.current
    )
    found = {
        "memories": library.memory_format,
        "intensity": repr(library.intensity),
        "head": _NONE if head is None else head.hex()[:12],
        "calibrated": ", ".join(calibrated) or _NONE,
    }
    if evaluation is not None:
        recipe = (evaluation.get("provenance") or {}).get("recipe") or {}
        found["evaluated"] = f"k = {evaluation['k']}, recipe {str(recipe.get('digest'))[:12]}"
    return found


def _dices(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> tuple[dict[str, Dices], str]:
    if before is None or after is None:
        which = "neither" if before is after else "A" if after is not None else "B"
        was = "was evaluated" if which == "neither" else "was not evaluated"
        return {}, f"{which} {was}: both must be releases that were (release --evaluate)"
    if before["cases"] != after["cases"]:
        return {}, "they were evaluated on other cases"
    both = before["dice"].keys() & after["dice"].keys()
    return {
        name: Dices(
            before["dice"][name]["mean"], after["dice"][name]["mean"], after["dice"][name]["cases"]
        )
        for name in sorted(both)
    }, "" if both else "they have no structure in common"
