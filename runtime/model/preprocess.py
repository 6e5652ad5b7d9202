"""From a caller's image to what the networks see: intensities, then geometry, then normalisation.

The intensity rule is part of a library: exemplars and queries go through the same one, and it is
written down with them. Images are squashed to the network's square, as SAM 2's own predictor does;
pixel centres lie at half-integer coordinates throughout (OpenCV's and PyTorch's convention). The
arithmetic is :class:`recallseg.engines.pixels.Pixels`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.pixels import Pixels, open_pixels
from recallseg.engines.pixels.interface import Target, window_gain
from recallseg.engines.pixels.opencv import scaled
from recallseg.runtime.frozen import public

__all__ = [
    "Intensity",
    "intensity_window",
    "planes_of",
    "prepare_image",
    "prepare_mask",
    "scale_intensities",
]

Mode = Literal["percentile", "range", "window"]


@public
@dataclass(frozen=True)
class Intensity:
    """How pixel values become 0..1.

    Attributes
    ----------
    mode : ``percentile`` maps the given percentiles of each image to 0 and 1 (the default: scanners
        and gains differ); ``window`` maps fixed values (Hounsfield units, say); ``range`` maps the
        whole range of an integer dtype, and 0..1 of a float one.
    low, high : percentiles, or the window's ends in the image's own unit.
    """

    mode: Mode = "percentile"
    low: float = 1.0
    high: float = 99.0

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(
                f"there is no intensity mode '{self.mode}'; choose {', '.join(get_args(Mode))}."
            )
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise InputError(
                f"intensity ends must be finite and low < high, got {self.low}..{self.high}."
            )
        if self.mode == "percentile" and not (self.low >= 0 and self.high <= 100):
            raise InputError(f"percentiles lie in 0..100, got {self.low}..{self.high}.")

    def to_json(self) -> dict[str, Any]:
        """Return the fields for storage."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Intensity:
        """Rebuild from storage."""
        return cls(**data)


def intensity_window(
    image: NDArray[Any], intensity: Intensity, pixels: Pixels
) -> tuple[float, float]:
    """Return the intensities that become 0 and 1; equal ones for a constant image.

    All channels share one window, so that colours keep their hue.

    Parameters
    ----------
    image : HxW or HxWx3 of any integer or floating dtype.

    Raises
    ------
    InputError
        For an empty image, or NaN or infinite pixels.
    """
    if intensity.mode == "percentile":
        low, high = pixels.percentiles(image, intensity.low, intensity.high)
        if low == high:  # mostly background: the percentiles fall on it
            low, high = float(image.min()), float(image.max())
        return low, high
    if intensity.mode == "window":
        return intensity.low, intensity.high
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        return float(limits.min), float(limits.max)
    return 0.0, 1.0


def scale_intensities(image: NDArray[Any], intensity: Intensity) -> NDArray[np.float32]:
    """Map an image HxW or HxWx3 of any real dtype to float32 in 0..1, to be looked at.

    A constant image becomes 0. Raises what :func:`prepare_image` does.
    """
    low, high = intensity_window(image, intensity, open_pixels())
    return scaled(image, np.float32(low), window_gain(low, high))


def planes_of(scaled: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return an image HxW or HxWx3 of intensities 0..1 as 1x3xHxW."""
    if scaled.ndim == 2:
        return np.broadcast_to(scaled, (1, 3, *scaled.shape))
    planes: NDArray[np.float32] = scaled.transpose(2, 0, 1)[None]
    return planes


def prepare_image(
    image: NDArray[Any], intensity: Intensity, pixels: Pixels, *targets: Target
) -> None:
    """Make network inputs of an image HxW or HxWx3 (RGB) of any real dtype.

    Parameters
    ----------
    targets : each an array 1x3xSxS to write into, float32 or float16, and its normalisation.

    Raises
    ------
    InputError
        For another shape or dtype, NaN or infinite pixels, or intensities beyond float32.
    """
    pixels.prepare(image, intensity_window(image, intensity, pixels), targets)


def prepare_mask(mask: NDArray[np.bool_], out: NDArray[np.float32]) -> None:
    """Resize a mask HxW into ``out``, SxS float32 of 0 and 1.

    A pixel is set where at least half of it is covered; a structure so small that this leaves
    nothing keeps the pixel that it covers most, since an empty mask would mean "absent".
    """
    side = out.shape[-1]
    shrink = mask.shape[0] > side or mask.shape[1] > side
    method = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    coverage = cv2.resize(mask.astype(np.float32), (side, side), interpolation=method)
    out[:] = coverage >= 0.5
    if not out.any() and mask.any():
        out.flat[int(np.argmax(coverage))] = 1.0
