"""What an evaluation finds: one row per image, structure and way of segmenting it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.segmenting.recipe import Provenance
from recallseg.runtime.segmenting.result import HeadUse, Result

if TYPE_CHECKING:
    from recallseg.runtime.library import Library
    from recallseg.runtime.reports.summary import StructureSummary

__all__ = ["RECALLED", "Arm", "Case", "Evaluation", "Illustration", "Timing", "VolumeCase"]

RECALLED = "recalled"
"""The method that is judged; others are baselines."""


@dataclass(frozen=True)
class Arm:
    """One way to segment every query.

    Attributes
    ----------
    method : ``recalled``, or a baseline: ``copy``, ``forest``, ``match``.
    k : most exemplars that are recalled (``copy``: 1, ``forest``: 0, it takes all).
    annotated : how many exemplars there are to recall from, chosen at random; 0: all.
    draw : which random choice.
    """

    method: str = RECALLED
    k: int = 0
    annotated: int = 0
    draw: int = 0


@dataclass(frozen=True)
class Case:
    """One image, structure and arm.

    ``hd95`` is in mm (pixels if the spacing is unknown), volumes in its square; ``iou_estimate``,
    ``object_score`` and ``nearest_distance`` are the model's own (see ``Score``), NaN for
    baselines; ``recalled`` are keys, nearest first; ``present``: whether a mask was given;
    ``volume``: what a slice is of, empty for other images; ``group``: a hash of what the image
    belongs to (patient, folder, file), made with a key of this run; ``method``, ``annotated`` and
    ``draw``: see ``Arm``.
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
    surface_dice: float = 0.0
    method: str = RECALLED
    annotated: int = 0
    draw: int = 0
    group: str = ""
    volume: str = ""
    present: bool = True

    @property
    def arm(self) -> Arm:
        """How it was segmented."""
        return Arm(self.method, self.k, self.annotated, self.draw)


@dataclass(frozen=True)
class VolumeCase:
    """One whole volume, structure and arm, compared in three dimensions.

    ``hd95`` is in mm and volumes in cubic mm (pixels where the file states no lengths); NaN where
    not every slice says something of the structure, ``slices`` being those that do.
    """

    volume: str
    structure: str
    k: int
    slices: int
    dice: float
    iou: float
    hd95: float
    surface_dice: float
    reference_volume: float
    predicted_volume: float
    method: str = RECALLED
    annotated: int = 0
    draw: int = 0
    group: str = ""

    @property
    def arm(self) -> Arm:
        """How it was segmented."""
        return Arm(self.method, self.k, self.annotated, self.draw)

    @property
    def volume_difference(self) -> float:
        """Predicted less reference volume, as a share of the reference; NaN without one."""
        if not self.reference_volume:
            return float("nan")
        return (self.predicted_volume - self.reference_volume) / self.reference_volume


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
    arms : every way in which each image was segmented, in the order of the tables.
    cases, volumes : one per image (volume), structure and arm.
    timings : one per image and k.
    failures : name and message of images that could not be evaluated.
    illustrations : for the largest k, lowest Dice first.
    workspace_bytes : what the segmenter set aside, by k.
    in_mm : whether distances are in mm; else in pixels.
    tolerance : of surface Dice, in the same unit.
    exemplars : how many the library has.
    split : whether queries were recalled without their own group (or fold).
    unit : what a group is: ``patient``, ``folder``, ``file``, ``group``, or ``image``.
    provenance : what made the last result, by k.
    heads : what the library's head had to do with it, by k, if it has one.
    unmentioned : names of images and volumes that say nothing of the structures.
    notes : what had to be decided while volumes were read, by name.
    """

    structures: tuple[str, ...]
    ks: tuple[int, ...]
    arms: tuple[Arm, ...]
    cases: tuple[Case, ...] = field(repr=False)
    volumes: tuple[VolumeCase, ...] = field(repr=False)
    timings: tuple[Timing, ...] = field(repr=False)
    failures: Mapping[str, str]
    illustrations: tuple[Illustration, ...] = field(repr=False)
    workspace_bytes: Mapping[int, int]
    in_mm: bool
    tolerance: float
    exemplars: int
    split: bool
    provenance: Mapping[int, Provenance]
    unmentioned: tuple[str, ...] = ()
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    heads: Mapping[int, HeadUse] = field(default_factory=dict)
    unit: str = "image"

    @property
    def summary(self) -> tuple[StructureSummary, ...]:
        """Agreement by structure, method and k, over all images; see :class:`StructureSummary`."""
        from recallseg.runtime.reports.summary import summarise

        return summarise(self)

    def write(
        self,
        folder: str | Path,
        library: Library,
        *,
        title: str = "Evaluation",
        threads: int | None = None,
    ) -> dict[str, Any]:
        """Write what ``recallseg evaluate`` does, and return what ``summary.json`` then holds.

        ``report.html``, ``summary.json``, ``cases.csv``, and ``volumes.csv`` if there are any.

        Parameters
        ----------
        library : that was evaluated, whose exemplars the page shows.
        title : of the page.
        threads : that the segmenters had, to be told; None: as many as cores.

        Raises
        ------
        OSError
            If the folder cannot be written.
        """
        from recallseg.runtime.reports.page import Settings, render_report
        from recallseg.runtime.reports.pictures import source_of
        from recallseg.runtime.reports.summary import write_evaluation

        recipe = self.provenance[max(self.ks)].recipe
        settings = Settings.of(library, title, recipe.engine, recipe.precision, threads)
        page = render_report(self, settings, source_of(library))
        return write_evaluation(self, settings, page, Path(folder))

    def __repr__(self) -> str:
        found = "; ".join(
            f"{one.structure} {one.method} k={one.k}: median Dice {one.dice['median']:.3f} of "
            f"{one.present}"
            for one in self.summary
        )
        failed = f"; {len(self.failures)} failed" if self.failures else ""
        return f"recallseg.Evaluation({found}{failed})"
