"""What is done to pixels, whoever does it: checks and meaning here, arithmetic in subclasses.

Resizing follows OpenCV, half-pixel centres throughout: bilinear where no axis shrinks, the mean
over area where both do (or one stays), and ``INTER_AREA``'s interpolation between cells where one
shrinks and the other grows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import floor, isnan, nan
from typing import Any, ClassVar, Optional

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import EngineRunError, InputError

__all__ = [
    "INPUT_DTYPES",
    "MOST_STRUCTURES",
    "PREPARE_TOLERANCE",
    "Pixels",
    "Target",
    "check_shape",
    "percentile_ranks",
    "shape_text",
    "window_gain",
]

PREPARE_TOLERANCE = 2e-6
"""Largest difference between two implementations of :meth:`Pixels.prepare` on the scale 0..1,
before normalisation: both round sums of products of numbers up to 1 to 24 bits, in another order.
fp16 outputs may differ by one unit in the last place besides."""

INPUT_DTYPES = (np.float32, np.float16)
MOST_STRUCTURES = 255  # values of an 8-bit label map, 0 being background

Target = tuple[NDArray[Any], Normalisation]
"""A network input to fill, 1x3xSxS float32 or float16, C-contiguous, and its normalisation."""

_LARGEST = float(np.finfo(np.float32).max)


class Pixels(ABC):
    """The runtime's way of touching pixels. One thread at a time: implementations hold buffers."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def detail(self) -> str:
        """What computes: a version, or the level of vector units."""

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that it holds."""
        return 0

    def percentiles(self, image: NDArray[Any], low: float, high: float) -> tuple[float, float]:
        """Return two percentiles (0..100) of all pixels, linear between neighbours in order.

        As ``numpy.percentile``, whose difference of neighbours overflows for narrow integers.

        Parameters
        ----------
        image : HxW or HxWx3 of any integer or floating dtype and strides.

        Raises
        ------
        InputError
            If the image has another shape, is empty, or has NaN or infinite pixels.
        """
        _check_image(image)
        ranks, shares = percentile_ranks(image.size, low, high)
        ordered = self._ordered(image, ranks)
        if isnan(ordered[0]):
            raise InputError(
                "the image has NaN or infinite pixels. Replace them, for example with "
                "numpy.nan_to_num(image)."
            )
        ends = []
        for share, below, above in zip(shares, ordered[::2], ordered[1::2], strict=True):
            # From the nearer neighbour, so that neither end is missed by rounding.
            ends.append(
                below + (above - below) * share
                if share < 0.5
                else above - (above - below) * (1 - share)
            )
        return ends[0], ends[1]

    def prepare(
        self, image: NDArray[Any], window: tuple[float, float], targets: Sequence[Target]
    ) -> None:
        """Map intensities to 0..1, clip, resize to each target's square, and normalise.

        Parameters
        ----------
        image : HxW (grey, replicated to three channels) or HxWx3 (RGB), any integer or floating
            dtype and strides, finite.
        window : intensities that become 0 and 1; equal ones make everything 0.
        targets : written into.

        Raises
        ------
        InputError
            If the image or a target has another shape or dtype, or the window is beyond float32.
        """
        _check_image(image)
        for out, _ in targets:
            _check_target(out)
        self._prepare(image, np.float32(window[0]), window_gain(*window), targets)

    def finish(
        self,
        logits: NDArray[np.float32],
        present: Sequence[bool],
        label_map: NDArray[np.uint8],
        masks: NDArray[np.bool_],
    ) -> None:
        """Resize logits to the outputs' grid, threshold at 0, and resolve overlaps by logit.

        Parameters
        ----------
        logits : nxhxw, C-contiguous.
        present : structures that are absent get an empty mask, whatever their logits.
        label_map : uint8 HxW of any strides, written: structure i has the value i + 1.
        masks : boolean nxHxW of any strides, written.

        Raises
        ------
        InputError
            If a shape or dtype does not fit.
        EngineRunError
            If logits of a present structure are NaN or infinite.
        """
        n = len(logits)
        if logits.ndim != 3 or logits.dtype != np.float32 or not logits.flags.c_contiguous:
            raise InputError(
                f"logits must be float32 nxhxw, C-contiguous, got {logits.dtype} of shape "
                f"{logits.shape}."
            )
        if n > MOST_STRUCTURES or 0 in logits.shape[1:] or len(present) != n:
            raise InputError(
                f"expected up to {MOST_STRUCTURES} structures with logits and as many flags, got "
                f"logits {logits.shape} and {len(present)} flags."
            )
        if label_map.dtype != np.uint8 or label_map.ndim != 2:
            raise InputError(
                f"the label map must be uint8 HxW, got {label_map.dtype} {label_map.shape}."
            )
        if masks.dtype != np.bool_ or masks.shape != (n, *label_map.shape):
            raise InputError(
                f"masks must be boolean {(n, *label_map.shape)}, got {masks.dtype} {masks.shape}."
            )
        for index, plane in enumerate(logits):
            if present[index] and not np.isfinite(plane).all():
                raise EngineRunError(
                    f"the logits of structure {index + 1} of {n} have NaN or infinite values. "
                    "Check the engine with 'recallseg verify', or use a wider precision."
                )
        self._finish(logits, present, label_map, masks)

    def gather(
        self,
        rows: Sequence[NDArray[Any]],
        out: NDArray[Any],
        scales: Optional[Sequence[NDArray[np.float32]]] = None,
    ) -> None:
        """Decode stored memories into the rows of a network input.

        Parameters
        ----------
        rows : k arrays Txd, C-contiguous, finite float16, or int8 with one scale per token.
        out : kxTxd float32 or float16, C-contiguous, written. float16 to float32 is exact.
        scales : for int8: k arrays of T float32. Memory = int8 value times its token's scale: the
            d numbers of a token come out of one layer normalisation, while tokens differ.

        Raises
        ------
        InputError
            If shapes or dtypes do not fit, or scales are missing or too many.
        """
        if out.ndim != 3 or out.dtype not in INPUT_DTYPES or not out.flags.c_contiguous:
            raise InputError(
                f"memories go into float32 or float16 kxTxd, C-contiguous, got {out.dtype} "
                f"{out.shape}."
            )
        wanted = np.float16 if scales is None else np.int8
        if len(rows) != len(out) or (scales is not None and len(scales) != len(out)):
            raise InputError(f"expected {len(out)} memories, and as many scales for int8.")
        for row in rows:
            if row.shape != out.shape[1:] or row.dtype != wanted or not row.flags.c_contiguous:
                raise InputError(
                    f"a memory must be {np.dtype(wanted)} {out.shape[1:]}, C-contiguous, got "
                    f"{row.dtype} {row.shape}."
                )
        for scale in scales or ():
            if scale.shape != out.shape[1:2] or scale.dtype != np.float32:
                raise InputError(
                    f"scales must be float32 {out.shape[1:2]}, got {scale.dtype} {scale.shape}."
                )
        self._gather(rows, out, scales)

    def _ordered(self, image: NDArray[Any], ranks: Sequence[int]) -> list[float]:
        """Return the values that would stand at ``ranks`` if all pixels were sorted.

        NaN if any is NaN or infinite: these end up first or last.
        """
        flat = np.partition(image.reshape(-1), sorted({*ranks, 0, image.size - 1}))
        if not np.isfinite(flat[[0, -1]].astype(np.float64)).all():
            return [nan] * len(ranks)
        return [float(flat[rank]) for rank in ranks]

    @abstractmethod
    def _prepare(
        self, image: NDArray[Any], low: np.float32, gain: np.float32, targets: Sequence[Target]
    ) -> None: ...

    @abstractmethod
    def _finish(
        self,
        logits: NDArray[np.float32],
        present: Sequence[bool],
        label_map: NDArray[np.uint8],
        masks: NDArray[np.bool_],
    ) -> None: ...

    @abstractmethod
    def _gather(
        self,
        rows: Sequence[NDArray[Any]],
        out: NDArray[Any],
        scales: Optional[Sequence[NDArray[np.float32]]],
    ) -> None: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.detail})"


def percentile_ranks(size: int, *percentiles: float) -> tuple[list[int], list[float]]:
    """Return the two ranks that each percentile of ``size`` numbers lies between, and how far."""
    places = [q / 100 * (size - 1) for q in percentiles]
    ranks = [min(floor(place) + step, size - 1) for place in places for step in (0, 1)]
    return ranks, [place - floor(place) for place in places]


def window_gain(low: float, high: float) -> np.float32:
    """Return what intensities above ``low`` are multiplied with; 0 for an empty window.

    Raises
    ------
    InputError
        If an end is NaN or beyond float32, or they are the wrong way round.
    """
    if not (abs(low) <= _LARGEST and abs(high) <= _LARGEST and low <= high):
        raise InputError(
            f"the window {low}..{high} cannot be used: expected low <= high, both within "
            f"{_LARGEST:.3g}. Scale the image."
        )
    # Closer together than float32 can divide by: as steep as can be.
    gain: np.float32 = np.float32(min(1 / (high - low), _LARGEST) if high > low else 0.0)
    return gain


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise InputError unless an image of this shape is HxW (grey) or HxWx3 (RGB), and not empty.

    HxWx1 and HxWx4 are refused rather than guessed at.
    """
    if len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
        raise InputError(
            f"an image must have shape HxW (grey) or HxWx3 (RGB), got "
            f"{shape_text(shape)}.{_shape_hint(shape)}"
        )
    if 0 in shape:
        raise InputError(f"the image is empty: its shape is {shape_text(shape)}.")


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as people write it: 480x640x3."""
    return "x".join(str(size) for size in shape) or "no axes"


def _shape_hint(shape: tuple[int, ...]) -> str:
    last = shape[-1] if len(shape) == 3 else 0
    if last == 1:
        return " Drop the last axis: image[..., 0]."
    if last == 4:
        return " Drop the opacity channel: image[..., :3]."
    if len(shape) == 3 and shape[0] == 3:
        return " Put the channels last: numpy.moveaxis(image, 0, -1)."
    if len(shape) == 3 and shape[0] == 1:
        return " Drop the first axis: image[0]."
    if len(shape) == 3:
        return " Of a volume, pass one slice at a time, or use segment_volume."
    return " Pass one image, without an axis of a batch." if len(shape) == 4 else ""


def _check_image(image: NDArray[Any]) -> None:
    check_shape(image.shape)
    if image.dtype.kind not in "iuf":
        raise InputError(f"an image must have an integer or floating dtype, got {image.dtype}.")


def _check_target(out: NDArray[Any]) -> None:
    side = out.shape[-1] if out.ndim else 0
    if out.shape != (1, 3, side, side) or side == 0 or out.dtype not in INPUT_DTYPES:
        raise InputError(
            f"a network input must be float32 or float16 1x3xSxS, got {out.dtype} {out.shape}."
        )
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise InputError("a network input must be C-contiguous and writeable.")
