"""As much of the CUDA driver as an engine needs, straight from ``libcuda``.

The driver's library is there wherever a GPU works, so that neither the CUDA toolkit nor a Python
package for it has to be installed. Handles and addresses are plain integers, which is what TensorRT
takes.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from recallseg.engines.errors import EngineRunError, EngineUnavailableError

__all__ = ["Cuda", "Device"]

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Device:
    """A GPU: its name, compute capability (87 is 8.7), and CUDA version of its driver."""

    name: str
    capability: int
    driver: str

    @property
    def gpu(self) -> str:
        """What a plan for ``current`` is bound to."""
        return f"sm{self.capability} {self.name}"

    def __str__(self) -> str:
        return f"{self.gpu}, driver {self.driver}"


class Cuda:
    """The first GPU, its primary context (shared with TensorRT), and one stream.

    Raises
    ------
    EngineUnavailableError
        If there is no driver or no GPU.
    """

    def __init__(self) -> None:
        try:
            self._driver: Any = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise EngineUnavailableError(
                f"this needs an NVIDIA GPU and its driver, and {_LIBRARY} cannot be loaded: "
                f"{error}. Install the driver, or choose engine onnxruntime-cpu."
            ) from error
        try:
            self._call("cuInit", 0)
            self._device = ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(self._device), 0)
            context = ctypes.c_void_p()
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
            self._call("cuCtxSetCurrent", context)
            self._context = context
            handle = ctypes.c_void_p()
            self._call("cuStreamCreate", ctypes.byref(handle), 1)  # does not wait for stream 0
        except EngineRunError as error:
            raise EngineUnavailableError(
                f"no GPU can be used: {error} Choose engine onnxruntime-cpu, or mend the driver."
            ) from error
        self.stream = int(handle.value or 0)
        """Handle of the stream."""

    def device(self) -> Device:
        """Return which GPU this is."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, len(name), self._device)
        major, minor, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, self._device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, self._device)
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return Device(
            name.value.decode(),
            major.value * 10 + minor.value,
            f"{version.value // 1000}.{version.value % 1000 // 10}",
        )

    def enter(self) -> None:
        """Make the context current in the calling thread, which TensorRT expects."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes on the device."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def copy_in(self, address: int, array: np.ndarray[Any, Any]) -> None:
        """Queue a copy of a contiguous array to the device; keep it until :meth:`wait`."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(self.stream),
        )

    def copy_out(self, array: np.ndarray[Any, Any], address: int) -> None:
        """Queue a copy from the device into a contiguous array; valid after :meth:`wait`."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(array.nbytes),
            ctypes.c_void_p(self.stream),
        )

    def wait(self) -> None:
        """Wait until everything queued is done; raises what went wrong on the device."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def settle(self) -> None:
        """Wait until everything that anybody queued in the context is done."""
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *arguments: Any) -> None:
        status = int(getattr(self._driver, name)(*arguments))
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            said = text.value.decode() if text.value else "unknown error"
            raise EngineRunError(f"CUDA {name} failed with {status}: {said}.")
