"""DLPack of the CPU's memory stands in for that of a GPU: the struct is the same."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

from recallseg.engines.device.dlpack import read_dlpack
from recallseg.engines.errors import InputError

STREAM = 4711
PICTURE = np.arange(60, dtype=np.int16).reshape(6, 10)


class OnGpu:
    """A CPU array that says that it lies on GPU 0."""

    def __init__(
        self, array: np.ndarray[Any, Any], device: tuple[int, int] = (2, 0), *, old: bool = False
    ) -> None:
        self.array, self.device, self.old = array, device, old
        self.streams: list[int] = []

    def __dlpack__(self, *, stream: int, **more: Any) -> Any:
        self.streams.append(stream)
        if self.old and more:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(**more)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


# numpy gives versioned capsules from 2.1 on.
@pytest.mark.parametrize("old", [False, True])
def test_an_array_is_seen_where_it_lies(old: bool) -> None:
    array = OnGpu(PICTURE, old=old)
    tensor = read_dlpack(array, 0, STREAM)
    assert set(array.streams) == {STREAM}
    assert tensor.address == PICTURE.ctypes.data
    assert (tensor.shape, tensor.dtype) == (PICTURE.shape, PICTURE.dtype)


@pytest.mark.parametrize("old", [False, True])
def test_the_producer_is_told_when_it_is_no_longer_needed(old: bool) -> None:
    class Array(np.ndarray[Any, Any]):
        pass

    array = PICTURE.copy().view(Array)
    gone = weakref.ref(array)
    tensor = read_dlpack(OnGpu(array, old=old), 0, STREAM)
    del array
    gc.collect()
    assert gone() is not None
    del tensor
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("device", [(1, 0), (2, 1), (10, 0)])
def test_another_device_is_refused(device: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="not on GPU 0"):
        read_dlpack(OnGpu(PICTURE, device), 0, STREAM)


def test_strides_are_refused() -> None:
    with pytest.raises(InputError, match="contiguous"):
        read_dlpack(OnGpu(PICTURE[:, ::2]), 0, STREAM)


def test_a_dtype_without_meaning_is_refused() -> None:
    with pytest.raises(InputError, match="dtype"):
        read_dlpack(OnGpu(np.zeros(3, np.complex64)), 0, STREAM)


def test_memory_that_is_read_only_says_so() -> None:
    if np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("numpy gives no versioned capsules")
    array = PICTURE.copy()
    assert not read_dlpack(OnGpu(array), 0, STREAM).read_only
    array.flags.writeable = False
    assert read_dlpack(OnGpu(array), 0, STREAM).read_only


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float64])
def test_dtypes_are_numpys(dtype: Any) -> None:
    assert read_dlpack(OnGpu(np.zeros((2, 3), dtype)), 0, STREAM).dtype == dtype


def test_a_capsule_that_was_used_or_refused_is_an_error() -> None:
    capsule = PICTURE.__dlpack__()

    class Again(OnGpu):
        def __dlpack__(self, *, stream: int, **more: Any) -> Any:
            return capsule

    class Refusing(OnGpu):
        def __dlpack__(self, *, stream: int, **more: Any) -> Any:
            raise BufferError("it requires grad")

    read_dlpack(Again(PICTURE), 0, STREAM)
    with pytest.raises(InputError, match="used before"):
        read_dlpack(Again(PICTURE), 0, STREAM)
    with pytest.raises(InputError, match="Refusing gives no DLPack: it requires grad"):
        read_dlpack(Refusing(PICTURE), 0, STREAM)
