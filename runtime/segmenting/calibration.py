"""What is normal for this library? Thresholds by leaving one group of exemplars out at a time.

Each exemplar is treated as a query to those of other groups, see
:mod:`recallseg.runtime.segmenting.groups`. A new query whose score is more extreme than the
exemplars' own is flagged. The threshold is the conformal one: with N exemplars, the
ceil((N + 1)(1 - alpha))-th smallest score, so that at most alpha of the images that are like the
library (or 1 / (N + 1), whichever is more) are flagged without cause (Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World", chapter 2).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library.calibrations import Learnt
from recallseg.runtime.segmenting.groups import GROUPINGS, group_numbers

__all__ = [
    "ALPHA",
    "MIN_EXEMPLARS",
    "InForce",
    "Thresholds",
    "conformal_upper",
    "in_force",
    "nearest_other",
]

ALPHA = 0.05
"""Share of images like the library's own that may be flagged without cause."""
MIN_EXEMPLARS = 4
"""Fewer scores than this say nothing about what is normal."""
STRANGE = 0.01
"""Less likely than this, exemplars that came later are not like those of a calibration."""
MOST_LEFT_OUT = 1024
"""Exemplars that are compared with all others: a threshold needs no more in the largest library."""
_BLOCK = 256  # rows of the distance matrix at a time, to bound memory for large libraries


@dataclass(frozen=True)
class Thresholds:
    """Limits for one structure; None where nothing could be calibrated.

    Attributes
    ----------
    distance : largest usual cosine distance to the nearest exemplar.
    iou : least usual IoU estimate.
    exemplars : how many were left out in turn.
    dice : median Dice of the left-out exemplars with their own masks, if they were segmented.
    left_out : what was left out at a time: its group (patient, series, volume), the exemplar by
        itself where no groups are known, or a block of one patient's.
    """

    distance: float | None = None
    iou: float | None = None
    exemplars: int = 0
    dice: float | None = None
    left_out: str = "exemplars"

    def to_json(self) -> dict[str, Any]:
        """Return the fields for storage."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Thresholds:
        """Rebuild from storage; raises LibraryCorruptError for anything else."""
        numbers = (int, float, type(None))
        named = {"distance", "iou", "exemplars", "dice"}
        if (
            not isinstance(data, dict)
            or {*data} - {"left_out"}
            != named  # older programs left out exemplars, and said nothing
            or not all(isinstance(data[name], numbers) for name in named)
            or not isinstance(data["exemplars"], int)
            or data.get("left_out", "exemplars") not in GROUPINGS
        ):
            raise LibraryCorruptError(
                f"the thresholds of a calibration are damaged: {ascii(data)[:80]}. Make them anew "
                "with 'recallseg library calibrate'."
            )
        return cls(**data)


@dataclass(frozen=True)
class InForce:
    """What holds for one structure now.

    Attributes
    ----------
    thresholds : the distance is of the exemplars as they are now, the rest of the calibration.
    calibrated : None, or how many exemplars it was made with, of how many there are.
    missing : why it is not calibrated; empty if it is.
    """

    thresholds: Thresholds
    calibrated: tuple[int, int] | None
    missing: str


def in_force(learnt: Learnt) -> InForce:
    """Return what a library has learnt of a structure, as far as it still holds.

    Exemplars that came later leave a calibration in force as long as they are like those that it
    was made with: of these at most ``ALPHA`` lie farther from their nearest than its distance. If
    so many do that chance gives them in less than one of a hundred cases, it holds no more.
    """
    count = len(learnt.embeddings)
    enough = count >= MIN_EXEMPLARS
    of, grouping = group_numbers(np.sort(learnt.numbers).tolist(), learnt.told)
    groups = np.array([of[number] for number in learnt.numbers.tolist()], np.int64)
    distance = conformal_upper(nearest_other(learnt.embeddings, groups)) if enough else None
    stored = learnt.calibration
    fresh = Thresholds(distance=distance, exemplars=count, left_out=grouping)
    if stored is None:
        other = "it was calibrated for other settings" if learnt.others else ""
        return InForce(fresh, None, learnt.damage or other)
    if not stored.current:
        return InForce(fresh, None, "the library was encoded anew since it was calibrated")
    try:
        found = Thresholds.from_json(stored.data.get("thresholds"))
    except LibraryCorruptError as error:
        return InForce(fresh, None, str(error))
    with_it = groups[: learnt.made_with]
    if found.left_out == "exemplars" and len(np.unique(with_it)) < len(with_it):
        return InForce(
            fresh,
            None,
            "it was made by leaving out single exemplars, and the library knows which belong "
            "together: calibrate anew, after a new fit if there is a head",
        )
    if found.iou is None:
        more = "more of other groups" if found.left_out == "groups" else "more"
        return InForce(
            replace(found, distance=distance),
            None,
            f"{found.exemplars} exemplars could be left out in turn, {MIN_EXEMPLARS} are needed: "
            f"annotate {more}, then calibrate",
        )
    strange, added = _unlike(learnt, groups, found.distance)
    if strange and _chance(strange, added) < STRANGE:
        return InForce(
            fresh,
            None,
            f"{strange} of {added} exemplars added since are unlike those it was made with",
        )
    return InForce(replace(found, distance=distance), (learnt.made_with, count), "")


def _unlike(learnt: Learnt, groups: NDArray[np.int64], limit: float | None) -> tuple[int, int]:
    """Return how many later exemplars lie beyond the distance of the calibration, of how many.

    Those count that the calibration has exemplars of other ``groups`` for.
    """
    before, later = np.split(learnt.embeddings, [learnt.made_with])
    ours, theirs = np.split(groups, [learnt.made_with])
    if limit is None or not len(before) or not len(later):
        return 0, 0
    count = min(len(later), MOST_LEFT_OUT)
    chosen = np.linspace(0, len(later) - 1, count).round().astype(int)
    beyond = judged = 0
    for start in range(0, count, _BLOCK):
        rows = chosen[start : start + _BLOCK]
        similarity = later[rows] @ before.T
        similarity[theirs[rows, None] == ours] = -np.inf
        nearest = similarity.max(axis=1)
        judged += int((nearest > -np.inf).sum())
        beyond += int(((1.0 - nearest > limit) & (nearest > -np.inf)).sum())
    return beyond, judged


def _chance(least: int, of: int) -> float:
    """Return how likely at least so many of exchangeable exemplars exceed a threshold of ALPHA."""
    fewer = (math.comb(of, i) * ALPHA**i * (1 - ALPHA) ** (of - i) for i in range(least))
    return 1.0 - math.fsum(fewer)


def conformal_upper(
    scores: NDArray[np.float64] | list[float], alpha: float = ALPHA
) -> float | None:
    """Return what at most ``alpha`` of exchangeable new scores exceed; None if too few."""
    if len(scores) < MIN_EXEMPLARS:
        return None
    ordered = np.sort(np.asarray(scores, np.float64))
    rank = min(len(ordered), math.ceil((len(ordered) + 1) * (1 - alpha)))
    return float(ordered[rank - 1])


def nearest_other(
    embeddings: NDArray[np.float32], groups: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the cosine distances of embeddings to the nearest of other groups.

    Parameters
    ----------
    embeddings : NxD of unit length.
    groups : N; of two at least.

    Returns
    -------
    ndarray
        N distances, or those of ``MOST_LEFT_OUT`` evenly chosen ones if there are more.
    """
    count = min(len(embeddings), MOST_LEFT_OUT)
    chosen = np.linspace(0, len(embeddings) - 1, count).round().astype(int)
    nearest = np.empty(count, np.float64)
    for start in range(0, count, _BLOCK):
        rows = chosen[start : start + _BLOCK]
        similarity = embeddings[rows] @ embeddings.T
        similarity[groups[rows, None] == groups] = -np.inf
        nearest[start : start + len(rows)] = 1.0 - similarity.max(axis=1)
    return nearest
