"""Frames from wherever a scanner keeps them into memory of our own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.cuda import Cuda
from recallseg.engines.errors import InputError

__all__ = ["copy_frame"]


def copy_frame(image: Any) -> NDArray[Any]:
    """Return a copy in the CPU's memory.

    Parameters
    ----------
    image : a numpy array; anything with ``__cuda_array_interface__`` (CuPy, PyTorch, Numba, PyCUDA)
        that lies contiguously on the first GPU; or anything with ``__dlpack__`` on the CPU.

    Raises
    ------
    InputError
        For anything else.
    EngineUnavailableError
        If it says that it lies on a GPU, and there is no driver.
    """
    copied: NDArray[Any]
    if isinstance(image, np.ndarray):
        copied = image.copy()
        return copied
    interface = getattr(image, "__cuda_array_interface__", None)
    if interface is not None:
        return _from_device(interface)
    if not hasattr(image, "__dlpack__"):
        raise InputError(
            "a frame must be a numpy array, or have __cuda_array_interface__ or __dlpack__; got "
            f"{type(image).__name__}."
        )
    try:
        copied = np.from_dlpack(image).copy()
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the frame's data cannot be reached from the CPU: {error}. Copy it there first."
        ) from error
    return copied


@lru_cache(maxsize=1)
def _cuda() -> Cuda:
    return Cuda()


def _from_device(interface: Mapping[str, Any]) -> NDArray[Any]:
    """Copy from the GPU, once all that was queued there is done."""
    array = np.empty(tuple(interface["shape"]), np.dtype(interface["typestr"]))
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != array.strides:
        raise InputError(
            f"a frame on the GPU must be contiguous; this one has strides {tuple(strides)}, "
            f"expected {array.strides}."
        )
    if array.size:
        cuda = _cuda()
        cuda.enter()
        cuda.settle()
        cuda.copy_out(array, int(interface["data"][0]))
        cuda.wait()
    return array
