"""Which exemplars are left out together: those of one patient, series or volume.

What is next to an exemplar in its own volume is nearly the same image. Whoever leaves out the
exemplar alone asks how well the library knows what it has, not what is to come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["GROUPINGS", "group_numbers"]

GROUPINGS = ("groups", "exemplars", "blocks")
"""``groups`` that were told, ``exemplars`` each by itself, or ``blocks`` within one patient."""
FEWEST_GROUPS = 3
"""That were told; of fewer, what is left when one is left out says little of a library."""
BLOCKS = 6
"""Contiguous parts of what is one patient's."""


def group_numbers(numbers: Sequence[int], told: Mapping[int, str]) -> tuple[dict[int, int], str]:
    """Return a group for each exemplar, by its number, and how they came about.

    Parameters
    ----------
    numbers : of exemplars, ascending.
    told : groups of those that one was told of; others stand each by itself.
    """
    names = [told.get(number, f"exemplar {number}") for number in numbers]
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    known = sum(number in told for number in numbers)
    if known and len(places) < FEWEST_GROUPS:
        count = min(BLOCKS, len(numbers))
        return {n: i * count // len(numbers) for i, n in enumerate(numbers)}, "blocks"
    grouping = "groups" if known else "exemplars"
    return {n: places[name] for n, name in zip(numbers, names, strict=True)}, grouping
