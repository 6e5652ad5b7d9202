"""What a person says of one structure, from an image's own pixels to the network's.

Coordinates are those of the image: x to the right, y down, in pixels whose centres lie at whole
numbers, so that an image spans -0.5 to its width (height) - 0.5. In the network's square a pixel's
centre lies at a whole number too, as the published predictors have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.composition import Prompts
from recallseg.engines.errors import InputError
from recallseg.engines.specs import MOST_POINTS, Geometry

__all__ = ["Grid", "Point", "covered", "deepest", "logits_of", "polygon_mask", "sample_stroke"]

OUTSIDE, INSIDE, FIRST_CORNER, SECOND_CORNER = 0, 1, 2, 3
NO_POINT = -1
SURE = 10.0
"""Logit of what a person drew."""
STROKE_POINTS = 6
"""Points that stand for one scribble."""


@dataclass(frozen=True)
class Point:
    """A place in the image's pixels, and what it says: one of the labels of ``correct``."""

    x: float
    y: float
    label: int


@dataclass(frozen=True)
class Grid:
    """An image's grid and the network's.

    Attributes
    ----------
    shape : height and width of the image in pixels.
    geometry : of the bundle.
    """

    shape: tuple[int, int]
    geometry: Geometry

    def check(self, x: Any, y: Any, what: str = "a point") -> tuple[float, float]:
        """Return a place in the image; InputError if it is none."""
        try:
            place = float(x), float(y)
        except (TypeError, ValueError):
            place = math.nan, math.nan
        if isinstance(x, (bool, np.bool_)) or isinstance(y, (bool, np.bool_)):
            place = math.nan, math.nan
        height, width = self.shape
        if not (-0.5 <= place[0] <= width - 0.5 and -0.5 <= place[1] <= height - 0.5):
            raise InputError(
                f"{what} must lie in the image, x -0.5 to {width - 0.5:g} and y -0.5 to "
                f"{height - 0.5:g} (pixels, x to the right, y down, centres at whole numbers); got "
                f"x = {x!r}, y = {y!r}."
            )
        return place

    def cell(self, point: Point) -> tuple[int, int]:
        """Return row and column of the logits that a point lies in."""
        size = self.geometry.logit_size
        height, width = self.shape
        row, column = (point.y + 0.5) * size / height, (point.x + 0.5) * size / width
        return min(size - 1, max(0, int(row))), min(size - 1, max(0, int(column)))

    def prompts(self, points: Sequence[Point], prior: NDArray[np.float32] | None) -> Prompts:
        """Return what ``correct`` takes: points, or one that is none, and the mask before."""
        height, width = self.shape
        side = self.geometry.image_size
        chosen = self._chosen(points) or [Point(0.0, 0.0, NO_POINT)]
        places = [
            ((p.x + 0.5) * side / width - 0.5, (p.y + 0.5) * side / height - 0.5) for p in chosen
        ]
        size = self.geometry.logit_size
        logits = np.zeros((1, 1, size, size), np.float32)
        if prior is not None:
            logits[0, 0] = prior
        return Prompts(
            np.asarray([places], np.float32),
            np.asarray([[p.label for p in chosen]], np.int32),
            logits,
            np.asarray([prior is not None]),
        )

    @staticmethod
    def _chosen(points: Sequence[Point]) -> list[Point]:
        """Return as many as one call takes: a box, then the newest; the prior knows the others."""
        box = [p for p in points if p.label >= FIRST_CORNER]
        rest = [p for p in points if p.label < FIRST_CORNER]
        return box + rest[max(0, len(rest) - (MOST_POINTS - len(box))) :]


def logits_of(mask: NDArray[np.bool_], size: int) -> NDArray[np.float32]:
    """Return logits ``size`` x ``size`` of a mask HxW that a person drew: +-10, less at edges."""
    share = covered(mask, size)
    if mask.any() and not (share > 0.5).any():  # smaller than a cell: the one that it covers most
        share.flat[int(np.argmax(share))] = 1.0
    logits: NDArray[np.float32] = (share * 2 - 1) * np.float32(SURE)
    return logits


def covered(mask: NDArray[np.bool_], size: int) -> NDArray[np.float32]:
    """Return which share of each of ``size`` x ``size`` cells a mask HxW covers."""
    shrink = mask.shape[0] > size or mask.shape[1] > size
    method = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    share = cv2.resize(mask.astype(np.float32), (size, size), interpolation=method)
    return np.asarray(share, np.float32)


def polygon_mask(
    places: Sequence[tuple[float, float]], shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Return the mask HxW of a closed outline, edges included."""
    mask = np.zeros(shape, np.uint8)
    shift = 4  # sixteenths of a pixel
    outline = np.round(np.asarray(places, float) * 2**shift).astype(np.int32)
    cv2.fillPoly(mask, [outline], 1, shift=shift)
    return mask.astype(bool)


def deepest(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return x and y of the pixel of a mask HxW that lies farthest from its edge."""
    inner = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1]
    y, x = divmod(int(np.argmax(inner)), mask.shape[1])
    return x, y


def sample_stroke(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most :data:`STROKE_POINTS` places along a stroke, evenly by its length."""
    line = np.asarray(places, float)
    steps = np.hypot(*np.diff(line, axis=0).T) if len(line) > 1 else np.zeros(0)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    if along[-1] == 0:
        return [(float(line[0, 0]), float(line[0, 1]))]
    count = int(min(STROKE_POINTS, max(2, math.ceil(along[-1]))))
    # The middles of equal parts: ends of a stroke are where hands slip.
    at = (np.arange(count) + 0.5) * along[-1] / count
    return [
        (float(x), float(y))
        for x, y in zip(
            np.interp(at, along, line[:, 0]), np.interp(at, along, line[:, 1]), strict=True
        )
    ]
