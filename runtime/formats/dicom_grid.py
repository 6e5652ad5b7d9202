"""The even grid that the images of one volume lie on, made of their own positions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.dicom_planes import Plane

__all__ = ["place"]

EVEN = 0.02  # of the gap: how far a slice may lie from its even place, within or along
ROUNDED = 0.2  # of the gap; one slice missing of five moves others by a quarter of it,
ROUNDED_OF_THREE = 0.14  # and one of four by a sixth


def place(
    planes: Sequence[Plane], path: Path
) -> tuple[NDArray[np.float64], list[int], tuple[str, ...]]:
    """Return the affine of (plane, row, column), the order of the planes along it, and notes.

    Positions may lie off an even spacing by what rounding to the decimals that they are written
    with explains, and 2 % of the gap.

    Raises
    ------
    InputError
        If a slice is missing, two lie at one place, or slices are shifted (gantry tilt).
    """
    first = planes[0].at
    row, column, normal = np.array(first.row), np.array(first.column), first.normal
    rows, columns = first.spacing
    if rows <= 0 or columns <= 0:
        raise InputError(f"{path}: its pixel spacing is {[rows, columns]}; expected more than 0.")
    positions = np.array([plane.at.position for plane in planes], np.float64)
    distances = positions @ normal
    order = [int(i) for i in np.argsort(distances, kind="stable")]
    placed, notes = positions[order], []
    if len(order) == 1:
        step = normal * (planes[0].thickness or 1.0)
    else:
        step = (placed[-1] - placed[0]) / (len(order) - 1)
        gap = float(step @ normal)
        heights = distances[order]
        gaps = np.diff(heights)
        if gaps.min() < 1e-3:
            raise InputError(
                f"{path}: two slices lie at one position. Give each volume a folder, or remove the "
                "copy."
            )
        decimal = min(plane.at.decimals for plane in planes)
        largest = ROUNDED_OF_THREE if len(order) == 3 else ROUNDED
        rounding = min(float(np.abs(normal).sum()) * decimal / 2, largest * gap)
        even, off = _even_gap(heights)
        if off > EVEN * gap + rounding * (1 + 1e-6):
            raise InputError(
                f"{path}: gaps between slices range from {gaps.min():.3f} to {gaps.max():.3f} mm. "
                "A slice is missing, or several stacks are mixed."
            )
        across = placed - np.outer(heights, normal)
        drift = float(np.linalg.norm(across[-1] - across[0]))
        line = np.linspace(across[0], across[-1], len(order))
        shift = float(np.linalg.norm(across - line, axis=1).max())
        slack = EVEN * gap + np.sqrt(3) * decimal
        if drift > EVEN * gap * (len(order) - 2) + slack or shift > slack:
            raise InputError(
                f"{path}: slices are shifted against each other (gantry tilt). Resample the "
                "series without tilt first."
            )
        if off > EVEN * gap:
            stated = planes[0].thickness
            if stated and _off_line(heights, stated) <= rounding * (1 + 1e-6):
                even = stated
            rest = heights - even * np.arange(len(heights))
            placed[0] += normal * ((rest.max() + rest.min()) / 2 - heights[0])
            gap = even
            notes.append(
                f"positions are rounded: gaps range from {gaps.min():.4g} to {gaps.max():.4g} mm, "
                f"{gap:.4g} mm is taken"
            )
        step = normal * gap
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = column * rows
    affine[:3, 2] = row * columns
    affine[:3, 3] = placed[0]
    return affine, order, tuple(notes)


def _off_line(heights: NDArray[np.float64], gap: float) -> float:
    """Return how far, at least, a height lies off an even stack with that gap."""
    rest = heights - gap * np.arange(len(heights))
    return float(rest.max() - rest.min()) / 2


def _even_gap(heights: NDArray[np.float64]) -> tuple[float, float]:
    """Return the gap of the even stack that heights lie closest to, and how far off they are.

    The largest distance is convex in the gap, so a ternary search finds the least one.
    """
    gaps = np.diff(heights)
    low, high = float(gaps.min()), float(gaps.max())
    for _ in range(60):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if _off_line(heights, left) < _off_line(heights, right):
            high = right
        else:
            low = left
    gap = (low + high) / 2
    return gap, _off_line(heights, gap)
