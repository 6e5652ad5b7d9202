"""Every buffer of a query on a GPU, allocated once, its size known in advance."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.bundle import Bundle
from recallseg.engines.device import Device, DeviceTensor, PinnedBuffer
from recallseg.engines.specs import graph_specs

__all__ = ["DeviceWorkspace", "Room"]

GRAPHS = ("embed", "encode", "attend", "decode")


class Room:
    """Memory that grows with the largest query so far, and stands still after it."""

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


class DeviceWorkspace:
    """Tensors of one query at a time with up to n structures and k memories each.

    Parameters
    ----------
    device : where.
    bundle : whose graphs.
    n, k : structures, and most memories of each.

    Attributes
    ----------
    tensors : inputs and outputs of the graphs by name; ``embed_image`` and ``encode_image`` are
        what both call ``image``. Those with n or k have room for the largest call.
    all_logits, all_iou, all_scores : of every structure: nx(S/4)x(S/4), n, n.
    room : for what depends on the image's own size.
    group : most structures of one call.
    """

    def __init__(self, device: Device, bundle: Bundle, *, n: int, k: int) -> None:
        self.group = min(n, bundle.geometry.max_n)
        self.tensors = {
            name: device.tensor(shape) for name, shape in _shapes(bundle, self.group, k)
        }
        side = bundle.geometry.logit_size
        self.all_logits = device.tensor((n, side, side))
        self.all_iou, self.all_scores = device.tensor((n,)), device.tensor((n,))
        self.room = Room(device)
        if "pointer_time" in self.tensors:
            constant = np.full((self.group, k), bundle.memory.pointer_time, np.float32)
            device.stream.copy_in(self.tensors["pointer_time"], constant)
        device.stream.fill(self.all_logits)
        device.stream.synchronize()

    @staticmethod
    def required_bytes(bundle: Bundle, *, n: int, k: int) -> int:
        """Return the bytes on the device that a workspace will take, before any is taken.

        The image and its masks come with the first query, at their own size.
        """
        g = bundle.geometry
        shapes = [shape for _, shape in _shapes(bundle, min(n, g.max_n), k)]
        return 4 * (sum(map(prod, shapes)) + n * (g.logit_size**2 + 2))

    @property
    def nbytes(self) -> int:
        """Bytes held on the device now."""
        fixed = (*self.tensors.values(), self.all_logits, self.all_iou, self.all_scores)
        return sum(tensor.nbytes for tensor in fixed) + self.room.nbytes

    def view(self, name: str, n: int, k: int) -> DeviceTensor:
        """Return a tensor for a call with n structures and k memories; it shares memory."""
        full = self.tensors[name]
        if name in ("memories", "pointers", "pointer_time"):
            return full.reshape(n, k, *full.shape[2:])
        if name in ("conditioned", "logits", "iou", "object_score"):
            return full.rows(n)
        return full


def _shapes(bundle: Bundle, n: int, k: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every tensor of a query once, at its largest."""
    seen = set()
    specs = graph_specs(bundle.geometry, object_pointers=bundle.memory.object_pointers)
    for graph in GRAPHS:
        for tensor in (*specs[graph].inputs, *specs[graph].outputs):
            name = f"{graph}_image" if tensor.name == "image" else tensor.name
            if name not in seen:
                seen.add(name)
                yield name, tensor.resolve(n=n, k=k)
