"""Pixels by OpenCV and numpy: on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Optional

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.pixels.interface import Pixels, Target

__all__ = ["OpenCvPixels", "resize_plane", "scaled"]

_BLOCK = 1 << 16
_SIGN_AND_BITS = np.int32(-0x70002000)  # 0x8FFFE000: sign, exponent and mantissa once shifted by 13
_REBIAS = np.float32(2.0**112)  # moves fp16's exponent bias (15) to fp32's (127)


class OpenCvPixels(Pixels):
    """See :class:`~recallseg.engines.pixels.interface.Pixels`."""

    name: ClassVar[str] = "opencv"

    def __init__(self) -> None:
        self._grids = np.zeros((2, 0), np.float32)  # logits of one structure, and the highest

    @property
    def detail(self) -> str:
        """The library's version."""
        return f"OpenCV {cv2.__version__}"

    @property
    def nbytes(self) -> int:
        """Bytes of two buffers on the grid of the largest image so far."""
        return self._grids.nbytes

    def _ordered(self, image: NDArray[Any], ranks: Sequence[int]) -> list[float]:
        if image.dtype not in (np.uint8, np.uint16):
            return super()._ordered(image, ranks)
        # Few values: counting them takes half the time of sorting pixels apart.
        counted = np.cumsum(np.bincount(image.reshape(-1)))
        return [float(value) for value in np.searchsorted(counted, ranks, side="right")]

    def _prepare(
        self, image: NDArray[Any], low: np.float32, gain: np.float32, targets: Sequence[Target]
    ) -> None:
        values = scaled(image, low, gain)
        for out, normalisation in targets:
            side = out.shape[-1]
            resized = resize_plane(values, (side, side))
            for channel in range(3):
                plane = resized if resized.ndim == 2 else resized[..., channel]
                to = out[0, channel]
                wide = to if to.dtype == np.float32 else np.empty_like(to, np.float32)
                np.subtract(plane, np.float32(normalisation.mean[channel]), out=wide)
                gain = np.float32(1.0 / normalisation.std[channel])
                np.multiply(wide, gain, out=to, casting="same_kind")

    def _finish(
        self,
        logits: NDArray[np.float32],
        present: Sequence[bool],
        label_map: NDArray[np.uint8],
        masks: NDArray[np.bool_],
    ) -> None:
        upsampled, highest = self._two_grids(*label_map.shape)
        highest.fill(0.0)
        label_map.fill(0)
        for index, plane in enumerate(logits):
            if not present[index]:
                masks[index].fill(False)
                continue
            resize_plane(plane, label_map.shape, upsampled)
            np.greater(upsampled, 0, out=masks[index])
            wins = upsampled > highest
            np.copyto(label_map, np.uint8(index + 1), where=wins)
            np.maximum(highest, upsampled, out=highest)

    def _gather(
        self,
        rows: Sequence[NDArray[Any]],
        out: NDArray[Any],
        scales: Optional[Sequence[NDArray[np.float32]]],
    ) -> None:
        for index, row in enumerate(rows):
            if scales is not None:
                # Copied first, which is exact: a product of two dtypes is half again as slow.
                np.copyto(out[index], row)
                np.multiply(out[index], scales[index][:, None], out=out[index], casting="same_kind")
            elif out.dtype == np.float32:
                _widen(row, out[index])
            else:
                out[index] = row

    def _two_grids(self, height: int, width: int) -> NDArray[np.float32]:
        """Return two HxW buffers; they grow when a larger image comes."""
        if self._grids.shape[1] < height * width:
            self._grids = np.zeros((2, height * width), np.float32)
        return self._grids[:, : height * width].reshape(2, height, width)


def scaled(image: NDArray[Any], low: np.float32, gain: np.float32) -> NDArray[np.float32]:
    """Return clip((image - low) * gain) in 0..1, float32, a new array."""
    values = image.astype(np.float32)
    with np.errstate(over="ignore"):  # what is beyond float32 is beyond the window, and clipped
        np.subtract(values, low, out=values)
        np.multiply(values, gain, out=values)
    return np.clip(values, 0.0, 1.0, out=values)


def resize_plane(
    image: NDArray[np.float32], shape: tuple[int, ...], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return an image hxw or hxwx3 on the grid of a shape HxW, resized as all pixels are."""
    shrink = shape[0] < image.shape[0] or shape[1] < image.shape[1]
    method = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
    resized: Any = cv2.resize(image, (shape[1], shape[0]), dst=out, interpolation=method)
    return resized  # type: ignore[no-any-return]


def _widen(tokens: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Convert finite fp16 to fp32, exactly, four times as fast as ``numpy.copyto``.

    Works on bits, block by block in cache: fp16's bits moved to fp32's places give the value times
    2**-112, subnormal numbers included. Both arrays must be C-contiguous and of equal size.
    """
    source = tokens.reshape(-1).view(np.int16)
    target = out.reshape(-1)
    bits = target.view(np.int32)
    for start in range(0, source.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        np.copyto(block, source[start : start + _BLOCK])
        np.left_shift(block, 13, out=block)
        np.bitwise_and(block, _SIGN_AND_BITS, out=block)
        floats = target[start : start + _BLOCK]
        np.multiply(floats, _REBIAS, out=floats)
