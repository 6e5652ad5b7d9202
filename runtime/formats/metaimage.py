"""MetaImage volumes (``.mha``; ``.mhd`` with its pixels in a file beside it), as ITK lays them.

The format is MetaIO's: lines of ``key = value``, of which ``ElementDataFile`` is the last, then the
pixels, x fastest. A row of ``TransformMatrix`` is the direction of an axis, ``Offset`` the centre
of the first voxel, both in LPS and mm. What MetaIO would take for granted is refused where it
decides what a voxel is or where it lies.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.durable import replace_file
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.guards import (
    check_finite,
    check_given,
    check_length,
    check_size,
    expand,
    of_file,
)
from recallseg.runtime.formats.packed import packing
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.json_text import printable

__all__ = ["count_metaimage", "pixel_file", "read_metaimage", "write_metaimage"]

_MOST_HEADER = 2**16
_LOCAL = "local"
_ALSO = {
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "Origin": "Offset",
    "Position": "Offset",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
"""Other names of a key, and its own."""
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def read_metaimage(path: Path, *, time: int | None = None) -> Volume:
    """Read a volume of numbers, frame LPS.

    Raises
    ------
    InputError
        If it is damaged, cut off or too large; has not three axes, several numbers for each voxel
        or a rescaling; keeps its pixels elsewhere than in a file of its own folder, or in several;
        does not state directions, origin, spacing or the order of bytes.
    """
    if time not in (None, 1):
        raise InputError(f"{path} has 1 volume, there is no number {time}.")
    try:
        check_length(path)
        with path.open("rb") as file:
            header = _read_header(path, file)
            affine = _affine(path, header)
            array = _pixels(path, header, file)
    except (OSError, MemoryError) as error:
        check_given(path, error)
        raise InputError(f"{path} cannot be read: {error}.") from error
    check_finite(path, array)
    with of_file(path):
        return Volume(array, affine, "LPS")


def count_metaimage(path: Path) -> int:
    """Return 1, the volumes of a file; raises InputError if its header cannot be read."""
    try:
        with path.open("rb") as file:
            _read_header(path, file)
    except OSError as error:
        check_given(path, error)
        raise InputError(f"{path} cannot be read: {error}.") from error
    return 1


def pixel_file(path: Path) -> Path | None:
    """Return the file beside a header that holds its pixels, be it there or not; None if none is.

    What is wrong with a header is said by :func:`read_metaimage`.
    """
    try:
        with path.open("rb") as file:
            name = _read_header(path, file)["ElementDataFile"]
            return None if name.lower() == _LOCAL else _beside(path, name)
    except (InputError, OSError):
        return None


def write_metaimage(path: Path, label_map: NDArray[np.uint8], like: Volume) -> None:
    """Write a label map IxJxK on the grid of ``like``, as one file: in full, or not at all.

    Raises
    ------
    InputError
        If ``like`` has no patient frame.
    OSError
        If the folder cannot be written.
    """
    affine = like.affine_in("LPS")
    axes = (affine[:3, :3] / like.spacing).T
    data = zlib.compress(np.asarray(label_map, np.uint8).tobytes(order="F"), 6)
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "True",
        "CompressedDataSize": str(len(data)),
        "TransformMatrix": _text(axes),
        "Offset": _text(affine[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": _text(np.array(like.spacing)),
        "DimSize": " ".join(map(str, label_map.shape)),
        "ElementType": "MET_UCHAR",
        "ElementDataFile": "LOCAL",
    }
    head = "".join(f"{key} = {value}\n" for key, value in fields.items())
    replace_file(path, head.encode() + data)


def _text(numbers: NDArray[np.float64]) -> str:
    return " ".join(f"{number:.17g}" for number in numbers.ravel())


def _read_header(path: Path, file: IO[bytes]) -> dict[str, str]:
    """Return keys and values; the file is then at the first byte behind them."""
    head = file.read(_MOST_HEADER)
    if found := packing(head):
        raise InputError(f"{path} is {found.told}.")
    fields: dict[str, str] = {}
    at = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", at)
        key, equals, value = os.fsdecode(head[at : end if end >= 0 else None]).partition("=")
        key = _ALSO.get(key.strip(), key.strip())
        if end < 0 or not equals or not re.fullmatch(r"\w+", key, re.ASCII):
            what = "is no MetaImage file, or damaged" if fields else "is no MetaImage file"
            raise InputError(
                f"{path} {what}: its header is no list of 'key = value' that ends with "
                f"ElementDataFile, in at most {_MOST_HEADER} bytes."
            )
        if key in fields and fields[key] != value.strip() and key != "Comment":
            raise InputError(f"{path} states {key} twice. Save it anew.")
        fields[key], at = value.strip(), end + 1
    if fields.get("ObjectType", "Image") != "Image":
        raise InputError(f"{path} holds no image: its ObjectType is {fields['ObjectType']!a:.40}.")
    file.seek(at)
    return fields


def _numbers(path: Path, header: Mapping[str, str], key: str, count: int) -> NDArray[np.float64]:
    try:
        numbers = np.array([float(word) for word in header.get(key, "").split()])
    except ValueError:
        numbers = np.zeros(0)
    if len(numbers) != count or not np.isfinite(numbers).all():
        found = f"it is {header[key]!a:.80}" if key in header else "it is missing"
        raise InputError(
            f"{path} must state {count} numbers as {key}, and {found}. Save it anew with its place "
            "in the patient."
        )
    return numbers


def _truth(path: Path, header: Mapping[str, str], key: str, default: bool | None) -> bool:
    truth = _TRUTHS.get(header[key].lower()) if key in header else default
    if truth is None:
        raise InputError(
            f"{path} must state {key} as True or False, got {header.get(key, 'nothing')!a:.40}. "
            "Save it anew."
        )
    return truth


def _affine(path: Path, header: Mapping[str, str]) -> NDArray[np.float64]:
    if header.get("NDims") != "3":
        raise InputError(
            f"{path} has {header.get('NDims', 'unknown')!a:.20} axes (NDims); expected a volume of "
            "three. Save a picture as PNG or TIFF, and each volume of a series by itself."
        )
    if (unit := header.get("DistanceUnits", "mm")) not in ("mm", "?", ""):
        raise InputError(f"{path} states lengths in {unit!a:.20}. Save it in mm.")
    spacing = "ElementSpacing" if "ElementSpacing" in header else "ElementSize"
    size = _numbers(path, header, spacing, 3)
    if (size <= 0).any():
        raise InputError(f"{path}: its {spacing} must be above 0, got {header[spacing]}.")
    affine = np.eye(4)
    affine[:3, :3] = _numbers(path, header, "TransformMatrix", 9).reshape(3, 3).T * size
    affine[:3, 3] = _numbers(path, header, "Offset", 3)
    return affine


def _pixels(path: Path, header: Mapping[str, str], file: IO[bytes]) -> NDArray[np.generic]:
    """Return the pixels IxJxK, in the machine's order of bytes."""
    if (channels := header.get("ElementNumberOfChannels", "1")) != "1":
        raise InputError(
            f"{path} holds {channels!a:.20} numbers for each voxel (ElementNumberOfChannels): "
            "vectors, or colours that it does not call so. Save colours as NRRD or NIfTI."
        )
    for key, plain in (("Slope", 1.0), ("Offset", 0.0)):
        key = f"ElementToIntensityFunction{key}"
        if key in header and _numbers(path, header, key, 1)[0] != plain:
            raise InputError(
                f"{path} asks for its voxels to be rescaled ({key}), which ITK does not. Save it "
                "with the values that are meant."
            )
    kind = _TYPES.get(header.get("ElementType", ""))
    if kind is None or not _truth(path, header, "BinaryData", True):
        raise InputError(
            f"{path} has voxels of type {header.get('ElementType', 'unknown')!a:.40}, binary: "
            f"{header.get('BinaryData', 'True')!a:.20}; expected one of {', '.join(_TYPES)}, "
            "binary. Save it as one of them."
        )
    dtype = np.dtype(kind)
    if dtype.itemsize > 1:
        most_first = _truth(path, header, "BinaryDataByteOrderMSB", None)
        dtype = np.dtype((">" if most_first else "<") + kind)
    sizes = header.get("DimSize", "").split()
    if len(sizes) != 3 or not all(re.fullmatch("[0-9]{1,9}", size) for size in sizes):
        raise InputError(f"{path}: its DimSize is damaged: {header.get('DimSize', '')!a:.80}.")
    shape = tuple(map(int, sizes))
    wanted = check_size(path, shape, dtype)
    packed = _truth(path, header, "CompressedData", False)
    name = header["ElementDataFile"]
    if name.lower() == _LOCAL:
        data = _read_pixels(path, header, file, wanted, packed)
    else:
        beside = _beside(path, name)
        with _open_beside(path, beside) as other:
            data = _read_pixels(beside, header, other, wanted, packed)
    array = np.frombuffer(data, dtype).reshape(shape, order="F")
    return array.astype(dtype.newbyteorder("="))


def _read_pixels(
    path: Path, header: Mapping[str, str], file: IO[bytes], wanted: int, packed: bool
) -> bytes:
    """Return so many bytes of pixels, unpacked, from where the file is."""
    skipped = header.get("HeaderSize", "0")
    stated = header.get("CompressedDataSize", "0") if packed else "0"
    if not re.fullmatch("-1|[0-9]{1,15}", skipped) or not re.fullmatch("[0-9]{1,15}", stated):
        raise InputError(
            f"{path} is damaged: HeaderSize {skipped!a:.40}, CompressedDataSize {stated!a:.40}."
        )
    begin = file.tell() + int(skipped)
    size = os.fstat(file.fileno()).st_size
    if skipped == "-1":  # the pixels are what the file ends with
        begin = size - (int(stated) if packed else wanted)
    needed = int(stated) if packed else wanted
    if begin < 0 or begin > size or size - begin < needed:
        raise InputError(
            f"{path} is cut off: it holds {max(0, size - begin)} bytes of pixels, its header "
            f"states {needed}. Copy it again."
        )
    file.seek(begin)
    data = file.read(needed or -1)
    return expand(data, "gzip", wanted, path) if packed else data


def _beside(path: Path, name: str) -> Path:
    """Return the file that a header names for its pixels, which lies in its folder."""
    if name.split(maxsplit=1)[:1] == ["LIST"] or "%" in name:
        raise InputError(
            f"{path} keeps its pixels in several files ({name!a:.80}). Save it as one .mha file."
        )
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(
            f"{path} keeps its pixels in {printable(name)[:80]!r}; only a file in its own folder "
            "is read. Save it as one .mha file."
        )
    return path.with_name(name)


def _open_beside(path: Path, beside: Path) -> IO[bytes]:
    """Open the file with the pixels; no link is followed, which may lead out of the folder."""
    try:
        descriptor = os.open(beside, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        check_given(beside, error)
        raise InputError(
            f"{path} keeps its pixels in {printable(beside.name)}, which cannot be opened beside "
            f"it: {error.strerror}. Copy both files, and no link; or save it as one .mha file."
        ) from error
    file = os.fdopen(descriptor, "rb")
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path} keeps its pixels in {printable(beside.name)}: no file.")
        check_length(beside)
    except BaseException:
        file.close()
        raise
    return file
