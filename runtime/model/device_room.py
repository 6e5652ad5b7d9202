"""Memory beside a model's fixed buffers, on a device and pinned: for images, masks and indices."""

from __future__ import annotations

import weakref
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import Device, DeviceTensor, PinnedBuffer, Stream

__all__ = ["Frames", "Places", "Room"]


class Room:
    """Memory that grows with the largest image so far, and stands still after it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._tensors: dict[str, DeviceTensor] = {}
        self._pinned: dict[str, PinnedBuffer] = {}

    def on_device(self, name: str, shape: tuple[int, ...], dtype: Any) -> DeviceTensor:
        """Return a tensor on the device; what it holds is kept until the same name grows."""
        kind = np.dtype(dtype)
        held = self._tensors.get(name)
        if held is None or held.nbytes < prod(shape) * kind.itemsize:
            held = self._tensors[name] = self._device.tensor(shape, kind)
        return DeviceTensor(held.address, shape, kind, held.owner)

    def pinned(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array in pinned memory of the host."""
        kind = np.dtype(dtype)
        size = max(1, prod(shape) * kind.itemsize)
        held = self._pinned.get(name)
        if held is None or held.nbytes < size:
            held = self._pinned[name] = self._device.allocate_pinned(size)
        array: NDArray[Any] = held.array[: prod(shape) * kind.itemsize].view(kind)
        return array.reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


class Places:
    """Indices of up to ``count`` memories in the cache, where a kernel reads them."""

    def __init__(self, device: Device, count: int) -> None:
        self.count = count
        self._host = device.allocate_pinned(8 * count)
        # Every block of the kernel reads them: across the bus only where there is none.
        self._shared = device.facts.integrated
        self._there = (
            DeviceTensor(self._host.device_address, (count,), np.dtype(np.int64), self._host)
            if self._shared
            else device.tensor((count,), np.int64)
        )

    def put(self, first: int, slots: NDArray[np.int64], stream: Stream) -> DeviceTensor:
        """Write indices from ``first`` on; return them on the device."""
        chosen = self._host.array.view(np.int64)[first : first + len(slots)]
        chosen[:] = slots
        there = self._there.part(first, len(slots))
        if not self._shared:
            stream.copy_in(there, chosen)
        return there


class _Lease:
    """Lives for as long as anything refers to a frame."""


class Frames:
    """Copies of frames on the device; the memory of those that nobody holds any more is reused.

    Attributes
    ----------
    nbytes : bytes held on the device, by frames and for the next ones.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._free: list[DeviceTensor] = []
        self.nbytes = 0

    def tensor(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceTensor:
        """Return a tensor whose memory comes back when it is dropped; its contents are undefined.

        Work that was queued on a dropped one must be done, or its result not matter.
        """
        size = max(1, prod(shape) * dtype.itemsize)
        while self._free:
            memory = self._free.pop()
            if memory.nbytes >= size:
                break
            self.nbytes -= memory.nbytes  # frames have become larger
        else:
            memory = self._device.tensor((size,), np.uint8)
            self.nbytes += size
        lease = _Lease()
        weakref.finalize(lease, self._free.append, memory)
        return DeviceTensor(memory.address, shape, dtype, lease)
