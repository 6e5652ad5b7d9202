"""How an image is cut into slices, and what prompts that are drawn as pixels mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.volume import COARSER, Slicing, Volume

__all__ = ["Box", "box_of", "cuts_of", "outline_of", "scribble_points", "stack", "union_of"]

SCRIBBLE_POINTS = 12
"""That a scribble is taken for: it is sampled evenly."""

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Half-open ranges of voxels along the three axes."""


def scribble_points(mask: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """Return points (x, y) spread evenly over the pixels of a scribble; none if it is empty."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        return ()
    points = np.stack([xs, ys], 1).astype(np.float64)
    chosen = [int(((points - points.mean(0)) ** 2).sum(1).argmin())]
    distance = ((points - points[chosen[0]]) ** 2).sum(1)
    while len(chosen) < min(SCRIBBLE_POINTS, len(points)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
    return tuple((float(x), float(y)) for x, y in points[chosen])


def outline_of(mask: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """Return (x, y) along the outline of the largest part of what was drawn round something."""
    import cv2

    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not found:
        return ()
    largest = max(found, key=lambda each: (cv2.contourArea(each), len(each)))
    return tuple((float(x), float(y)) for x, y in largest[:, 0])


def stack(array: NDArray[Any], spacing: Iterable[float] | None = None) -> Volume:
    """Return an array IxJxK(x3) without a place in a patient as a volume."""
    affine = np.diag([*(spacing or (1.0, 1.0, 1.0)), 1.0])
    return Volume(array, affine, "image", measured=spacing is not None)


def cuts_of(volume: Volume) -> Mapping[int, Slicing]:
    """Return how to cut along each axis, the one that proposals go along first."""
    if volume.frame != "image":
        first = Slicing.of(volume)
        by_axis = {first.axis: first}
        for plane in ("axial", "coronal", "sagittal"):
            try:
                cut = Slicing.of(volume, plane)
            except InputError:  # of a single slice there is one plane
                continue
            by_axis.setdefault(cut.axis, cut)
        return by_axis
    thin = [axis for axis, extent in enumerate(volume.shape) if extent == 1]
    axes = [0, 1, 2]
    order = np.argsort(volume.spacing)
    if thin:
        axes = thin[:1]
    elif volume.spacing[order[2]] >= COARSER * volume.spacing[order[1]]:
        axes.sort(key=lambda axis: axis != order[2])
    cuts = {}
    for axis in axes:
        rows, columns = (one for one in range(3) if one != axis)
        cuts[axis] = Slicing(axis, rows, columns, False, False, "image")
    return cuts


def box_of(changed: NDArray[np.bool_]) -> Box | None:
    """Return the ranges of voxels that hold all that is set; None if nothing is."""
    spans = []
    for axis in range(3):
        hit = np.flatnonzero(changed.any(tuple(one for one in range(3) if one != axis)))
        if not len(hit):
            return None
        spans.append((int(hit[0]), int(hit[-1]) + 1))
    return spans[0], spans[1], spans[2]


def union_of(boxes: Iterable[Box | None]) -> Box | None:
    """Return the ranges that hold all boxes; None if there is none."""
    known = [box for box in boxes if box is not None]
    if not known:
        return None
    spans = [(min(b[axis][0] for b in known), max(b[axis][1] for b in known)) for axis in range(3)]
    return spans[0], spans[1], spans[2]
