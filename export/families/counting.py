"""What a network costs, counted: parameters, bytes and operations of every graph.

``python -m recallseg.export.families.counting`` counts them anew and writes ``counted.json``
beside this file, which ``recallseg export --list`` shows. Nothing is run: tensors are shapes only
(PyTorch's fake tensors). A multiplication and an addition are two operations, as PyTorch's counter
has it; what is no product (normalisation, activation, softmax) is not counted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel
from transformers.initialization import no_init_weights

from recallseg.engines.specs import GRAPHS, GraphSpec, graph_specs
from recallseg.export.checkpoints.architectures import (
    DINOV2,
    EDGETAM,
    SAM2,
    dinov2_config,
    edgetam_config,
    sam2_config,
)
from recallseg.export.checkpoints.embedders import DINOV3
from recallseg.export.families import SEGMENTERS
from recallseg.export.graphs import build_graphs, read_geometry
from recallseg.export.tensorrt import fusable_attention

__all__ = ["COUNTED", "SIZES", "K", "count_in_process"]

COUNTED = Path(__file__).with_name("counted.json")
SIZES = (512, 1024)
"""Image sizes in pixels."""

EMBED_SIZE = 224
_SHAPES = FakeTensorMode()
"""One for a process: transformers keeps position embeddings for the next call."""

K = 4
"""Recalled memories, for one structure."""


def _segmenter_config(name: str, size: int) -> Any:
    """Return the configuration of ``edgetam`` or of an architecture of SAM 2.1."""
    if name == EDGETAM:
        return edgetam_config(image_size=size)
    return sam2_config(name, newer=True, image_size=size)


def _make(config: Any) -> Any:
    with no_init_weights():  # it looks at values, which fake tensors lack
        made: nn.Module = _made(config)
    return made.requires_grad_(False)


def _made(config: Any) -> Any:
    for family in SEGMENTERS:
        if family.model_class.config_class is type(config):
            return family.model_class(config).eval()
    return AutoModel.from_config(config).eval()


def count_in_process(name: str, size: int) -> dict[str, Any]:
    """Count a segmenter at an image size, or an embedder at size 0, in a process of its own.

    Position embeddings that transformers keeps for the next call would be without values in this.
    """
    module = "recallseg.export.families.counting"
    command = [sys.executable, "-m", module, name, str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    counted: dict[str, Any] = json.loads(done.stdout)
    return counted


def _count_segmenter(name: str, size: int) -> dict[str, Any]:
    """Count one segmenter at one image size: operations and weights of each graph but ``embed``."""
    with _SHAPES, torch.no_grad():
        model = _make(_segmenter_config(name, size))
        embedder = _make(dinov2_config("small", registers=0))
        geometry = read_geometry(model, embedder, embed_size=EMBED_SIZE)
        modules, specs = build_graphs(model, embedder), graph_specs(geometry)
        with fusable_attention(model):  # in products, which are counted
            graphs = {g: _count(modules[g], specs[g]) for g in GRAPHS if g != "embed"}
        parameters = sum(p.numel() for p in model.parameters())
    return {
        "parameters": parameters,
        "tokens": geometry.tokens,
        "memory_bytes_fp16": 2 * (geometry.tokens * geometry.memory_dim + geometry.channels),
        "graphs": graphs,
    }


def _count_embedder(name: str) -> dict[str, Any]:
    """Count one embedder at its usual size."""
    plain = name.removeprefix("dinov2-")
    config = DINOV3[name] if name in DINOV3 else dinov2_config(plain, registers=0)
    with _SHAPES, torch.no_grad():
        model = _make(config)
        image = torch.zeros(1, 3, EMBED_SIZE, EMBED_SIZE)
        with fusable_attention(model), FlopCounterMode(display=False) as counter:
            model(image)
        parameters = sum(p.numel() for p in model.parameters())
    flop = counter.get_total_flops()
    return {"parameters": parameters, "gflop": round(flop / 1e9, 2), "mb": _mb(parameters)}


def _count(module: nn.Module, spec: GraphSpec) -> dict[str, float]:
    inputs = [torch.zeros(tensor.resolve(n=1, k=K)) for tensor in spec.inputs]
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    weights = {id(p): p.numel() for p in module.parameters()}
    flop = counter.get_total_flops()
    return {"gflop": round(flop / 1e9, 2), "mb": _mb(sum(weights.values()))}


def _mb(parameters: int) -> float:
    return round(4 * parameters / 1e6, 1)


def _count_all() -> Mapping[str, Any]:
    """Count everything that has a name."""
    embedders = (*(f"dinov2-{name}" for name in DINOV2), *DINOV3)
    return {
        "k": K,
        "embed_size": EMBED_SIZE,
        "segmenters": {
            name: {str(size): _count_segmenter(name, size) for size in SIZES}
            for name in (*SAM2, EDGETAM)
        },
        "embedders": {name: _count_embedder(name) for name in embedders},
    }


def _main(arguments: list[str]) -> None:
    if not arguments:
        COUNTED.write_text(json.dumps(_count_all(), indent=1) + "\n", encoding="utf-8")
        return
    name, size = arguments
    found = _count_segmenter(name, int(size)) if int(size) else _count_embedder(name)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1:])
