"""Pixels by the native kernels of ``engines/native/pixels``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Optional

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.pixels.interface import Pixels, Target

__all__ = ["NativePixels"]

DTYPES = (np.uint8, np.int16, np.uint16, np.float32)
"""Pixels that the kernels read as they are; others become float32, as the definition has it."""


class NativePixels(Pixels):
    """See :class:`~recallseg.engines.pixels.interface.Pixels`.

    Parameters
    ----------
    kernels : the extension module.
    threads : that share the rows of an image. One is best for most: the work is done in about a
        millisecond, and is bound by memory.
    """

    name: ClassVar[str] = "native"

    def __init__(self, kernels: Any, threads: int = 1) -> None:
        self._kernels = kernels
        self._threads = threads

    @property
    def detail(self) -> str:
        """The level of vector units in use: ``v4`` is AVX-512, ``v3`` AVX2 (x86-64 psABI)."""
        return f"vector units: {self._kernels.level()}"

    def _ordered(self, image: NDArray[Any], ranks: Sequence[int]) -> list[float]:
        if not _read_as_is(image):
            return super()._ordered(image, ranks)
        found: list[float] = self._kernels.order_statistics(image, list(ranks))
        return found

    def _prepare(
        self, image: NDArray[Any], low: np.float32, gain: np.float32, targets: Sequence[Target]
    ) -> None:
        if not _read_as_is(image):
            image = image.astype(np.float32)
        for out, normalisation in targets:
            gains = [float(np.float32(1.0 / std)) for std in normalisation.std]
            self._kernels.prepare(
                image, low, gain, out, list(normalisation.mean), gains, self._threads
            )

    def _finish(
        self,
        logits: NDArray[np.float32],
        present: Sequence[bool],
        label_map: NDArray[np.uint8],
        masks: NDArray[np.bool_],
    ) -> None:
        self._kernels.finish(logits, list(present), label_map, masks, self._threads)

    def _gather(
        self,
        rows: Sequence[NDArray[Any]],
        out: NDArray[Any],
        scales: Optional[Sequence[NDArray[np.float32]]],
    ) -> None:
        self._kernels.gather(list(rows), out, None if scales is None else list(scales))


def _read_as_is(image: NDArray[Any]) -> bool:
    return image.dtype in DTYPES and image.dtype.isnative
