"""From single cases to the numbers that answer the benchmark's questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recallseg.benchmarks.accuracy.dataset import MOST_ANNOTATED
from recallseg.benchmarks.accuracy.measure import (
    COPY_EMBEDDING,
    COPY_POSITION,
    NO_POINTERS,
    RANDOM,
    RECALLED,
    REFERENCE_K,
    UNET,
    Case,
    Outcome,
    Training,
)

__all__ = [
    "Difference",
    "FalsePositives",
    "Summary",
    "Tables",
    "Target",
    "compare",
    "false_positives",
    "summarise",
    "tabulate",
    "targets",
]

RESAMPLES = 2000
BASELINES = (COPY_EMBEDDING, COPY_POSITION, UNET)


@dataclass(frozen=True)
class Summary:
    """Dice over the queries that show a structure.

    ``dice`` is their mean; ``pooled`` that of all their pixels taken together, in which images that
    show little of the structure weigh little; ``missed`` counts empty predictions.
    """

    structure: str
    method: str
    k: int
    annotated: int
    images: int
    dice: float
    pooled: float
    median: float
    worst: float
    missed: int


@dataclass(frozen=True)
class Difference:
    """Mean Dice of recall at k = 8 less that of something else, on the same images.

    ``low`` and ``high`` bound 95 % of resampled means (bootstrap over images).
    """

    structure: str
    against: str
    images: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class FalsePositives:
    """What is predicted where the structure is absent.

    ``share`` is the mean part of the image that is covered; ``foreign``: images of other datasets.
    """

    structure: str
    method: str
    foreign: bool
    images: int
    positive: int
    share: float


@dataclass(frozen=True)
class Target:
    """A Dice to reach at k = 8 with 16 annotated images; None where no query shows it."""

    structure: str
    wanted: float
    reached: float | None
    pooled: float | None
    met: bool


@dataclass(frozen=True)
class Tables:
    """One dataset and what was found in it.

    Attributes
    ----------
    exemplars, extra, queries : how many images; ``extra`` are annotated too, and join where more
        than 16 are asked for.
    reference : where its masks come from; ``human_reference``: whether people drew them.
    targets : Dice wanted at k = 8, by structure.
    unet_training : None where the baseline was left out.
    """

    name: str
    modality: str
    structures: tuple[str, ...]
    exemplars: int
    extra: int
    queries: int
    reference: str
    human_reference: bool
    licence: str
    source: str
    remark: str
    intensity: Mapping[str, Any]
    targets: Mapping[str, float]
    summaries: tuple[Summary, ...]
    differences: tuple[Difference, ...]
    false_positives: tuple[FalsePositives, ...]
    targets_reached: tuple[Target, ...]
    unet_training: Training | None


def summarise(outcome: Outcome) -> list[Summary]:
    """Return one summary per structure, method, k and number of annotated images."""
    groups: dict[tuple[str, str, int, int], list[Case]] = {}
    for case in outcome.cases:
        if case.reference and not case.foreign:
            key = (case.structure, case.method, case.k, case.annotated)
            groups.setdefault(key, []).append(case)
    found = []
    for (structure, method, k, annotated), cases in groups.items():
        dice = [case.dice for case in cases]
        found.append(
            Summary(
                structure=structure,
                method=method,
                k=k,
                annotated=annotated,
                images=len({case.case for case in cases}),
                dice=float(np.mean(dice)),
                pooled=_pooled(cases),
                median=float(np.median(dice)),
                worst=min(dice),
                missed=sum(case.predicted == 0 for case in cases),
            )
        )
    return found


def compare(outcome: Outcome) -> list[Difference]:
    """Compare recall at k = 8 with random exemplars, k = 1, no pointers and the baselines."""
    rivals: list[tuple[str, Callable[[Case], bool]]] = [
        ("random exemplars", _is(RANDOM, REFERENCE_K)),
        ("k = 1", _is(RECALLED, 1)),
        ("without object pointers", _is(NO_POINTERS, REFERENCE_K)),
        *((name, _is(name, 0)) for name in BASELINES),
    ]
    found = []
    for structure in outcome.dataset.structures:
        shown = [
            case
            for case in outcome.cases
            if case.structure == structure and case.reference and not case.foreign
        ]
        own = _by_image(filter(_is(RECALLED, REFERENCE_K), shown))
        for name, belongs in rivals:
            other = _by_image(filter(belongs, shown))
            common = [own[image] - other[image] for image in own if image in other]
            if common:
                found.append(Difference(structure, name, len(common), *_bootstrap(common)))
    return found


def false_positives(outcome: Outcome) -> list[FalsePositives]:
    """Count what is predicted where a structure is absent, at k = 8 and by the baselines."""
    groups: dict[tuple[str, str, bool], list[Case]] = {}
    for case in outcome.cases:
        ours = _is(RECALLED, REFERENCE_K)(case)
        if not case.reference and (ours or case.method in BASELINES):
            groups.setdefault((case.structure, case.method, case.foreign), []).append(case)
    return [
        FalsePositives(
            structure=structure,
            method=method,
            foreign=foreign,
            images=len(cases),
            positive=sum(case.predicted > 0 for case in cases),
            share=float(np.mean([case.predicted / case.pixels for case in cases])),
        )
        for (structure, method, foreign), cases in groups.items()
    ]


def targets(outcome: Outcome) -> list[Target]:
    """Return the dataset's targets with what was reached."""
    found = {
        summary.structure: (summary.dice, summary.pooled)
        for summary in summarise(outcome)
        if (summary.method, summary.k, summary.annotated) == (RECALLED, REFERENCE_K, MOST_ANNOTATED)
    }
    rows = []
    for structure, wanted in outcome.dataset.targets.items():
        reached, pooled = found.get(structure, (None, None))
        met = reached is not None and reached >= wanted
        rows.append(Target(structure, wanted, reached, pooled, met))
    return rows


def tabulate(outcome: Outcome) -> Tables:
    """Return every table of a dataset."""
    return Tables(
        **outcome.dataset.describe(),
        summaries=tuple(summarise(outcome)),
        differences=tuple(compare(outcome)),
        false_positives=tuple(false_positives(outcome)),
        targets_reached=tuple(targets(outcome)),
        unet_training=outcome.training,
    )


def _is(method: str, k: int) -> Callable[[Case], bool]:
    return lambda case: (case.method, case.k, case.annotated) == (method, k, MOST_ANNOTATED)


def _by_image(cases: Iterable[Case]) -> dict[str, float]:
    """Return the mean Dice of each image (over draws)."""
    dice: dict[str, list[float]] = {}
    for case in cases:
        dice.setdefault(case.case, []).append(case.dice)
    return {name: float(np.mean(values)) for name, values in dice.items()}


def _pooled(cases: Sequence[Case]) -> float:
    areas = [case.reference + case.predicted for case in cases]
    return float(np.average([case.dice for case in cases], weights=areas))


def _bootstrap(differences: Sequence[float]) -> tuple[float, float, float]:
    values = np.asarray(differences)
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)
