"""One PyTorch module -> one ONNX file with the names and dynamic axes that its spec states."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recallseg.engines.errors import ExportError
from recallseg.engines.specs import MOST_POINTS, Geometry, GraphSpec

__all__ = ["OPSET", "example_inputs", "export_graph"]

OPSET = 18
"""Of the ``portable`` variant: every runtime and TensorRT in use accepts it."""

_EXTERNAL_DATA_BYTES = 1_800_000_000  # an ONNX file is a protobuf message, which ends at 2 GiB
_EXAMPLE = {"n": 2, "k": 3, "p": 3}  # neither 0 nor 1, which tracing would take for constants


def example_inputs(
    spec: GraphSpec, generator: torch.Generator, *, n: int = 2, k: int = 3, p: int = 3
) -> dict[str, Tensor]:
    """Draw random inputs of the right kind.

    Masks of 0 and 1, times in 0..1, points in the image, of every label; the rest normal.
    """
    inputs: dict[str, Tensor] = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(n=n, k=k, p=p)
        if tensor.name == "masks":
            inputs[tensor.name] = (torch.rand(shape, generator=generator) > 0.5).float()
        elif tensor.name == "pointer_time":
            inputs[tensor.name] = torch.rand(shape, generator=generator)
        elif tensor.name == "points":
            logits = spec.outputs[0].resolve(n=n, k=k, p=p)  # a quarter of the image's side
            inputs[tensor.name] = torch.rand(shape, generator=generator) * 4 * logits[-1]
        elif tensor.name == "point_labels":
            labels = torch.randint(-1, 4, shape, generator=generator, dtype=torch.int32)
            inputs[tensor.name] = labels
        elif tensor.name == "has_prior":
            inputs[tensor.name] = torch.rand(shape, generator=generator) > 0.5
        else:
            inputs[tensor.name] = torch.randn(shape, generator=generator)
    return inputs


def export_graph(
    module: nn.Module, spec: GraphSpec, geometry: Geometry, path: Path, *, opset: int = OPSET
) -> None:
    """Write ``module`` to ``path`` (and ``path`` + ``.data`` if it is too large for one file).

    Parameters
    ----------
    module : in eval mode, on the CPU, fp32; takes and returns the tensors of ``spec`` in order.
    spec : names and shapes; the symbols ``n``, ``k`` and ``p`` become dynamic axes.
    geometry : gives the largest n and k.
    path : of the ``.onnx`` file.
    opset : version of the standard operators.

    Raises
    ------
    ExportError
        If the exporter fails, with its own words.
    OSError
        If the file cannot be written.
    """
    limits = {"n": geometry.max_n, "k": geometry.max_k, "p": MOST_POINTS}
    dims = {symbol: torch.export.Dim(symbol, min=1, max=limit) for symbol, limit in limits.items()}
    axes = tuple(
        {i: dims[size] for i, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    )
    inputs = example_inputs(spec, torch.Generator().manual_seed(0), **_EXAMPLE)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns that torchvision's operators are not installed
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecations inside torch and transformers, not ours
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=opset,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=axes if any(axes) else None,
                verbose=False,
            )
            if program is None:
                raise ExportError(f"graph '{spec.name}': the exporter returned nothing.")
            _forget_origin(program.model)
            _rename_twins(program.model)
            program.save(path, external_data=size > _EXTERNAL_DATA_BYTES)
    except (ExportError, OSError):  # of the disk: whoever writes the bundle names it
        raise
    except Exception as error:  # the exporter raises many kinds; all mean the same to the caller
        raise ExportError(f"graph '{spec.name}' cannot be exported to ONNX: {error}") from error
    finally:
        exporter_log.setLevel(level)


def _rename_twins(model: Any) -> None:
    """Rename inner values that are called as an output is: the exporter takes care of no such."""
    outputs = {value.name: value for value in model.graph.outputs}
    made = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*made, *model.graph.initializers.values()):
        if value.name in outputs and value is not outputs[value.name]:
            value.name = f"{value.name}__inner"


def _forget_origin(model: Any) -> None:
    """Drop what the exporter notes beside every node: stack traces, with this machine's paths."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
