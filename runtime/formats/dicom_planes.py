"""Where each image of a DICOM series or multi-frame object lies.

What holds for a frame stands in its own functional groups, in the shared ones (PS3.3 C.7.6.16), or,
in an object of one frame, at its top; it is read here, once for all. Frame: LPS, millimetres.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError

__all__ = ["MARKS", "Plane", "Where", "item", "numbers", "planes_of"]

MOST_FRAMES = 200_000
"""Of one object: ten times those of the largest scan, and of a SEG with many segments of it."""

MARKS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
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
    for name, places in MARKS:
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
