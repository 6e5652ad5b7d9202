"""NRRD volumes and ``.seg.nrrd`` segmentations (3D Slicer's), headers read by pynrrd.

Pixels are decoded here, within the bounds of :mod:`recallseg.runtime.formats.guards`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.guards import check_finite, check_size, expand
from recallseg.runtime.formats.images import write_atomically
from recallseg.runtime.formats.volume import Frame, Volume

__all__ = ["read_nrrd", "read_seg_nrrd", "write_seg_nrrd"]

_SPACES: dict[str, tuple[Frame, tuple[float, float, float]]] = {
    "left-posterior-superior": ("LPS", (1.0, 1.0, 1.0)),
    "lps": ("LPS", (1.0, 1.0, 1.0)),
    "right-anterior-superior": ("RAS", (1.0, 1.0, 1.0)),
    "ras": ("RAS", (1.0, 1.0, 1.0)),
    "left-anterior-superior": ("RAS", (-1.0, 1.0, 1.0)),
    "las": ("RAS", (-1.0, 1.0, 1.0)),
}
_TYPES = {
    "int8": "i1", "signed char": "i1", "int8_t": "i1",
    "uint8": "u1", "unsigned char": "u1", "uchar": "u1", "uint8_t": "u1",
    "int16": "i2", "short": "i2", "short int": "i2", "signed short": "i2", "int16_t": "i2",
    "signed short int": "i2",
    "uint16": "u2", "unsigned short": "u2", "ushort": "u2", "uint16_t": "u2",
    "unsigned short int": "u2",
    "int32": "i4", "int": "i4", "signed int": "i4", "int32_t": "i4",
    "uint32": "u4", "unsigned int": "u4", "uint": "u4", "uint32_t": "u4",
    "float": "f4", "double": "f8",
}  # fmt: skip


def read_nrrd(path: Path) -> Volume:
    """Read a volume, grey or RGB.

    Raises
    ------
    InputError
        If it is damaged, cut off, too large, detached from its pixels, of another encoding, or
        without space or directions.
    """
    array, header, colours = _read(path)
    frame, affine = _geometry(path, header)
    if colours is not None:
        array = np.moveaxis(array, colours, -1)
    if array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3):
        check_finite(path, array)
        return Volume(np.ascontiguousarray(array), affine, frame, origin=header)
    raise InputError(f"{path} has the shape {array.shape}; expected one volume, grey or RGB.")


def read_seg_nrrd(path: Path) -> tuple[Volume, dict[str, NDArray[np.bool_]]]:
    """Read a segmentation.

    Returns
    -------
    volume : its grid, with the first layer's labels.
    masks : boolean IxJxK by segment name.

    Raises
    ------
    InputError
        As :func:`read_nrrd`, or if it has no segments or two of one name.
    """
    array, header, layers = _read(path)
    frame, affine = _geometry(path, header)
    array = array[None] if layers is None else np.moveaxis(array, layers, 0)
    masks: dict[str, NDArray[np.bool_]] = {}
    number = 0
    while (name := header.get(f"Segment{number}_Name")) is not None:
        try:
            layer = int(header.get(f"Segment{number}_Layer", 0))
            value = int(header.get(f"Segment{number}_LabelValue", 1))
            mask = array[layer] == value
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}: segment {number} ({name}) is damaged: {error}.") from error
        if str(name) in masks:
            raise InputError(f"{path} has two segments named '{name}'. Rename one of them.")
        masks[str(name)] = mask
        number += 1
    if not masks:
        raise InputError(f"{path} has no segments: it is no .seg.nrrd of 3D Slicer's kind.")
    return Volume(np.ascontiguousarray(array[0]), affine, frame, origin=header), masks


def write_seg_nrrd(
    path: Path, label_map: NDArray[np.uint8], like: Volume, labels: Mapping[str, int]
) -> None:
    """Write a label map IxJxK as segments on the grid of ``like``: in full, or not at all.

    Raises
    ------
    InputError
        If ``like`` has no patient frame.
    OSError
        If the folder cannot be written.
    """
    import nrrd

    affine = like.affine_in("LPS")
    header: dict[str, Any] = {
        "type": "uint8",
        "dimension": 3,
        "space": "left-posterior-superior",
        "sizes": np.array(label_map.shape),
        "space directions": affine[:3, :3].T,
        "space origin": affine[:3, 3],
        "kinds": ["domain", "domain", "domain"],
        "encoding": "gzip",
    }
    for number, (name, value) in enumerate(labels.items()):
        inside = np.nonzero(label_map == value)
        extent = (
            " ".join(f"{axis.min()} {axis.max()}" for axis in inside)
            if inside[0].size
            else "0 -1 0 -1 0 -1"
        )
        header |= {
            f"Segment{number}_ID": f"Segment_{value}",
            f"Segment{number}_Name": name,
            f"Segment{number}_LabelValue": str(value),
            f"Segment{number}_Layer": "0",
            f"Segment{number}_Extent": extent,
        }
    stream = io.BytesIO()
    nrrd.write(stream, np.asfortranarray(label_map), header, compression_level=6)
    write_atomically(path, stream.getvalue())


def _read(path: Path) -> tuple[NDArray[Any], dict[str, Any], int | None]:
    """Return pixels in the header's axis order, the header, and the axis outside space, if any."""
    import nrrd

    try:
        with path.open("rb") as file:
            header = nrrd.read_header(file)
            start = file.tell()
            if "data file" in header or "datafile" in header:
                raise InputError(
                    f"{path} keeps its pixels in another file. Save it as one .nrrd file."
                )
            kind = _TYPES.get(str(header.get("type")))
            if kind is None:
                raise InputError(f"{path} has voxels of type {header.get('type')}.")
            order = ">" if str(header.get("endian", "little")).lower() == "big" else "<"
            dtype = np.dtype(order + kind)
            sizes = [int(size) for size in header["sizes"]]
            if len(sizes) not in (3, 4) or int(header["dimension"]) != len(sizes):
                raise InputError(f"{path} has {len(sizes)} axes; expected a volume of three.")
            wanted = check_size(path, sizes, dtype)
            encoding = str(header.get("encoding", "")).lower()
            encoding = {"gz": "gzip", "bzip2": "bz2"}.get(encoding, encoding)
            if encoding not in ("raw", "gzip", "bz2"):
                raise InputError(
                    f"{path} has the encoding '{encoding}'; expected raw, gzip or bz2."
                )
            if int(header.get("line skip", 0)) or int(header.get("byte skip", 0)):
                raise InputError(f"{path} skips lines or bytes before its pixels. Save it anew.")
            file.seek(start)
            data = file.read(wanted + 1 if encoding == "raw" else -1)
    except (
        IndexError,
        KeyError,
        OverflowError,
        StopIteration,  # an empty file, to pynrrd
        TypeError,
        ValueError,
        nrrd.NRRDError,
    ) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no NRRD file, or damaged: {error}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if encoding != "raw":
        data = expand(data, encoding, wanted, path)
    elif len(data) < wanted:
        raise InputError(
            f"{path} is cut off: it holds {len(data)} bytes of pixels, its header states {wanted}."
        )
    array = np.frombuffer(data[:wanted], dtype).reshape(sizes, order="F")
    return array.astype(dtype.newbyteorder("=")), dict(header), _extra_axis(path, header, sizes)


def _extra_axis(path: Path, header: Mapping[str, Any], sizes: list[int]) -> int | None:
    """Return which of four axes has no direction in space: colours, or layers of segments."""
    if len(sizes) == 3:
        return None
    directions = np.asarray(header.get("space directions", np.full((4, 3), np.nan)), float)
    missing = [axis for axis, row in enumerate(directions) if np.isnan(row).any()]
    if directions.shape != (4, 3) or len(missing) != 1:
        raise InputError(f"{path} has four axes in space; expected one volume.")
    return missing[0]


def _geometry(path: Path, header: Mapping[str, Any]) -> tuple[Frame, NDArray[np.float64]]:
    known = _SPACES.get(str(header.get("space", "")).lower())
    if known is None:
        raise InputError(
            f"{path} does not say how the patient lay (its space is "
            f"'{header.get('space', 'missing')}'). Save it with space left-posterior-superior."
        )
    try:
        directions = np.asarray(header["space directions"], np.float64)
        origin = np.asarray(header["space origin"], np.float64)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} lacks space directions or a space origin.") from error
    directions = (
        directions[~np.isnan(directions).any(axis=-1)] if directions.ndim == 2 else directions
    )
    if directions.shape != (3, 3) or origin.shape != (3,):
        raise InputError(f"{path}: its space directions or origin are damaged.")
    frame, signs = known
    affine = np.eye(4)
    affine[:3, :3] = directions.T
    affine[:3, 3] = origin
    affine[:3] *= np.array(signs)[:, None]
    return frame, affine
