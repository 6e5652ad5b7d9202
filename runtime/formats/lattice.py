"""Grids as sets of voxel centres in the patient: compare two, and put a mask where it belongs.

Frame: LPS, millimetres. Two grids whose centres coincide are one *lattice*, whatever the order and
direction of their axes and wherever each begins and ends: a mask on one of them is permuted,
flipped, cropped or padded onto the other, and no voxel changes. Another lattice is refused with the
difference, or resampled when that was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError

__all__ = ["SAME_PLACE", "Lattice", "Placement", "check_overlap", "resample"]

SAME_PLACE = 0.1
"""How far, in voxels, any centre may lie from one of the other grid's, and still be the same one.

Scanners write positions with one to six decimals and tools compute affines in float32, so 0.0 is
never reached; half a voxel, where a nearest neighbour begins to be another one, stays far off."""


@dataclass(frozen=True, eq=False)
class Lattice:
    """Voxel centres in the patient.

    Attributes
    ----------
    affine : 4x4 float64; voxel index (i, j, k, 1) -> mm (left, back, head, 1).
    shape : I, J, K. Along an axis of one voxel the affine's step is a thickness; nothing about
        where other planes would lie.
    """

    affine: NDArray[np.float64]
    shape: tuple[int, int, int]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between centres along i, j and k."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    def relate(self, other: Lattice) -> Placement:
        """Return where the voxels of this grid lie on ``other``.

        Raises
        ------
        InputError
            If the two are different lattices; the message says in what.
        """
        linear, start = _index_map(self, other)
        axes = _nearest_axes(linear)
        signs = [int(np.sign(linear[axis, i])) or 1 for i, axis in enumerate(axes)]
        exact = np.zeros((3, 3))
        for i, axis in enumerate(axes):
            exact[axis, i] = signs[i]
        whole = np.rint(start)
        corners = np.array(list(product(*[(0, size - 1) for size in self.shape])), np.float64)
        off = corners @ (linear - exact).T + (start - whole)
        if np.abs(off).max() > SAME_PLACE:
            raise InputError(self._difference(other, linear, axes, start))
        return Placement(
            (axes[0], axes[1], axes[2]),
            (signs[0], signs[1], signs[2]),
            (int(whole[0]), int(whole[1]), int(whole[2])),
        )

    def _difference(
        self,
        other: Lattice,
        linear: NDArray[np.float64],
        axes: list[int],
        start: NDArray[np.float64],
    ) -> str:
        mine = tuple(self.spacing[axes.index(axis)] for axis in range(3))
        cosines = [
            abs(linear[axis, i]) / np.linalg.norm(linear[:, i]) for i, axis in enumerate(axes)
        ]
        angle = float(np.degrees(np.arccos(min(1.0, min(cosines)))))
        several = [
            axis for axis in range(3) if other.shape[axis] > 1 and self.shape[axes.index(axis)] > 1
        ]
        if any(abs(mine[axis] / other.spacing[axis] - 1) > 1e-2 for axis in several):
            return (
                f"its voxels are {_millimetres(mine)} apart, the image's "
                f"{_millimetres(other.spacing)}"
            )
        if angle > 0.5:
            return f"its axes are turned by {angle:.1f} degrees against the image's"
        shift = (start - np.rint(start)) * other.spacing
        return (
            f"its voxel centres lie {np.linalg.norm(shift):.2f} mm beside the image's, whose "
            f"voxels are {_millimetres(other.spacing)} apart"
        )


@dataclass(frozen=True)
class Placement:
    """How a grid lies on another of the same lattice.

    Attributes
    ----------
    axes : of the other grid, for each axis of this one.
    signs : 1, or -1 where an axis runs the other way.
    start : index on the other grid of this one's voxel (0, 0, 0); may lie outside of it.
    """

    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    start: tuple[int, int, int]

    def put(self, array: NDArray[Any], target: NDArray[Any]) -> int:
        """Set ``target`` (IxJxK) to what ``array`` says, where it says something (not 0).

        Returns
        -------
        Voxels of ``array`` that are not 0 and lie outside of ``target``.
        """
        taken: list[slice] = [slice(0)] * 3
        kept: list[slice] = [slice(0)] * 3
        for i, axis in enumerate(self.axes):
            first = self.start[axis]
            length, room = array.shape[i], target.shape[axis]
            if self.signs[i] > 0:
                low, high = max(0, -first), min(length, room - first)
                kept[axis] = slice(first + low, first + high)
            else:
                low, high = max(0, first - room + 1), min(length, first + 1)
                kept[axis] = slice(first - high + 1, first - low + 1)
            if low >= high:
                return int(np.count_nonzero(array))
            taken[i] = slice(low, high)
        part = array[tuple(taken)]
        outside = int(np.count_nonzero(array)) - int(np.count_nonzero(part))
        part = part[tuple(slice(None, None, sign) for sign in self.signs)]
        part = part.transpose([self.axes.index(axis) for axis in range(3)])
        view = target[tuple(kept)]
        np.copyto(view, part, where=part != 0)
        return outside


def check_overlap(
    segmentation: Path,
    image: Path,
    before: Mapping[Any, NDArray[Any]],
    after: Mapping[Any, NDArray[Any]],
    outside: int,
) -> tuple[str, ...]:
    """Return what is to be said of voxels that were left out.

    Raises
    ------
    InputError
        If something was drawn, and none of it lies in the image.
    """
    if any(mask.any() for mask in before.values()) and not any(m.any() for m in after.values()):
        raise InputError(
            f"nothing that is drawn in {segmentation} lies within {image}. Is it of another image, "
            "or was one of them moved?"
        )
    if not outside:
        return ()
    return (f"{segmentation.name}: {outside} voxels lie outside the image and were left out",)


def resample(mask: NDArray[Any], grid: Lattice, onto: Lattice) -> NDArray[Any]:
    """Take each voxel of ``onto`` from the nearest of ``grid``; 0 outside of it."""
    to_grid = np.linalg.inv(grid.affine) @ onto.affine
    resampled = np.zeros(onto.shape, mask.dtype)
    j, k = np.meshgrid(*[np.arange(size) for size in onto.shape[1:]], indexing="ij")
    plane = to_grid[:3, 1, None, None] * j + to_grid[:3, 2, None, None] * k
    plane += to_grid[:3, 3, None, None]
    limits = np.array(grid.shape)[:, None, None]
    for i in range(onto.shape[0]):  # a plane at a time, so that memory stays bounded
        index = np.floor(plane + to_grid[:3, 0, None, None] * i + 0.5).astype(np.int64)
        inside = ((index >= 0) & (index < limits)).all(axis=0)
        index = index[:, inside]
        resampled[i][inside] = mask[index[0], index[1], index[2]]
    return resampled


def _index_map(grid: Lattice, onto: Lattice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return 3x3 and offset, from index on one grid to index on the other.

    A step along an axis of one voxel is not known; it is taken from the other grid.
    """
    mine, theirs = grid.affine[:3, :3].copy(), onto.affine[:3, :3].copy()
    unit_mine, unit_theirs = (m / np.linalg.norm(m, axis=0) for m in (mine, theirs))
    axes = _nearest_axes(unit_theirs.T @ unit_mine)
    for i, axis in enumerate(axes):
        sign = 1.0 if unit_theirs[:, axis] @ unit_mine[:, i] >= 0 else -1.0
        if grid.shape[i] == 1 and abs(unit_theirs[:, axis] @ unit_mine[:, i]) > 0.5:
            mine[:, i] = sign * theirs[:, axis]
        elif onto.shape[axis] == 1 and abs(unit_theirs[:, axis] @ unit_mine[:, i]) > 0.5:
            theirs[:, axis] = sign * mine[:, i]
    back = np.linalg.inv(theirs)
    return back @ mine, back @ (grid.affine[:3, 3] - onto.affine[:3, 3])


def _nearest_axes(matrix: NDArray[np.float64]) -> list[int]:
    """Return the row whose entry is largest for each column, every row once."""
    strength = np.abs(matrix)
    best = max(
        permutations(range(3)), key=lambda order: sum(strength[order[i], i] for i in range(3))
    )
    return list(best)


def _millimetres(spacing: tuple[float, ...]) -> str:
    return " x ".join(f"{size:.4g}" for size in spacing) + " mm"
