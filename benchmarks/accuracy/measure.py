"""Measure one dataset: every number of exemplars, way of choosing them, and baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.accuracy.baselines import copy_nearest_by_position
from recallseg.benchmarks.accuracy.dataset import MOST_ANNOTATED, Dataset, spread
from recallseg.benchmarks.accuracy.recall import COUNTS, RandomLibrary, fill, member_tag
from recallseg.benchmarks.accuracy.unet import UNetSettings, train_unet
from recallseg.engines import defaults
from recallseg.engines.bundle import Bundle
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.library import Library
from recallseg.runtime.reports.baselines import copy_mask
from recallseg.runtime.reports.metrics import compare_masks
from recallseg.runtime.segmenting.reach import REACH
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["KS", "REFERENCE_K", "Case", "Outcome", "Plan", "Training", "count_steps", "measure"]

KS = (1, 2, 4, 8, 16)
REFERENCE_K = 8
"""The k of the targets, of all comparisons that are not about k, and of the pictures."""

RECALLED, RANDOM, NO_POINTERS = "recalled", "random", "no pointers"
COPY_EMBEDDING, COPY_POSITION, UNET = "copy, by embedding", "copy, by position", "U-Net"
Masks = Mapping[str, NDArray[np.bool_]]
Step = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """One query, structure and way of segmenting it.

    Attributes
    ----------
    k, used : exemplars asked for and used: there may be fewer that show the structure; 0: baseline.
    annotated : annotated images there were to recall from (or train on).
    draw : which random choice; 0 otherwise.
    dice : 1 where reference and prediction are both empty.
    reference, predicted, pixels : pixels of the reference, the prediction and the image.
    object_score, nearest : the model's score that the structure is there, and the cosine distance
        of the nearest exemplar; NaN for baselines.
    foreign : the image is another dataset's, so the structure cannot be there.
    """

    dataset: str
    case: str
    structure: str
    method: str
    k: int
    used: int
    annotated: int
    draw: int
    dice: float
    reference: int
    predicted: int
    pixels: int
    object_score: float
    nearest: float
    foreign: bool


@dataclass(frozen=True)
class Training:
    """The U-Net of one dataset: seconds that training took, its steps and its size."""

    seconds: float
    steps: int
    parameters: int


@dataclass(frozen=True)
class Outcome:
    """All cases of a dataset, and the masks at k = 8 by query for pictures."""

    dataset: Dataset
    cases: tuple[Case, ...] = field(repr=False)
    masks: Mapping[str, Masks] = field(repr=False)
    training: Training | None


@dataclass(frozen=True)
class Plan:
    """What is measured, alike for every dataset.

    Attributes
    ----------
    bundle, without_pointers : the bundle, and one of the same weights without object pointers.
    ks, counts, draws : exemplars recalled, annotated images, and random choices for each k.
    most_queries : at most so many queries of each dataset.
    unet : training of the baseline; None to leave it out.
    engine, precision, threads : what runs the networks.
    """

    bundle: Bundle
    without_pointers: Bundle | None
    ks: tuple[int, ...] = KS
    counts: tuple[int, ...] = COUNTS
    draws: int = 2
    most_queries: int = 64
    unet: UNetSettings | None = None
    engine: str = defaults.ENGINE
    precision: str = defaults.PRECISION
    threads: int | None = None


def count_steps(dataset: Dataset, plan: Plan, foreign: int) -> int:
    """Return how often :func:`measure` calls its ``step`` for a dataset, roughly."""
    queries = min(len(dataset.queries), plan.most_queries)
    bundles = 1 if plan.without_pointers is None else 2
    passes = len(plan.ks) * (bundles + plan.draws) + len(plan.counts) - 1
    training = plan.unet.steps if plan.unet is not None else 0
    return queries * passes + foreign + 32 + MOST_ANNOTATED * (bundles - 1) + training


def measure(
    dataset: Dataset, plan: Plan, foreign: Sequence[Annotated], step: Step = lambda name: None
) -> Outcome:
    """Measure a dataset.

    Parameters
    ----------
    foreign : images of other datasets, which show none of the structures.
    step : called with a name after each query, exemplar or training step.
    """
    queries = spread(dataset.queries, plan.most_queries)
    cases: list[Case] = []
    pictures: dict[str, Masks] = {}
    with TemporaryDirectory(prefix="recallseg-accuracy-") as folder:
        path = Path(folder) / "library"
        fill(
            path,
            plan.bundle,
            dataset,
            engine=plan.engine,
            precision=plan.precision,
            threads=plan.threads,
            counts=plan.counts,
            step=step,
        )
        with Library.open(path, plan.bundle) as library:
            run = _Run(dataset, plan, library, step)
            for k in plan.ks:
                for case, masks in run.segment(queries, RECALLED, k, MOST_ANNOTATED):
                    cases.append(case)
                    if k == REFERENCE_K:
                        pictures[case.case] = {
                            **pictures.get(case.case, {}),
                            case.structure: masks,
                        }
            for count in plan.counts:
                if count != MOST_ANNOTATED:
                    k = min(REFERENCE_K, count)
                    cases += [case for case, _ in run.segment(queries, RECALLED, k, count)]
            cases += [
                case
                for case, _ in run.segment(
                    foreign, RECALLED, REFERENCE_K, MOST_ANNOTATED, foreign=True
                )
            ]
            cases += _copies(dataset, library, plan, queries)
        random = RandomLibrary.open_drawing(path, plan.bundle)
        with random:
            run = _Run(dataset, plan, random, step)
            for k in plan.ks:
                for draw in range(plan.draws):
                    random.seed = draw
                    found = run.segment(queries, RANDOM, k, MOST_ANNOTATED, draw=draw)
                    cases += [case for case, _ in found]
        if plan.without_pointers is not None:
            cases += _without_pointers(dataset, plan, queries, Path(folder), step)
    training = None
    if plan.unet is not None:
        trained, training = _unet(dataset, plan.unet, queries, foreign, step)
        cases += trained
    return Outcome(dataset, tuple(cases), pictures, training)


class _Run:
    """Segments queries from one library and compares."""

    def __init__(self, dataset: Dataset, plan: Plan, library: Library, step: Step) -> None:
        self._dataset, self._plan, self._library, self._step = dataset, plan, library, step

    def segment(
        self,
        queries: Sequence[Annotated],
        method: str,
        k: int,
        annotated: int,
        *,
        draw: int = 0,
        foreign: bool = False,
    ) -> Iterator[tuple[Case, NDArray[np.bool_]]]:
        """Yield a case and its mask for every query and structure with an exemplar."""
        structures = self._structures(method, k, annotated)
        if not structures:
            return
        segmenter = Segmenter(
            self._library,
            k=k,
            structures=structures,
            reach=math.inf if method == RANDOM else REACH,
            engine=self._plan.engine,
            precision=self._plan.precision,
            threads=self._plan.threads,
            tags=member_tag(annotated),
        )
        for query in queries:
            result = segmenter.segment(query.image)
            for name in structures:
                score = result.scores[name]
                case = _case(
                    self._dataset,
                    query,
                    name,
                    result.masks[name],
                    method,
                    k=k,
                    used=min(k, result.available[name]),
                    annotated=annotated,
                    draw=draw,
                    object_score=score.object_score,
                    nearest=score.distance,
                    foreign=foreign,
                )
                if case is not None:
                    yield case, result.masks[name]
            self._step(query.name)

    def _structures(self, method: str, k: int, annotated: int) -> list[str]:
        """Return the structures with an exemplar.

        Where all of them are recalled there is nothing to draw at random.
        """
        members = self._dataset.annotated(annotated)
        showing = {
            name: sum(name in member.masks for member in members)
            for name in self._dataset.structures
        }
        return [
            name
            for name, count in showing.items()
            if count and not (method == RANDOM and k >= count)
        ]


def _case(
    dataset: Dataset,
    query: Annotated,
    structure: str,
    mask: NDArray[np.bool_],
    method: str,
    *,
    k: int = 0,
    used: int = 0,
    annotated: int = MOST_ANNOTATED,
    draw: int = 0,
    object_score: float = math.nan,
    nearest: float = math.nan,
    foreign: bool = False,
) -> Case | None:
    """Return a comparison, or None if nobody looked for the structure in this image."""
    reference = None if foreign else query.masks.get(structure)
    if reference is None:
        if not foreign and structure not in query.absent:
            return None
        reference = np.zeros(mask.shape, np.bool_)
    agreement = compare_masks(mask, reference)
    return Case(
        dataset=dataset.name,
        case=query.name,
        structure=structure,
        method=method,
        k=k,
        used=used,
        annotated=annotated,
        draw=draw,
        dice=agreement.dice,
        reference=int(agreement.reference_volume),
        predicted=int(agreement.predicted_volume),
        pixels=mask.size,
        object_score=object_score,
        nearest=nearest,
        foreign=foreign,
    )


def _copies(
    dataset: Dataset, library: Library, plan: Plan, queries: Sequence[Annotated]
) -> list[Case]:
    """Copy the nearest exemplar's mask: by embedding, and by place where there is one.

    By embedding the nearest that shows the structure is meant, as in recall; by place the nearest
    slice, whether it shows it or not.
    """
    segmenter = Segmenter(
        library,
        k=1,
        engine=plan.engine,
        precision=plan.precision,
        threads=plan.threads,
        tags=member_tag(MOST_ANNOTATED),
    )
    cases: list[Case | None] = []
    for query in queries:
        found = segmenter.segment(query.image).recalled
        shape = (query.image.shape[0], query.image.shape[1])
        for name in dataset.structures:
            showing = [recalled.key for recalled in found.get(name, ()) if not recalled.absent]
            if showing:
                mask = copy_mask(library.source(showing[0])[1][name], shape)
                cases.append(_case(dataset, query, name, mask, COPY_EMBEDDING))
            placed = copy_nearest_by_position(dataset, query, name)
            if placed is not None:
                cases.append(_case(dataset, query, name, placed, COPY_POSITION))
    return [case for case in cases if case is not None]


def _without_pointers(
    dataset: Dataset, plan: Plan, queries: Sequence[Annotated], folder: Path, step: Step
) -> list[Case]:
    bundle = plan.without_pointers
    if bundle is None:
        return []
    path = folder / "without-pointers"
    fill(
        path,
        bundle,
        dataset,
        engine=plan.engine,
        precision=plan.precision,
        threads=plan.threads,
        counts=(MOST_ANNOTATED,),
        step=step,
    )
    with Library.open(path, bundle) as library:
        run = _Run(dataset, plan, library, step)
        return [
            case
            for k in plan.ks
            for case, _ in run.segment(queries, NO_POINTERS, k, MOST_ANNOTATED)
        ]


def _unet(
    dataset: Dataset,
    settings: UNetSettings,
    queries: Sequence[Annotated],
    foreign: Sequence[Annotated],
    step: Step,
) -> tuple[list[Case], Training]:
    own = replace(settings, mirror=not dataset.oriented)
    net = train_unet(dataset.exemplars, dataset.structures, dataset.intensity, own, step)
    cases: list[Case | None] = []
    for strange, images in ((False, queries), (True, foreign)):
        for query in images:
            for name, mask in net.predict(query.image).items():
                cases.append(_case(dataset, query, name, mask, UNET, foreign=strange))
    training = Training(net.seconds, settings.steps, net.parameters)
    return [case for case in cases if case is not None], training
