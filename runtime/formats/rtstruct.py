"""RT structure sets: outlines in the patient, filled on the grid of the images they were drawn on.

PS3.3 C.8.8.6. An outline belongs to the plane that it lies in; one between two planes is refused,
not moved. A pixel belongs to it if its centre lies inside or on the line; an outline within another
one of its structure is a hole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom_files import (
    RT_STRUCTURE_SET,
    damaged_is_input_error,
    is_dicom,
    names_by_number,
    open_dicom,
)
from recallseg.runtime.formats.polygons import fill
from recallseg.runtime.formats.volume import Volume

__all__ = ["is_structure_set", "read_structure_set"]

IN_PLANE = 0.1
"""Of the distance of planes: how far points of an outline may lie off one."""
_EDGE = 1e-3  # of a pixel: what counts as on the line


def is_structure_set(path: Path) -> bool:
    """Whether a file is an RT structure set."""
    if not is_dicom(path):
        return False
    with damaged_is_input_error(path):
        return bool(open_dicom(path, only=["SOPClassUID"]).get("SOPClassUID") == RT_STRUCTURE_SET)


def read_structure_set(
    path: Path, volume: Volume
) -> tuple[dict[int, str], dict[int, NDArray[np.bool_]]]:
    """Read the structures onto the grid of a volume.

    Returns
    -------
    labels : ROIName by ROINumber.
    masks : boolean IxJxK by ROINumber; all False for one without outlines.

    Raises
    ------
    InputError
        If it is damaged, of another frame of reference, or has outlines between planes, across
        them, outside the image, or that are not closed.
    """
    onto = volume.lattice
    inverse: NDArray[np.float64] = np.asarray(np.linalg.inv(onto.affine), np.float64)
    with damaged_is_input_error(path):
        dataset = open_dicom(path)
        _check_reference(path, dataset, volume)
        described = dataset.get("StructureSetROISequence") or ()
        labels = names_by_number(
            *(path, described, "ROINumber", "ROIName"), what="a structure", whose="an outline"
        )
        masks = {number: np.zeros(onto.shape, bool) for number in labels}
        for roi in dataset.get("ROIContourSequence") or ():
            number = int(roi.ReferencedROINumber)
            if number not in masks:
                raise InputError(f"{path} has outlines of structure {number}, which it lacks.")
            what = f"{path}: structure '{labels[number]}'"
            outlines = [
                _indices(contour, inverse, what) for contour in roi.get("ContourSequence") or ()
            ]
            _draw(outlines, masks[number], what)
    if not labels:
        raise InputError(f"{path} has no structures. Export the set that has outlines.")
    return labels, masks


def _check_reference(path: Path, dataset: Any, volume: Volume) -> None:
    mine = getattr(volume.origin, "reference", "")
    theirs = {
        str(frame.get("FrameOfReferenceUID") or "")
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
    } | {
        str(roi.get("ReferencedFrameOfReferenceUID") or "")
        for roi in dataset.get("StructureSetROISequence") or ()
    }
    theirs.discard("")
    if mine and theirs and mine not in theirs:
        raise InputError(
            f"{path} was drawn on other images than this series, in another frame of reference. "
            "Give the series it refers to."
        )


def _indices(contour: Any, inverse: NDArray[np.float64], what: str) -> NDArray[np.float64]:
    """Return an outline's points Nx3 as voxel indices."""
    kind = str(contour.get("ContourGeometricType") or "CLOSED_PLANAR")
    values = np.array([float(v) for v in contour.get("ContourData") or ()])
    if kind not in ("CLOSED_PLANAR", "CLOSED_PLANAR_XOR", "CLOSEDPLANAR_XOR"):
        raise InputError(f"{what} has an outline that is {kind}; closed ones have an inside.")
    if values.size < 9 or values.size % 3 or not np.isfinite(values).all():
        raise InputError(f"{what} has an outline of {values.size} numbers: it is damaged.")
    points = np.column_stack([values.reshape(-1, 3), np.ones(values.size // 3)])
    indices: NDArray[np.float64] = (points @ inverse.T)[:, :3]
    return indices


def _draw(outlines: list[NDArray[np.float64]], mask: NDArray[np.bool_], what: str) -> None:
    if not outlines:
        return
    # The axis that every outline stays at one place of: its planes.
    extents = np.max([np.ptp(points, axis=0) for points in outlines], axis=0)
    axis = int(np.argmin(extents))
    if extents[axis] > 2 * IN_PLANE:
        raise InputError(
            f"{what} has an outline across the planes of the images ({extents[axis]:.2f} of them). "
            "Give the series that it was drawn on."
        )
    planes: dict[int, list[NDArray[np.float64]]] = {}
    for points in outlines:
        place = float(points[:, axis].mean())
        plane = round(place)
        if abs(place - plane) > IN_PLANE:
            raise InputError(
                f"{what} has an outline between two planes of the images ({place:.2f}). Give the "
                "series that it was drawn on, or resample the structure to it."
            )
        if not 0 <= plane < mask.shape[axis]:
            raise InputError(f"{what} has an outline outside the images (plane {plane}).")
        planes.setdefault(plane, []).append(np.delete(points, axis, axis=1))
    for plane, drawn in planes.items():
        target = np.moveaxis(mask, axis, 0)[plane]
        for points in sorted(drawn, key=_area, reverse=True):
            # Indices are those of centres; polygons count from the outer corner, x first.
            corners = points[:, ::-1] + 0.5
            size = (target.shape[0], target.shape[1])
            inner = _all(corners, *size)
            if inner.any() and target[inner].all():
                target &= ~inner  # within what is drawn already: a hole
            else:
                target |= _any(corners, *size)


def _area(points: NDArray[np.float64]) -> float:
    x, y = points[:, 0], points[:, 1]
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1)))


_SHIFTS = np.array([(-_EDGE, -_EDGE), (_EDGE, -_EDGE), (-_EDGE, _EDGE), (_EDGE, _EDGE)])


def _any(corners: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Fill a polygon with the pixels on its line."""
    filled: NDArray[np.bool_] = np.logical_or.reduce(
        [fill(corners + shift, height, width) for shift in _SHIFTS]
    )
    return filled


def _all(corners: NDArray[np.float64], height: int, width: int) -> NDArray[np.bool_]:
    """Fill a polygon without the pixels on its line."""
    filled: NDArray[np.bool_] = np.logical_and.reduce(
        [fill(corners + shift, height, width) for shift in _SHIFTS]
    )
    return filled
