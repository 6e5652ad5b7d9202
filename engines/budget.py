"""How much memory a bundle needs for k, n and S: computed from its files, before anything is built.

What can be counted is counted: weights, inputs and outputs, recalled memories. What an engine works
in is estimated from the graphs, as the tensors between their operators that live at once; where
plans were built, their builder has recorded it. What a driver and its libraries take is an
allowance. Each line says which of these it is. What was compared with what was measured:
docs/device/status.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recallseg.engines.buffer_shapes import buffer_shapes, bytes_of
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import BundleError, InputError
from recallseg.engines.graph_sizes import GraphSizes
from recallseg.engines.precisions import find_precision
from recallseg.engines.registry import engine_class
from recallseg.engines.specs import GRAPHS, graph_specs

if TYPE_CHECKING:
    from recallseg.engines.tensorrt.loading import RecordedPlans

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

_FLOAT, _HALF = 4, 2
_ARENA = 2
"""ONNX Runtime's arena on a CPU by what lives in it: it doubles when it is full."""
_INTEGERS = 2
"""Bytes more of a number with the integers that quantized products take and give: between 1 and 4;
this fits what was measured."""
_POOLED = 4
"""Memory tokens that one takes the place of in the precisions that average them 2x2."""

ALLOWANCE = {"device": 900 << 20, "host": 85 << 20}
"""Python and libraries, by where an engine runs: with CUDA's context and TensorRT, which 'doctor'
cannot know, and on a CPU with ONNX Runtime, what a process has before it opens a model."""


@dataclass(frozen=True)
class Line:
    """One part of the need; ``kind`` is ``counted``, ``recorded``, ``estimated`` or ``assumed``."""

    name: str
    size: int
    kind: str


@dataclass(frozen=True)
class Budget:
    """Everything that one process needs at once, in bytes.

    Attributes
    ----------
    image_size, k, n, precision, engine : what it was computed for.
    lines : the parts.
    scores : what memory attention needs in addition if it is *not* fused, as no TensorRT is known
        to fuse it in fp32 (``fp32``, ``mixed``); see docs/device/status.md.
    exemplar : what one exemplar adds for each structure it shows, on disk and in the page cache.
    """

    image_size: int
    k: int
    n: int
    precision: str
    engine: str
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
    engine: str = "tensorrt",
    shared: bool = True,
    plans: RecordedPlans | None = None,
) -> Budget:
    """Compute what a process with all five graphs needs.

    Parameters
    ----------
    bundle : whose weights and sizes.
    k, n : most memories and structures of one call: the profile's largest.
    precision : of the plans.
    image_size : S in pixels, a multiple of 16; the bundle's by default. At another one what an
        engine works in is that of the bundle's, as much more as the image has pixels.
    engine : that runs them.
    shared : CPU and GPU share their memory (Jetson), so that what lies on both counts twice; of no
        meaning for an engine on the CPU.
    plans : what plans of TensorRT say they work in
        (:func:`recallseg.engines.tensorrt.loading.recorded_plans`): that, instead of an estimate,
        for the bundle's own S and as many n and k as they take; scores that they do not fuse are
        in it.

    Raises
    ------
    InputError
        For k, n or S that no graph can have, or an unknown precision or engine.
    BundleError
        If a graph's file cannot be read.
    """
    side, stride = image_size or bundle.geometry.image_size, bundle.geometry.stride
    if side < stride or side % stride:
        raise InputError(f"an image size must be a multiple of {stride}, got {side}.")
    if k < 1 or n < 1:
        raise InputError(f"a budget needs k and n of at least 1; got k = {k}, n = {n}.")
    chosen, kind = find_precision(precision), engine_class(engine)
    geometry = bundle.geometry.at(side)
    specs = graph_specs(geometry, object_pointers=bundle.memory.object_pointers)
    buffers = bytes_of(buffer_shapes(specs, geometry, n=n, k=k, masks=n))
    spatial = geometry.tokens // (_POOLED if "pooled" in chosen.approximations else 1)
    tokens = k * (spatial + geometry.channels // geometry.memory_dim)
    variants, host = kind.variants, kind.place == "host"
    weights = sum(_weights(bundle, graph, variants, precision) for graph in GRAPHS)
    grown = (side / bundle.geometry.image_size) ** 2
    peaks = [
        _peak(bundle, graph, variants, precision, n, k, _living(precision, host=host))
        * (1 if graph == "embed" else grown)
        for graph in GRAPHS
    ]
    ours = n * k * (geometry.tokens * geometry.memory_dim * _HALF + geometry.channels * _FLOAT)
    there = [Line("weights", weights, "counted"), Line("buffers of the graphs", buffers, "counted")]
    if host:
        # Repacked beside the files, which are mapped; one arena for all graphs.
        there.insert(1, Line("the same, repacked", weights, "estimated"))
        activations = _ARENA * max(peaks)
    else:
        there.append(Line("recalled memories", ours, "counted"))
        there += [Line("the same for the CPU", buffers, "counted")] if shared else []
        activations = sum(peaks)  # each graph works in memory of its own
    told = (
        plans is not None and side == bundle.geometry.image_size and n <= plans.n and k <= plans.k
    )
    if plans is not None and told:
        activations = sum(plans.works_in[graph] for graph in GRAPHS)
    lines = (
        *there,
        Line("activations", int(activations), "recorded" if told else "estimated"),
        Line("driver, libraries, Python", ALLOWANCE[kind.place], "assumed"),
    )
    return Budget(
        side,
        k,
        n,
        precision,
        engine,
        lines,
        # Scores and their softmax; in mixed this is the part that stays fp32.
        scores=0
        if host or told
        else 2 * n * geometry.places * tokens * (_FLOAT if precision == "mixed" else chosen.size),
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


def graph_bytes(
    bundle: Bundle, graphs: Sequence[str], variants: Sequence[str], precision: str
) -> int:
    """Return the bytes of the weights of graphs, each graph's its own, as engines hold them.

    Files that several graphs refer to are counted as often as they are needed, and no more of them
    than a graph needs. What the bundle lacks counts nothing.
    """
    found = (_file(bundle, graph, variants, precision) for graph in graphs)
    return sum(_read(path, *_state(path)).weights for path in found if path is not None)


def encoding_bytes(bundle: Bundle, engine: str, precision: str) -> int:
    """Estimate what encoding one image on a CPU needs: weights twice, as ONNX Runtime repacks
    them, inputs and outputs, and the activations of one graph at a time.
    """
    graphs, variants = ("embed", "encode", "memorize"), engine_class(engine).variants
    shapes = buffer_shapes(bundle.specs, bundle.geometry, n=1, k=1, masks=1)
    size = _living(precision, host=True)
    peak = max(_peak(bundle, graph, variants, precision, 1, 1, size) for graph in graphs)
    weights = graph_bytes(bundle, graphs, variants, precision)
    return 2 * weights + bytes_of(shapes) + _ARENA * peak


def _living(precision: str, *, host: bool) -> int:
    """Return the bytes of a number between two operators; on a CPU they are fp32."""
    chosen = find_precision(precision)
    if not host:
        return chosen.size
    return _FLOAT + (_INTEGERS if chosen.made_by == "quantized" else 0)


def _weights(bundle: Bundle, graph: str, variants: Sequence[str], precision: str) -> int:
    """Return a graph's weights in this precision, or what fp32's would become."""
    for chosen, part in ((precision, 1.0), ("fp32", find_precision(precision).size / _FLOAT)):
        path = _file(bundle, graph, (*variants, "portable"), chosen)
        if path is not None:
            return int(_read(path, *_state(path)).weights * part)
    return 0


def _peak(
    bundle: Bundle,
    graph: str,
    variants: Sequence[str],
    precision: str,
    n: int,
    k: int,
    float_bytes: int,
) -> int:
    """Return what a graph works in if scores of attention are not stored."""
    exported = precision if find_precision(precision).made_by == "export" else "fp32"
    for chosen in (exported, "fp32"):  # what was converted does not state its shapes
        path = _file(bundle, graph, (*variants, "portable"), chosen)
        if path is not None:
            few = (1, 1) if graph in ("embed", "encode") else (n, k if graph == "attend" else 1)
            return _peak_of(path, *_state(path), *few, float_bytes)
    return 0


def _file(bundle: Bundle, graph: str, variants: Sequence[str], precision: str) -> Path | None:
    """Return the file of the first of ``variants`` that the bundle has."""
    entries = bundle.manifest["graphs"]
    for variant in variants:
        entry = entries.get(f"{variant}/{precision}/{graph}")
        if entry is not None:
            return bundle.path / str(entry["file"])
    return None


def _state(path: Path) -> tuple[int, int]:
    """Return what changes with a file's content."""
    try:
        found = path.stat()
    except OSError as error:
        raise BundleError(f"the graph {path} cannot be read: {error.strerror}.") from error
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=64)
def _read(path: Path, size: int, changed: int) -> GraphSizes:
    return GraphSizes(path)


@lru_cache(maxsize=4096)
def _peak_of(path: Path, size: int, changed: int, n: int, k: int, float_bytes: int) -> int:
    symbols = {"n": n, "k": k}
    return _read(path, size, changed).peak(symbols, float_bytes=float_bytes, fused=True)
