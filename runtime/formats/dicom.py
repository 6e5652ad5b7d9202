"""DICOM images: a series of slices, multi-frame objects, or a single picture. Frame: LPS.

Geometry follows PS3.3 C.7.6.2 (image plane) and C.7.6.16 (functional groups): images are ordered by
their position along the normal, never by the order in which they are stored. Values go through the
modality LUT (C.11.1), and through the VOI LUT or window (C.11.2) if asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats import guards
from recallseg.runtime.formats.dicom_files import (
    damaged_is_input_error,
    find_series,
    object_kind,
    open_dicom,
)
from recallseg.runtime.formats.dicom_grid import place
from recallseg.runtime.formats.dicom_pixels import (
    check_length,
    check_pixels,
    stored_frames,
    values_of,
    window_of,
)
from recallseg.runtime.formats.dicom_planes import Plane, item, numbers, planes_of
from recallseg.runtime.formats.dicom_stacks import choose
from recallseg.runtime.formats.volume import Volume

__all__ = ["DicomSource", "count_dicom", "read_dicom"]

PHILIPS_SCALE = (0x2005, 0x100E)
"""Private slope of Philips MR: to what the coil received, which differs by series."""


@dataclass(frozen=True)
class DicomSource:
    """What a SEG must repeat of the images it is drawn on.

    Attributes
    ----------
    header : of the first image, without its pixels.
    planes : every image, in the order of the volume's first axis.
    reference : frame of reference UID; one of our own making where the file has none.
    """

    header: Any = field(repr=False)
    planes: tuple[Plane, ...]
    reference: str


def read_dicom(
    path: Path | Sequence[Path],
    *,
    voi: bool = False,
    time: int | None = None,
    stack: str | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Volume:
    """Read a file, a folder with one series, or the files of one.

    Parameters
    ----------
    voi : apply the file's own VOI LUT or window; values are then what a screen would show.
    time, stack : which of several volumes; see
        :func:`recallseg.runtime.formats.dicom_stacks.choose`.
    progress : is told of each image that is read.

    Returns
    -------
    Volume
        Of images with positions: axes slice, row, column, slices in the order of their positions.
        A picture without: one or more frames, frame ``image``. Padding (PixelPaddingValue) has the
        lowest value of what was measured.

    Raises
    ------
    InputError
        If a file is damaged, unsupported, too large or has no pixels; for several series, stacks or
        volumes and none chosen, uneven gaps (one is missing), gantry tilt, or a missing spacing.
    """
    files, path = _files(path)
    with damaged_is_input_error(path):
        paths, headers, notes = _headers(files, path)
        planes = [
            plane
            for number, header in enumerate(headers)
            for plane in planes_of(header, number, path)
        ]
        for name in ("SamplesPerPixel", "PhotometricInterpretation"):
            values = {str(header.get(name)) for header in headers}
            if len(values) > 1:
                raise InputError(
                    f"{path}: slices differ in {name}: {', '.join(sorted(values))}. Give each "
                    "kind a folder."
                )
        placed = [plane for plane in planes if plane.where is not None]
        acquired: int | None = 0
        if not placed:
            affine = _picture_affine(headers, planes, path)
        else:
            if len(placed) < len(planes):
                raise InputError(
                    f"{path}: a slice has no ImagePositionPatient, so its place is unknown. Export "
                    "the original series, not a derived one."
                )
            planes, _, chosen = choose(planes, path, stack=stack, time=time)
            affine, order, rounded = place(planes, path)
            planes = [planes[i] for i in order]
            notes += [*chosen, *rounded]
            if _text(headers[planes[0].file], "MRAcquisitionType") == "3D":
                acquired = None
        first = planes[0]
        header = headers[first.file]
        array, padded = _pixels(paths, headers, planes, path, voi, progress)
        if padded:
            notes.append(f"{padded} pixels are padding and have the lowest value of the others")
        guards.check_finite(path, array)
        if any(PHILIPS_SCALE in each for each in headers):
            notes.append("its private scaling (2005,100E) is not applied; RescaleSlope is")
        patient = first.where is not None and first.where.patient
        if first.where is not None and not patient:
            affine = np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1.0])
        reference = next((plane.reference for plane in planes if plane.reference), "")
        if patient and not reference:
            reference = _own_reference(header)
            notes.append("it has no frame of reference UID; one is made from its series'")
        own, mended = _own_header(header)
        notes += mended
        source = DicomSource(own, _bare(planes), reference)
        return Volume(
            array,
            affine,
            "LPS" if patient else "image",
            _text(header, "Modality"),
            None if voi else window_of(header, first),
            _tags(header, first),
            source,
            tuple(notes),
            acquired,
            bool(placed) or _picture_spacing(header, first, path) is not None,
        )


def count_dicom(path: Path | Sequence[Path], stack: str | None = None) -> int:
    """Return how many volumes lie at one place; raises InputError as :func:`read_dicom`."""
    files, path = _files(path)
    with damaged_is_input_error(path):
        _, headers, _ = _headers(files, path)
        planes = [plane for number, h in enumerate(headers) for plane in planes_of(h, number, path)]
        if any(plane.where is None for plane in planes):
            return 1
        return choose(planes, path, stack=stack, time=1)[1]


def _files(path: Path | Sequence[Path]) -> tuple[Sequence[Path], Path]:
    if isinstance(path, Path):
        return (find_series(path) if path.is_dir() else [path]), path
    if not path:
        raise InputError("there are no DICOM files: the series has no slices.")
    return path, path[0].parent


def _headers(files: Sequence[Path], path: Path) -> tuple[list[Path], list[Any], list[str]]:
    """Return the images among the files of one series, and what was passed over."""
    if not files:
        raise InputError(f"there are no DICOM files in {path}: the series has no slices.")
    paths, headers = [], []
    others: dict[str, list[str]] = defaultdict(list)
    for file in files:
        with damaged_is_input_error(file):
            header = open_dicom(file)
            kind = object_kind(header)
            if kind == "image":
                check_length(file, header)
        if kind == "image":
            paths.append(file)
            headers.append(header)
        else:
            others[kind].append(file.name)
    if not headers:
        kind = next(iter(others))
        raise InputError(
            f"{files[0] if len(files) == 1 else path} has no pixels of an image: it is a {kind}, "
            "not an image."
        )
    notes = [
        f"passed over: {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} "
        f"({kind})"
        for kind, names in others.items()
    ]
    series = {str(header.get("SeriesInstanceUID", "")) for header in headers}
    if len(series) > 1:
        raise InputError(f"{path} holds {len(series)} series; expected one. Give each a folder.")
    instances = [str(uid) for header in headers if (uid := header.get("SOPInstanceUID"))]
    if len(set(instances)) < len(instances):
        raise InputError(f"{path} holds the same image twice. Remove the copies.")
    return paths, headers, notes


def _pixels(
    paths: Sequence[Path],
    headers: Sequence[Any],
    planes: Sequence[Plane],
    path: Path,
    voi: bool,
    progress: Callable[[str], None],
) -> tuple[NDArray[Any], int]:
    """Decode every plane into one array, one file in memory at a time; return it and how many of
    its pixels are padding.
    """
    array: NDArray[Any] | None = None
    padding: dict[int, NDArray[np.uint8]] = {}
    lowest: list[float] = []
    wanted: dict[int, dict[int, int]] = defaultdict(dict)
    for index, plane in enumerate(planes):
        wanted[plane.file][plane.frame] = index
    for file, frames in wanted.items():
        check_pixels(path, headers[file], len(planes))
        with damaged_is_input_error(paths[file]):
            dataset = open_dicom(paths[file], pixels=True)
            numbers_of = sorted(frames)
            done = 0
            for number, stored in zip(numbers_of, stored_frames(dataset, numbers_of), strict=False):
                index = frames[number]
                values, padded = values_of(stored, dataset, planes[index], voi=voi, first=planes[0])
                array = _room(path, array, values, len(planes))
                array[index] = values
                if padded is not None:
                    padding[index] = np.packbits(padded)
                    values = values[~padded]
                if values.ndim < 3 and values.size:
                    lowest.append(values.min())
                done += 1
                progress(f"image {index}")
            if done != len(frames):
                raise InputError(
                    f"{paths[file]} has {done} frames of pixels, {len(frames)} are declared."
                )
    assert array is not None
    count = 0
    for index, bits in padding.items() if lowest else ():
        where = (
            np.unpackbits(bits, count=array[index].size).astype(bool).reshape(array[index].shape)
        )
        array[index][where] = min(lowest)
        count += int(where.sum())
    return array, count


def _room(path: Path, array: NDArray[Any] | None, values: NDArray[Any], count: int) -> NDArray[Any]:
    """Return an array for all planes that ``values`` fit in, the others' values kept."""
    if array is None:
        guards.check_size(path, [count, *values.shape], values.dtype)
        return np.zeros((count, *values.shape), values.dtype)
    if array.shape[1:] != values.shape:
        raise InputError(f"{path}: slices are {array.shape[1:]} and {values.shape} pixels.")
    if array.dtype == values.dtype:
        return array
    both = np.result_type(array, values)
    both = np.dtype(np.float32) if both == np.float64 else both
    guards.check_size(path, array.shape, both)
    return array.astype(both, copy=False)


def _picture_affine(
    headers: Sequence[Any], planes: Sequence[Plane], path: Path
) -> NDArray[np.float64]:
    """Return the affine of images without a place in the patient: radiograph, ultrasound."""
    if len(headers) > 1:
        raise InputError(
            f"{path} holds {len(headers)} pictures: a slice has no ImageOrientationPatient, so "
            "they are no volume. Give them one by one, or export the original series."
        )
    rows, columns = _picture_spacing(headers[0], planes[0], path) or (1.0, 1.0)
    return np.diag([1.0, rows, columns, 1.0])


def _picture_spacing(dataset: Any, plane: Plane, path: Path) -> tuple[float, float] | None:
    """Return mm between rows and columns; None where the file states none."""
    stated: list[Any] = [plane.spacing]
    shared = item(dataset, "SharedFunctionalGroupsSequence")
    properties = item(shared, "FramePixelDataPropertiesSequence")
    for holder in (dataset, properties):
        for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
            stated.append(None if holder is None else holder.get(name))
    for value in stated:
        if value:
            rows, columns = numbers(value, 2, path)
            if rows > 0 and columns > 0:
                return rows, columns
    region = item(dataset, "SequenceOfUltrasoundRegions")
    centimetres = 3  # PS3.3 C.8.5.5.1.15: physical units of both directions
    if (
        region is not None
        and region.get("PhysicalUnitsXDirection") == centimetres
        and region.get("PhysicalUnitsYDirection") == centimetres
        and region.get("PhysicalDeltaX")
        and region.get("PhysicalDeltaY")
    ):
        return abs(float(region.PhysicalDeltaY)) * 10, abs(float(region.PhysicalDeltaX)) * 10
    return None


def _bare(planes: Sequence[Plane]) -> tuple[Plane, ...]:
    """Return the planes without the headers that they were read from, which are big."""
    return tuple(replace(plane, modality=None, voi=None, anatomy=None) for plane in planes)


def _own_header(header: Any) -> tuple[Any, list[str]]:
    """Return a header as a writer needs it, and what is to be said.

    What is said of each frame stands in the planes. Dates and times of the patient and the study as
    ACR-NEMA wrote them (with points and colons) are rewritten; those that are none are emptied.
    """
    from pydicom.dataset import Dataset
    from pydicom.valuerep import DA, TM

    own, notes = Dataset(), []
    for element in header:
        if element.keyword != "PerFrameFunctionalGroupsSequence":
            own.add(element)
    for name in ("PatientBirthDate", "StudyDate", "StudyTime"):
        value = own.get(name)
        if value is None:
            continue
        kind, word = (TM, "time") if name == "StudyTime" else (DA, "date")
        plain = str(value).strip().replace(":", "")
        plain = plain.replace(".", "") if kind is DA else plain
        try:
            kind(plain)
        except (ValueError, TypeError):
            plain = ""
            notes.append(f"its {name} is no {word}; it is left empty in what is written")
        if plain != str(value):
            own[name] = type(own[name])(own[name].tag, own[name].VR, plain)
    if own.get("PatientSex", "") not in ("", "M", "F", "O"):
        own.PatientSex = ""
        notes.append("its PatientSex is none of M, F, O; it is left empty in what is written")
    return own, notes


def _own_reference(header: Any) -> str:
    """Return a frame of reference UID: always the same one for the same series."""
    from pydicom.uid import generate_uid

    series = header.get("SeriesInstanceUID") or header.get("SOPInstanceUID") or ""
    return str(generate_uid(entropy_srcs=["recallseg frame of reference", str(series)]))


def _tags(dataset: Any, plane: Plane) -> dict[str, str]:
    """Return what helps to choose exemplars; nothing of it says who the patient is."""
    found = {
        "modality": _text(dataset, "Modality"),
        "body_part": _text(dataset, "BodyPartExamined"),
        "view": _text(dataset, "ViewPosition"),
        "laterality": _text(plane.anatomy, "FrameLaterality")
        or _text(dataset, "ImageLaterality")
        or _text(dataset, "Laterality"),
        "orientation": _turned(dataset) if plane.where is None else "",
    }
    return {tag: value for tag, value in found.items() if value}


def _turned(dataset: Any) -> str:
    """Return where a picture's rows and columns run to in the patient, e.g. ``A-F``."""
    value = dataset.get("PatientOrientation") or ()
    parts = ["".join(c for c in str(part) if c in "LRAPHF") for part in value]
    return "-".join(parts) if len(parts) == 2 and all(parts) else ""


def _text(dataset: Any, name: str) -> str:
    value = str(dataset.get(name, "") or "").strip()
    return "".join(c for c in value if c.isalnum() or c in " _-.")[:64].strip()
