"""Memory on the device, and pinned memory of the host that it copies from and to."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import EngineRunError, InputError
from recallseg.engines.reading import reason

if TYPE_CHECKING:
    from recallseg.engines.device.device import Device
    from recallseg.engines.device.queues import Stream

__all__ = ["DeviceBuffer", "DeviceTensor", "PinnedBuffer", "adopt_tensor", "on_gpu"]

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
    read_only : its owner wants nobody to write there.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = None
    stream: int | None = None
    read_only: bool = False

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, count: int) -> DeviceTensor:
        """Return the first ``count`` along the first axis; they share memory."""
        if not 0 <= count <= self.shape[0]:
            raise EngineRunError(f"{count} rows of {self.shape[0]} were asked for.")
        return replace(self, shape=(count, *self.shape[1:]))

    def part(self, first: int, count: int) -> DeviceTensor:
        """Return ``count`` from ``first`` on along the first axis; they share memory."""
        if not 0 <= first <= first + count <= self.shape[0]:
            raise EngineRunError(
                f"rows {first} to {first + count} of {self.shape[0]} were asked for."
            )
        return replace(self.row(first) if count else self, shape=(count, *self.shape[1:]))

    def row(self, index: int) -> DeviceTensor:
        """Return one element along the first axis; it shares memory."""
        if not 0 <= index < self.shape[0]:
            raise EngineRunError(f"row {index} of {self.shape[0]} was asked for.")
        rest = self.shape[1:]
        address = self.address + index * prod(rest) * self.dtype.itemsize
        return replace(self, address=address, shape=rest)

    def reshape(self, *shape: int) -> DeviceTensor:
        """Return the first elements in another shape; they share memory."""
        if prod(shape) > prod(self.shape):
            raise EngineRunError(
                f"a tensor of shape {self.shape} has too few elements for {shape}."
            )
        return replace(self, shape=shape)

    def __getitem__(self, place: int | slice) -> DeviceTensor:
        """Return a row, or consecutive rows, as numpy does; they share memory."""
        if isinstance(place, slice):
            first, last, step = place.indices(self.shape[0])
            if step != 1:
                raise EngineRunError(f"rows of a device's tensor are consecutive, got {place}.")
            return self.part(first, max(0, last - first))
        return self.row(place)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, self.read_only),
            "strides": None,
            "stream": self.stream or None,
            "version": 3,
        }


def on_gpu(array: Any) -> bool:
    """Whether an array says that it lies on a GPU."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__dlpack_device__"):
        from recallseg.engines.device.dlpack import lies_on_gpu

        return lies_on_gpu(array)
    return hasattr(array, "__cuda_array_interface__")


def adopt_tensor(source: Any, device: Device, stream: Stream | None = None) -> DeviceTensor:
    """Take a caller's array on the device as it is, without a copy.

    What its owner queued on it is done before whatever is queued on ``stream`` from now on:
    the producer is told that stream (DLPack), or the stream that the array names is waited for
    (``__cuda_array_interface__`` version 3). An array that names none is taken to be ready.

    Parameters
    ----------
    source : anything on the device with ``__dlpack__`` (CuPy, PyTorch) or
        ``__cuda_array_interface__`` (those, Numba, PyCUDA). It must stay alive and unchanged until
        the result is there.
    device : that it must lie on.
    stream : of the device, on which it will be used; None is the device's own.

    Raises
    ------
    InputError
        If it is no such array, is not contiguous, was freed, is misaligned, or lies elsewhere.
    """
    stream = stream or device.stream
    if isinstance(source, DeviceTensor):
        tensor = source
    elif hasattr(source, "__dlpack__"):
        from recallseg.engines.device.dlpack import read_dlpack

        tensor = read_dlpack(source, device.ordinal, stream.handle)
    elif hasattr(source, "__cuda_array_interface__"):
        tensor = _from_interface(source.__cuda_array_interface__, source)
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
    if tensor.stream is not None:
        device.wait_for(tensor.stream, stream)
    return tensor


def _from_interface(interface: Mapping[str, Any], owner: object) -> DeviceTensor:
    try:
        shape = tuple(int(size) for size in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        address = int(interface["data"][0] or 0)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"__cuda_array_interface__ is incomplete: {reason(error)}.") from error
    strides = interface.get("strides")
    wanted = contiguous_strides(shape, dtype.itemsize)
    if strides is not None and prod(shape) > 1 and tuple(strides) != wanted:
        raise InputError(
            f"an array on the GPU must be contiguous; this one has strides {tuple(strides)}, "
            f"expected {wanted}."
        )
    if interface.get("mask") is not None:
        raise InputError("a masked array on the GPU cannot be taken: fill in what is masked.")
    stream, read_only = interface.get("stream"), bool(interface["data"][1])
    return DeviceTensor(
        address, shape, dtype, owner, None if stream is None else int(stream), read_only
    )


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides in bytes of a C-contiguous array."""
    return tuple(itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape)))
