"""DLPack of the CPU's memory stands in for that of a GPU: the struct is the same."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from recallseg.engines.device.dlpack import read_dlpack
from recallseg.engines.errors import InputError

PICTURE = np.arange(60, dtype=np.int16).reshape(6, 10)


class OnGpu:
    """A CPU array that says that it lies on GPU 0."""

    def __init__(self, array: np.ndarray[Any, Any], device: tuple[int, int] = (2, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, *, stream: int) -> Any:
        assert stream == 1
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def test_an_array_is_seen_where_it_lies() -> None:
    tensor = read_dlpack(OnGpu(PICTURE), 0)
    assert tensor.address == PICTURE.ctypes.data
    assert (tensor.shape, tensor.dtype) == (PICTURE.shape, PICTURE.dtype)


def test_the_producer_is_told_when_it_is_no_longer_needed() -> None:
    class Array(np.ndarray[Any, Any]):
        pass

    array = PICTURE.copy().view(Array)
    gone = weakref.ref(array)
    tensor = read_dlpack(OnGpu(array), 0)
    del array
    gc.collect()
    assert gone() is not None
    del tensor
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("device", [(1, 0), (2, 1), (10, 0)])
def test_another_device_is_refused(device: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="not on GPU 0"):
        read_dlpack(OnGpu(PICTURE, device), 0)


def test_strides_are_refused() -> None:
    with pytest.raises(InputError, match="contiguous"):
        read_dlpack(OnGpu(PICTURE[:, ::2]), 0)


def test_a_dtype_without_meaning_is_refused() -> None:
    with pytest.raises(InputError, match="dtype"):
        read_dlpack(OnGpu(np.zeros(3, np.complex64)), 0)
