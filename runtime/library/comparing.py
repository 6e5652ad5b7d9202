"""What became of a library: exemplars added, removed and changed between two states of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recallseg.runtime.library.exemplar import Exemplar

if TYPE_CHECKING:
    from recallseg.runtime.library.library import Library

__all__ = ["Dices", "Difference", "compare"]


@dataclass(frozen=True)
class Dices:
    """Mean Dice of a structure before and after, over the same held-out cases."""

    before: float
    after: float
    cases: int


@dataclass(frozen=True)
class Difference:
    """What a library has that another has not.

    Attributes
    ----------
    added, removed : keys, in the order of the library that has them.
    changed : by key, what differs: ``masks`` (image, masks or what is absent) and ``tags``.
    structures_added, structures_removed : names.
    bundle : identities before and after, where they differ.
    dice : by structure, where both were evaluated on the same cases.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, tuple[str, ...]]
    structures_added: tuple[str, ...]
    structures_removed: tuple[str, ...]
    bundle: tuple[str, str] | None = None
    dice: Mapping[str, Dices] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**vars(self), "dice": {name: vars(one) for name, one in self.dice.items()}}


def compare(
    before: Library,
    after: Library,
    evaluations: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None] = (None, None),
) -> Difference:
    """Return what is new in ``after``.

    Parameters
    ----------
    evaluations : of both on held-out images, as releases bring them
        (:func:`recallseg.runtime.reports.summary.released`); Dice is compared where the cases are
        the same.
    """
    old = {one.key: one for one in before}
    new = {one.key: one for one in after}
    changed = {key: _changed(old[key], one) for key, one in new.items() if key in old}
    was, now = before.structures, after.structures
    identities = before.bundle_identity, after.bundle_identity
    return Difference(
        added=tuple(key for key in new if key not in old),
        removed=tuple(key for key in old if key not in new),
        changed={key: parts for key, parts in changed.items() if parts},
        structures_added=tuple(name for name in now if name not in was),
        structures_removed=tuple(name for name in was if name not in now),
        bundle=None if identities[0] == identities[1] else identities,
        dice=_dices(*evaluations),
    )


def _changed(before: Exemplar, after: Exemplar) -> tuple[str, ...]:
    same = {"masks": before.content == after.content, "tags": before.tags == after.tags}
    return tuple(name for name, equal in same.items() if not equal)


def _dices(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Dices]:
    if before is None or after is None or before["cases"] != after["cases"]:
        return {}
    both = before["dice"].keys() & after["dice"].keys()
    return {
        name: Dices(
            before["dice"][name]["mean"], after["dice"][name]["mean"], after["dice"][name]["cases"]
        )
        for name in sorted(both)
    }
