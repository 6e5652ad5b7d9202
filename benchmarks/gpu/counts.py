"""What a graph asks of a GPU, without one: kernels launched and bytes moved.

The fp32 graph is run once on the CPU as it is stored, and ONNX Runtime's trace says which nodes ran
on which shapes. The rules are those of its CUDA provider as a profile on an H100 showed them: what
only renames a tensor is free, whole numbers that describe shapes stay on the CPU, a product with a
bias behind it is filled with the bias first, and every other operator is one kernel that reads what
it takes and writes what it makes once. Attention may be two or three kernels, and what a kernel
reads may come from the cache: these are counts to compare graphs by, not times.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from recallseg.engines.imports import import_onnxruntime
from recallseg.engines.specs import GraphSpec

__all__ = ["Counts", "count_graph", "count_trace"]

_FREE = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Constant", "Shape", "Size"}
_SHAPE_BYTES = 4096  # as the engine's own check allows the CPU


@dataclass
class Counts:
    """Of one run of a graph; ``by_operator`` has launches and bytes of each operator."""

    launches: int = 0
    bytes: int = 0
    by_operator: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, operator: str, moved: int) -> None:
        """Count a kernel."""
        self.launches += 1
        self.bytes += moved
        launches, before = self.by_operator.get(operator, (0, 0))
        self.by_operator[operator] = launches + 1, before + moved


def count_graph(path: Path, spec: GraphSpec, *, n: int, k: int, float_bytes: int) -> Counts:
    """Count one graph.

    Parameters
    ----------
    path : of the fp32 graph.
    spec : its inputs.
    n, k : structures and memories.
    float_bytes : of a number as it would be on the GPU: 4, or 2 for fp16.
    """
    runtime = import_onnxruntime(wanted_by="benchmarks of graphs")
    with tempfile.TemporaryDirectory() as folder:
        settings = runtime.SessionOptions()
        settings.log_severity_level = 3
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Weights that were packed are no inputs any more.
        settings.add_session_config_entry("session.disable_prepacking", "1")
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "trace")
        session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        inputs = {
            tensor.name: np.ones(tensor.resolve(n=n, k=k), tensor.dtype) for tensor in spec.inputs
        }
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return count_trace(events, float_bytes=float_bytes)


def count_trace(events: Iterable[Mapping[str, Any]], *, float_bytes: int) -> Counts:
    """Count the nodes of a trace, in the order in which they ran."""
    counts = Counts()
    product: tuple[int, ...] | None = None
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") != "Node" or "op_name" not in facts:
            continue
        operator = facts["op_name"]
        made = _tensors(facts["output_type_shape"])
        before, product = product, None
        if operator in _FREE or all(
            kind != "float" and prod(shape) * 8 <= _SHAPE_BYTES for kind, shape in made
        ):
            continue

        def size(tensor: tuple[str, tuple[int, ...]]) -> int:
            kind, shape = tensor
            return prod(shape) * (float_bytes if kind == "float" else 8)

        taken = _tensors(facts["input_type_shape"])
        written = sum(map(size, made))
        if operator == "MatMul" and len(taken[-1][1]) == 2:
            product = made[0][1]
        vector = any(len(shape) == 1 for _, shape in taken)
        if operator == "Add" and before == made[0][1] and vector:
            counts.add("bias", 2 * written)  # filled in, and read by the product
        elif operator == "Gather":  # it reads what it takes, not the whole table
            counts.add(operator, 2 * written + size(taken[1]))
        else:
            counts.add(operator, sum(map(size, taken)) + written)
    return counts


def _tensors(found: Iterable[Mapping[str, Any]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(shape)) for tensor in found for kind, shape in tensor.items()]
