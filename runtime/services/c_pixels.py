"""A C caller's pixels, on the host or on a GPU: wrapped, not copied."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from recallseg.engines import errors
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["Pixels", "array_of", "check_place", "release"]

Pixels = tuple[Union[memoryview, int], str, tuple[int, ...], tuple[int, ...], int]
"""Memory from lowest to past highest byte, dtype, shape, strides, offset of pixel (0, 0); or, on a
GPU, the address of pixel (0, 0), dtype, shape, strides, and the stream on which it is ready (0: it
is)."""


@dataclass(frozen=True)
class _OnGpu:
    """A caller's memory on a GPU."""

    __cuda_array_interface__: dict[str, Any]


def array_of(pixels: Pixels) -> Any:
    """Wrap memory; it is writeable if the view is."""
    view, dtype, shape, strides, offset = pixels
    if isinstance(view, int):
        return _OnGpu(
            {
                "data": (view, False),
                "typestr": np.dtype(dtype).str,
                "shape": shape,
                "strides": strides,
                "stream": offset or None,
                "version": 3,
            }
        )
    array: NDArray[Any] = np.ndarray(shape, np.dtype(dtype), view, offset, strides)
    return array


def check_place(segmenter: Segmenter, what: str, pixels: Pixels | None) -> None:
    """Raise InputError for pixels on a GPU that the segmenter does not run on."""
    if pixels is not None and isinstance(pixels[0], int) and segmenter.device is None:
        raise errors.InputError(
            f"the {what} lies on a GPU (location RECALLSEG_CUDA), and engine '{segmenter.engine}' "
            "runs on the CPU: copy it to the host, or open the segmenter with an engine on the GPU."
        )


def release(*views: memoryview) -> None:
    """Give memory back; raises BufferError if something still holds an array over it."""
    for view in views:
        try:
            view.release()
        except BufferError:  # a reference cycle, as an exception's traceback makes them
            gc.collect()
            view.release()
