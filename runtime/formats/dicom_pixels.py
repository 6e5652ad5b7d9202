"""From the stored pixels of a DICOM image to its values: bits, colours, look-up tables, padding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.codestreams import MOST_SCANS, rle_fits, scans, stated_size
from recallseg.runtime.formats.dicom_files import DEFLATED
from recallseg.runtime.formats.dicom_planes import Plane, item
from recallseg.runtime.formats.guards import check_size

__all__ = ["check_length", "check_pixels", "stored_frames", "values_of", "window_of"]

DECODERS = {
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000, by OpenJPEG
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
}
"""By transfer syntax, the decoder that refuses damaged data; others were seen to take the process
down. GDCM is left with the JPEGs that only it decodes."""
RLE = "1.2.840.10008.1.2.5"
SIZED = re.compile(r"1\.2\.840\.10008\.1\.2\.4\.([5-8]\d|9[0-3]|20[1-3])")
"""Transfer syntaxes of JPEG, JPEG-LS and JPEG 2000, whose streams state their size."""
LEAST_FRAME = 8
"""Bytes that a compressed frame takes at least: the head of its fragment."""
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
EIGHT_BITS = 255


def check_length(path: Path, dataset: Any) -> None:
    """Refuse more frames than a file of this length can hold, before anything is made for each.

    Raises
    ------
    InputError
        Saying how many it declares.
    """
    frames, syntax = int(dataset.get("NumberOfFrames") or 1), dataset.file_meta.TransferSyntaxUID
    if frames <= 1 or str(syntax) == DEFLATED:
        return
    bits = int(dataset.get("BitsAllocated") or 0) * int(dataset.get("SamplesPerPixel") or 1)
    if "422" in str(dataset.get("PhotometricInterpretation", "")):
        bits = bits * 2 // 3
    each = int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0) * bits
    least = frames * (8 * LEAST_FRAME if syntax.is_encapsulated else each)
    if least > 8 * (size := path.stat().st_size):
        raise InputError(
            f"{path} declares {frames} frames, and its {size} bytes cannot hold them: it is cut "
            "off or damaged. Send or copy it again."
        )


def check_pixels(path: Path, dataset: Any, images: int) -> None:
    """Refuse what cannot be decoded, or is too large, by the header alone.

    Raises
    ------
    InputError
        Saying what it is.
    """
    samples = int(dataset.get("SamplesPerPixel") or 1)
    if samples not in (1, 3):
        raise InputError(f"{path} has {samples} samples a pixel; expected 1 or 3.")
    bits = int(dataset.get("BitsAllocated") or 0)
    if bits not in (1, 8, 16, 32, 64):
        raise InputError(
            f"{path} has {dataset.get('BitsAllocated')} bits a pixel; expected 1, 8, 16, 32 or 64."
        )
    shape = [int(dataset.Rows), int(dataset.Columns), samples]
    check_size(path, [1, *shape], np.dtype(np.float64))
    check_size(path, [images, *shape], np.dtype(f"u{max(1, bits // 8)}"))


def stored_frames(dataset: Any, frames: Sequence[int]) -> Iterator[NDArray[Any]]:
    """Decode frames, by number from 0: HxW as stored (bits above the stored ones gone), or RGB.

    Raises
    ------
    InputError
        If there are no pixels, or compressed ones of another size than the header's.
    """
    from pydicom.pixels import iter_pixels

    if not any(name in dataset for name in PIXELS):
        raise InputError("it has no pixels: it is no image, or was cut off. Send or copy it again.")
    syntax_of = dataset.file_meta.TransferSyntaxUID
    syntax = str(syntax_of)
    _check_frames(dataset)
    several = int(dataset.get("NumberOfFrames") or 1) > 1
    which = list(frames) if several else None
    if int(dataset.get("BitsAllocated") or 0) == 1 and not syntax_of.is_encapsulated:
        yield from _single_bits(dataset, frames)
        return
    for frame in iter_pixels(
        dataset,
        decoding_plugin=DECODERS.get(syntax, ""),
        indices=which,
        correct_unused_bits=False,
    ):
        if frame.ndim == 2 and frame.dtype.kind in "iu" and "PixelData" in dataset:
            yield _stored_bits(frame, dataset, syntax)
        else:
            yield frame


def values_of(
    stored: NDArray[Any], dataset: Any, plane: Plane, *, voi: bool, first: Plane
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return the values of one stored image HxW, and which pixels are padding (None: none is).

    Colours come as 8 bits. MONOCHROME1 is inverted by the range of the stored bits, so that every
    slice of a series is inverted alike; ``first`` of them sets that range in measured values, and
    the range of what a VOI LUT gives.
    """
    from pydicom.pixels import apply_voi_lut

    kind = str(dataset.get("PhotometricInterpretation", ""))
    if kind == "PALETTE COLOR":
        return _palette(stored, dataset), None
    if stored.ndim == 3:
        return stored, None
    padding = _padding(stored, dataset)
    array = _modality(stored, plane)
    if voi and _has_voi(plane):
        array = apply_voi_lut(array, _display(dataset, plane, first))
    if kind == "MONOCHROME1":
        array = _inverted(array, dataset, plane, first, voi)
    return _narrow(array), padding


def window_of(dataset: Any, plane: Plane) -> tuple[float, float] | None:
    """Return the first window, centre and width, in the values that :func:`values_of` returns."""
    centre, width = _first(plane.voi.get("WindowCenter")), _first(plane.voi.get("WindowWidth"))
    if centre is None or width is None or not width > 0:
        return None
    if str(dataset.get("PhotometricInterpretation", "")) == "MONOCHROME1":
        centre = _ends(dataset, plane) - centre
    return centre, width


def _first(value: Any) -> float | None:
    if value is not None and hasattr(value, "__len__") and not isinstance(value, str):
        value = value[0] if len(value) else None
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _check_frames(dataset: Any) -> None:
    """See compressed frames of another size than the header's before they are decoded.

    So too what states no size, unpacks to more than it should, or repeats itself: decoders were
    seen to take the process, or minutes, with such data.
    """
    from pydicom.encaps import generate_frames

    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated or "PixelData" not in dataset:
        return
    wanted = (int(dataset.Rows), int(dataset.Columns))
    syntax = str(dataset.file_meta.TransferSyntaxUID)
    mend = "The file is damaged; send or export it again."
    count = int(dataset.get("NumberOfFrames") or 1)
    for frame in generate_frames(dataset.PixelData, number_of_frames=count):
        size = stated_size(frame)
        if size not in (None, wanted):
            raise InputError(
                f"an image states {wanted[0]} x {wanted[1]} pixels, its compressed data "
                f"{size[0]} x {size[1]}. {mend}"
            )
        if size is None and SIZED.fullmatch(syntax):
            raise InputError(
                f"its compressed data does not begin as an image of its transfer syntax. {mend}"
            )
        if (found := scans(frame)) > MOST_SCANS:
            raise InputError(f"its compressed data has {found} scans of one image. {mend}")
        if syntax == RLE and not rle_fits(frame, wanted[0] * wanted[1]):
            raise InputError(
                f"its compressed data is much more than {wanted[0]} x {wanted[1]} pixels. {mend}"
            )


def _single_bits(dataset: Any, frames: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Unpack frames of one bit a pixel, which need not begin at a byte (PS3.5 8.2)."""
    shape = (int(dataset.Rows), int(dataset.Columns))
    count = shape[0] * shape[1]
    data = np.frombuffer(dataset.PixelData, np.uint8)
    for frame in frames:
        first, last = frame * count, (frame + 1) * count
        if last > 8 * len(data):
            return  # cut off: whoever counts the frames says so
        bits = np.unpackbits(data[first // 8 : (last + 7) // 8], bitorder="little")
        yield bits[first % 8 : first % 8 + count].reshape(shape)


def _stored_bits(frame: NDArray[Any], dataset: Any, syntax: str) -> NDArray[Any]:
    """Return the stored bits of the allocated ones (others may hold overlays), with their sign."""
    allocated = int(dataset.BitsAllocated)
    stored = int(dataset.get("BitsStored") or allocated)
    raw = not dataset.file_meta.TransferSyntaxUID.is_encapsulated or syntax == RLE
    high = int(dataset.get("HighBit", stored - 1)) if raw else stored - 1
    if not 1 <= stored <= allocated or not stored - 1 <= high < allocated:
        raise InputError(
            f"it states {stored} stored bits with the highest at {high}, of {allocated}. The "
            "header is damaged."
        )
    frame = frame.astype(frame.dtype.newbyteorder("="), copy=False)
    if stored == allocated:
        return frame
    width = 8 * frame.dtype.itemsize
    bits = frame.view(f"u{frame.dtype.itemsize}")
    bits = bits << (width - 1 - high)  # what is above the stored bits goes
    return np.asarray(
        bits.view(frame.dtype) >> (width - stored)
    )  # what is below goes, the sign comes down


def _palette(stored: NDArray[Any], dataset: Any) -> NDArray[np.uint8]:
    """Return colours of 8 bits (PS3.3 C.7.6.3.1.5), of tables of any depth.

    Tables of 16 bits whose entries all fit 8 hold 8-bit colours, as other readers take them.
    """
    from pydicom.pixels import apply_color_lut

    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        array = apply_color_lut(stored, dataset)
        return (array >> 8 if array.dtype == np.uint16 else array).astype(np.uint8)
    tables, depths = [], []
    for colour in ("Red", "Green", "Blue"):
        count, first, bits = (
            int(v) for v in dataset[f"{colour}PaletteColorLookupTableDescriptor"].value
        )
        count, first = count or 2**16, _signed(first, dataset)
        data = bytes(dataset[f"{colour}PaletteColorLookupTableData"].value)
        words = bits > 8 or len(data) >= 2 * count
        order = "<" if dataset.original_encoding[1] else ">"
        table = np.frombuffer(data[: count * (2 if words else 1)], f"{order}u2" if words else "u1")
        if len(table) < count or not 1 <= bits <= 16:
            raise InputError(f"its palette declares {count} colours of {bits} bits: it is cut off.")
        index = np.clip(stored.astype(np.int64) - first, 0, count - 1)
        depths.append(bits if table.max() > EIGHT_BITS else min(bits, 8))
        tables.append((table, index))
    shift = max(0, max(depths) - 8)
    planes = [(table[index] >> shift).clip(0, EIGHT_BITS) for table, index in tables]
    return np.stack(planes, axis=-1).astype(np.uint8)


def _signed(value: int, dataset: Any) -> int:
    """Return a first mapped value with the sign of the pixels."""
    if int(dataset.get("PixelRepresentation") or 0):
        return value - 2**16 if value >= 2**15 else value
    return value + 2**16 if value < 0 else value


def _padding(stored: NDArray[Any], dataset: Any) -> NDArray[np.bool_] | None:
    """Return which pixels are PixelPaddingValue, or in its range (PS3.3 C.7.5.1.1.2)."""
    name = "FloatPixelPadding" if "FloatPixelData" in dataset else "PixelPadding"
    name = "DoubleFloatPixelPadding" if "DoubleFloatPixelData" in dataset else name
    value, limit = dataset.get(f"{name}Value"), dataset.get(f"{name}RangeLimit")
    if value in (None, "", b""):
        return None
    ends = [_as_stored(v, dataset) for v in (value, limit) if v not in (None, "", b"")]
    padding = (stored >= min(ends)) & (stored <= max(ends))
    return padding if padding.any() else None


def _as_stored(value: Any, dataset: Any) -> float:
    """Return a value of ambiguous sign (US or SS, bytes of it where VRs are implicit) as the pixels
    have it.
    """
    if isinstance(value, bytes):
        order: Literal["little", "big"] = "little" if dataset.original_encoding[1] else "big"
        value = int.from_bytes(value, order)
    number = float(value)
    if "PixelData" not in dataset:
        return number
    size = 2.0 ** int(dataset.BitsAllocated)
    if int(dataset.get("PixelRepresentation") or 0):
        return number - size if number >= size / 2 else number
    return number + size if number < 0 else number


def _rescale(plane: Plane) -> tuple[float, float]:
    """Return slope and intercept; a slope that is empty or 0 is none."""
    slope, intercept = plane.modality.get("RescaleSlope"), plane.modality.get("RescaleIntercept")
    return (
        float(slope) if slope not in (None, "") and float(slope) != 0 else 1.0,
        float(intercept) if intercept not in (None, "") else 0.0,
    )


def _modality(stored: NDArray[Any], plane: Plane) -> NDArray[Any]:
    from pydicom.pixels import apply_modality_lut

    if item(plane.modality, "ModalityLUTSequence") is not None:
        return np.asarray(apply_modality_lut(stored, plane.modality))
    slope, intercept = _rescale(plane)
    if (slope, intercept) == (1.0, 0.0):
        return stored
    return stored * slope + intercept


def _has_voi(plane: Plane) -> bool:
    table = item(plane.voi, "VOILUTSequence") is not None
    return table or (
        _first(plane.voi.get("WindowCenter")) is not None
        and _first(plane.voi.get("WindowWidth")) is not None
    )


def _display(dataset: Any, plane: Plane, first: Plane) -> Any:
    """Return a data set with all that a VOI LUT depends on, wherever it stood."""
    from pydicom.dataset import Dataset

    whole = Dataset()
    for name in ("BitsStored", "PixelRepresentation", "SamplesPerPixel"):
        if name in dataset:
            setattr(whole, name, dataset.get(name))
    whole.PhotometricInterpretation = "MONOCHROME2"
    names = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
    for name in names:
        if plane.voi.get(name) not in (None, ""):
            whole[name] = plane.voi[name]
    if item(plane.modality, "ModalityLUTSequence") is not None:
        whole["ModalityLUTSequence"] = plane.modality["ModalityLUTSequence"]
    else:
        slope, intercept = _rescale(first)
        whole.RescaleSlope, whole.RescaleIntercept = f"{slope:.10g}", f"{intercept:.10g}"
    return whole


def _stored_range(dataset: Any) -> tuple[float, float]:
    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if int(dataset.get("PixelRepresentation") or 0):
        return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - 1


def _ends(dataset: Any, plane: Plane) -> float:
    """Return the sum of the values of the lowest and the highest stored number."""
    table = item(plane.modality, "ModalityLUTSequence")
    if table is not None:
        return 2.0 ** int(table.LUTDescriptor[2]) - 1
    slope, intercept = _rescale(plane)
    low, high = _stored_range(dataset)
    return slope * (low + high) + 2 * intercept


def _inverted(
    array: NDArray[Any], dataset: Any, plane: Plane, first: Plane, voi: bool
) -> NDArray[Any]:
    if voi and _has_voi(plane):
        table = item(plane.voi, "VOILUTSequence")
        if table is not None:
            highest = 2.0 ** int(table.LUTDescriptor[2]) - 1
            return np.asarray(highest - array.astype(np.float64))
    if array.dtype.kind == "f" and "PixelData" not in dataset:
        raise InputError("it is MONOCHROME1 of floating-point pixels, which have no range.")
    return np.asarray(_ends(dataset, first) - array.astype(np.float64))


def _narrow(array: NDArray[Any]) -> NDArray[Any]:
    """Return native byte order; whole numbers that fit as int16 or int32, else float32."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype != np.float64:
        return array
    whole = np.rint(array)
    largest = np.abs(array).max(initial=0)
    if largest < 2**31 and (whole == array).all():
        return np.asarray(whole, np.int16 if largest < 2**15 else np.int32)
    return array.astype(np.float32)
