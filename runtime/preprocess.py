"""From a caller's image to what the networks see: intensities, then geometry, then normalisation.

The intensity rule is part of a library: exemplars and queries go through the same one, and it is
written down with them. Images are squashed to the network's square, as SAM 2's own predictor does;
pixel centres lie at half-integer coordinates throughout (OpenCV's and PyTorch's convention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import InputError

__all__ = ["Intensity", "prepare_image", "prepare_mask", "scale_intensities"]

Mode = Literal["percentile", "range", "window"]


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


def scale_intensities(image: NDArray[Any], intensity: Intensity) -> NDArray[np.float32]:
    """Map an image HxW or HxWx3 of any real dtype to float32 in 0..1.

    All channels share one window, so that colours keep their hue. A constant image becomes 0.
    """
    if intensity.mode == "percentile":
        low, high = np.percentile(image, [intensity.low, intensity.high])
        if low == high:  # mostly background: the percentiles fall on it
            low, high = float(image.min()), float(image.max())
    elif intensity.mode == "window":
        low, high = intensity.low, intensity.high
    elif np.issubdtype(image.dtype, np.integer):
        low, high = np.iinfo(image.dtype).min, np.iinfo(image.dtype).max
    else:
        low, high = 0.0, 1.0
    if low == high:
        return np.zeros(image.shape, np.float32)
    scaled = (image.astype(np.float32) - np.float32(low)) * np.float32(
        1.0 / (float(high) - float(low))
    )
    clipped: NDArray[np.float32] = np.clip(scaled, 0.0, 1.0, out=scaled)
    return clipped


def prepare_image(
    scaled: NDArray[np.float32], out: NDArray[np.float32], normalisation: Normalisation
) -> None:
    """Resize a scaled image HxW or HxWx3 (RGB) and normalise it into ``out``, 1x3xSxS float32.

    Shrinking averages over area, enlarging interpolates bilinearly.
    """
    side = out.shape[-1]
    shrink = scaled.shape[0] > side or scaled.shape[1] > side
    method = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    resized = (
        scaled
        if scaled.shape[:2] == (side, side)
        else cv2.resize(scaled, (side, side), interpolation=method)
    )
    for channel in range(3):
        plane = resized if resized.ndim == 2 else resized[..., channel]
        np.subtract(plane, np.float32(normalisation.mean[channel]), out=out[0, channel])
        out[0, channel] *= np.float32(1.0 / normalisation.std[channel])


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
