"""How well a mask agrees with its reference: Dice, IoU, HD95, surface Dice, volumes.

Of images (HxW) and volumes (IxJxK) alike. Rules, since tools differ by over 100 mm in Hausdorff
distance:

- **Surface**: pixels (voxels) of the mask with one of their 4 (6) neighbours outside of it; what
  lies beyond the image's border counts as outside.
- **HD95**: the larger of the two directed 95th percentiles (linear interpolation) of distances
  between the centres of surface pixels, as MONAI's ``HausdorffDistanceMetric(percentile=95)``.
- **Surface Dice** (normalised surface distance): the share of both surfaces' pixels that lie within
  the tolerance of the other surface, each pixel counting as one, as MONAI's ``SurfaceDiceMetric``.
  ``surface-distance`` weighs them by their area instead, which differs where voxels are not cubes.
- **Empty masks**: both empty is agreement (Dice, IoU and surface Dice 1, HD95 0); one empty is
  Dice, IoU and surface Dice 0 and no HD95 (NaN): a distance to nothing has no length. MONAI and
  ``surface-distance`` give NaN where both are empty.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError

__all__ = ["TOLERANCE", "Agreement", "compare_masks", "ndimage"]

Mask = NDArray[np.bool_]
TOLERANCE = 2.0
"""Of surface Dice, in mm (pixels without a spacing)."""


@dataclass(frozen=True)
class Agreement:
    """A predicted mask against its reference.

    ``hd95`` is in the unit of the spacing (pixels without one); ``reference_volume`` and
    ``predicted_volume`` are in its square, or, of volumes, its cube.
    """

    dice: float
    iou: float
    hd95: float
    surface_dice: float
    reference_volume: float
    predicted_volume: float


def compare_masks(
    predicted: Mask,
    reference: Mask,
    spacing: Sequence[float] | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> Agreement:
    """Compare two boolean masks, HxW or IxJxK.

    Parameters
    ----------
    spacing : mm between pixels along each axis of the array; None: distances in pixels.
    tolerance : of surface Dice, in the unit of the spacing.

    Raises
    ------
    InputError
        On masks of different shape, a spacing that is not positive, or a negative tolerance.
    """
    if predicted.shape != reference.shape:
        raise InputError(f"masks differ in shape: {predicted.shape} and {reference.shape}.")
    size = tuple(spacing or (1.0,) * predicted.ndim)
    if len(size) != predicted.ndim or not all(0 < step < math.inf for step in size):
        raise InputError(
            f"spacing must be {predicted.ndim} positive numbers (mm), one for each axis, "
            f"got {spacing}."
        )
    if not 0 <= tolerance < math.inf:
        raise InputError(f"the tolerance must be a number from 0, got {tolerance}.")
    common = int(np.count_nonzero(predicted & reference))
    found, wanted = int(np.count_nonzero(predicted)), int(np.count_nonzero(reference))
    total = found + wanted
    there, back = _surface_distances(predicted, reference, size)
    return Agreement(
        dice=2.0 * common / total if total else 1.0,
        iou=common / (total - common) if total else 1.0,
        hd95=_hausdorff95(there, back) if found and wanted else math.nan if total else 0.0,
        surface_dice=_surface_dice(there, back, tolerance) if total else 1.0,
        reference_volume=wanted * math.prod(size),
        predicted_volume=found * math.prod(size),
    )


def _hausdorff95(there: NDArray[np.float64], back: NDArray[np.float64]) -> float:
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _surface_dice(there: NDArray[np.float64], back: NDArray[np.float64], tolerance: float) -> float:
    within = np.count_nonzero(there <= tolerance) + np.count_nonzero(back <= tolerance)
    return float(within / (there.size + back.size))


def _surface_distances(
    first: Mask, second: Mask, spacing: tuple[float, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how far each surface pixel of one mask is from the other's surface, both ways.

    Infinitely far, where the other has none.
    """
    image = ndimage()
    window = _bounding_box(first | second)  # distances do not depend on what lies around
    surfaces = [mask & ~image.binary_erosion(mask) for mask in (first[window], second[window])]
    directed = []
    for here, there in (surfaces, surfaces[::-1]):
        if there.any():
            distances = image.distance_transform_edt(~there, sampling=spacing)[here]
        else:
            distances = np.full(np.count_nonzero(here), np.inf)
        directed.append(distances)
    return directed[0], directed[1]


def ndimage() -> Any:
    """Return what measures distances; ModuleNotFoundError where it is not installed.

    It comes with the extra ``evaluate``: segmenting needs no SciPy.
    """
    return importlib.import_module("scipy.ndimage")


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    axes = range(mask.ndim)
    extents = [mask.any(axis=tuple(other for other in axes if other != axis)) for axis in axes]
    found = [np.flatnonzero(extent) for extent in extents]
    return tuple(slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0) for at in found)
