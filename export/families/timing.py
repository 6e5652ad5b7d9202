"""Two segmenters side by side on this CPU, in one thread, from random weights.

``python -m recallseg.export.families.timing edgetam tiny --image-size 1024`` exports the graphs
that differ (variant ``ort-cpu``, fp32) of both, runs them in turns, and the first one's in PyTorch
beside them, with memories that were made before. What is told is processor time, which other
processes disturb less than the clock: the least of all rounds, and the median.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from recallseg.engines.engine import EngineOptions
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.specs import graph_specs
from recallseg.export import ort_cpu
from recallseg.export.checkpoints import load_dinov2, load_segmenter
from recallseg.export.families.counting import EMBED_SIZE, K
from recallseg.export.graphs import build_graphs, read_geometry
from recallseg.export.onnx_export import example_inputs, export_graph

__all__ = ["time_side_by_side"]

MANY = 32
"""Memories that the first one is asked for as well: as many bytes as the other's four."""
GRAPHS = ("encode", "attend", "decode")
"""Those of a query that the embedder does not make."""

Call = Callable[[], object]


def time_side_by_side(
    first: str, second: str, *, image_size: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Return milliseconds of each graph: of ``first``, of it in PyTorch, and of ``second``.

    Parameters
    ----------
    first, second : what may follow ``random:`` for a segmenter.
    image_size : S in pixels.
    rounds : how often each is run, in turns.
    """
    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        calls = dict(_calls(first, image_size, Path(folder), many=True))
        calls.update(_calls(second, image_size, Path(folder), many=False))
    with torch.inference_mode():
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                since = process_time()
                call()
                spent.setdefault(name, []).append(1e3 * (process_time() - since))
    return {name: {"least": min(some), "median": median(some)} for name, some in spent.items()}


def _calls(name: str, image_size: int, folder: Path, *, many: bool) -> Iterator[tuple[str, Call]]:
    segmenter: Any = load_segmenter(f"random:{name}", image_size=image_size).model
    embedder: Any = load_dinov2("random:small").model
    geometry = read_geometry(segmenter, embedder, embed_size=EMBED_SIZE)
    modules, specs = build_graphs(segmenter, embedder), graph_specs(geometry)
    made = {**modules, **ort_cpu.build_ort_cpu_graphs(segmenter, embedder)}
    for graph in GRAPHS:
        path = folder / f"{name}.{graph}.onnx"
        with ort_cpu.fused_attention(segmenter, embedder):
            export_graph(made[graph], specs[graph], geometry, path, opset=ort_cpu.OPSET)
        engine = OnnxRuntimeCpu(specs[graph], path, EngineOptions(threads=1))
        ks = (1, K, *((MANY,) if many else ())) if graph == "attend" else (K,)
        for k in ks:
            what = f"{graph} k={k}" if graph == "attend" else graph
            inputs = example_inputs(specs[graph], torch.Generator().manual_seed(1), n=1, k=k)
            arrays = {tensor: value.numpy() for tensor, value in inputs.items()}
            results = engine.allocate_outputs(n=1)
            yield f"{name} {what}", partial(engine.run, arrays, results)
            if many and k == K:
                module = partial(modules[graph], *inputs.values())
                yield f"{name} in PyTorch {what}", module


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first")
    parser.add_argument("second")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    found = time_side_by_side(
        asked.first, asked.second, image_size=asked.image_size, rounds=asked.rounds
    )
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    _main()
