"""Frames from wherever a scanner keeps them into memory of our own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import Device, adopt_tensor, on_gpu, open_device
from recallseg.engines.errors import InputError

__all__ = ["copy_frame"]


def copy_frame(image: Any) -> NDArray[Any]:
    """Return a copy in the CPU's memory.

    Parameters
    ----------
    image : a numpy array; anything with ``__cuda_array_interface__`` (CuPy, PyTorch, Numba, PyCUDA)
        or ``__dlpack__`` that lies contiguously on the first GPU; anything with ``__dlpack__`` on
        the CPU.

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
    if on_gpu(image):
        return _from_device(image)
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
def _device() -> Device:
    return open_device()


def _from_device(image: Any) -> NDArray[Any]:
    """Copy from the GPU, once all that was queued there is done."""
    device = _device()
    device.enter()
    tensor = adopt_tensor(image, device)
    array = np.empty(tensor.shape, tensor.dtype)
    if array.size:
        device.synchronize()
        device.stream.copy_out(array, tensor)
        device.stream.synchronize()
    return array
