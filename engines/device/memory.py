"""Memory on the device, and pinned memory of the host that it copies from and to."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import EngineRunError, InputError

if TYPE_CHECKING:
    from recallseg.engines.device.device import Device

__all__ = ["DeviceBuffer", "DeviceTensor", "PinnedBuffer", "adopt_tensor"]

ALIGNMENT = 16
"""Bytes that an address handed to the engines must be a multiple of: kernels load four floats."""


class DeviceBuffer:
    """Bytes on the device, given back by :meth:`close` or when nothing refers to them any more."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self._address = device.take(nbytes)
        self._finalizer = weakref.finalize(self, device.give_back, self._address, nbytes)

    @property
    def address(self) -> int:
        """Where it lies; EngineRunError if it was given back."""
        if not self._finalizer.alive:
            raise EngineRunError(
                f"this device buffer of {self.nbytes} bytes has been closed. Keep it open for as "
                "long as anything uses it."
            )
        return self._address

    def close(self) -> None:
        """Give it back. Nothing may be queued on it any more."""
        self._finalizer()


class PinnedBuffer:
    """Page-locked memory of the host: copies from and to it run beside everything else.

    Attributes
    ----------
    array : uint8, all of its bytes; view it as what is needed.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self._device = device
        self._address = device.take_pinned(nbytes)
        block = (ctypes.c_uint8 * nbytes).from_address(self._address)
        self.array: NDArray[np.uint8] = np.frombuffer(memoryview(block), np.uint8)
        self._finalizer = weakref.finalize(self, device.give_back_pinned, self._address)

    @property
    def device_address(self) -> int:
        """Where the device sees the same bytes; without a copy where the two share memory."""
        if not self._finalizer.alive:
            raise EngineRunError("this pinned buffer has been closed.")
        return self._device.call(self._device.driver.device_address, self._address)

    def close(self) -> None:
        """Give it back; ``array`` must not be used any more."""
        self._finalizer()


@dataclass(frozen=True)
class DeviceTensor:
    """A C-contiguous array on the device; offers ``__cuda_array_interface__`` (version 3).

    Attributes
    ----------
    address : of its first element.
    shape, dtype : as numpy's.
    owner : what keeps the memory alive.
    stream : handle of the stream on which its contents become valid; None if they are.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = None
    stream: int | None = None

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, count: int) -> DeviceTensor:
        """Return the first ``count`` along the first axis; they share memory."""
        if not 0 <= count <= self.shape[0]:
            raise EngineRunError(f"{count} rows of {self.shape[0]} were asked for.")
        return DeviceTensor(
            self.address, (count, *self.shape[1:]), self.dtype, self.owner, self.stream
        )

    def row(self, index: int) -> DeviceTensor:
        """Return one element along the first axis; it shares memory."""
        if not 0 <= index < self.shape[0]:
            raise EngineRunError(f"row {index} of {self.shape[0]} was asked for.")
        rest = self.shape[1:]
        address = self.address + index * prod(rest) * self.dtype.itemsize
        return DeviceTensor(address, rest, self.dtype, self.owner, self.stream)

    def reshape(self, *shape: int) -> DeviceTensor:
        """Return the first elements in another shape; they share memory."""
        if prod(shape) > prod(self.shape):
            raise EngineRunError(
                f"a tensor of shape {self.shape} has too few elements for {shape}."
            )
        return DeviceTensor(self.address, shape, self.dtype, self.owner, self.stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": self.stream or None,
            "version": 3,
        }


def adopt_tensor(source: Any, device: Device) -> DeviceTensor:
    """Take a caller's array on the device as it is, without a copy.

    Parameters
    ----------
    source : anything with ``__cuda_array_interface__`` (CuPy, PyTorch, Numba, PyCUDA) or, on the
        device, with ``__dlpack__``. It must stay alive and unchanged until the result is there.
    device : that it must lie on.

    Raises
    ------
    InputError
        If it is no such array, is not contiguous, was freed, is misaligned, or lies elsewhere.
    """
    if isinstance(source, DeviceTensor):
        tensor = source
    elif hasattr(source, "__cuda_array_interface__"):
        tensor = _from_interface(source.__cuda_array_interface__, source)
    elif hasattr(source, "__dlpack__"):
        from recallseg.engines.device.dlpack import read_dlpack

        tensor = read_dlpack(source, device.ordinal)
    else:
        raise InputError(
            "an array on the GPU must have __cuda_array_interface__ or __dlpack__; got "
            f"{type(source).__name__}."
        )
    if tensor.nbytes == 0:
        return tensor
    if tensor.address == 0:
        raise InputError(
            "the array on the GPU has no memory (address 0): it was freed, or is empty."
        )
    if tensor.address % min(ALIGNMENT, tensor.dtype.itemsize or 1):
        raise InputError(
            f"the array on the GPU lies at {tensor.address:#x}, which is not a multiple of its "
            f"{tensor.dtype.itemsize} bytes: it is misaligned. Copy it into an array of its own."
        )
    owner = device.ordinal_of(tensor.address)
    if owner != device.ordinal:
        where = "no GPU" if owner is None else f"GPU {owner}"
        raise InputError(
            f"the array's address {tensor.address:#x} belongs to {where}, the engine runs on GPU "
            f"{device.ordinal}. It was freed, or has to be copied there first."
        )
    return tensor


def _from_interface(interface: Mapping[str, Any], owner: object) -> DeviceTensor:
    try:
        shape = tuple(int(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        address = int(interface["data"][0] or 0)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"__cuda_array_interface__ is incomplete: {error!r}.") from error
    strides = interface.get("strides")
    wanted = contiguous_strides(shape, dtype.itemsize)
    if strides is not None and prod(shape) > 1 and tuple(strides) != wanted:
        raise InputError(
            f"a frame on the GPU must be contiguous; this one has strides {tuple(strides)}, "
            f"expected {wanted}."
        )
    return DeviceTensor(address, shape, dtype, owner, interface.get("stream"))


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides in bytes of a C-contiguous array."""
    return tuple(itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape)))
