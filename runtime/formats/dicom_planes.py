"""Where each image of a DICOM series or multi-frame object lies, and which of them are one volume.

What holds for a frame stands in its own functional groups, in the shared ones (PS3.3 C.7.6.16), or,
in an object of one frame, at its top; it is read here, once for all. Frame: LPS, millimetres.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError

__all__ = ["Plane", "Where", "choose", "item", "numbers", "place", "plane_word", "planes_of"]

MOST_FRAMES = 200_000
"""Of one object: ten times those of the largest scan, and of a SEG with many segments of it."""

SAME_ORIENTATION = 1e-3  # of direction cosines
SAME_SPACING = 1e-3  # of the spacing
EVEN = 0.02  # of the gap: how far a slice may lie from its even place, within or along
ROUNDED = 0.2  # of the gap; one slice missing of five moves others by a quarter of it,
ROUNDED_OF_THREE = 0.14  # and one of four by a sixth
_LISTED = 8

_MARKS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("time point", (("FrameContentSequence", "TemporalPositionIndex"),
                    ("", "TemporalPositionIdentifier"))),
    ("time offset", (("TemporalPositionSequence", "TemporalPositionTimeOffset"),)),
    ("trigger time", (("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
                      ("", "TriggerTime"))),
    ("frame reference time", (("", "FrameReferenceTime"),)),
    ("echo", (("", "EchoNumbers"),)),
    ("echo time", (("MREchoSequence", "EffectiveEchoTime"), ("", "EchoTime"))),
    ("inversion time", (("MRModifierSequence", "InversionTimes"), ("", "InversionTime"))),
    ("b value", (("MRDiffusionSequence", "DiffusionBValue"), ("", "DiffusionBValue"))),
    ("gradient", (("MRDiffusionSequence", "DiffusionGradientOrientation"),
                  ("", "DiffusionGradientOrientation"))),
    ("image type", (("MRImageFrameTypeSequence", "FrameType"), ("CTImageFrameTypeSequence",
                    "FrameType"), ("PETFrameTypeSequence", "FrameType"), ("", "ImageType"))),
    ("component", (("MRImageFrameTypeSequence", "ComplexImageComponent"),)),
    ("tube voltage", (("CTXRayDetailsSequence", "KVP"), ("", "KVP"))),
    ("kernel", (("CTReconstructionSequence", "ConvolutionKernel"), ("", "ConvolutionKernel"))),
    ("acquisition", (("FrameContentSequence", "FrameAcquisitionNumber"),
                     ("", "AcquisitionNumber"))),
    ("phase", (("", "NominalPercentageOfCardiacPhase"),)),
    ("contrast", (("ContrastBolusUsageSequence", "ContrastBolusAgentPhase"),)),
    ("acquisition time", (("FrameContentSequence", "FrameAcquisitionDateTime"),
                          ("", "AcquisitionDateTime"), ("", "AcquisitionTime"))),
    ("dimension indices", (("FrameContentSequence", "DimensionIndexValues"),)),
)  # fmt: skip
"""What tells images at one place apart, in the order in which it is tried: name, and where it
stands (a functional group, or the top of the object)."""


@dataclass(frozen=True)
class Where:
    """The place of one image.

    Attributes
    ----------
    position : mm of the centre of its first pixel.
    row, column : unit vectors along increasing column and row index.
    spacing : mm between rows, and between columns.
    patient : whether that is in the patient's coordinates (or an ultrasound volume's own).
    decimals : mm of the last decimal that the position is written with.
    """

    position: tuple[float, ...]
    row: tuple[float, ...]
    column: tuple[float, ...]
    spacing: tuple[float, float]
    patient: bool
    decimals: float

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector across the plane: along a row, turned towards along a column."""
        return np.cross(self.row, self.column)


@dataclass(frozen=True)
class Plane:
    """One image: a file of one frame, or a frame of many.

    Attributes
    ----------
    file : index of its file among those that were read.
    frame : number within the file, from 0.
    frames : how many the file has.
    shape : rows, columns.
    where : its place; None of a picture that has none.
    spacing : mm between rows, and between columns; or None.
    thickness : mm to the next plane as the header states it, or None.
    modality, voi, anatomy : data sets in which the modality LUT, the VOI LUT and laterality stand.
    stack : StackID, or empty.
    marks : what may tell it from another image at its place, by name.
    instance : SOP class and instance UID.
    reference : frame of reference UID, or empty.
    """

    file: int
    frame: int
    frames: int
    shape: tuple[int, int]
    where: Where | None
    spacing: tuple[float, float] | None
    thickness: float | None
    modality: Any = field(repr=False, compare=False)
    voi: Any = field(repr=False, compare=False)
    anatomy: Any = field(repr=False, compare=False)
    stack: str
    marks: Mapping[str, str] = field(repr=False)
    instance: tuple[str, str]
    reference: str

    @property
    def at(self) -> Where:
        """Its place, of an image that has one."""
        assert self.where is not None
        return self.where


def planes_of(dataset: Any, file: int, path: Path) -> list[Plane]:
    """Return every image of one object.

    Raises
    ------
    InputError
        If there are not as many functional groups as frames, or a frame has a part of its place.
    """
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not 1 <= frames <= MOST_FRAMES:
        raise InputError(f"{path} declares {frames} frames; at most {MOST_FRAMES} are read.")
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    shared = item(dataset, "SharedFunctionalGroupsSequence")
    if groups is not None and len(groups) != frames:
        raise InputError(f"{path} has {frames} frames and places for {len(groups)}: it is damaged.")
    enhanced = groups is not None or shared is not None
    return [
        _plane(dataset, groups[n] if groups else None, shared, enhanced, file, n, frames, path)
        for n in range(frames)
    ]


def _plane(
    dataset: Any,
    group: Any,
    shared: Any,
    enhanced: bool,
    file: int,
    frame: int,
    frames: int,
    path: Path,
) -> Plane:
    def find(name: str) -> Any:
        found = item(group, name)
        return item(shared, name) if found is None else found

    if enhanced:
        place, turn = find("PlanePositionSequence"), find("PlaneOrientationSequence")
        position = None if place is None else place.get("ImagePositionPatient")
        orientation = None if turn is None else turn.get("ImageOrientationPatient")
        patient = position is not None or orientation is not None
        if not patient:
            place, turn = (
                find("PlanePositionVolumeSequence"),
                find("PlaneOrientationVolumeSequence"),
            )
            position = None if place is None else place.get("ImagePositionVolume")
            orientation = None if turn is None else turn.get("ImageOrientationVolume")
        measures = find("PixelMeasuresSequence")
        spacing = None if measures is None else measures.get("PixelSpacing")
        top = None
    else:  # the place of several frames cannot be that of the first
        top = dataset if frames == 1 else None
        position = None if top is None else top.get("ImagePositionPatient")
        orientation = None if top is None else top.get("ImageOrientationPatient")
        patient, measures = True, dataset
        spacing = dataset.get("PixelSpacing")
    placed = bool(position) or bool(orientation)
    if placed:
        for name, value in {
            "ImageOrientationPatient": orientation,
            "ImagePositionPatient": position,
            "PixelSpacing": spacing,
        }.items():
            if not value:
                raise InputError(
                    f"{path}: a slice has no {name}, so its place is unknown. Export the original "
                    "series, not a derived one."
                )
    pixels = _two(numbers(spacing, 2, path)) if spacing else None
    where = None
    if placed and pixels is not None:
        row, column = _directions(orientation, path)
        corner = tuple(numbers(position, 3, path))
        where = Where(corner, row, column, pixels, patient, _last_decimal(position))
    content = find("FrameContentSequence")
    stack = "" if content is None else str(content.get("StackID") or "")
    marks = {}
    for name, places in _MARKS:
        for sequence, keyword in places:
            source = find(sequence) if sequence else top
            if keyword == "DiffusionGradientOrientation" and source is not None and sequence:
                source = item(source, "DiffusionGradientDirectionSequence")
            value = None if source is None else source.get(keyword)
            if value is not None and str(value) != "":
                marks[name] = _text(value)
                break
    return Plane(
        file,
        frame,
        frames,
        (int(dataset.Rows), int(dataset.Columns)),
        where,
        pixels,
        _thickness(measures),
        find("PixelValueTransformationSequence") or dataset,
        find("FrameVOILUTSequence") or dataset,
        find("FrameAnatomySequence") or dataset,
        stack,
        marks,
        (str(dataset.get("SOPClassUID", "")), str(dataset.get("SOPInstanceUID", ""))),
        str(dataset.get("FrameOfReferenceUID") or ""),
    )


def choose(
    planes: Sequence[Plane], path: Path, *, stack: str | None = None, time: int | None = None
) -> tuple[list[Plane], int, tuple[str, ...]]:
    """Return the images of one volume, how many volumes lie at its place, and what was chosen.

    Parameters
    ----------
    stack : which of several stacks (by StackID, orientation, size or spacing): its name, or its
        number from 1.
    time : which of several volumes at one place, from 1: time points, echoes, b values, or
        whatever tells them apart.

    Raises
    ------
    InputError
        If there are several and none is chosen (they are named), or there is no such one.
    """
    notes: list[str] = []
    stacks = _stacks(planes)
    names = [f"{n}: {name}" for n, name in enumerate(stacks, 1)]
    if stack is None and len(stacks) > 1:
        raise InputError(
            f"{path} holds {len(stacks)} stacks ({'; '.join(names[:_LISTED])}). Choose one with "
            "--stack, by its number."
        )
    if stack is None:
        chosen = next(iter(stacks.values()))
    else:
        by_id = [list_ for list_ in stacks.values() if list_[0].stack == stack]
        number = int(stack) if stack.isascii() and stack.isdecimal() else 0
        if len(by_id) == 1:
            chosen = by_id[0]
        elif 1 <= number <= len(stacks):
            chosen = list(stacks.values())[number - 1]
        else:
            raise InputError(f"{path} has no stack '{stack}'; there are {'; '.join(names)}.")
        if len(stacks) > 1:
            notes.append(f"one of {len(stacks)} stacks: {_describe(chosen)}")
    volumes = _volumes(chosen, path)
    titles = list(volumes)
    if time is None and len(volumes) > 1:
        listed = "; ".join(f"{n}: {title}" for n, title in enumerate(titles[:_LISTED], 1))
        more = f"; and {len(titles) - _LISTED} more" if len(titles) > _LISTED else ""
        raise InputError(
            f"{path}: images lie at one position, as {len(volumes)} volumes ({listed}{more}). Say "
            f"which with --time 1 to {len(volumes)}, or --time all."
        )
    if time is not None and not 1 <= time <= len(volumes):
        raise InputError(f"{path} has {len(volumes)} volumes at one place, there is no {time}.")
    if len(volumes) > 1:
        notes.append(f"volume {time} of {len(volumes)}: {titles[(time or 1) - 1]}")
    return volumes[titles[(time or 1) - 1]], len(volumes), tuple(notes)


def place(
    planes: Sequence[Plane], path: Path
) -> tuple[NDArray[np.float64], list[int], tuple[str, ...]]:
    """Return the affine of (plane, row, column), the order of the planes along it, and notes.

    Positions may lie off an even spacing by what rounding to the decimals that they are written
    with explains, and 2 % of the gap.

    Raises
    ------
    InputError
        If a slice is missing, two lie at one place, or slices are shifted (gantry tilt).
    """
    first = planes[0].at
    row, column, normal = np.array(first.row), np.array(first.column), first.normal
    rows, columns = first.spacing
    if rows <= 0 or columns <= 0:
        raise InputError(f"{path}: its pixel spacing is {[rows, columns]}; expected more than 0.")
    positions = np.array([plane.at.position for plane in planes], np.float64)
    distances = positions @ normal
    order = [int(i) for i in np.argsort(distances, kind="stable")]
    placed, notes = positions[order], []
    if len(order) == 1:
        step = normal * (planes[0].thickness or 1.0)
    else:
        step = (placed[-1] - placed[0]) / (len(order) - 1)
        gap = float(step @ normal)
        heights = distances[order]
        gaps = np.diff(heights)
        if gaps.min() < 1e-3:
            raise InputError(f"{path}: two slices lie at one position.")
        decimal = min(plane.at.decimals for plane in planes)
        largest = ROUNDED_OF_THREE if len(order) == 3 else ROUNDED
        rounding = min(float(np.abs(normal).sum()) * decimal / 2, largest * gap)
        even, off = _even_gap(heights)
        if off > EVEN * gap + rounding * (1 + 1e-6):
            raise InputError(
                f"{path}: gaps between slices range from {gaps.min():.3f} to {gaps.max():.3f} mm. "
                "A slice is missing, or several stacks are mixed."
            )
        across = placed - np.outer(heights, normal)
        drift = float(np.linalg.norm(across[-1] - across[0]))
        line = np.linspace(across[0], across[-1], len(order))
        shift = float(np.linalg.norm(across - line, axis=1).max())
        slack = EVEN * gap + np.sqrt(3) * decimal
        if drift > EVEN * gap * (len(order) - 2) + slack or shift > slack:
            raise InputError(
                f"{path}: slices are shifted against each other (gantry tilt). Resample the "
                "series without tilt first."
            )
        if off > EVEN * gap:
            stated = planes[0].thickness
            if stated and _off_line(heights, stated) <= rounding * (1 + 1e-6):
                even = stated
            rest = heights - even * np.arange(len(heights))
            placed[0] += normal * ((rest.max() + rest.min()) / 2 - heights[0])
            gap = even
            notes.append(
                f"positions are rounded: gaps range from {gaps.min():.4g} to {gaps.max():.4g} mm, "
                f"{gap:.4g} mm is taken"
            )
        step = normal * gap
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * rows
    affine[:3, 2] = row * columns
    affine[:3, 3] = placed[0]
    return affine, order, tuple(notes)


def _off_line(heights: NDArray[np.float64], gap: float) -> float:
    """Return how far, at least, a height lies off an even stack with that gap."""
    rest = heights - gap * np.arange(len(heights))
    return float(rest.max() - rest.min()) / 2


def _even_gap(heights: NDArray[np.float64]) -> tuple[float, float]:
    """Return the gap of the even stack that heights lie closest to, and how far off they are.

    The largest distance is convex in the gap, so a ternary search finds the least one.
    """
    gaps = np.diff(heights)
    low, high = float(gaps.min()), float(gaps.max())
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _off_line(heights, left) < _off_line(heights, right):
            high = right
        else:
            low = left
    gap = (low + high) / 2
    return gap, _off_line(heights, gap)


def plane_word(normal: NDArray[np.float64]) -> str:
    """Return axial, coronal or sagittal, whichever is nearest, for a plane's normal (LPS)."""
    return ("sagittal", "coronal", "axial")[int(np.argmax(np.abs(normal)))]


def item(dataset: Any, name: str) -> Any:
    """Return the first item of a sequence, or None."""
    sequence = None if dataset is None else dataset.get(name)
    return sequence[0] if sequence else None


def numbers(values: Any, count: int, path: Path) -> list[float]:
    """Return ``count`` finite numbers; raises InputError otherwise."""
    found = [float(v) for v in values]
    if len(found) != count or not np.isfinite(found).all():
        raise InputError(f"{path}: expected {count} numbers, got {found}. The header is damaged.")
    return found


def _two(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]


def _directions(orientation: Any, path: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return unit vectors at right angles, of cosines that may be rounded."""
    values = np.array(numbers(orientation, 6, path))
    row, column = values[:3], values[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or abs(row @ column) > 1e-2:
        raise InputError(
            f"{path}: ImageOrientationPatient is not two unit vectors at right angles."
        )
    row = row / lengths[0]
    column = column - row * (row @ column)
    return tuple(row.tolist()), tuple((column / np.linalg.norm(column)).tolist())


def _last_decimal(position: Any) -> float:
    """Return the millimetres of the last decimal that a position's coordinates are written with.

    A coordinate with fewer decimals than another lost its zeros, not its precision.
    """
    decimals = 0
    for value in position:
        text = str(getattr(value, "original_string", None) or value).strip().lower()
        mantissa, _, power = text.partition("e")
        digits = len(mantissa.partition(".")[2].rstrip("0"))
        decimals = max(decimals, digits - int(power or 0))
    return 10.0**-decimals if decimals > 0 else 1.0


def _thickness(measures: Any) -> float | None:
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        value = None if measures is None else measures.get(name)
        if value not in (None, "") and float(value) > 0:
            return float(value)
    return None


def _text(value: Any) -> str:
    parts = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return " ".join(str(part) for part in parts)


def _stacks(planes: Sequence[Plane]) -> dict[str, list[Plane]]:
    """Return the planes by stack, under names that tell them apart, in an order of their own."""
    groups: list[list[Plane]] = []
    for plane in planes:
        for group in groups:
            if _together(plane, group[0]):
                group.append(plane)
                break
        else:
            groups.append([plane])
    groups.sort(key=lambda g: (_sortable(g[0].stack), _describe(g), g[0].at.row))
    named: dict[str, list[Plane]] = {}
    for group in groups:
        name = _describe(group)
        named[name if name not in named else f"{name} ({len(named) + 1})"] = group
    return named


def _together(one: Plane, other: Plane) -> bool:
    if one.stack != other.stack or one.shape != other.shape:
        return False
    here, there = one.at, other.at
    turned = np.abs(np.subtract((*here.row, *here.column), (*there.row, *there.column))).max()
    stretched = np.abs(np.subtract(here.spacing, there.spacing)).max() / max(there.spacing)
    same = turned <= SAME_ORIENTATION and stretched <= SAME_SPACING
    return bool(same and here.patient == there.patient)


def _describe(group: Sequence[Plane]) -> str:
    first, at = group[0], group[0].at
    rows, columns = first.shape
    stack = f"StackID {first.stack}, " if first.stack else ""
    return (
        f"{stack}{plane_word(at.normal)}, {rows} x {columns} pixels of {at.spacing[0]:.3g} x "
        f"{at.spacing[1]:.3g} mm, {len(group)} images"
    )


def _volumes(planes: Sequence[Plane], path: Path) -> dict[str, list[Plane]]:
    """Return the planes of a stack by volume: one each where images share their positions."""
    normal = planes[0].at.normal
    distances = [float(np.dot(plane.at.position, normal)) for plane in planes]
    at = [round(distance / 2e-3) for distance in distances]
    repeats = max(Counter(at).values())
    if repeats == 1:
        return {"": list(planes)}
    names = [name for name, _ in _MARKS if len({plane.marks.get(name) for plane in planes}) > 1]
    for count in (1, 2, 3):
        for marks in combinations(names, count):
            groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
            for i, plane in enumerate(planes):
                groups[tuple(plane.marks.get(name, "") for name in marks)].append(i)
            unique = all(len({at[i] for i in group}) == len(group) for group in groups.values())
            if unique and len(groups) == repeats:
                order = sorted(groups, key=lambda key: [_sortable(part) for part in key])
                return {
                    ", ".join(f"{n} {v or '-'}" for n, v in zip(marks, key, strict=True)): [
                        planes[i] for i in groups[key]
                    ]
                    for key in order
                }
    raise InputError(
        f"{path}: {repeats} images lie at one position, and nothing in their headers (time point, "
        "echo, b value, image type, acquisition) tells them apart. Give each volume a folder."
    )


def _sortable(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
