"""What to choose for a structure, and what to expect: by exemplars that the head had not seen.

Of the ways in which a head may be used, that of the highest mean Dice is chosen whose 95 %
interval, by groups, excludes harm (a loss of more than :data:`HARM`).

The Dice that is expected of a result depends on how far its image is from the library, and
exemplars need not be as far from each other as queries are from them: slices of one volume are
twice as far from each other as from a slice midway, and those of another patient are farther than
all of them. So each exemplar is judged three times: from those of other groups, from all (it is
then no distance away), and from the farther half of the others. Nor are images at one distance
alike: the outermost slices of an organ are harder than those within, which the decoder's own IoU
estimate knows. So mean Dice of results that have a mask is a function of the distance that never
rises plus one of the estimate that never falls, fitted to all of that by least squares, in turn
(isotonic regression: Barlow, Bartholomew, Bremner and Brunk, "Statistical Inference under Order
Restrictions", 1972; two of them: Bacchetti, "Additive Isotonic Models", JASA 1989). Its interval is
a bootstrap's over groups, expanded for their small number (Hesterberg, "What Teachers Should Know
About the Bootstrap", The American Statistician 2015). Of results without a mask it is counted how
often that was right, of those from other groups and from all: the farther half is farther than
queries are, and a count does not know it.

What was chosen as the best of many looks better than it is. By how much is estimated by choosing
anew from groups drawn with replacement, and comparing what that choice promises there with what it
gives on all (Efron's optimism: Harrell, Lee and Mark, Statistics in Medicine 1996). Choosing
without each group in turn would say what comes of one group fewer, which of few groups is another
choice altogether.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.verification import mask_dice
from recallseg.runtime.library.choices import MOST_KNOTS, Choice, Knot
from recallseg.runtime.segmenting.reach import SAME

__all__ = ["FEWEST", "LEAST", "WAYS", "Found", "Judged", "by_way", "choose", "falling", "out"]

FEWEST = 4
"""Groups that show a structure, below which nothing can be said of a head."""
MIXES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the head in the log-odds that are tried; memory attention has the rest."""
HARM = 0.005
"""A loss of mean Dice that the interval of what is chosen excludes: less nobody would notice."""
NEAR = 0.01
"""Of the best in mean Dice: ways that a smaller share may be chosen of."""
LEAST = 0.25
"""Of the smallest annotated share of an image: what is smaller may count as absent."""
DRAWS, CURVES, CHOICES = 2000, 200, 60
"""Of the bootstraps: of a mean, of a curve, of a choice."""
ROUNDS = 6
"""Of a fit by distance and one by IoU estimate: each lessens the squares that are left."""
DIGITS = 4
"""Of the root of a cosine distance, and of an IoU estimate: nearer ones are equal."""
TINY = 1e-9
ALPHA = 0.05

Floats = NDArray[np.float64]


class Way(NamedTuple):
    """What may be chosen for a structure: see :class:`Choice`."""

    mix: float
    within: bool = False
    small: bool = False

    @property
    def bolder(self) -> tuple[Way, ...]:
        """Ways that count it as absent less often: to choose this one must cost no exemplar."""
        ways = (self._replace(within=False), self._replace(small=False))
        return tuple(way for way in ways if way != self)


ALONE = Way(0.0)
WAYS = (
    ALONE,
    Way(0.0, small=True),
    *(Way(mix, *flags) for mix in MIXES for flags in product((False, True), repeat=2)),
)


class Found(NamedTuple):
    """How an exemplar was segmented: from how far, and how sure the decoder was of it.

    By way: Dice, share of the image, and whether a mask was given. The distance is NaN where
    nothing was recalled.
    """

    distance: float
    sure: float
    dice: list[float]
    areas: list[float]
    given: list[bool]


class Judged(NamedTuple):
    """An exemplar of which a structure is known: whether it shows it, and how it was found.

    ``found`` is, in turn, from exemplars of other groups, from all, from the farther half.
    """

    group: int
    shows: bool
    found: list[Found]


def by_way(
    distance: float,
    sure: float,
    alone: NDArray[np.float32],
    own: NDArray[np.float32],
    present: bool,
    mask: NDArray[np.bool_],
) -> Found:
    """Return what each way finds; nothing small left out yet.

    Parameters
    ----------
    sure : the decoder's IoU estimate.
    alone, own : logits HxW of memory attention, and of the head.
    mask : HxW, what is shown.
    """
    nothing = not (alone > 0).any()
    dice, areas, given = [], [], []
    for way in WAYS:
        given.append(present and not (way.within and nothing))
        found = (alone + np.float32(way.mix) * (own - alone) > 0) & given[-1]
        dice.append(mask_dice(found, mask))
        areas.append(float(found.mean()))
    return Found(distance, sure, dice, areas, given)


def out(why: str) -> Choice:
    """Return the choice that the head stays out."""
    return Choice(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, why)


def choose(rows: Sequence[Judged], limit: float) -> Choice:
    """Return what is chosen for a structure, and what is expected.

    Parameters
    ----------
    rows : of exemplars.
    limit : of what is small.
    """
    if not rows:
        return out("no exemplar with a stored image is annotated for it")
    groups = np.array([row.group for row in rows])
    shows = np.array([row.shows for row in rows])
    # Dice by exemplar, by what it was segmented from, by way.
    dice = np.array([[_judged(row, found, limit) for found in row.found] for row in rows])
    apart = dice[:, 0]
    shown = len(np.unique(groups[shows]))
    best, gain, why = 0, (0.0, 0.0), f"{shown} of {FEWEST} groups that are needed to judge it"
    if shown >= FEWEST:
        best, gain = _best(groups, apart)
        why = "" if best else "no better than memory attention alone, surely"
    found = apart[:, best]
    way = WAYS[best]
    given = np.array([[_given(one, best, limit) for one in row.found] for row in rows])
    parts = np.ones(len(rows), bool), given[:, 0], ~given[:, 0]
    flattered = _optimism(groups, apart, parts) if best else (0.0, 0.0, 0.0)
    under, over = _expanded(groups, found)
    curve, sure = _curves(groups, _evidence(rows), dice[:, :, best], given, flattered[1])
    return Choice(
        way.mix,
        limit if way.small else 0.0,
        float(apart[:, 0].mean()),
        max(0.0, float(found.mean()) - flattered[0]),
        *gain,
        len(rows),
        why,
        way.within,
        (max(0.0, under - flattered[0]), over),
        curve,
        sure,
        _empty(dice[:, :2, best], given[:, :2]),
        flattered[2],
    )


def _judged(row: Judged, found: Found, limit: float) -> list[float]:
    """Return Dice by way, with what is small left out where that is the way."""
    return [
        float(not row.shows) if way.small and area < limit else value
        for way, value, area in zip(WAYS, found.dice, found.areas, strict=True)
    ]


def _given(found: Found, way: int, limit: float) -> bool:
    """Whether a way gives a mask, however little is in it."""
    return found.given[way] and not (WAYS[way].small and found.areas[way] < limit)


def _evidence(rows: Sequence[Judged]) -> Floats:
    """Return Nx3x2: distance and IoU estimate, by what exemplars were segmented from."""
    return np.array([[(found.distance, found.sure) for found in row.found] for row in rows])


def _empty(dice: Floats, given: NDArray[np.bool_]) -> tuple[float, int]:
    """Return of how many exemplars some result had no mask, and of how many that was right.

    One counts as a part where it was right in some of its results alone.
    """
    some = ~given.all(1)
    right = np.where(given, 0.0, dice == 1)[some].sum(1) / (~given)[some].sum(1)
    return float(right.sum()), int(some.sum())


def _best(groups: NDArray[np.int_], dice: Floats) -> tuple[int, tuple[float, float]]:
    """Return the best way that does no harm, and the interval of its gain; 0 if there is none.

    Of ways near the best and not surely worse than it, or worse by one group alone, that with the
    smallest share of the head: an exemplar that is left out has farther neighbours than a query,
    and memory attention suffers more of that than the head.
    """
    gains = dice - dice[:, :1]
    means = gains.mean(0).round(9)
    found: dict[int, tuple[float, float]] = {}
    for i in map(int, np.argsort(-means, kind="stable")):
        if i == 0 or means[i] <= 0:
            break
        if any((dice[:, i] < dice[:, WAYS.index(way)]).any() for way in WAYS[i].bolder):
            continue
        best = next(iter(found), i)
        if i != best and not _near(groups, dice[:, best] - dice[:, i]):
            continue
        low, high = _interval(groups, gains[:, i])
        if low >= -HARM:
            found[i] = low, high
    if not found:
        return 0, (0.0, 0.0)
    chosen = min(found, key=lambda i: WAYS[i].mix)  # of equal ones the first, which is better
    return chosen, found[chosen]


def _optimism(
    groups: NDArray[np.int_], dice: Floats, parts: Sequence[NDArray[np.bool_]]
) -> tuple[float, ...]:
    """Return by how much a choice promises more than it gives, on average over parts of exemplars.

    Parameters
    ----------
    groups, dice : N, and NxW by way.
    parts : N each.
    """
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    sums, draw = np.zeros(len(parts)), np.random.default_rng(0)
    for drawn in draw.integers(len(members), size=(CHOICES, len(members))):
        some = np.concatenate([members[i] for i in drawn])
        places = np.repeat(np.arange(len(drawn)), [len(members[i]) for i in drawn])
        best, _ = _best(places, dice[some])
        for i, part in enumerate(parts):
            here = some[part[some]]
            if len(here):
                sums[i] += dice[here, best].mean() - dice[part, best].mean()
    return tuple(float(total) for total in np.maximum(0.0, sums / CHOICES))


def _near(groups: NDArray[np.int_], behind: Floats) -> bool:
    """Whether a way that is behind another by so much, by exemplar, is as good for all we know."""
    sums = np.array([behind[groups == name].sum() for name in np.unique(groups)])
    if sums.sum() - sums.max() <= TINY:
        return True  # one group alone makes the difference
    return bool(behind.mean() <= NEAR and _interval(groups, behind)[0] < 0)


def _interval(
    groups: NDArray[np.int_], values: Floats, tail: float = ALPHA / 2
) -> tuple[float, float]:
    """Return the bootstrap's interval of a mean, groups being drawn, not exemplars."""
    names = np.unique(groups)
    sums = np.array([values[groups == name].sum() for name in names])
    counts = np.array([(groups == name).sum() for name in names])
    drawn = np.random.default_rng(0).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _expanded(groups: NDArray[np.int_], dice: Floats) -> tuple[float, float]:
    """Return the interval of a mean Dice; that of what nobody knows with fewer than three groups.

    A bootstrap of few groups is too narrow by a factor that is known for a normal mean.
    """
    count = len(np.unique(groups))
    return _interval(groups, dice, _tail(count)) if count > 2 else (0.0, 1.0)


def _tail(count: int) -> float:
    """Return which quantile of a bootstrap of so many groups covers 95 % in the end.

    Student's quantile by its expansion (Abramowitz and Stegun 26.7.5).
    """
    z, n = NormalDist().inv_cdf(1 - ALPHA / 2), count - 1
    student = (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
    return NormalDist().cdf(-student * float(np.sqrt(count / n)))


def _curves(
    groups: NDArray[np.int_],
    evidence: Floats,
    dice: Floats,
    given: NDArray[np.bool_],
    flattered: float,
) -> tuple[tuple[Knot, ...], tuple[Knot, ...]]:
    """Return mean Dice of results with a mask, by distance, and what the IoU estimate adds.

    Parameters
    ----------
    groups : N, of exemplars.
    evidence : Nx3x2, see :func:`_evidence`.
    dice, given : Nx3, by what they were segmented from; whether there was a mask.
    flattered : by how much Dice is too high.
    """
    known = given & np.isfinite(evidence).all(2)
    places, own = np.unique(groups[np.nonzero(known)[0]], return_inverse=True)
    if len(places) < FEWEST:
        return (), ()
    values, (distances, sure) = dice[known], evidence[known].T
    chords = np.sqrt(np.where(distances > SAME, distances, 0.0)).round(DIGITS)
    unsure = 1.0 - sure.round(DIGITS)

    def fit(weights: NDArray[Any]) -> tuple[Line, Line]:
        more = np.zeros(len(values))
        for _ in range(ROUNDS):
            left = values - falling(chords, values - more, weights)(chords)
            rising = falling(unsure, left, weights)
            more = rising(unsure)
            middle = float(np.average(more, weights=weights))
            more -= middle
        by_distance = falling(chords, values - more, weights)
        return by_distance, Line(rising.at, rising.values - middle)

    mean = fit(np.ones(len(values)))
    draw = np.random.default_rng(0)
    drawn = [
        fit(np.bincount(one, minlength=len(places))[own])
        for one in draw.integers(len(places), size=(CURVES, len(places)))
    ]
    tail = _tail(len(places))
    curves = []
    for line, lines, seen, less in zip(
        mean, zip(*drawn, strict=True), (chords, unsure), (flattered, 0.0), strict=True
    ):
        ends = [0.0 if line is mean[0] else seen.min(), seen.max()]
        at = np.unique([*line.at, *ends])
        if len(at) > MOST_KNOTS:  # as a large library gives; what is between them is a line
            at = at[np.linspace(0, len(at) - 1, MOST_KNOTS).round().astype(int)]
        low, high = np.quantile([one(at) for one in lines], [tail, 1 - tail], axis=0)
        dice = line(at)
        curves.append(
            [at, dice - less, np.minimum(low, dice) - less, np.maximum(high, dice) - less]
        )
    (chord, *curve), (off, *sure) = curves
    return _knots(chord**2, *curve), _knots(1.0 - off, *sure)[::-1]


def _knots(*columns: Floats) -> tuple[Knot, ...]:
    return tuple(Knot(*map(float, row)) for row in zip(*columns, strict=True))


class Line(NamedTuple):
    """Straight from point to point, and level beyond the first and the last."""

    at: Floats
    values: Floats

    def __call__(self, at: Floats) -> Floats:
        """Return the values at some places."""
        found: Floats = np.interp(at, self.at, self.values)
        return found


def falling(chords: Floats, values: Floats, weights: NDArray[Any]) -> Line:
    """Return the best fit in least squares that never rises, between its steps a straight line.

    Parameters
    ----------
    chords, values, weights : N.
    """
    places, own = np.unique(chords, return_inverse=True)
    there = np.bincount(own, weights)
    sums = np.bincount(own, weights * values)
    # Each step: weight, sum of chords, sum of values. Pool adjacent violators.
    steps: list[tuple[float, float, float]] = []
    for chord, weight, total in zip(places.tolist(), there.tolist(), sums.tolist(), strict=True):
        if not weight:
            continue
        step = (weight, weight * chord, total)
        while steps and steps[-1][2] * step[0] <= step[2] * steps[-1][0]:
            before = steps.pop()
            step = (before[0] + step[0], before[1] + step[1], before[2] + step[2])
        steps.append(step)
    count, at, total_of = np.array(steps).T
    return Line(at / count, total_of / count)
