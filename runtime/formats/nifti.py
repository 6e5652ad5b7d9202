"""NIfTI volumes (``.nii``, ``.nii.gz``), read and written by nibabel. Frame: RAS."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.durable import replace_file
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.guards import (
    BoundedReader,
    check_finite,
    check_given,
    check_size,
    of_file,
)
from recallseg.runtime.formats.kinds import kind_by_name
from recallseg.runtime.formats.lattice import SAME_PLACE
from recallseg.runtime.formats.packed import HEAD_BYTES, packing
from recallseg.runtime.formats.volume import Volume

__all__ = ["count_nifti", "read_nifti", "write_nifti"]

_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # of unknown, metre, mm, micron
_INTENT_RGB = 2003  # NIFTI_INTENT_RGB_VECTOR
_PLACE = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
"""Fields of the header that say where voxels lie, beside ``pixdim`` and the unit."""
_MOST_HEADER = 2**24
_MOST_EXTENSIONS = 1000
"""Of a header: programs write a few, and nibabel makes an object of each."""
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def read_nifti(path: Path, *, time: int | None = None, anywhere: bool = False) -> Volume:
    """Read a volume; a stored slope and intercept are applied.

    Colours are what the datatype (RGB24) or the intent (RGB vector) says; any other fourth axis
    counts volumes.

    Parameters
    ----------
    time : which of several volumes, from 1.
    anywhere : take a file that does not say how the patient lay too, with frame ``image``.

    Raises
    ------
    InputError
        If it is damaged, cut off or too large, has several volumes and none was chosen, NaN voxels,
        complex numbers or vectors, or does not say how the patient lay.
    """
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    try:
        with np.errstate(all="ignore"), _opened(path) as file:
            image: Any = _kind(file, path).from_stream(file)
            header = image.header
            shape = tuple(int(size) for size in image.shape)
            dtype = header.get_data_dtype()
            affine, notes = _affine(header, path, anywhere)
            wanted = _wanted(path, header, shape, time)
            each = (*shape[:3], 3) if _is_rgb_vector(header, shape) else shape[:3]
            check_size(path, each, np.dtype(np.float64) if dtype != _RGB else dtype)
            _check_length(path, header, shape, dtype)
            array = np.asanyarray(image.dataobj[wanted])
    except (ImageFileError, HeaderDataError, WrapStructError) as error:
        raise InputError(f"{path} is no NIfTI file, or damaged: {error}") from error
    except (
        EOFError,
        KeyError,  # a code that nibabel does not know
        MemoryError,
        OSError,
        OverflowError,
        ValueError,
        struct.error,
        zlib.error,
    ) as error:
        if isinstance(error, InputError):
            raise
        check_given(path, error)
        raise InputError(
            f"{path} cannot be read: {error}. It is cut off or damaged; export or copy it again."
        ) from error
    if array.dtype == _RGB:
        array = np.stack([array[name] for name in "RGB"], axis=-1)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise InputError(
            f"{path} has voxels of type {array.dtype}; expected whole or floating-point numbers."
        )
    check_finite(path, array)
    array = np.asarray(array, array.dtype.newbyteorder("="))
    if time is not None and (count := _volumes(header, shape)) > 1:
        notes = (*notes, f"volume {time} of {count}")
    placed = affine is not None
    if affine is None:
        affine = np.diag([*np.abs(header["pixdim"][1:4].astype(np.float64)), 1.0])
        affine[affine.diagonal() == 0, affine.diagonal() == 0] = 1.0
    with of_file(path):
        return Volume(array, affine, "RAS" if placed else "image", origin=header, notes=notes)


def count_nifti(path: Path) -> int:
    """Return how many volumes a file holds; raises InputError if it cannot be read."""
    try:
        with _opened(path) as file:
            image: Any = _kind(file, path).from_stream(file)
            return _volumes(image.header, tuple(int(size) for size in image.shape))
    except Exception as error:  # of every kind that nibabel has
        check_given(path, error)
        raise InputError(f"{path} is no NIfTI file, or damaged: {error}") from error


def write_nifti(path: Path, label_map: NDArray[np.uint8], like: Volume) -> None:
    """Write a label map IxJxK on the grid of ``like``: in full, or not at all.

    Of a NIfTI source, both its qform and its sform are kept, each with its code, whichever of them
    a reader prefers. A volume without a patient frame is written with pixel spacing only.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    import nibabel

    kind: Any = nibabel.Nifti1Image
    if isinstance(like.origin, nibabel.Nifti2Header) or max(label_map.shape) > 32767:
        kind = nibabel.Nifti2Image
    header = kind.header_class()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(label_map.shape)
    header.set_xyzt_units("mm")
    if like.frame == "image":
        header.set_zooms(like.spacing)
    elif isinstance(like.origin, nibabel.Nifti1Header):  # Nifti2Header is one too
        source = like.origin
        for field in _PLACE:
            header[field] = source[field]
        header["pixdim"][:4] = source["pixdim"][:4]
        header["xyzt_units"] = int(source["xyzt_units"]) % 8 or 2  # unknown is read as mm
    else:
        header.set_sform(like.affine_in("RAS"), code="scanner")
        header.set_qform(like.affine_in("RAS"), code="scanner", strip_shears=True)
    image = kind(label_map, None, header)  # with an affine, nibabel would write its own
    data = image.to_bytes()
    replace_file(path, gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


def _opened(path: Path) -> io.BufferedReader:
    """Open a file, decompressed within limits if its name says that it is compressed."""
    with path.open("rb") as file:
        found, given = packing(file.read(HEAD_BYTES)), _is_packed(path)
    if given and found is None:
        raise InputError(
            f"{path} is not packed with gzip, though its name says so: it is cut off or damaged, "
            "or was unpacked and kept its name. Name it .nii then."
        )
    if found is not None and not (given and found.name == "gzip"):
        other = ", whatever its name says" if given else ""
        rename = ", or name it .nii.gz" if found.name == "gzip" else ""
        raise InputError(f"{path} is {found.told}{rename}{other}.")
    return io.BufferedReader(BoundedReader(path)) if given else path.open("rb")


def _is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _kind(file: io.BufferedReader, path: Path) -> Any:
    """Return the class of image that a file's first number tells."""
    import nibabel

    head = file.read(176)
    file.seek(0)
    for kind, size, form, at in (
        (nibabel.Nifti1Image, 348, "f", 108),
        (nibabel.Nifti2Image, 540, "q", 168),
    ):
        for order in "<>":
            if head[:4] == struct.pack(f"{order}i", size) and len(head) == 176:
                (offset,) = struct.unpack_from(f"{order}{form}", head, at)
                if not 0 <= offset <= _MOST_HEADER:
                    raise InputError(
                        f"{path} states that its voxels begin at byte {offset:.0f}; at most "
                        f"{_MOST_HEADER} bytes of header and extensions are read. It is damaged."
                    )
                _check_extensions(file, path, order, size, int(offset))
                return kind
    if inner := packing(head):
        mend = "name it .nii.gz" if inner.name == "gzip" else f"unpack that too ({inner.command})"
        raise InputError(
            f"{path} is packed twice, inside with {inner.name}: unpack it (gunzip), and {mend}."
        )
    named = ", though its name says so" if kind_by_name(path) == "nifti" else ""
    raise InputError(f"{path} is no NIfTI file{named}, or it is cut off.")


def _check_extensions(
    file: io.BufferedReader, path: Path, order: str, header: int, end: int
) -> None:
    """Refuse a list of extensions that is made to take long; ``file`` is at its beginning again."""
    file.seek(header)
    at, count = header + 4, 0
    if file.read(4)[:1] not in (b"", b"\0"):
        while at + 8 <= end:
            file.seek(at)
            head = file.read(8)
            (size,) = struct.unpack(f"{order}i", head[:4].ljust(4, b"\0"))
            if len(head) < 8 or size < 8:
                break  # cut off or damaged: nibabel says how
            at, count = at + size, count + 1
            if count > _MOST_EXTENSIONS:
                raise InputError(
                    f"{path} has more than {_MOST_EXTENSIONS} extensions in its header: it is "
                    "damaged, or made to take long. Export it again without them."
                )
    file.seek(0)


def _is_rgb_vector(header: Any, shape: tuple[int, ...]) -> bool:
    return int(header["intent_code"]) == _INTENT_RGB and len(shape) == 5 and shape[4] == 3


def _volumes(header: Any, shape: tuple[int, ...]) -> int:
    further = shape[3:4] if _is_rgb_vector(header, shape) else shape[3:]
    return int(np.prod(further, dtype=object)) if further else 1


def _wanted(
    path: Path, header: Any, shape: tuple[int, ...], time: int | None
) -> tuple[int | slice, ...]:
    """Return the index of the volume to read."""
    if len(shape) < 3:
        raise InputError(f"{path} has {len(shape)} dimensions; expected a volume of three.")
    vector = _is_rgb_vector(header, shape)
    if not vector and len(shape) >= 5 and shape[4] > 1:
        raise InputError(
            f"{path} holds {shape[4]} numbers for each voxel (its shape is {shape}): vectors or "
            "matrices, no image."
        )
    count = _volumes(header, shape)
    if count > 1 and time is None:
        raise InputError(
            f"{path} is a series of {count} volumes (its shape is {shape}). Say which with --time "
            f"1 to {count}, or --time all."
        )
    if time is not None and not 1 <= time <= count:
        raise InputError(f"{path} has {count} volumes, there is no number {time}.")
    further = np.unravel_index((time or 1) - 1, shape[3:4] if vector else shape[3:] or (1,), "F")
    index = [int(i) for i in further][: len(shape) - 3]
    whole = slice(None)
    return (whole, whole, whole, *index, *((whole,) if vector else ()))


def _affine(
    header: Any, path: Path, anywhere: bool
) -> tuple[NDArray[np.float64] | None, tuple[str, ...]]:
    """Return the affine in mm, or None without one, and what had to be decided."""
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform <= 0 and qform <= 0:
        if anywhere:
            return None, ()
        raise InputError(
            f"{path} does not say how the patient lay (its sform_code and qform_code are 0), so "
            "left and right are unknown. Export it with orientation, or set one of them."
        )
    unit = int(header["xyzt_units"]) % 8  # the lowest three bits; the others are of time
    if unit not in _MILLIMETRES:
        raise InputError(f"{path} states lengths in the unknown unit {unit}. Export it again.")
    affine = np.array(header.get_best_affine(), np.float64)
    notes: tuple[str, ...] = ()
    if sform > 0 and qform > 0:
        shape = (*(max(1, int(size)) for size in header["dim"][1:4]),)
        corners = np.array([(*corner, 1) for corner in product(*[(0, n - 1) for n in shape])]).T
        other = np.array(header.get_qform(), np.float64)
        apart = float(np.linalg.norm(((affine - other) @ corners)[:3], axis=0).max())
        size = float(np.linalg.norm(affine[:3, :3], axis=0).min())
        if apart > SAME_PLACE * size:
            millimetres = apart * _MILLIMETRES[unit]
            notes = (
                f"its sform and qform lie up to {millimetres:.4g} mm apart; the sform is taken, "
                "and both are kept in what is written",
            )
    affine[:3] *= _MILLIMETRES[unit]
    return affine, notes


def _check_length(path: Path, header: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """See a file that was cut off before memory for all of it is taken."""
    if _is_packed(path):
        return
    needed = int(header.get_data_offset()) + int(np.prod(shape, dtype=object)) * dtype.itemsize
    have = path.stat().st_size
    if have < needed:
        raise InputError(
            f"{path} is cut off: it has {have} bytes, its header states {needed}. Copy it again."
        )
