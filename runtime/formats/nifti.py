"""NIfTI volumes (``.nii``, ``.nii.gz``), read and written by nibabel. Frame: RAS."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.guards import check_finite, check_size
from recallseg.runtime.formats.images import write_atomically
from recallseg.runtime.formats.volume import Volume

__all__ = ["read_nifti", "write_nifti"]

_MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # of unknown, metre, mm, micron
_RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])


def read_nifti(path: Path) -> Volume:
    """Read a volume; a stored slope and intercept are applied.

    Raises
    ------
    InputError
        If it is damaged, cut off or too large, has several time points, NaN voxels, complex
        numbers, or does not say how the patient lay.
    """
    import nibabel
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        with np.errstate(all="ignore"):
            image: Any = nibabel.load(path, mmap=False)
            if not isinstance(image, nibabel.Nifti1Image):  # Nifti2Image is one too
                raise InputError(f"{path} is no NIfTI file, though its name says so.")
            header = image.header
            shape = tuple(int(size) for size in image.shape)
            dtype = header.get_data_dtype()
            check_size(path, shape, np.dtype(np.float64) if dtype != _RGB else dtype)
            affine = _affine(header, path)
            _check_length(path, header, shape, dtype)
            array = np.asanyarray(image.dataobj)
    except (ImageFileError, HeaderDataError) as error:
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
        raise InputError(
            f"{path} cannot be read: {error}. It is cut off or damaged; export or copy it again."
        ) from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype == _RGB:
        array = np.stack([array[name] for name in "RGB"], axis=-1)
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise InputError(
            f"{path} has voxels of type {array.dtype}; expected whole or floating-point numbers."
        )
    check_finite(path, array)
    array = np.asarray(array, array.dtype.newbyteorder("="))
    return Volume(array, affine, "RAS", origin=header)


def write_nifti(path: Path, label_map: NDArray[np.uint8], like: Volume) -> None:
    """Write a label map IxJxK on the grid of ``like``: in full, or not at all.

    A volume without a patient frame is written with pixel spacing only (no s-form, no q-form).

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    import nibabel

    if like.frame == "image":
        image: Any = nibabel.Nifti1Image(label_map, like.affine)
        image.header.set_sform(like.affine, code=0)
        image.header.set_qform(like.affine, code=0)
        image.header.set_zooms(like.spacing)
    else:
        image = nibabel.Nifti1Image(label_map, like.affine_in("RAS"))
        if like.origin is not None and hasattr(like.origin, "get_sform"):
            _, code = like.origin.get_sform(coded=True)
            _, other = like.origin.get_qform(coded=True)
            image.header["sform_code"] = code or other
            image.header.set_qform(like.affine_in("RAS"), code=other or code)
    image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    write_atomically(path, gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)


def _affine(header: Any, path: Path) -> NDArray[np.float64]:
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform <= 0 and qform <= 0:
        raise InputError(
            f"{path} does not say how the patient lay (its sform_code and qform_code are 0), so "
            "left and right are unknown. Export it with orientation, or set one of them."
        )
    unit = int(header["xyzt_units"]) % 8  # the lowest three bits; the others are of time
    if unit not in _MILLIMETRES:
        raise InputError(f"{path} states lengths in the unknown unit {unit}. Export it again.")
    affine = np.array(header.get_best_affine(), np.float64)
    affine[:3] *= _MILLIMETRES[unit]
    return affine


def _check_length(path: Path, header: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """See a file that was cut off before memory for all of it is taken."""
    if path.suffix.lower() == ".gz":
        return
    needed = int(header.get_data_offset()) + int(np.prod(shape, dtype=object)) * dtype.itemsize
    have = path.stat().st_size
    if have < needed:
        raise InputError(
            f"{path} is cut off: it has {have} bytes, its header states {needed}. Copy it again."
        )
