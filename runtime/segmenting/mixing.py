"""What a correction leaves of the mask that a person saw before.

A mask decoder answers each point with a whole new mask, also far from where the person looked. Of a
mask that was good that takes more than the point gives. So the new answer holds where it does what
was asked for: in the piece of the change that the point lies in, as far as that piece is wide. For
everywhere else both masks speak, by the mean of their logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.runtime.segmenting.prompts import FIRST_CORNER, INSIDE, Grid, Point

__all__ = ["mix"]

REACH = 1.0
"""How far from a point the new answer holds alone, in half widths of the change there, and ..."""
MARGIN = 1.0
"""... cells of the logits beyond that."""
KEPT = 0.5
"""Share of the former logits elsewhere. All three were chosen by ``recallseg bench clicks``."""

Plane = NDArray[np.float32]


def mix(
    before: Plane | None, after: Plane, points: Sequence[Point], new: Sequence[Point], grid: Grid
) -> Plane:
    """Return the logits (S/4)x(S/4) of a corrected mask.

    Parameters
    ----------
    before : those that the person saw; None if there was no mask.
    after : those that the decoder made of the points and of ``before``.
    points : all since the mask was last drawn or boxed.
    new : which of them are new.
    grid : that of the image and of the logits.

    Returns
    -------
    ndarray
        ``after`` itself where there was no mask or a box begins anew, where the decoder does not do
        what a new point says, and where the mixed mask would contradict more points.
    """
    if before is None or not (before > 0).any() or any(p.label >= FIRST_CORNER for p in new):
        return after
    asked = np.zeros(after.shape, bool)
    for point in new:
        piece = _piece(before, after, point, grid)
        if piece is None:
            return after
        asked |= piece
    round_it = cv2.dilate(asked.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    own = asked | (round_it & ((before > 0) == (after > 0)))
    mixed: Plane = np.where(own, after, KEPT * before + (1 - KEPT) * after).astype(np.float32)
    return mixed if _agreed(mixed, points, grid) >= _agreed(after, points, grid) else after


def _piece(before: Plane, after: Plane, point: Point, grid: Grid) -> NDArray[np.bool_] | None:
    """Return the cells that change as a point says, and are near it; None if the point is not met.

    Empty where the mask before did what the point says already.
    """
    y, x = grid.cell(point)
    near = slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2)
    inside = point.label == INSIDE
    changed = ((after > 0) == inside) & ((before > 0) != inside)
    _, parts = cv2.connectedComponents(changed.astype(np.uint8), connectivity=4)
    own = {int(parts[y, x])} if parts[y, x] else {int(part) for part in np.unique(parts[near])}
    own.discard(0)
    if not own:
        met: bool = (before[y, x] > 0) == inside
        return np.zeros(after.shape, bool) if met else None
    piece = np.isin(parts, [*own])
    width = cv2.distanceTransform(piece.astype(np.uint8), cv2.DIST_L2, 5)[near].max()
    rows, columns = np.indices(piece.shape)
    reached: NDArray[np.bool_] = np.hypot(rows - y, columns - x) <= REACH * width + MARGIN
    return piece & reached


def _agreed(logits: Plane, points: Sequence[Point], grid: Grid) -> int:
    """Return how many points a mask does as they say."""
    return sum(
        bool((logits[grid.cell(point)] > 0) == (point.label == INSIDE))
        for point in points
        if point.label < FIRST_CORNER
    )
