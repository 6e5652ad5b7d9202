"""NRRD volumes and ``.seg.nrrd`` segmentations (3D Slicer's), headers read by pynrrd.

Pixels are decoded here, within the bounds of :mod:`recallseg.runtime.formats.guards`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.durable import replace_file
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.concepts import Concept
from recallseg.runtime.formats.guards import (
    check_finite,
    check_given,
    check_length,
    check_size,
    expand,
    of_file,
)
from recallseg.runtime.formats.packed import packing
from recallseg.runtime.formats.volume import Frame, Volume

__all__ = ["count_nrrd", "read_nrrd", "read_seg_nrrd", "write_seg_nrrd"]

_MOST_HEADER = 2**22
_COLOURS = {"rgb-color", "3-color"}
_VECTORS = {
    *("vector", "covariant-vector", "normal", "point", "2-vector", "3-vector", "4-vector"),
    *("3-gradient", "3-normal", "quaternion", "complex", "hsv-color", "xyz-color", "4-color"),
    *("rgba-color", "2d-symmetric-matrix", "2d-matrix", "3d-symmetric-matrix", "3d-matrix"),
    *("2d-masked-symmetric-matrix", "2d-masked-matrix"),
    *("3d-masked-symmetric-matrix", "3d-masked-matrix"),
}
"""Kinds of axes (teem's NRRD format, section 5.2) whose numbers belong to one voxel."""

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
_MILLIMETRES = {
    "": 1.0,
    **dict.fromkeys(("mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns"), 1e-3),
    **dict.fromkeys(("micrometer", "micrometers", "micrometre", "micrometres"), 1e-3),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-6),
}
"""Of units of length, which are free text; none is millimetres, as every reader takes it. No "m":
programs that know only ASCII leave it of "µm"."""


def read_nrrd(path: Path, *, time: int | None = None) -> Volume:
    """Read a volume, grey or RGB: colours are an axis whose kind says so, never one of length 3.

    Parameters
    ----------
    time : which of several volumes along an axis of kind list or time, from 1.

    Raises
    ------
    InputError
        If it is damaged, cut off, too large, detached from its pixels, of another encoding, without
        space or directions, or has several volumes and none was chosen.
    """
    array, header, extra = _read(path)
    frame, affine = _geometry(path, header)
    notes: tuple[str, ...] = ()
    if extra is not None:
        kind, count = _kind(header, extra), array.shape[extra]
        if kind in _COLOURS and count == 3:
            array = np.moveaxis(array, extra, -1)
        elif kind in _VECTORS and count > 1:
            raise InputError(
                f"{path} holds {count} numbers for each voxel (an axis of kind '{kind}'): vectors "
                "or matrices, no image. If they are colours, say so: kinds RGB-color."
            )
        else:
            if count > 1 and time is None:
                raise InputError(
                    f"{path} is a series of {count} volumes (an axis of kind '{kind}'). Say which "
                    f"with --time 1 to {count}, or --time all."
                )
            if time is not None and not 1 <= time <= count:
                raise InputError(f"{path} has {count} volumes, there is no number {time}.")
            array = np.take(array, (time or 1) - 1, axis=extra)
            notes = (f"volume {time} of {count}",) if count > 1 else ()
    elif time not in (None, 1):
        raise InputError(f"{path} has 1 volume, there is no number {time}.")
    check_finite(path, array)
    with of_file(path):
        return Volume(np.ascontiguousarray(array), affine, frame, origin=header, notes=notes)


def count_nrrd(path: Path) -> int:
    """Return how many volumes a file holds; raises InputError if it cannot be read."""
    try:
        check_length(path)
        with path.open("rb") as file:
            header, _ = _read_header(path, file)
        sizes = [int(size) for size in header["sizes"]]
        extra = _extra_axis(path, header, sizes)
    except InputError:
        raise
    except Exception as error:  # of every kind that pynrrd has
        check_given(path, error)
        raise InputError(f"{path} is no NRRD file, or damaged: {error}.") from error
    if extra is None or _kind(header, extra) in _COLOURS | _VECTORS:
        return 1
    return sizes[extra]


def read_seg_nrrd(path: Path) -> tuple[Volume, list[tuple[str, NDArray[np.bool_]]]]:
    """Read a segmentation: of 3 axes, of layers (3D Slicer 4.11 on), or of one component for each
    segment (before).

    Returns
    -------
    volume : its grid, with the first layer's labels. 3D Slicer saves the box around the segments
        only, so it may be smaller than the image's.
    segments : name and boolean IxJxK, in the file's order; names may repeat, masks may overlap.

    Raises
    ------
    InputError
        As :func:`read_nrrd`, or if it has no segments, or more than it has layers for.
    """
    array, header, axis = _read(path)
    frame, affine = _geometry(path, header)
    array = array[None] if axis is None else np.moveaxis(array, axis, 0)
    names: list[str] = []
    while (name := header.get(f"Segment{len(names)}_Name")) is not None:
        names.append(str(name))
        if re.search("[\ud800-\udfff]", names[-1]):
            raise InputError(
                f"{path}: the name of segment {len(names) - 1} is not in UTF-8, so its letters "
                "cannot be told. Save it anew with 3D Slicer 5 or later."
            )
    if not names:
        raise InputError(f"{path} has no segments: it is no .seg.nrrd of 3D Slicer's kind.")
    layered = any(f"Segment{n}_Layer" in header for n in range(len(names)))
    if not layered and len(array) > 1 and len(array) != len(names):
        raise InputError(
            f"{path} has {len(names)} segments, {len(array)} components and does not say which "
            "belongs to which. Save it with 3D Slicer 4.11 or later."
        )
    segments = []
    for number, name in enumerate(names):
        own = number if not layered and len(array) > 1 else 0  # a component for each segment
        valued = layered or f"Segment{number}_LabelValue" in header or len(array) == 1
        try:
            layer = int(header.get(f"Segment{number}_Layer", own))
            value = int(header.get(f"Segment{number}_LabelValue", 1))
            if layer < 0:
                raise ValueError(f"layer {layer}")
            mask = array[layer] == value if valued else array[layer] != 0
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}: segment {number} ({name}) is damaged: {error}.") from error
        segments.append((name, mask))
    if not layered and len(array) == 1 and len(names) > 1 and not _has_values(header, len(names)):
        raise InputError(
            f"{path} has {len(names)} segments in one layer and no label values: which voxel is "
            "whose cannot be told. Save it anew with 3D Slicer."
        )
    with of_file(path):
        return Volume(np.ascontiguousarray(array[0]), affine, frame, origin=header), segments


def write_seg_nrrd(
    path: Path,
    masks: Mapping[str, NDArray[np.bool_]],
    like: Volume,
    concepts: Mapping[str, Concept] | None = None,
) -> None:
    """Write masks IxJxK as segments on the grid of ``like``: in full, or not at all.

    Masks that overlap get layers of their own, as 3D Slicer writes them.

    Parameters
    ----------
    concepts : coded meaning and colour by structure; see :mod:`recallseg.runtime.formats.concepts`.

    Raises
    ------
    InputError
        If ``like`` has no patient frame, or there are no masks.
    OSError
        If the folder cannot be written.
    """
    import nrrd

    affine = like.affine_in("LPS")
    if not masks:
        raise InputError("there is no structure to write, and a .seg.nrrd has one or more.")
    kind = np.uint8 if len(masks) <= np.iinfo(np.uint8).max else np.uint16
    layers: list[NDArray[np.unsignedinteger[Any]]] = []
    fields: dict[str, str] = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    for number, (name, mask) in enumerate(masks.items()):
        at = next((n for n, layer in enumerate(layers) if not layer[mask].any()), len(layers))
        if at == len(layers):
            layers.append(np.zeros(like.shape, kind))
        layers[at][mask] = number + 1
        extents = []
        for axis in range(3):
            inside = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
            extents.append(f"{inside[0]} {inside[-1]}" if inside.size else "0 -1")
        fields |= {
            f"Segment{number}_ID": f"Segment_{number + 1}",
            f"Segment{number}_Name": name,
            f"Segment{number}_LabelValue": str(number + 1),
            f"Segment{number}_Layer": str(at),
            f"Segment{number}_Extent": " ".join(extents),
        }
        concept = (concepts or {}).get(name)
        if concept is not None:
            red, green, blue = (f"{value / 255:.6g}" for value in concept.colour)
            fields[f"Segment{number}_Color"] = f"{red} {green} {blue}"
            fields[f"Segment{number}_Tags"] = f"TerminologyEntry:{concept.terminology()}|"
    several = len(layers) > 1
    array = np.stack(layers) if several else layers[0]
    header: dict[str, Any] = {
        "dimension": array.ndim,
        "space": "left-posterior-superior",
        "sizes": np.array(array.shape),
        "space directions": np.vstack([*[[np.nan] * 3] * several, affine[:3, :3].T]),
        "space origin": affine[:3, 3],
        "kinds": [*["list"] * several, "domain", "domain", "domain"],
        "encoding": "gzip",
    }
    stream = io.BytesIO()
    nrrd.write(stream, np.asfortranarray(array), header, compression_level=6)
    # pynrrd writes ASCII alone; names are UTF-8, as 3D Slicer has them.
    head, _, pixels = stream.getvalue().partition(b"\n\n")
    told = "".join(f"\n{field}:={value}" for field, value in fields.items())
    replace_file(path, b"".join((head, told.encode(), b"\n\n", pixels)))


def _read_header(path: Path, file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """Return the header, and where the pixels begin."""
    import nrrd

    head = file.read(_MOST_HEADER)
    if found := packing(head):
        raise InputError(f"{path} is {found.told}.")
    if len(head) == _MOST_HEADER and not re.search(rb"\n\r?\n", head):
        raise InputError(
            f"{path} has a header of more than {_MOST_HEADER} bytes. It is damaged, or made to "
            "take long; save it anew."
        )
    lines = io.BytesIO(head)
    # Of bytes, pynrrd passes over all that is not ASCII: two names may then be one.
    return nrrd.read_header(line.decode("utf-8", "surrogateescape") for line in lines), lines.tell()


def _kind(header: Mapping[str, Any], axis: int) -> str:
    kinds = header.get("kinds")
    kind = str(kinds[axis]) if kinds is not None and axis < len(kinds) else "???"
    return kind.lower()


def _has_values(header: Mapping[str, Any], count: int) -> bool:
    return all(f"Segment{number}_LabelValue" in header for number in range(count))


def _read(path: Path) -> tuple[NDArray[Any], dict[str, Any], int | None]:
    """Return pixels in the header's axis order, the header, and the axis outside space, if any."""
    import nrrd

    try:
        check_length(path)
        with path.open("rb") as file:
            header, start = _read_header(path, file)
            if "data file" in header or "datafile" in header:
                raise InputError(
                    f"{path} keeps its pixels in another file. Save it as one .nrrd file."
                )
            kind = _TYPES.get(str(header.get("type")))
            if kind is None:
                raise InputError(
                    f"{path} has voxels of type {header.get('type')}; expected whole numbers of up "
                    "to 32 bits, float or double. Save it as one of them."
                )
            dtype = np.dtype(_order(path, header, kind) + kind)
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
    except (OSError, MemoryError) as error:
        check_given(path, error)
        raise InputError(f"{path} cannot be read: {error}.") from error
    if encoding != "raw":
        data = expand(data, encoding, wanted, path)
    elif len(data) < wanted:
        raise InputError(
            f"{path} is cut off: it holds {len(data)} bytes of pixels, its header states {wanted}."
        )
    array = np.frombuffer(data[:wanted], dtype).reshape(sizes, order="F")
    return array.astype(dtype.newbyteorder("=")), dict(header), _extra_axis(path, header, sizes)


def _order(path: Path, header: Mapping[str, Any], kind: str) -> str:
    """Return the order of the bytes of a number, which a header must state."""
    endian = str(header.get("endian", "missing")).lower()
    if kind.endswith("1"):
        return "|"
    if endian not in ("little", "big"):
        raise InputError(
            f"{path} does not say in which order the bytes of its numbers are (its endian is "
            f"'{endian}', expected little or big). Save it anew."
        )
    return "<" if endian == "little" else ">"


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
    affine[:3] *= (np.array(signs) * _millimetres(path, header))[:, None]
    return frame, affine


def _millimetres(path: Path, header: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the millimetres of the unit of x, y and z."""
    units = [str(unit).strip().lower() for unit in header.get("space units", [""] * 3)]
    # An axis with a direction has the units of space and none of its own; some writers repeat them.
    own = {str(unit).strip().lower() for unit in header.get("units", ())}
    known = all(unit in _MILLIMETRES for unit in units)
    lengths = {_MILLIMETRES[unit] for unit in own if unit and unit in _MILLIMETRES}
    if not known or len(units) != 3 or not lengths <= {_MILLIMETRES[unit] for unit in units}:
        raise InputError(
            f"{path} states lengths in units that are not understood (space units {units}, units "
            f"of axes {sorted(own)}). Save it in mm."
        )
    return np.array([_MILLIMETRES[unit] for unit in units])
