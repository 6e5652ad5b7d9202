"""Every tensor that a bundle's graphs read and write, its size known before it is allocated."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from recallseg.engines.buffer_shapes import Shapes, buffer_name, buffer_shapes
from recallseg.engines.bundle import Bundle
from recallseg.engines.device import DeviceTensor

__all__ = ["Buffers"]


class Buffers:
    """Tensors by name, with room for the largest call that was reserved; numpy's or a device's.

    ``embed_image`` and ``encode_image`` are what both graphs call ``image``; ``new_memories`` and
    ``new_pointers`` are what ``memorize`` makes; ``all_logits``, ``all_iou`` and ``all_scores`` are
    of every structure that is asked for, whatever the groups they were segmented in.

    Parameters
    ----------
    bundle : whose graphs.
    allocate : makes a float32 tensor of a shape.
    """

    def __init__(self, bundle: Bundle, allocate: Callable[[tuple[int, ...]], Any]) -> None:
        self._bundle = bundle
        self._allocate = allocate
        self._tensors: dict[str, Any] = {}
        self._calls: dict[tuple[str, int, int], dict[str, Any]] = {}

    def __getitem__(self, name: str) -> Any:
        return self._tensors[name]

    def missing(self, *, n: int, k: int, masks: int) -> Shapes:
        """Return the shapes of what has to be allocated for such a call, see :meth:`grow`."""
        held, specs, geometry = self._tensors, self._bundle.specs, self._bundle.geometry
        return {
            name: shape
            for name, shape in buffer_shapes(specs, geometry, n=n, k=k, masks=masks).items()
            if name not in held or held[name].shape[0] < shape[0]
        }

    def grow(self, shapes: Shapes) -> None:
        """Allocate; what was there under these names goes when all of it is made."""
        made = {name: self._allocate(shape) for name, shape in shapes.items()}
        self._tensors.update(made)
        self._calls.clear()

    def of(self, graph: str, n: int = 1, k: int = 1) -> dict[str, Any]:
        """Return inputs and outputs of a graph for n structures with k memories, by their names.

        They share memory with those of every other call.
        """
        call = graph, n, k
        if call not in self._calls:
            spec = self._bundle.specs[graph]
            self._calls[call] = {
                tensor.name: self.part(buffer_name(graph, tensor.name), tensor.resolve(n=n, k=k))
                for tensor in (*spec.inputs, *spec.outputs)
            }
        return self._calls[call]

    def part(self, name: str, shape: tuple[int, ...]) -> Any:
        """Return the first elements of a tensor in another shape; they share memory."""
        tensor = self._tensors[name]
        if isinstance(tensor, DeviceTensor):
            return tensor.reshape(*shape)
        return tensor.reshape(-1)[: prod(shape)].reshape(shape)

    def holds(self, n: int, k: int) -> bool:
        """Whether a call of ``attend`` with n structures and k memories fits."""
        held = self._tensors.get("memories")
        return held is not None and n * k <= held.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for tensor in self._tensors.values())
