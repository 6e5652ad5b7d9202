"""The graph that runs a library's head, whatever it has learnt; made by ``export/refining.py``."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from recallseg.engines.reading import read_file
from recallseg.engines.specs import GraphSpec, TensorSpec

__all__ = [
    "EARLIER",
    "FILTERS",
    "FIXED",
    "HEADS",
    "PER_STRUCTURE",
    "REFINE",
    "REFINE_NATIVE",
    "SCALES",
    "feature_count",
    "filters",
    "graph_digest",
    "is_for",
    "refine",
]

HEADS = Path(__file__).parent
FILTERS, REFINE = "filters.onnx", "refine.onnx"
REFINE_NATIVE = "refine-native.onnx"
"""The second one as a single native operator, which differs by rounding."""
EARLIER = frozenset(("93795a5256fc3415b4f86ec159d152d17e7aa1fb9f3c04297cac496b8c8267d6",))
"""Digests of earlier ``refine.onnx`` that gave the same numbers."""
SCALES = 5
"""Octaves of the filters: 1, 2, 4, 8, 16 pixels. Images are padded to whole coarsest pixels."""
FIXED = 1 + 4 * SCALES + 2 * 3
"""Features that do not depend on structures: grey, four filters per scale, colour."""
PER_STRUCTURE = 3
"""Features of each structure: its logits, and two means around."""

_IMAGE = TensorSpec("image", "float32", (1, 3, "H", "W"))
_LOGITS = tuple(
    TensorSpec(name, "float32", (1, count, "H", "W"))
    for name, count in (("logits", "n"), ("around", "m"))
)


def feature_count(structures: int) -> int:
    """Return how many numbers a pixel has."""
    return FIXED + PER_STRUCTURE * structures


def filters() -> GraphSpec:
    """``image`` 1x3xHxW in 0..1, ``logits`` 1xnxHxW, ``around`` 1xmxHxW -> ``features`` 1xFxHpxWp.

    Hp and Wp are H and W, padded to multiples of the coarsest filter's pixel.
    """
    return GraphSpec(
        "filters", (_IMAGE, *_LOGITS), (TensorSpec("features", "float32", (1, "F", "Hp", "Wp")),)
    )


def refine() -> GraphSpec:
    """As :func:`filters`, with a head's weights, -> ``refined`` 1xnxHxW: logits."""
    layers = []
    for layer, (rows, columns) in enumerate((("u", "F"), ("v", "u"), ("n", "v")), 1):
        layers.append(TensorSpec(f"weights{layer}", "float32", (rows, columns, 1, 1)))
        layers.append(TensorSpec(f"biases{layer}", "float32", (rows,)))
    mix = TensorSpec("mix", "float32", (1, "n", 1, 1))
    return GraphSpec(
        "refine",
        (_IMAGE, *_LOGITS, *layers, mix),
        (TensorSpec("refined", "float32", (1, "n", "H", "W")),),
    )


def is_for(graph: str) -> bool:
    """Whether what was fitted for a graph, by its digest, is for the one that ships."""
    return graph == graph_digest(REFINE) or graph in EARLIER


@cache
def graph_digest(name: str) -> str:
    """Return the SHA-256 of one of the graphs, hex."""
    return hashlib.sha256(read_file(HEADS / name)).hexdigest()
