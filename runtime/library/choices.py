"""What was chosen for a structure when a head was fitted, and the Dice that is expected of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from recallseg.runtime.library.values import integer

__all__ = ["Choice", "Expected", "Knot", "choice_values", "finite", "parse_choice"]

MOST_KNOTS = 64
Z = 1.96
"""Of a normal 95 % interval."""


class Expected(NamedTuple):
    """A mean Dice of images, with its 95 % interval.

    ``beyond`` says that they are farther from the library than all that it was judged by, so that
    it may well be less.
    """

    dice: float
    low: float
    high: float
    beyond: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return self._asdict()


class Knot(NamedTuple):
    """Mean Dice, and its 95 % interval, at a cosine distance from the nearest exemplar."""

    distance: float
    dice: float
    low: float
    high: float


@dataclass(frozen=True)
class Choice:
    """What was chosen for one structure, by exemplars that the head had not seen.

    Attributes
    ----------
    mix : the head's share of the logits, 0 (memory attention alone) to 1.
    least : share of an image's pixels below which the structure counts as absent; 0: none.
    alone, expected : mean Dice of memory attention alone, and of what was chosen, of exemplars that
        were segmented from the others; an image without the structure counts 1 if none is found.
    low, high : 95 % interval of the difference that the choice makes, by groups.
    exemplars : that it was judged by.
    why : why the head stays out, if it does; empty otherwise.
    within : whether it counts as absent where memory attention finds none of it.
    interval : of ``expected``, 95 %.
    curve : Dice where the structure is shown, by distance from the nearest exemplar that shows it;
        nearest first, empty where too few groups show it.
    absent : of how many exemplars known not to show it nothing was found, and how many there are.
    flattered : by how much that share is too high, as the choice was made by it; ``expected`` and
        ``curve`` are without what their choice adds.
    """

    mix: float
    least: float
    alone: float
    expected: float
    low: float
    high: float
    exemplars: int
    why: str = ""
    within: bool = False
    interval: tuple[float, float] = (0.0, 1.0)
    curve: tuple[Knot, ...] = ()
    absent: tuple[int, int] = (0, 0)
    flattered: float = 0.0

    @property
    def used(self) -> bool:
        """Whether it changes anything."""
        return self.mix > 0 or self.least > 0

    @property
    def absence(self) -> str:
        """Where it counts as absent for all that is found, in words; empty if nowhere."""
        rules = []
        if self.least:
            rules.append(f"less than {self.least:.2%} of the image is found")
        if self.within:
            rules.append("memory attention alone finds nothing")
        return " or ".join(rules)

    def at(self, distance: float) -> Expected | None:
        """Return what is expected of images that show the structure, at a distance.

        Parameters
        ----------
        distance : cosine distance to the nearest exemplar that shows it (``Score.distance``).

        Returns
        -------
        Expected or None
            None without exemplars to say it by, or without a distance.
        """
        if not self.curve or math.isnan(distance):
            return None
        # Lengths of chords: an image half as far away differs half as much.
        chords = np.sqrt([knot.distance for knot in self.curve])
        chord = math.sqrt(max(0.0, distance))
        values = np.array([knot[1:] for knot in self.curve])
        dice, low, high = (float(np.interp(chord, chords, values[:, i])) for i in range(3))
        return Expected(dice, low, high, bool(chord > chords[-1]))

    @property
    def rejects(self) -> Expected | None:
        """How likely nothing is found in an image without the structure; None if not judged.

        The mean under Jeffreys' prior, since two of two right do not make it certain, and Wilson's
        interval.
        """
        right, of = self.absent
        if not of:
            return None
        share, more = right / of, Z * Z / of
        middle = (share + more / 2) / (1 + more)
        half = Z / (1 + more) * math.sqrt(share * (1 - share) / of + more / of / 4)
        dice = max(0.0, (right + 0.5) / (of + 1) - self.flattered)
        return Expected(dice, max(0.0, middle - half - self.flattered), min(1.0, middle + half))

    def over(self, images: Iterable[tuple[float, bool]]) -> Expected | None:
        """Return what is expected on average over images.

        Parameters
        ----------
        images : distance (see :meth:`at`) of each, and whether it shows the structure.

        Returns
        -------
        Expected or None
            Its interval is the mean of theirs, since they rest on the same exemplars. None if there
            is no image, or nothing is known of one of them.
        """
        told = [self.at(distance) if shows else self.rejects for distance, shows in images]
        known = [one for one in told if one is not None]
        if not known or len(known) < len(told):
            return None
        dice, low, high, beyond = (sum(values) / len(known) for values in zip(*known, strict=True))
        return Expected(dice, low, high, beyond > 0)


def choice_values(choice: Choice) -> list[Any]:
    """Return a choice as it is stored."""
    return [
        *(choice.mix, choice.least, choice.alone, choice.expected, choice.low, choice.high),
        *(choice.exemplars, choice.why, choice.within),
        *(list(choice.interval), [list(knot) for knot in choice.curve], list(choice.absent)),
        choice.flattered,
    ]


def parse_choice(values: Sequence[Any]) -> Choice:
    """Rebuild a stored choice; raises ValueError for anything else."""
    mix, least, alone, expected, low, high = (finite(value) for value in values[:6])
    exemplars, why, *more = values[6:]
    if not (0 <= mix <= 1 and 0 <= least <= 1) or not isinstance(why, str):
        raise ValueError("a choice beyond its range")
    within = more[0] if more else False  # the first heads did not say
    if not isinstance(within, bool) or len(more) not in (0, 1, 5):
        raise ValueError("a choice beyond its range")
    count = integer(exemplars, "exemplars of a choice")
    choice = (mix, least, alone, expected, low, high, count, why, within)
    if len(more) < 5:  # nor did they say by distance
        return Choice(*choice)
    under, over = (_share(value) for value in more[1])
    if len(more[2]) > MOST_KNOTS:
        raise ValueError("too many knots")
    curve = tuple(_knot(*knot) for knot in more[2])
    if any(one.distance >= other.distance for one, other in pairwise(curve)):
        raise ValueError("knots out of order")
    right, of = (integer(value, "exemplars without a structure") for value in more[3])
    if right > of or under > over:
        raise ValueError("a choice beyond its range")
    return Choice(*choice, (under, over), curve, (right, of), _share(more[4]))


def _knot(distance: Any, dice: Any, low: Any, high: Any) -> Knot:
    found = finite(distance)
    if not 0 <= found <= 2:
        raise ValueError(f"a cosine distance of {found}")
    return Knot(found, _share(dice), _share(low), _share(high))


def _share(value: Any) -> float:
    number = finite(value)
    if not 0 <= number <= 1:
        raise ValueError(f"a Dice of {number}")
    return number


def finite(value: Any) -> float:
    """Return a stored number; raises ValueError if it is none, or not finite."""
    number = float(value)
    if isinstance(value, (str, bool)) or not math.isfinite(number):
        raise ValueError(f"{value!r} is no finite number")
    return number
