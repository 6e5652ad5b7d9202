"""How much memory a bundle needs for k, n and S: computed from its sizes, before anything is built.

What can be counted is counted: weights, inputs and outputs, what the library holds. What a compiled
engine needs in between is estimated from the shapes that the method prescribes; what a driver and
its libraries take is an allowance. Each line says which of the three it is. None of it was
compared with a GPU (docs/device/status.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.engines.manifest import data_files
from recallseg.engines.precisions import find_precision
from recallseg.engines.registry import engine_class
from recallseg.engines.specs import GRAPHS, Geometry, graph_specs

__all__ = [
    "PRESETS",
    "Budget",
    "Line",
    "Preset",
    "encoding_bytes",
    "graph_bytes",
    "largest_k",
    "memory_budget",
]

_FLOAT = 4
_POOLED = 4
"""Memory tokens that one takes the place of in the precisions that average them 2x2."""

STEM_WIDTH = 576
"""Widest layer at stride 4 of any SAM 2: four times the 144 channels of Hiera-L."""

LAYERS_ALIVE = 3
"""Tensors of the widest layer that live at once: input, output, and what is being made."""

KEYS_ALIVE = 4
"""Tensors of all recalled tokens at full width that live at once: keys, the same rotated, values,
and the sum that the keys were projected from."""

ALLOWANCE = 900 << 20
"""CUDA's context, TensorRT's libraries, Python. An assumption; 'doctor' cannot know it."""


@dataclass(frozen=True)
class Line:
    """One part of the need; ``kind`` is ``counted``, ``estimated`` or ``assumed``."""

    name: str
    size: int
    kind: str


@dataclass(frozen=True)
class Budget:
    """Everything that one process needs at once, in bytes.

    Attributes
    ----------
    image_size, k, n, precision : what it was computed for.
    lines : the parts.
    scores : what memory attention needs in addition if it is *not* fused, as no TensorRT is known
        to fuse it in fp32 (``fp32``, ``mixed``); see docs/device/status.md.
    exemplar : what one exemplar adds for each structure it shows, on disk and in the page cache.
    """

    image_size: int
    k: int
    n: int
    precision: str
    lines: tuple[Line, ...]
    scores: int
    exemplar: int

    @property
    def total(self) -> int:
        """Sum of the lines: enough if attention is fused."""
        return sum(line.size for line in self.lines)

    @property
    def worst(self) -> int:
        """Enough if it is not."""
        return self.total + self.scores

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**asdict(self), "total": self.total, "worst": self.worst}


@dataclass(frozen=True)
class Preset:
    """Settings for a kind of device; whether they fit is computed by a test, not promised."""

    name: str
    memory: int
    image_size: int
    k: int
    n: int
    precision: str


PRESETS = {
    preset.name: preset
    for preset in (
        # Of 8 GiB, the system, a desktop and the display take about three on these boards.
        Preset("jetson-8gb", 5 << 30, 1024, 8, 2, "mixed"),
        Preset("jetson-16gb", 12 << 30, 1024, 16, 4, "mixed"),
        Preset("jetson-64gb", 48 << 30, 1024, 32, 8, "mixed"),
    )
}
"""Memory is what is left for RecallSeg; CPU and GPU share it."""


def memory_budget(
    bundle: Bundle,
    *,
    k: int,
    n: int,
    precision: str = "mixed",
    image_size: int | None = None,
    shared: bool = True,
) -> Budget:
    """Compute what a process with all five graphs needs.

    Parameters
    ----------
    bundle : whose weights and sizes.
    k, n : most memories and structures of one call: the profile's largest.
    precision : of the plans.
    image_size : S in pixels, a multiple of 16; the bundle's by default.
    shared : CPU and GPU share their memory (Jetson), so that what lies on both counts twice.

    Raises
    ------
    InputError
        For k, n or S that no graph can have, or an unknown precision.
    """
    side, stride = image_size or bundle.geometry.image_size, bundle.geometry.stride
    if side < stride or side % stride:
        raise InputError(f"an image size must be a multiple of {stride}, got {side}.")
    if k < 1 or n < 1:
        raise InputError(f"a budget needs k and n of at least 1; got k = {k}, n = {n}.")
    chosen = find_precision(precision)
    geometry = bundle.geometry.at(side)
    buffers = _buffers(geometry, bundle.memory.object_pointers, n, k)
    size, pixels = chosen.size, geometry.places
    spatial = geometry.tokens // (_POOLED if "pooled" in chosen.approximations else 1)
    tokens = k * (spatial + geometry.channels // geometry.memory_dim)
    encode = _widest(side, size)
    attend = n * (KEYS_ALIVE * tokens + 8 * pixels) * geometry.channels * size
    # Engines run one after the other, and may use the same scratch memory.
    lines = [
        Line("weights", _weights(bundle, precision), "counted"),
        Line("inputs and outputs of the engines", buffers, "counted"),
        *([Line("the same for the CPU", buffers, "counted")] if shared else []),
        Line("activations", max(encode, attend), "estimated"),
        Line("driver, libraries, Python", ALLOWANCE, "assumed"),
    ]
    return Budget(
        side,
        k,
        n,
        precision,
        tuple(lines),
        # Scores and their softmax; in mixed this is the part that stays fp32.
        scores=2 * n * pixels * tokens * (_FLOAT if precision == "mixed" else size),
        exemplar=geometry.tokens * geometry.memory_dim * _FLOAT,
    )


def largest_k(bundle: Bundle, memory: int, **settings: Any) -> int:
    """Return the largest k that fits ``memory`` bytes without fusion; 0 if none does.

    At most the bundle's own limit, ``bundle.geometry.max_k``: that is then no limit of the memory.
    """
    fits = [
        k
        for k in range(1, bundle.geometry.max_k + 1)
        if memory_budget(bundle, k=k, **settings).worst <= memory
    ]
    return max(fits, default=0)


def _buffers(geometry: Geometry, object_pointers: bool, n: int, k: int) -> int:
    def tensors() -> Iterator[int]:
        for spec in graph_specs(geometry, object_pointers=object_pointers).values():
            for tensor in (*spec.inputs, *spec.outputs):
                yield prod(tensor.resolve(n=n, k=k)) * _FLOAT

    return sum(tensors())


def _weights(bundle: Bundle, precision: str) -> int:
    """Size of the graph files in this precision, or what fp32's would become."""
    entries = bundle.manifest["graphs"]
    total = 0
    for graph in GRAPHS:
        for variant in ("tensorrt", "portable", "ort-cuda", "ort-cpu"):
            exact = entries.get(f"{variant}/{precision}/{graph}")
            if exact is not None:
                total += _size(bundle, exact)
                break
        else:
            fp32 = entries[f"portable/fp32/{graph}"]
            total += _size(bundle, fp32) * find_precision(precision).size // _FLOAT
    return total


def graph_bytes(
    bundle: Bundle, graphs: Sequence[str], variants: Sequence[str], precision: str
) -> int:
    """Return the size of the files that an engine loads; what the bundle lacks counts nothing."""
    entries = bundle.manifest["graphs"]
    keys = [[f"{variant}/{precision}/{graph}" for variant in variants] for graph in graphs]
    first = [next((entries[key] for key in own if key in entries), None) for own in keys]
    return sum(_size(bundle, entry) for entry in first if entry is not None)


def encoding_bytes(bundle: Bundle, engine: str, precision: str) -> int:
    """Estimate what encoding one image on a CPU needs: weights twice, as ONNX Runtime repacks
    them, inputs and outputs, and the widest layers.
    """
    graphs, variants = ("embed", "encode", "memorize"), engine_class(engine).variants
    geometry = bundle.geometry
    return (
        2 * graph_bytes(bundle, graphs, variants, precision)
        + _buffers(geometry, bundle.memory.object_pointers, 1, 1)
        + _widest(geometry.image_size, _FLOAT)
    )


def _widest(side: int, size: int) -> int:
    """Size of the widest layers of an image of this side, with so many bytes a number."""
    return LAYERS_ALIVE * (side // 4) ** 2 * STEM_WIDTH * size


def _size(bundle: Bundle, entry: Any) -> int:
    files = [entry, *data_files(entry)]
    return sum((bundle.path / str(file["file"])).stat().st_size for file in files)
