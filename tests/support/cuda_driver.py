"""The CUDA driver itself, by ctypes: the kernels on a real GPU, whatever provider is installed."""

from __future__ import annotations

import ctypes as c
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

__all__ = ["DriverKernels"]


@dataclass
class _Copied:
    """A copy on the device of all bytes that an array spans, its strides kept."""

    array: NDArray[Any]
    pointer: int
    low: int
    size: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        start = self.array.__array_interface__["data"][0]
        return {
            "typestr": self.array.dtype.str,
            "shape": self.array.shape,
            "strides": self.array.strides,
            "data": (self.pointer + start - self.low, False),
            "version": 3,
        }


class DriverKernels:
    """Kernels of a fatbin on the first GPU, in its primary context."""

    def __init__(self, fatbin: bytes) -> None:
        self._cuda = c.CDLL("libcuda.so.1")
        self._call("cuInit", c.c_uint(0))
        device, context = c.c_int(), c.c_void_p()
        self._call("cuDeviceGet", c.byref(device), c.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", c.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._module = c.c_void_p()
        self._call("cuModuleLoadData", c.byref(self._module), fatbin)
        self._held: list[_Copied] = []

    def put(self, array: NDArray[Any]) -> _Copied:
        spans = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
        first = array.__array_interface__["data"][0]
        low = first + sum(span for span in spans if span < 0)
        high = first + sum(span for span in spans if span > 0) + array.itemsize
        pointer, size = c.c_uint64(), high - low
        self._call("cuMemAlloc_v2", c.byref(pointer), c.c_size_t(size))
        copied = _Copied(array, pointer.value, low, high - low)
        self._call("cuMemcpyHtoD_v2", pointer, c.c_void_p(low), c.c_size_t(high - low))
        self._held.append(copied)
        return copied

    def fetch(self) -> None:
        """Copy everything back to where it came from, and free it."""
        self._call("cuCtxSynchronize")
        for copied in self._held:
            pointer = c.c_uint64(copied.pointer)
            if copied.array.flags.writeable:
                self._call(
                    "cuMemcpyDtoH_v2", c.c_void_p(copied.low), pointer, c.c_size_t(copied.size)
                )
            self._call("cuMemFree_v2", pointer)
        self._held.clear()

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Any],
        stream: Any,
        shared_bytes: int = 0,
    ) -> None:
        function = c.c_void_p()
        self._call("cuModuleGetFunction", c.byref(function), self._module, name.encode())
        places = (c.c_void_p * len(arguments))(*(c.addressof(value) for value in arguments))
        sizes = [c.c_uint(value) for value in (*grid, *block, shared_bytes)]
        self._call("cuLaunchKernel", function, *sizes, c.c_void_p(0), places, None)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        assert status == 0, f"{name}: CUDA error {status}"
