"""DICOM images: a series of slices, a multi-frame object, or a single picture. Frame: LPS.

Geometry follows PS3.3 C.7.6.2 (image plane): slices are ordered by their position along the normal,
never by instance number. Values go through the modality LUT (PS3.3 C.11.1), and through the VOI LUT
or window (C.11.2) if asked; MONOCHROME1 is inverted.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.codestreams import stated_size
from recallseg.runtime.formats.guards import check_finite, check_size
from recallseg.runtime.formats.volume import Volume

__all__ = [
    "damaged_is_input_error",
    "find_series",
    "is_dicom",
    "read_datasets",
    "read_dicom",
]

DECODERS = {
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000, by OpenJPEG
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
}
"""By transfer syntax, the decoder that refuses damaged data; others were seen to take the process
down. GDCM is left with the JPEGs that only it decodes."""
DEFLATED = "1.2.840.10008.1.2.1.99"
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
SAME_ORIENTATION = 1e-3  # of direction cosines
EVEN_GAPS = 0.02  # of the gap: rounding of positions in the header
STRAIGHT = 0.02  # of the gap that slices may shift within their plane
MAX_FILES = 20_000


def is_dicom(path: Path) -> bool:
    """Whether a file begins as a DICOM file does (PS3.10: 128 bytes, then ``DICM``)."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(folder: Path) -> list[Path]:
    """Return the DICOM files in a folder and below, DICOMDIR left out."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "DICOMDIR" and is_dicom(path):
            files.append(path)
            if len(files) > MAX_FILES:
                raise InputError(f"{folder} has more than {MAX_FILES} DICOM files. Split it.")
    return files


def read_datasets(paths: Sequence[Path]) -> list[Any]:
    """Read DICOM files of one series, pixels undecoded.

    Raises
    ------
    InputError
        If there are none, one is damaged, or they are of several series.
    """
    if not paths:
        raise InputError("there are no DICOM files: the series has no slices.")
    datasets = [d for d in (_read_file(path) for path in paths) if d is not None]
    if not datasets:
        raise InputError(f"{paths[0]} is a segmentation (SEG), not an image.")
    series = {str(d.get("SeriesInstanceUID", "")) for d in datasets}
    if len(series) > 1:
        raise InputError(
            f"{paths[0].parent} holds {len(series)} series; expected one. Give each a folder."
        )
    instances = {str(d.get("SOPInstanceUID", "")) for d in datasets}
    if len(instances) < len(datasets):
        raise InputError(f"{paths[0].parent} holds the same image twice. Remove the copies.")
    return datasets


def read_dicom(path: Path | Sequence[Path], *, voi: bool = False) -> Volume:
    """Read a file, a folder with one series, or the files of one.

    Parameters
    ----------
    voi : apply the file's own VOI LUT or window; values are then what a screen would show.

    Returns
    -------
    Volume
        A series or multi-frame image with positions: axes slice, row, column, slices in the order
        of their positions. A picture without: one or more frames, frame ``image``.

    Raises
    ------
    InputError
        If a file is damaged, unsupported, too large or has no pixels; for several series, slices
        of several orientations or sizes, two at one position, uneven gaps (one is missing), gantry
        tilt, or a missing spacing.
    """
    if isinstance(path, Path):
        files: Sequence[Path] = find_series(path) if path.is_dir() else [path]
    else:
        files, path = path, path[0].parent
    with damaged_is_input_error(path):
        datasets = read_datasets(files)
        if len(datasets) == 1 and int(datasets[0].get("NumberOfFrames", 1) or 1) > 1:
            return _multi_frame(datasets[0], path, voi)
        if len(datasets) == 1 and "ImageOrientationPatient" not in datasets[0]:
            return _picture(datasets[0], path, voi)
        return _series(datasets, path, voi)


def _read_file(path: Path) -> Any:
    """Return a dataset, or None for a SEG, which may lie beside the images it was drawn on."""
    import pydicom
    from pydicom.filereader import read_file_meta_info

    with damaged_is_input_error(path):
        if not is_dicom(path):
            raise InputError(f"{path} is no DICOM file: it does not begin as one.")
        syntax = str(read_file_meta_info(path).get("TransferSyntaxUID", ""))
        if syntax == DEFLATED:
            raise InputError(f"{path} is deflated, which is not read. Store it another way.")
        dataset = pydicom.dcmread(path)
        if dataset.get("SOPClassUID") == SEGMENTATION:
            return None
        if "PixelData" not in dataset:
            raise InputError(
                f"{path} has no pixels: it is no image, or was cut off. Send or copy it again."
            )
        return dataset


def _series(datasets: list[Any], path: Path, voi: bool) -> Volume:
    first = datasets[0]
    for name in ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"):
        values = {str(d.get(name)) for d in datasets}
        if len(values) > 1:
            raise InputError(f"{path}: slices differ in {name}: {', '.join(sorted(values))}.")
    for dataset in datasets:
        for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
            if dataset.get(name) is None:
                raise InputError(
                    f"{path}: a slice has no {name}, so its place is unknown. Export the original "
                    "series, not a derived one."
                )
    orientations = np.array([_numbers(d.ImageOrientationPatient, 6, path) for d in datasets])
    spacings = np.array([_numbers(d.PixelSpacing, 2, path) for d in datasets])
    positions = np.array([_numbers(d.ImagePositionPatient, 3, path) for d in datasets])
    if np.abs(orientations - orientations[0]).max() > SAME_ORIENTATION:
        raise InputError(f"{path}: slices have several orientations. Give each stack a folder.")
    if np.abs(spacings - spacings[0]).max() > 1e-3 * spacings[0].max():
        raise InputError(f"{path}: slices differ in pixel spacing.")
    affine, order = _place(path, orientations[0], spacings[0], positions, _thickness(first))
    datasets = [datasets[i] for i in order]
    _check_pixels(path, first, len(datasets))
    array = np.stack([_pixels(d, voi) for d in datasets])
    check_finite(path, array)
    return Volume(
        array, affine, "LPS", _text(first, "Modality"), _window(first), _tags(first), datasets
    )


def _multi_frame(dataset: Any, path: Path, voi: bool) -> Volume:
    frames = int(dataset.NumberOfFrames)
    _check_pixels(path, dataset, frames)
    shared = _item(dataset, "SharedFunctionalGroupsSequence")
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        return _picture(dataset, path, voi)
    if len(groups) != frames:
        raise InputError(f"{path} has {frames} frames and places for {len(groups)}: it is damaged.")

    def find(group: Any, sequence: str, name: str, count: int) -> list[float]:
        item = _item(group, sequence) or _item(shared, sequence)
        if item is None or item.get(name) is None:
            raise InputError(f"{path}: a frame has no {name}, so its place is unknown.")
        return _numbers(item.get(name), count, path)

    orientations = np.array(
        [find(g, "PlaneOrientationSequence", "ImageOrientationPatient", 6) for g in groups]
    )
    positions = np.array(
        [find(g, "PlanePositionSequence", "ImagePositionPatient", 3) for g in groups]
    )
    spacing = np.array(find(groups[0], "PixelMeasuresSequence", "PixelSpacing", 2))
    if np.abs(orientations - orientations[0]).max() > SAME_ORIENTATION:
        raise InputError(f"{path}: frames have several orientations.")
    measures = _item(groups[0], "PixelMeasuresSequence") or _item(shared, "PixelMeasuresSequence")
    affine, order = _place(path, orientations[0], spacing, positions, _thickness(measures))
    array = _pixels(dataset, voi)
    if array.shape[0] != frames:
        raise InputError(f"{path} has {array.shape[0]} frames of pixels, {frames} are declared.")
    scaled = []
    for index in order:
        lut = _item(groups[index], "PixelValueTransformationSequence") or _item(
            shared, "PixelValueTransformationSequence"
        )
        plane = array[index]
        if lut is not None and not voi:
            slope, intercept = float(lut.RescaleSlope), float(lut.RescaleIntercept)
            if (slope, intercept) != (1.0, 0.0):
                plane = plane * np.float32(slope) + np.float32(intercept)
        scaled.append(plane)
    array = np.stack(scaled)
    check_finite(path, array)
    return Volume(
        array,
        affine,
        "LPS",
        _text(dataset, "Modality"),
        _window(dataset),
        _tags(dataset),
        [dataset],
    )


def _picture(dataset: Any, path: Path, voi: bool) -> Volume:
    """Read an image without a place in the patient: radiograph, ultrasound, photograph."""
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    _check_pixels(path, dataset, frames)
    array = _pixels(dataset, voi)
    if frames == 1:
        array = array[None]
    check_finite(path, array)
    rows, columns = _picture_spacing(dataset, path)
    affine = np.diag([1.0, rows, columns, 1.0])
    return Volume(
        array,
        affine,
        "image",
        _text(dataset, "Modality"),
        _window(dataset),
        _tags(dataset),
        [dataset],
    )


def _picture_spacing(dataset: Any, path: Path) -> tuple[float, float]:
    """Return mm between rows and columns; 1 (pixel) where the file states none."""
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        if dataset.get(name) is not None:
            rows, columns = _numbers(dataset.get(name), 2, path)
            if rows > 0 and columns > 0:
                return rows, columns
    region = _item(dataset, "SequenceOfUltrasoundRegions")
    centimetres = 3  # PS3.3 C.8.5.5.1.15: physical units of both directions
    if (
        region is not None
        and region.get("PhysicalUnitsXDirection") == centimetres
        and region.get("PhysicalUnitsYDirection") == centimetres
        and region.get("PhysicalDeltaX")
        and region.get("PhysicalDeltaY")
    ):
        return abs(float(region.PhysicalDeltaY)) * 10, abs(float(region.PhysicalDeltaX)) * 10
    return 1.0, 1.0


def _place(
    path: Path,
    orientation: NDArray[np.float64],
    spacing: NDArray[np.float64],
    positions: NDArray[np.float64],
    thickness: float | None,
) -> tuple[NDArray[np.float64], list[int]]:
    """Return the affine of (slice, row, column), and the slices in the order of their positions."""
    along_row, along_column = orientation[:3], orientation[3:]  # steps of column, and of row, index
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if max(abs(length - 1) for length in lengths) > 1e-2 or abs(along_row @ along_column) > 1e-2:
        raise InputError(
            f"{path}: ImageOrientationPatient is not two unit vectors at right angles."
        )
    if (spacing <= 0).any():
        raise InputError(f"{path}: its pixel spacing is {spacing.tolist()}; expected more than 0.")
    normal = np.cross(along_row, along_column)
    distances = positions @ normal
    order = [int(i) for i in np.argsort(distances, kind="stable")]
    placed = positions[order]
    if len(order) > 1:
        gaps = np.diff(distances[order])
        gap = float(np.median(gaps))
        if gaps.min() < 1e-3:
            raise InputError(
                f"{path}: two slices lie at one position. It may hold several time points or "
                "echoes: give each a folder."
            )
        if np.abs(gaps - gap).max() > EVEN_GAPS * gap:
            raise InputError(
                f"{path}: gaps between slices range from {gaps.min():.3f} to {gaps.max():.3f} mm. "
                "A slice is missing, or several stacks are mixed."
            )
        step = (placed[-1] - placed[0]) / (len(order) - 1)
        if np.linalg.norm(step - normal * (step @ normal)) > STRAIGHT * gap:
            raise InputError(
                f"{path}: slices are shifted against each other (gantry tilt). Resample the "
                "series without tilt first."
            )
    else:
        step = normal * (thickness or 1.0)
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = along_column * spacing[0]
    affine[:3, 2] = along_row * spacing[1]
    affine[:3, 3] = placed[0]
    return affine, order


def _check_frames(dataset: Any) -> None:
    """See compressed frames of another size than the header's before they are decoded."""
    from pydicom.encaps import generate_frames

    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return
    wanted = (int(dataset.Rows), int(dataset.Columns))
    count = int(dataset.get("NumberOfFrames", 1) or 1)
    for frame in generate_frames(dataset.PixelData, number_of_frames=count):
        size = stated_size(frame)
        if size not in (None, wanted):
            raise InputError(
                f"an image states {wanted[0]} x {wanted[1]} pixels, its compressed data "
                f"{size[0]} x {size[1]}. The file is damaged; send or export it again."
            )


def _pixels(dataset: Any, voi: bool) -> NDArray[Any]:
    """Decode the pixels of one dataset: HxW, HxWx3, or either with frames before."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    kind = str(dataset.get("PhotometricInterpretation", ""))
    _check_frames(dataset)
    decoder = DECODERS.get(str(dataset.file_meta.get("TransferSyntaxUID", "")), "")
    array: NDArray[Any] = pixel_array(dataset, decoding_plugin=decoder)
    if kind == "PALETTE COLOR":
        array = apply_color_lut(array, dataset)
        return (array >> 8).astype(np.uint8) if array.dtype == np.uint16 else array
    if int(dataset.get("SamplesPerPixel", 1)) > 1:
        return array
    array = apply_modality_lut(array, dataset)
    if voi:
        array = apply_voi_lut(array, dataset)
    if kind == "MONOCHROME1":
        array = array.max() + array.min() - array
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.float64:
        whole = np.rint(array)
        fits = np.abs(array).max(initial=0) < 2**15
        array = (
            whole.astype(np.int16) if fits and (whole == array).all() else array.astype(np.float32)
        )
    return array


def _check_pixels(path: Path, dataset: Any, images: int) -> None:
    samples = int(dataset.get("SamplesPerPixel", 1) or 1)
    if samples not in (1, 3):
        raise InputError(f"{path} has {samples} samples a pixel; expected 1 or 3.")
    shape = [images, int(dataset.Rows), int(dataset.Columns), samples]
    check_size(path, shape, np.dtype(np.float64))
    if int(dataset.get("BitsAllocated", 0) or 0) not in (1, 8, 16, 32):
        raise InputError(f"{path} has {dataset.get('BitsAllocated')} bits a pixel.")


def _tags(dataset: Any) -> dict[str, str]:
    """Return what helps to choose exemplars; nothing of it says who the patient is."""
    names = {
        "modality": "Modality",
        "body_part": "BodyPartExamined",
        "view": "ViewPosition",
        "laterality": "ImageLaterality",
    }
    found = {tag: _text(dataset, name) for tag, name in names.items()}
    return {tag: value for tag, value in found.items() if value}


def _text(dataset: Any, name: str) -> str:
    value = str(dataset.get(name, "") or "").strip()
    return "".join(c for c in value if c.isalnum() or c in " _-.")[:64].strip()


def _window(dataset: Any) -> tuple[float, float] | None:
    centre, width = dataset.get("WindowCenter"), dataset.get("WindowWidth")
    if centre is None or width is None:
        return None
    first = [
        v[0] if hasattr(v, "__len__") and not isinstance(v, str) and len(v) else v
        for v in (centre, width)
    ]
    try:
        found = float(first[0]), float(first[1])
    except (TypeError, ValueError):
        return None
    return found if found[1] > 0 else None


def _thickness(dataset: Any) -> float | None:
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        value = None if dataset is None else dataset.get(name)
        if value is not None and float(value) > 0:
            return float(value)
    return None


def _item(dataset: Any, name: str) -> Any:
    """Return the first item of a sequence, or None."""
    sequence = None if dataset is None else dataset.get(name)
    return sequence[0] if sequence else None


def _numbers(values: Any, count: int, path: Path) -> list[float]:
    found = [float(v) for v in values]
    if len(found) != count or not np.isfinite(found).all():
        raise InputError(f"{path}: expected {count} numbers, got {found}. The header is damaged.")
    return found


@contextmanager
def damaged_is_input_error(path: Path) -> Iterator[None]:
    """Turn what pydicom, highdicom and decoders raise, of every kind, into one InputError."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # about values outside the standard; pixels decide
            yield
    except InputError:
        raise
    except ModuleNotFoundError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} needs more memory than there is.") from error
    except (Exception, struct.error) as error:
        kind = type(error).__name__
        raise InputError(
            f"{path} cannot be read as DICOM: {kind}: {error}. It is damaged, cut off or of a kind "
            "that is not read; send or export it again."
        ) from error
