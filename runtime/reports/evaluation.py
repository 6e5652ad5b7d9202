"""Segment images whose masks are known and compare: one row per image, structure and k.

A volume is compared slice by slice; its Dice as a whole is in the summary.

A query that is itself an exemplar would be compared with its own mask: it is found, said, and kept
out of every summary.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotated_volumes import (
    SliceChoice,
    annotated_slices,
    read_annotated_volume,
)
from recallseg.runtime.formats.annotations import Annotations
from recallseg.runtime.formats.finding import Item
from recallseg.runtime.formats.pairs import Annotated, Legend, Missing, Pair, read_pair
from recallseg.runtime.formats.volume import Slicing
from recallseg.runtime.library.importing import VolumeReader
from recallseg.runtime.reports.metrics import compare_masks
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.recipe import Provenance
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.volumes.slices import acquisition_of

if TYPE_CHECKING:
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = [
    "Case",
    "Evaluation",
    "Illustration",
    "Images",
    "Source",
    "Timing",
    "evaluate",
    "sources_of",
]

SAME_IMAGE = 1e-4
"""Cosine distance up to which a query is compared with its nearest exemplar pixel by pixel. An
image embeds to within the engine's rounding of itself: 1e-6 in fp32, under 1e-4 in fp16."""
ILLUSTRATED = 40
"""Most images shown in a report: half of them with the lowest Dice, half with the highest."""


@dataclass(frozen=True)
class Case:
    """One image, structure and k.

    ``hd95`` is in mm (pixels if the spacing is unknown), volumes in its square; ``iou_estimate``,
    ``object_score`` and ``nearest_distance`` are the model's own (see ``Score``); ``recalled`` are
    keys, nearest first; ``leaked``: the image is an exemplar of the library; ``volume``: what a
    slice is of, empty for other images.
    """

    case: str
    structure: str
    k: int
    dice: float
    iou: float
    hd95: float
    reference_volume: float
    predicted_volume: float
    latency_ms: float
    quality: str
    nearest_distance: float
    iou_estimate: float
    object_score: float
    recalled: tuple[str, ...]
    leaked: bool
    volume: str = ""


@dataclass(frozen=True)
class Timing:
    """Milliseconds by stage of one query."""

    case: str
    k: int
    stages: Mapping[str, float]


@dataclass(frozen=True)
class Illustration:
    """What a report shows of one image: pixels, reference and result. ``dice`` is the mean over
    structures.
    """

    annotated: Annotated
    result: Result
    cases: Mapping[str, Case]
    dice: float


@dataclass(frozen=True)
class Evaluation:
    """Everything that an evaluation found.

    Attributes
    ----------
    structures, ks : in the order asked for.
    cases, timings : one per image, structure and k; one per image and k.
    failures : name and message of images that could not be evaluated.
    leaked : names of images that are exemplars of the library.
    illustrations : for the largest k, lowest Dice first.
    workspace_bytes : what the segmenter set aside, by k.
    in_mm : whether distances are in mm; else in pixels.
    provenance : what made the last result, by k.
    unmentioned : names of images and volumes that say nothing of the structures.
    notes : what had to be decided while volumes were read, by name.
    """

    structures: tuple[str, ...]
    ks: tuple[int, ...]
    cases: tuple[Case, ...] = field(repr=False)
    timings: tuple[Timing, ...] = field(repr=False)
    failures: Mapping[str, str]
    leaked: tuple[str, ...]
    illustrations: tuple[Illustration, ...] = field(repr=False)
    workspace_bytes: Mapping[int, int]
    in_mm: bool
    provenance: Mapping[int, Provenance]
    unmentioned: tuple[str, ...] = ()
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """What a source holds.

    Attributes
    ----------
    annotated : an image, or every slice of a volume.
    acquisition : scale and side of all of them.
    notes : what had to be decided while they were read.
    """

    annotated: tuple[Annotated, ...]
    acquisition: Acquisition = field(default_factory=Acquisition)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """An image or a volume, read when it is asked for: a folder may be larger than memory.

    ``read`` raises InputError if it cannot be read.
    """

    name: str
    read: Callable[[], Images]
    is_volume: bool = False

    @classmethod
    def of(cls, annotated: Annotated) -> Source:
        """Return an image that was read already."""
        return cls(annotated.name, lambda: Images((annotated,)))


def sources_of(
    found: Annotations,
    labels: Mapping[int, str] | None,
    missing: Missing = "absent",
    *,
    legend: Legend | None = None,
    as_stored: bool = False,
    plane: str | None = None,
    read: VolumeReader = read_annotated_volume,
) -> list[Source]:
    """Return everything annotated in a folder; of volumes all slices, also those without a mask.

    Parameters
    ----------
    found : by :func:`recallseg.runtime.formats.annotations.find_annotations`.
    labels, missing, legend, as_stored : see :func:`read_pair`.
    plane, read : see :func:`recallseg.runtime.library.importing.import_volume`.
    """

    def picture(pair: Pair) -> Images:
        return Images((read_pair(pair, labels, missing, legend=legend, as_stored=as_stored),))

    def slices(item: Item, segmentation: Path) -> Images:
        volume, masks = read(item, segmentation, labels)
        name = item.relative.as_posix()
        every = SliceChoice(empty=True)
        cut = annotated_slices(volume, masks, name, every, plane=plane, missing=missing)
        acquisition = acquisition_of(volume, Slicing.of(volume, plane))
        return Images(tuple(cut), acquisition, volume.notes)

    def refuse(why: str) -> Images:
        raise InputError(why)

    return [
        *(Source(pair.name, partial(picture, pair)) for pair in found.pairs),
        *(
            Source(
                each.item.relative.as_posix(),
                partial(slices, each.item, each.segmentation),
                is_volume=True,
            )
            for each in found.volumes
        ),
        *(
            Source(name, partial(refuse, why), is_volume=True)
            for name, why in found.unclear.items()
        ),
    ]


def evaluate(
    library: Library,
    images: Sequence[Annotated | Source],
    structures: Sequence[str],
    ks: Sequence[int],
    make_segmenter: Callable[[int], Segmenter],
    *,
    spacing: tuple[float, float] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Segment every image with every k and compare with its masks.

    Parameters
    ----------
    library : where exemplars come from.
    images : annotated images, or what reads them (:func:`sources_of`); one that raises InputError
        when it is read is recorded as failed.
    structures : which to compare; the library must know each.
    ks : how many exemplars to recall.
    make_segmenter : gives a segmenter of the library for one k and these structures.
    spacing : pixel size in mm along rows and columns, of images that do not bring their own.
        Without it distances are in mm if there are only volumes, and in pixels otherwise.
    progress : called after each image and k with its name, and what part it is of its source.

    Raises
    ------
    InputError
        If a structure is unknown, there is nothing to do, or no image at all could be evaluated:
        none can be read, says anything of the structures, or was held out of the library.
    """
    check_structures(library, structures)
    if not ks or not len(images):
        raise InputError("there is nothing to evaluate: no image, or no k.")
    cases: list[Case] = []
    timings: list[Timing] = []
    failures: dict[str, str] = {}
    leaked: dict[str, None] = {}
    unmentioned: dict[str, None] = {}
    notes: dict[str, tuple[str, ...]] = {}
    sources = [Source.of(each) if isinstance(each, Annotated) else each for each in images]
    in_mm = spacing is not None or all(source.is_volume for source in sources)
    workspace: dict[int, int] = {}
    provenance: dict[int, Provenance] = {}
    shown = _Shortlist(ILLUSTRATED)
    for k in ks:
        segmenter = make_segmenter(k)
        workspace[k] = segmenter.required_bytes
        warm = False
        for source in sources:
            try:
                found = source.read()
                size = found.acquisition.spacing or spacing if in_mm else None
                if in_mm and size is None:
                    raise InputError(
                        f"{source.name} does not say how large its pixels are, and distances are "
                        "to be in mm: give --spacing."
                    )
            except InputError as error:
                failures[source.name] = str(error)
                if progress is not None:
                    progress(source.name, 1.0)
                continue
            if found.notes:
                notes[source.name] = found.notes
            told = [each for each in found.annotated if _tells(each, structures)]
            if not told:
                unmentioned[source.name] = None
                if progress is not None:
                    progress(source.name, 1.0)
            for annotated in told:
                try:
                    if not warm:  # the first query pays for lazy initialisation
                        segmenter.segment(annotated.image)
                        warm = True
                    result = segmenter.segment(annotated.image, acquisition=found.acquisition)
                except InputError as error:
                    failures[annotated.name] = str(error)
                else:
                    same = _is_exemplar(library, annotated, result)
                    provenance[k] = result.provenance
                    volume = source.name if source.is_volume else ""
                    rows = _compare(annotated, result, structures, k, same, size, volume)
                    cases.extend(rows)
                    timings.append(Timing(annotated.name, k, result.timings))
                    if same:
                        leaked[annotated.name] = None
                    elif k == max(ks):
                        dice = float(np.mean([row.dice for row in rows]))
                        by_structure = {row.structure: row for row in rows}
                        shown.offer(Illustration(annotated, result, by_structure, dice))
                if progress is not None:
                    progress(annotated.name, 1.0 / len(told))
    if not cases:
        nothing = f"no image says anything of {', '.join(structures)}: {', '.join(unmentioned)}"
        why = next(iter(failures.values()), nothing)
        raise InputError(f"no image could be evaluated. The first reason: {why}")
    if all(case.leaked for case in cases):
        raise InputError(
            f"there is nothing to evaluate: every image that says something of "
            f"{', '.join(structures)} is an exemplar of this library ({len(leaked)} of "
            f"{len({case.case for case in cases})}: {', '.join([*leaked][:5])}), and would be "
            "compared with its own mask. Give annotated images that were held out."
        )
    return Evaluation(
        tuple(structures),
        tuple(ks),
        tuple(cases),
        tuple(timings),
        failures,
        tuple(leaked),
        shown.sorted(),
        workspace,
        in_mm,
        provenance,
        tuple(unmentioned),
        notes,
    )


def check_structures(library: Library, structures: Sequence[str]) -> None:
    """Raise InputError unless the library knows every one of ``structures``."""
    known = tuple(library.structures)
    unknown = [name for name in structures if name not in known]
    if unknown:
        raise InputError(
            f"the library has no exemplar of '{unknown[0]}'; it knows "
            f"{', '.join(known) or 'nothing'}."
        )


def _tells(annotated: Annotated, structures: Sequence[str]) -> bool:
    return any(name in annotated.masks or name in annotated.absent for name in structures)


def _is_exemplar(library: Library, annotated: Annotated, result: Result) -> bool:
    """Whether the nearest exemplar is the same image: pixel by pixel where those are kept."""
    nearest = min(
        (found[0] for found in result.recalled.values() if found),
        key=lambda recalled: recalled.distance,
        default=None,
    )
    if nearest is None or nearest.distance > SAME_IMAGE:
        return False
    try:
        if not library.get(nearest.key).has_source:
            return True
        source, _ = library.source(nearest.key)
    except InputError:  # removed by another process since it was recalled
        return True
    return bool(np.array_equal(source, annotated.image))


def _compare(
    annotated: Annotated,
    result: Result,
    structures: Sequence[str],
    k: int,
    leaked: bool,
    spacing: tuple[float, float] | None,
    volume: str,
) -> list[Case]:
    rows = []
    for structure in structures:
        reference = annotated.masks.get(structure)
        if reference is None:
            if structure not in annotated.absent:
                continue  # nobody looked for it here: there is nothing to compare with
            reference = np.zeros(annotated.image.shape[:2], np.bool_)
        agreement = compare_masks(result.masks[structure], reference, spacing)
        score = result.scores[structure]
        rows.append(
            Case(
                case=annotated.name,
                structure=structure,
                k=k,
                dice=agreement.dice,
                iou=agreement.iou,
                hd95=agreement.hd95,
                reference_volume=agreement.reference_volume,
                predicted_volume=agreement.predicted_volume,
                latency_ms=result.timings.get("total", math.nan),
                quality=result.quality.flag,
                nearest_distance=score.distance,
                iou_estimate=score.iou,
                object_score=score.object_score,
                recalled=tuple(recalled.key for recalled in result.recalled[structure]),
                leaked=leaked,
                volume=volume,
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
