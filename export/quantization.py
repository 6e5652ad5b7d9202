"""``int8`` for CPUs: products with 8-bit weights and activations, layer by layer where it is safe.

Weights are quantised per output channel, symmetrically, by ONNX Runtime's own quantiser.
Activations are quantised by their range in the very image (``DynamicQuantizeMatMul``) and not by
one calibrated beforehand: on two cores with VNNI both took the same time (encode, SAM 2.1 tiny at
512 px: 713 and 714 ms beside 1188 in fp32), and no scanner can then leave the range of somebody
else's calibration images. Bias, normalisation and GELU stay in fp32, and so does
attention but in ``int8-native``, whose own operator quantises it.

Which layers stay in fp32 is measured: each is quantised alone, and the worst are left out until the
errors of the others, which are nearly independent, add up to little.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import ModelProto

from recallseg.engines.engine import EngineOptions, Tensor
from recallseg.engines.imports import import_onnxruntime
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.operators import DOMAIN, QUANTIZED_ATTENTION
from recallseg.engines.specs import GraphSpec
from recallseg.engines.verification import relative_error
from recallseg.export.native import FUSED_ATTENTION, use_native_operators
from recallseg.export.reading import read_graph

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ERROR_BUDGET", "quantize_graph", "sensitive_layers"]

ERROR_BUDGET = 2e-2
"""Relative error of a graph's worst output that its quantised layers may add up to."""


def quantize_graph(
    model: ModelProto, keep: frozenset[str] = frozenset(), *, native: bool = False
) -> ModelProto:
    """Return a graph with its products by constants in int8; ``model`` is left as it is.

    Parameters
    ----------
    model : fp32, every node named, weights loaded.
    keep : names of nodes to leave in fp32.
    native : whether attention becomes 8-bit too, and the rest runs by the native operators.
    """
    chosen = [node for node in layers(model, native=native) if node.name not in keep]
    made = _quantize_products(model, chosen)
    _quantize_attention(made, chosen)
    return use_native_operators(made) if native else made


def _quantize_attention(made: ModelProto, chosen: Sequence[onnx.NodeProto]) -> None:
    attention = {node.name for node in chosen if node.op_type == FUSED_ATTENTION}
    for node in made.graph.node:
        if node.name in attention:
            node.op_type, node.domain = QUANTIZED_ATTENTION, DOMAIN


def _quantize_products(model: ModelProto, chosen: Sequence[onnx.NodeProto]) -> ModelProto:
    quantization = import_onnxruntime("quantization", wanted_by="precision int8", extra="export")
    nodes = [node.name for node in chosen if node.op_type == "MatMul"]
    if not nodes:
        return copy.deepcopy(model)
    with TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "graph.onnx"
        quantization.quantize_dynamic(
            copy.deepcopy(model),
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=nodes,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
        )
        return read_graph(path)


def _alone(model: ModelProto, products: ModelProto, layer: onnx.NodeProto) -> ModelProto:
    """Return ``model`` with one layer quantised, as it is in ``products``, where all are."""
    made = copy.deepcopy(model)
    if layer.op_type == FUSED_ATTENTION:
        _quantize_attention(made, [layer])
        return made
    here = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    here.update(name for node in model.graph.node for name in node.output)
    maker = {name: node for node in products.graph.node for name in node.output}
    wanted, parts, used = [layer.output[0]], dict[str, onnx.NodeProto](), set[str]()
    while wanted:
        node = maker.get(wanted.pop())
        if node is None or node.output[0] in parts:  # a constant, or seen already
            continue
        parts[node.output[0]] = node
        used.update(node.input)
        wanted += [name for name in node.input if name not in here]
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        whole = node.output[0] == layer.output[0]
        nodes += [n for n in products.graph.node if n.output[0] in parts] if whole else [node]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    constants = {tensor.name: tensor for tensor in products.graph.initializer}
    made.graph.initializer.extend(constants[name] for name in constants if name in used - here)
    del made.opset_import[:]
    made.opset_import.extend(products.opset_import)
    return made


def layers(model: ModelProto, *, native: bool = False) -> list[onnx.NodeProto]:
    """Return what can be quantised: products by constants, and attention if ``native``."""
    constants = {t.name for t in model.graph.initializer if len(t.dims) == 2}
    return [
        node
        for node in model.graph.node
        if (node.op_type == "MatMul" and node.input[1] in constants)
        or (native and node.op_type == FUSED_ATTENTION and len(node.input) == 3)
    ]


def sensitive_layers(
    model: ModelProto,
    spec: GraphSpec,
    inputs: Mapping[str, Tensor],
    budget: float = ERROR_BUDGET,
    *,
    native: bool = False,
) -> tuple[frozenset[str], float]:
    """Measure which layers to leave in fp32.

    Parameters
    ----------
    model : fp32, every node named.
    spec : the graph's tensors.
    inputs : image-like ones, by name.
    budget : see :data:`ERROR_BUDGET`.
    native : as for :func:`quantize_graph`.

    Returns
    -------
    keep : names of nodes.
    error : what the errors of the others add up to (root of the sum of squares).
    """
    expected = _run(model, spec, inputs)
    errors = {}
    chosen = layers(model, native=native)
    products = _quantize_products(model, chosen)
    for layer in chosen:
        made = _alone(model, products, layer)
        found = _run(use_native_operators(made) if native else made, spec, inputs)
        errors[layer.name] = max(relative_error(found[key], expected[key]) for key in expected)
    kept: list[str] = []
    rest = sorted(errors, key=lambda name: errors[name])
    while rest and _sum(errors[name] for name in rest) > budget:
        kept.append(rest.pop())
    return frozenset(kept), _sum(errors[name] for name in rest)


def _sum(errors: Iterator[float]) -> float:
    return float(np.sqrt(sum(error**2 for error in errors)))


def _run(model: ModelProto, spec: GraphSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        onnx.save(model, path)
        engine = OnnxRuntimeCpu(spec, path, EngineOptions())
        symbols: dict[str, int] = {}
        for tensor in spec.inputs:
            tensor.bind(inputs[tensor.name], symbols, spec.name)
        outputs = engine.allocate_outputs(**symbols)
        engine.run({t.name: inputs[t.name] for t in spec.inputs}, outputs)
        return outputs


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser recommends, in a warning of its logger, a step that is of no use here."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
