"""Segment images whose masks are known and compare: one row per image, structure and arm.

A volume is segmented slice by slice, and compared slice by slice and as a whole. No query may be an
exemplar that it recalls: that is an error, found before anything is segmented.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines import defaults
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import volume_reader
from recallseg.runtime.formats.annotations import Annotations, find_annotations
from recallseg.runtime.formats.pairs import BACKGROUND, Annotated, Legend, Missing
from recallseg.runtime.reports.annotated_sources import Images, Source, sources_of
from recallseg.runtime.reports.baselines import Baseline, make_baselines
from recallseg.runtime.reports.cases import (
    RECALLED,
    Arm,
    Case,
    Evaluation,
    Illustration,
    Timing,
    VolumeCase,
)
from recallseg.runtime.reports.metrics import TOLERANCE, compare_masks, ndimage
from recallseg.runtime.reports.splitting import Split, check_leaks
from recallseg.runtime.segmenting.reach import REACH
from recallseg.runtime.segmenting.recipe import Provenance
from recallseg.runtime.segmenting.result import HeadUse, Result

if TYPE_CHECKING:
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["check_structures", "evaluate"]

ILLUSTRATED = 40
"""Most images shown in a report: half of them with the lowest Dice, half with the highest."""

UNREAD = (None, None, "absent", None, False, None, None, False, "union", False)
"""Options of reading that say nothing."""

Mask = NDArray[np.bool_]


def evaluate(
    library: Library,
    images: Sequence[Annotated | Source] | Annotations | str | Path,
    structures: Sequence[str] | None = None,
    ks: Sequence[int] = (defaults.K,),
    make_segmenter: Callable[[int], Segmenter] | None = None,
    *,
    reach: float = REACH,
    engine: str | None = None,
    precision: str | None = None,
    refine: bool = True,
    labels: Mapping[int, str] | None = None,
    legend: Legend | None = None,
    mask: str | Path | None = None,
    missing: Missing = "absent",
    plane: str | None = None,
    voi: bool = False,
    time: int | None = None,
    stack: str | None = None,
    resample: bool = False,
    segments: str = "union",
    as_stored: bool = False,
    spacing: tuple[float, float] | None = None,
    tolerance: float = TOLERANCE,
    budgets: Sequence[int] = (),
    draws: int = 3,
    baselines: Sequence[str] = (),
    groups: Mapping[str, str] | None = None,
    folds: int | None = None,
    threads: int | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Segment every image in every way that is asked for and compare with its masks.

    Parameters
    ----------
    library : where exemplars come from.
    images : a file or folder, or what
        :func:`recallseg.runtime.formats.annotations.find_annotations` found there; annotated
        images, or what reads them
        (:func:`recallseg.runtime.reports.annotated_sources.sources_of`). One that raises InputError
        when it is read is recorded as failed.
    structures : which to compare; the library must know each. None: those of ``labels`` and
        ``legend``, or else all that the library knows.
    ks : how many exemplars to recall.
    make_segmenter : gives a segmenter of the library for one k and these structures, instead of one
        with ``reach``, ``engine``, ``precision``, ``threads`` and ``refine``, which are those of
        :class:`recallseg.Segmenter`.
    labels, legend, mask, missing, plane, voi, time, stack, resample, segments, as_stored : of a
        file or folder, see :func:`recallseg.import_exemplars`.
    spacing : pixel size in mm along rows and columns, of images that do not bring their own.
        Without it distances are in mm if there are only volumes, and in pixels otherwise.
    tolerance : of surface Dice, in the same unit.
    budgets : numbers of annotated images to recall from, chosen at random, beside all of them; at
        the largest k.
    draws : random choices of each budget.
    baselines : ``copy``, ``forest`` (extra ``fit``), ``match``: on the same split.
    groups : group by key of an exemplar, where the images are the library's own
        (:func:`recallseg.runtime.reports.splitting.fill_pool`): a query recalls nothing of its
        group.
    folds : deal the groups to so many parts, and recall nothing of the query's part.
    threads : of the CPU.
    progress : called after each image and arm with its name, and what part it is of its source.

    Raises
    ------
    InputError
        If a structure, baseline or split is not possible, there is nothing to do, an image is an
        exemplar that it would recall, or no image at all could be evaluated: none can be read or
        says anything of the structures.
    ModuleNotFoundError
        If the extra ``evaluate`` is not installed, or ``fit`` and a forest is asked for.
    """
    ndimage()  # or every image would be read for nothing
    if structures is None:
        named = dict.fromkeys((*(labels or {}).values(), *(legend or {}).values()))
        structures = [name for name in named if name != BACKGROUND] or library.structures
    check_structures(library, structures)
    if isinstance(images, (str, Path)):
        images, mask = find_annotations(images, mask), None
    reading = (labels, legend, missing, plane, voi, time, stack, resample, segments, as_stored)
    found = isinstance(images, Annotations)
    if mask is not None or not (found or reading == UNREAD):
        raise InputError(
            "labels, mask and whatever else says how to read go with a file or folder; these "
            "images were found or read already. Leave them out, or pass the path."
        )
    if isinstance(images, Annotations):
        read = volume_reader(voi, time, stack, resample, segments)
        images = sources_of(
            images, labels, missing, legend=legend, as_stored=as_stored, plane=plane, read=read
        )
    if make_segmenter is None:
        make_segmenter = _maker(
            library,
            structures=structures,
            reach=reach,
            engine=engine,
            precision=precision,
            threads=threads,
            refine=refine,
        )
    elif (reach, engine, precision, refine) != (REACH, None, None, True):
        raise InputError(
            "reach, engine, precision and refine are those of segmenters that are made here: leave "
            "them out, or make_segmenter."
        )
    if not ks or not len(images):
        raise InputError("there is nothing to evaluate: no image, or no k.")
    most = len(library)
    wrong = [count for count in budgets if not 0 < count < most]
    if wrong or draws < 1:
        raise InputError(
            f"budgets must be below the {most} exemplars of the library, which are counted beside "
            f"them, and draws from 1; got {', '.join(map(str, wrong or budgets))}, {draws} draws."
        )
    sources = [Source.of(each) if isinstance(each, Annotated) else each for each in images]
    split = Split(library, groups, folds, draws)
    others = make_baselines(baselines, library, structures, max(ks), threads)
    unsaid = check_leaks(library, sources, structures, split)
    run = _Run(library, structures, ks, make_segmenter, others, split)
    run.arms = _arms(ks, budgets, draws, others)
    run.tolerance = tolerance
    if unsaid:
        run.notes[library.path.name] = (unsaid,)
    run.spacing = spacing
    run.in_mm = spacing is not None or all(source.is_volume for source in sources)
    for source in sources:
        run.source(source, progress or (lambda name, part: None))
    if not run.cases:
        nothing = f"no image says anything of {', '.join(structures)}: {', '.join(run.unmentioned)}"
        why = next(iter(run.failures.values()), nothing)
        raise InputError(f"no image could be evaluated. The first reason: {why}")
    place = {arm: number for number, arm in enumerate(run.arms)}
    return Evaluation(
        structures=tuple(structures),
        ks=tuple(ks),
        arms=tuple(run.arms),
        cases=tuple(sorted(run.cases, key=lambda row: place[row.arm])),
        volumes=tuple(sorted(run.volumes, key=lambda row: place[row.arm])),
        timings=tuple(sorted(run.timings, key=lambda timing: ks.index(timing.k))),
        failures=run.failures,
        illustrations=run.shown.sorted(),
        workspace_bytes=run.workspace,
        in_mm=run.in_mm,
        tolerance=tolerance,
        exemplars=most,
        split=groups is not None,
        provenance=run.provenance,
        unmentioned=tuple(run.unmentioned),
        notes=run.notes,
        heads=run.heads,
        unit=_unit(sources),
    )


def _unit(sources: Sequence[Source]) -> str:
    units = {source.unit for source in sources}
    return units.pop() if len(units) == 1 else "group"


def _maker(library: Library, **settings: Any) -> Callable[[int], Segmenter]:
    from recallseg.runtime.segmenting.segmenter import Segmenter

    return lambda k: Segmenter(library, k=k, **settings)


def check_structures(library: Library, structures: Sequence[str]) -> None:
    """Raise InputError unless the library knows every one of ``structures``."""
    known = tuple(library.structures)
    unknown = [name for name in structures if name not in known]
    if unknown:
        raise InputError(
            f"the library has no exemplar of '{unknown[0]}'; it knows "
            f"{', '.join(known) or 'nothing'}."
        )


def _arms(
    ks: Sequence[int], budgets: Sequence[int], draws: int, others: Sequence[Baseline]
) -> list[Arm]:
    arms = [Arm(RECALLED, k) for k in ks] + [Arm(other.name, other.k) for other in others]
    methods = [(RECALLED, max(ks)), *((other.name, other.k) for other in others)]
    arms += [
        Arm(method, k, count, draw)
        for method, k in methods
        for count in budgets
        for draw in range(draws)
    ]
    return arms


class _Run:
    """What is found so far."""

    arms: list[Arm]
    tolerance: float
    spacing: tuple[float, float] | None
    in_mm: bool

    def __init__(
        self,
        library: Library,
        structures: Sequence[str],
        ks: Sequence[int],
        make_segmenter: Callable[[int], Segmenter],
        others: Sequence[Baseline],
        split: Split,
    ) -> None:
        self._library, self._structures, self._split = library, structures, split
        self._segmenters = {k: make_segmenter(k) for k in ks}
        self._others = {other.name: other for other in others}
        self._warm: set[int] = set()
        self.cases: list[Case] = []
        self.volumes: list[VolumeCase] = []
        self.timings: list[Timing] = []
        self.failures: dict[str, str] = {}
        self.unmentioned: dict[str, None] = {}
        self.notes: dict[str, tuple[str, ...]] = {}
        self.provenance: dict[int, Provenance] = {}
        self.heads: dict[int, HeadUse] = {}
        self.workspace = {k: made.required_bytes for k, made in self._segmenters.items()}
        self.shown = _Shortlist(ILLUSTRATED)

    def source(self, source: Source, progress: Callable[[str, float], None]) -> None:
        """Segment and compare an image or volume in every way."""
        try:
            found = source.read()
            size = found.acquisition.spacing or self.spacing if self.in_mm else None
            if self.in_mm and size is None:
                raise InputError(
                    f"{source.name} does not say how large its pixels are, and distances are "
                    "to be in mm: give --spacing."
                )
        except InputError as error:
            self.failures[source.name] = str(error)
            progress(source.name, 1.0)
            return
        if found.notes:
            self.notes[source.name] = found.notes
        told = [
            each
            for each in found.annotated
            if any(name in each.masks or name in each.absent for name in self._structures)
        ]
        if not told:
            self.unmentioned[source.name] = None
            progress(source.name, 1.0)
        for arm in self.arms:
            whole = _Whole(source, found, self._structures)
            for annotated in told:
                try:
                    masks, rows = self._one(source, annotated, found, size, arm)
                except InputError as error:
                    self.failures[annotated.name] = str(error)
                    whole.broken = True
                else:
                    self.cases.extend(rows)
                    whole.add(annotated, masks)
                progress(annotated.name, 1.0 / len(told) / len(self.arms))
            if source.is_volume and not whole.broken and told:
                group = self._split.hashed(source.group or source.name)
                self.volumes.extend(whole.compare(size, self.tolerance, arm, group))

    def _one(
        self,
        source: Source,
        annotated: Annotated,
        found: Images,
        size: tuple[float, float] | None,
        arm: Arm,
    ) -> tuple[Mapping[str, Mask], list[Case]]:
        group = source.group or source.name
        without = self._split.without(group, arm.annotated, arm.draw)
        result = None
        if arm.method == RECALLED:
            segmenter = self._segmenters[arm.k]
            if arm.k not in self._warm:  # the first query pays for lazy initialisation
                segmenter.segment(annotated.image, without=without)
                self._warm.add(arm.k)
            result = segmenter.segment(
                annotated.image, acquisition=found.acquisition, without=without
            )
            masks, spent = result.masks, result.timings.get("total", math.nan)
        else:
            begin = perf_counter()
            embedding = self._library.embed(annotated.image)
            masks = self._others[arm.method].segment(annotated.image, embedding, without)
            spent = 1e3 * (perf_counter() - begin)
        rows = []
        for structure in self._structures:
            reference = _reference(annotated, structure)
            if reference is None:
                continue  # nobody looked for it here: there is nothing to compare with
            agreement = compare_masks(masks[structure], reference, size, tolerance=self.tolerance)
            score = None if result is None else result.scores[structure]
            recalled = () if result is None else result.recalled[structure]
            rows.append(
                Case(
                    case=annotated.name,
                    structure=structure,
                    k=arm.k,
                    **vars(agreement),
                    latency_ms=spent,
                    quality="" if result is None else result.quality.flag,
                    nearest_distance=math.nan if score is None else score.distance,
                    iou_estimate=math.nan if score is None else score.iou,
                    object_score=math.nan if score is None else score.object_score,
                    recalled=tuple(match.key for match in recalled),
                    method=arm.method,
                    annotated=arm.annotated,
                    draw=arm.draw,
                    group=self._split.hashed(group),
                    volume=source.name if source.is_volume else "",
                    present=bool(masks[structure].any()) if score is None else score.present,
                )
            )
        if result is not None and not arm.annotated:
            self._remember(annotated, result, rows, arm.k)
        return masks, rows

    def _remember(self, annotated: Annotated, result: Result, rows: Sequence[Case], k: int) -> None:
        self.provenance[k] = result.provenance
        if result.quality.head is not None:
            self.heads[k] = result.quality.head
        self.timings.append(Timing(annotated.name, k, result.timings))
        if k == max(self._segmenters):
            dice = float(np.mean([row.dice for row in rows]))
            by_structure = {row.structure: row for row in rows}
            self.shown.offer(Illustration(annotated, result, by_structure, dice))


def _reference(annotated: Annotated, structure: str) -> Mask | None:
    """Return the mask to find; None where nothing is known of the structure."""
    mask = annotated.masks.get(structure)
    if mask is None and structure in annotated.absent:
        return np.zeros(annotated.image.shape[:2], np.bool_)
    return mask


class _Whole:
    """The slices of a volume, put together again in the order in which they lie."""

    def __init__(self, source: Source, found: Images, structures: Sequence[str]) -> None:
        self.broken = False
        self._name, self._found = source.name, found
        self._keep = source.is_volume
        self._slices: dict[str, list[tuple[Mask, Mask]]] = {name: [] for name in structures}

    def add(self, annotated: Annotated, masks: Mapping[str, Mask]) -> None:
        if not self._keep:
            return
        for name, slices in self._slices.items():
            reference = _reference(annotated, name)
            if reference is not None:
                slices.append((np.array(masks[name]), reference))

    def compare(
        self, size: tuple[float, float] | None, tolerance: float, arm: Arm, group: str
    ) -> list[VolumeCase]:
        rows = []
        for name, slices in self._slices.items():
            if not slices:
                continue
            predicted, reference = (np.stack(planes) for planes in zip(*slices, strict=True))
            steps = None if size is None else (self._found.across or 1.0, *size)
            found = vars(compare_masks(predicted, reference, steps, tolerance=tolerance))
            if len(slices) < len(self._found.annotated):  # with gaps there are no distances
                found = found | {"hd95": math.nan, "surface_dice": math.nan}
            rows.append(
                VolumeCase(
                    volume=self._name,
                    structure=name,
                    slices=len(slices),
                    **found,
                    **vars(arm),
                    group=group,
                )
            )
        return rows


class _Shortlist:
    """Keeps the lowest and the highest Dice, so that memory does not grow with the folder."""

    def __init__(self, size: int) -> None:
        self._half = max(1, size // 2)
        self._count = 0
        self._lowest: list[tuple[float, int, Illustration]] = []
        self._highest: list[tuple[float, int, Illustration]] = []

    def offer(self, illustration: Illustration) -> None:
        self._count += 1
        for heap, sign in ((self._lowest, -1.0), (self._highest, 1.0)):
            entry = (sign * illustration.dice, self._count, illustration)
            if len(heap) < self._half:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)

    def sorted(self) -> tuple[Illustration, ...]:
        kept = {count: illustration for _, count, illustration in self._lowest + self._highest}
        return tuple(sorted(kept.values(), key=lambda illustration: illustration.dice))
