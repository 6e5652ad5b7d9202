"""Differences between ways of segmenting the same queries, with bootstrap intervals.

Images of one patient are alike, so patients (groups) are drawn again, not images: a percentile
bootstrap over groups of the mean difference (Efron and Tibshirani, An Introduction to the
Bootstrap, chapter 13). With few groups such intervals are too narrow; their number stands beside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.reports.cases import RECALLED, Arm, Case, Evaluation

__all__ = ["Budget", "Difference", "Grouped", "bootstrap", "budgets", "by_group", "differences"]

RESAMPLED = 2000
COVERAGE = 0.95


@dataclass(frozen=True)
class Grouped:
    """Mean Dice of each group (patient), of images that show the structure.

    ``mean`` with its interval ``low`` to ``high`` (95 %), ``worst`` the lowest group's, of
    ``groups`` groups; ``three_d``: of whole volumes instead of images.
    """

    structure: str
    arm: Arm
    three_d: bool
    groups: int
    mean: float
    low: float
    high: float
    worst: float


@dataclass(frozen=True)
class Difference:
    """Mean Dice of one arm less that of another, by group, with its interval (95 %)."""

    structure: str
    arm: Arm
    other: Arm
    groups: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Budget:
    """Mean Dice with so many annotated images: over draws, its deviation, lowest and highest."""

    structure: str
    method: str
    annotated: int
    draws: int
    mean: float
    deviation: float
    lowest: float
    highest: float


def bootstrap(values: NDArray[np.float64] | Sequence[float]) -> tuple[float, float]:
    """Return the interval of the mean, drawn again with a fixed seed; NaN for fewer than two."""
    given = np.asarray(values, np.float64)
    if len(given) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(0, len(given), (RESAMPLED, len(given)))
    means = given[drawn].mean(axis=1)
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def by_group(evaluation: Evaluation) -> list[Grouped]:
    """Summarise by group: images first, then volumes; arms with all exemplars."""
    rows = []
    for three_d, cases in ((False, evaluation.cases), (True, evaluation.volumes)):
        for structure in evaluation.structures:
            for arm in evaluation.arms:
                if arm.annotated:
                    continue
                dice: dict[str, list[float]] = {}
                for case in cases:
                    if (case.structure, case.arm) == (structure, arm) and case.reference_volume:
                        dice.setdefault(case.group, []).append(case.dice)
                means = [float(np.mean(values)) for values in dice.values()]
                if means:
                    low, high = bootstrap(means)
                    mean = float(np.mean(means))
                    rows.append(
                        Grouped(structure, arm, three_d, len(means), mean, low, high, min(means))
                    )
    return rows


def differences(evaluation: Evaluation) -> list[Difference]:
    """Compare the largest k with each smaller one and with every baseline, on the same images."""
    judged = Arm(RECALLED, max(evaluation.ks))
    others = [arm for arm in evaluation.arms if arm != judged and not arm.annotated]
    found = []
    for structure in evaluation.structures:
        ours = _dice(evaluation.cases, structure, judged)
        for other in others:
            theirs = _dice(evaluation.cases, structure, other)
            by: dict[str, list[float]] = {}
            for case, (group, dice) in ours.items():
                if case in theirs:
                    by.setdefault(group, []).append(dice - theirs[case][1])
            means = [float(np.mean(values)) for values in by.values()]
            if means:
                low, high = bootstrap(means)
                mean = float(np.mean(means))
                found.append(Difference(structure, judged, other, len(means), mean, low, high))
    return found


def budgets(evaluation: Evaluation) -> list[Budget]:
    """Summarise by number of annotated images; all of them last, if there are budgets."""
    if not any(arm.annotated for arm in evaluation.arms):
        return []
    rows = []
    most = max(evaluation.ks)
    for structure in evaluation.structures:
        for method in dict.fromkeys(arm.method for arm in evaluation.arms):
            arms = [
                arm
                for arm in evaluation.arms
                if arm.method == method and (method != RECALLED or arm.k == most)
            ]
            for count in sorted({arm.annotated or evaluation.exemplars for arm in arms}):
                means = []
                for arm in arms:
                    if (arm.annotated or evaluation.exemplars) == count:
                        dice = [d for _, d in _dice(evaluation.cases, structure, arm).values()]
                        means += [float(np.mean(dice))] if dice else []
                if means:
                    spread = float(np.std(means)), min(means), max(means)
                    mean = float(np.mean(means))
                    rows.append(Budget(structure, method, count, len(means), mean, *spread))
    return rows


def _dice(cases: Sequence[Case], structure: str, arm: Arm) -> dict[str, tuple[str, float]]:
    """Return group and Dice by image, of those that show the structure."""
    return {
        row.case: (row.group, row.dice)
        for row in cases
        if row.structure == structure and row.arm == arm and row.reference_volume
    }
