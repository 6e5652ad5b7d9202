"""The tensors that a model's graphs read and write: what each is called, and its shape."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from recallseg.engines.specs import GRAPHS, Geometry, GraphSpec

__all__ = ["Shapes", "buffer_name", "buffer_shapes", "bytes_of"]

Shapes = Mapping[str, tuple[int, ...]]


def buffer_shapes(
    specs: Mapping[str, GraphSpec], geometry: Geometry, *, n: int, k: int, masks: int = 0
) -> dict[str, tuple[int, ...]]:
    """Return the shape of every buffer; that of what is made for no structure is left out.

    Parameters
    ----------
    specs, geometry : of the bundle.
    n, k : structures of one question, and most memories of each.
    masks : structures that are memorized at once.
    """
    g = geometry
    group = min(n, g.max_n)
    # Flat where both count: four structures with one memory need what one with four does.
    rows = group * k
    shapes: dict[str, tuple[int, ...]] = {}
    for graph in GRAPHS:
        symbols = {"n": min(masks, g.max_n) if graph == "memorize" else group}
        spec = specs[graph]
        for tensor in (*spec.inputs, *spec.outputs):
            if "k" in tensor.shape:
                shape = (rows, *(size for size in tensor.shape if isinstance(size, int)))
            else:
                shape = tensor.resolve(**symbols)
            shapes[buffer_name(graph, tensor.name)] = shape
    # Stored with every memory, whether the graph takes them or not.
    shapes["pointers"] = (rows, g.channels)
    shapes["all_logits"] = (n, g.logit_size, g.logit_size)
    shapes["all_iou"] = shapes["all_scores"] = (n,)
    return {name: shape for name, shape in shapes.items() if shape[0]}


def bytes_of(shapes: Shapes) -> int:
    """Return the bytes of float32 tensors."""
    return 4 * sum(map(prod, shapes.values()))


def buffer_name(graph: str, tensor: str) -> str:
    """Return which buffer a graph's tensor is."""
    if tensor == "image":
        return f"{graph}_image"
    if graph == "memorize" and tensor in ("memories", "pointers"):
        return f"new_{tensor}"
    return tensor
