"""What was chosen for a structure when a head was fitted, and the Dice that is expected of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from recallseg.runtime.library.values import integer

__all__ = [
    "MOST_KNOTS",
    "Choice",
    "Expected",
    "Knot",
    "choice_values",
    "finite",
    "parse_choice",
]

MOST_KNOTS = 64
Z = 1.96
"""Of a normal 95 % interval."""


class Expected(NamedTuple):
    """A mean Dice of images, with its 95 % interval.

    ``beyond`` says that they are farther from the library than all that it was judged by, or of a
    lower IoU estimate, so that it may well be less.
    """

    dice: float
    low: float
    high: float
    beyond: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return self._asdict()


class Knot(NamedTuple):
    """Of a curve, mean Dice and its 95 % interval: at a cosine distance, or an IoU estimate.

    The two add up, so that one of them may leave 0 to 1.
    """

    at: float
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
    curve : Dice of results with a mask, by distance from the nearest exemplar that shows it;
        nearest first, empty where too few groups had one.
    sure : what the decoder's IoU estimate adds to that, or takes; lowest estimate first.
    empty : of how many exemplars a result without a mask was right, and how many had one.
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
    sure: tuple[Knot, ...] = ()
    empty: tuple[float, int] = (0.0, 0)
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

    def at(self, distance: float, sure: float, *, given: bool) -> Expected | None:
        """Return what is expected of results like one.

        Parameters
        ----------
        distance : cosine distance to the nearest exemplar that shows it (``Score.distance``).
        sure : the decoder's IoU estimate (``Score.iou``).
        given : whether there is a mask (``Score.present``).

        Returns
        -------
        Expected or None
            A result without a mask counts 1 if the image does not show it, else 0. None without
            exemplars to say it by, or without a distance.
        """
        if not given:
            return self.rejects
        if not self.curve or not math.isfinite(distance + sure):
            return None
        # Lengths of chords: an image half as far away differs half as much.
        chords = np.sqrt([knot.at for knot in self.curve])
        chord = math.sqrt(max(0.0, distance))
        parts = [
            [float(np.interp(place, places, values)) for values in zip(*curve, strict=True)][1:]
            for place, places, curve in (
                (chord, chords, self.curve),
                (sure, [knot.at for knot in self.sure], self.sure),
            )
        ]
        dice = sum(part[0] for part in parts)
        low = dice - math.hypot(*(part[0] - part[1] for part in parts))
        high = dice + math.hypot(*(part[2] - part[0] for part in parts))
        dice, low, high = (min(1.0, max(0.0, one)) for one in (dice, low, high))
        return Expected(dice, low, high, bool(chord > chords[-1] or sure < self.sure[0].at))

    @property
    def rejects(self) -> Expected | None:
        """How likely a result without a mask is right; None if there was none to judge by.

        The mean under Jeffreys' prior, since two of two right do not make it certain, and Wilson's
        interval.
        """
        right, of = self.empty
        if not of:
            return None
        share, more = right / of, Z * Z / of
        middle = (share + more / 2) / (1 + more)
        half = Z / (1 + more) * math.sqrt(share * (1 - share) / of + more / of / 4)
        dice = max(0.0, (right + 0.5) / (of + 1) - self.flattered)
        return Expected(dice, max(0.0, middle - half - self.flattered), min(1.0, middle + half))

    def over(self, results: Iterable[tuple[float, float, bool]]) -> Expected | None:
        """Return what is expected on average over results.

        Parameters
        ----------
        results : distance, IoU estimate, and whether there is a mask, of each; see :meth:`at`.

        Returns
        -------
        Expected or None
            Its interval is the mean of theirs, since they rest on the same exemplars. None if there
            is no result, or nothing is known of one of them.
        """
        told = [self.at(far, sure, given=given) for far, sure, given in results]
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
        list(choice.interval),
        *([list(knot) for knot in curve] for curve in (choice.curve, choice.sure)),
        *(list(choice.empty), choice.flattered),
    ]


def parse_choice(values: Sequence[Any]) -> Choice:
    """Rebuild a stored choice; raises ValueError for anything else."""
    mix, least, alone, expected, low, high = (finite(value) for value in values[:6])
    exemplars, why, *more = values[6:]
    if not (0 <= mix <= 1 and 0 <= least <= 1) or not isinstance(why, str):
        raise ValueError("a choice beyond its range")
    within = more[0] if more else False  # the first heads did not say
    if not isinstance(within, bool) or len(more) not in (0, 1, 5, 6):
        raise ValueError("a choice beyond its range")
    count = integer(exemplars, "exemplars of a choice")
    choice = (mix, least, alone, expected, low, high, count, why, within)
    if len(more) < 6:  # nor did they say by distance, nor the next ones by IoU estimate
        return Choice(*choice)
    under, over = (_share(value) for value in more[1])
    curve, sure = (_curve(knots) for knots in more[2:4])
    right, of = finite(more[4][0]), integer(more[4][1], "exemplars without a mask")
    if not 0 <= right <= of or under > over or bool(curve) is not bool(sure):
        raise ValueError("a choice beyond its range")
    return Choice(*choice, (under, over), curve, sure, (right, of), _share(more[5]))


def _curve(knots: Sequence[Any]) -> tuple[Knot, ...]:
    if len(knots) > MOST_KNOTS:
        raise ValueError("too many knots")
    curve = tuple(Knot(*map(finite, knot)) for knot in knots)
    if any(one.at >= other.at for one, other in pairwise(curve)):
        raise ValueError("knots out of order")
    if any(not 0 <= one.at <= 2 for one in curve):
        raise ValueError("knots at no distance, nor at an IoU estimate")
    return curve


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
