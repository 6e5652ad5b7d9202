"""How well a mask agrees with its reference: Dice, IoU, HD95.

Rules, since tools differ by over 100 mm in Hausdorff distance:

- **Surface**: pixels of the mask with a neighbour (4-connected) outside of it; the image's border
  counts as outside.
- **HD95**: the larger of the two directed 95th percentiles (linear interpolation) of distances
  between surface pixel centres, as MONAI's ``HausdorffDistanceMetric(percentile=95)`` has it.
- **Empty masks**: both empty is agreement (Dice 1, IoU 1, HD95 0); one empty is Dice 0, IoU 0 and
  no HD95 (NaN): a distance to nothing has no length.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError

__all__ = ["Agreement", "compare_masks", "hausdorff95"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Agreement:
    """A predicted mask against its reference.

    ``hd95`` is in the unit of the spacing (pixels without one), volumes are in its square.
    """

    dice: float
    iou: float
    hd95: float
    reference_volume: float
    predicted_volume: float


def compare_masks(
    predicted: Mask, reference: Mask, spacing: tuple[float, float] | None = None
) -> Agreement:
    """Compare two boolean masks HxW.

    Parameters
    ----------
    spacing : pixel size in mm along rows (y) and columns (x); None: distances in pixels.

    Raises
    ------
    InputError
        On masks of different shape, or a spacing that is not positive.
    """
    if predicted.shape != reference.shape:
        raise InputError(f"masks differ in shape: {predicted.shape} and {reference.shape}.")
    rows, columns = spacing or (1.0, 1.0)
    if not (rows > 0 and columns > 0 and math.isfinite(rows * columns)):
        raise InputError(f"spacing must be positive (mm), got {spacing}.")
    common = int(np.count_nonzero(predicted & reference))
    found, wanted = int(np.count_nonzero(predicted)), int(np.count_nonzero(reference))
    total = found + wanted
    return Agreement(
        dice=2.0 * common / total if total else 1.0,
        iou=common / (total - common) if total else 1.0,
        hd95=hausdorff95(predicted, reference, (rows, columns)),
        reference_volume=wanted * rows * columns,
        predicted_volume=found * rows * columns,
    )


def hausdorff95(first: Mask, second: Mask, spacing: tuple[float, float] = (1.0, 1.0)) -> float:
    """Return the symmetric 95th-percentile Hausdorff distance of two masks HxW.

    0 when both are empty, NaN when one is.
    """
    ndimage = _ndimage()
    if not first.any() and not second.any():
        return 0.0
    if not first.any() or not second.any():
        return math.nan
    window = _bounding_box(first | second)  # distances do not depend on what lies around
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (first[window], second[window])]
    directed = [
        np.percentile(ndimage.distance_transform_edt(~there, sampling=spacing)[here], 95)
        for here, there in (surfaces, surfaces[::-1])
    ]
    return float(max(directed))


def _ndimage() -> Any:
    return importlib.import_module("scipy.ndimage")  # extra "evaluate": segmenting needs no SciPy


def _bounding_box(mask: Mask) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
