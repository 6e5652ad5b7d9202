"""``fp32-native`` and ``fp16-native``: graphs with this project's own operators.

``fp32-native`` is made from variant ``ort-cpu``, for the CPU. Products by constants, with the bias
and the activation behind them, become ``Linear``; fused attention becomes ``Attention``. Nothing
but the order of summation differs from ``fp32``. Weights are stored in the order in which the
operator reads them: an operator of ONNX Runtime's C interface gets no chance to reorder them when a
session is made.

``fp16-native`` is made from ``fp16`` of variant ``ort-cuda``, for CUDA: products with a bias or an
activation behind them become ``HalfLinear``, one kernel of cuBLASLt each, whose GELU is the tanh
form: 4e-4 from the other at most.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from recallseg.engines.operators import ATTENTION, DOMAIN, HALF_LINEAR, LINEAR, STRIPE

__all__ = ["FUSED_ATTENTION", "stripe_weights", "use_half_linear", "use_native_operators"]

FUSED_ATTENTION = "MultiHeadAttention"
"""ONNX Runtime's operator for which both of ours stand in."""

_ACTIVATIONS = {"Gelu": 1, "Relu": 2}

Floats = NDArray[np.floating]


def stripe_weights(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Reorder a WxN matrix to PxWx16: stripes of columns, the last one filled up with 0."""
    width, columns = weights.shape
    padded = np.zeros((width, -(-columns // STRIPE) * STRIPE), np.float32)
    padded[:, :columns] = weights
    return np.ascontiguousarray(padded.reshape(width, -1, STRIPE).transpose(1, 0, 2))


def use_native_operators(model: ModelProto) -> ModelProto:
    """Return a graph with the native operators wherever they can stand; ``model`` stays as it is.

    Parameters
    ----------
    model : fp32 or int8, weights loaded. Only its products in fp32 are replaced.
    """
    made = copy.deepcopy(model)
    graph = _Graph(made)
    for node in model.graph.node:
        if node.op_type == FUSED_ATTENTION and len(node.input) == 3:
            replacement = copy.deepcopy(node)
            replacement.op_type, replacement.domain = ATTENTION, DOMAIN
            graph.replace(replacement, [node])
        elif node.op_type == "MatMul":
            graph.fuse(node)
    graph.write()
    _declare_domain(made)
    return made


def use_half_linear(model: ModelProto) -> ModelProto:
    """Return a graph with ``HalfLinear`` wherever it saves a pass; ``model`` stays as it is.

    Parameters
    ----------
    model : in fp16, of variant ``ort-cuda``, weights loaded.
    """
    made = copy.deepcopy(model)
    graph = _Graph(made, np.float16)
    for node in model.graph.node:
        if node.op_type == "MatMul":
            graph.fuse_half(node)
    graph.write()
    _declare_domain(made)
    return made


def _declare_domain(model: ModelProto) -> None:
    """Import the operators' domain where a node is of it, in place."""
    used = any(node.domain == DOMAIN for node in model.graph.node)
    if used and all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


@dataclass(frozen=True)
class _Followed:
    """A product by a constant WxN and what is behind it; ``bias`` is N or None."""

    nodes: list[NodeProto]
    weights: Any
    bias: Any
    activation: int


class _Graph:
    """A model whose nodes are being replaced, products of one number type among them."""

    def __init__(self, model: ModelProto, kind: type[np.floating] = np.float32) -> None:
        self.graph = model.graph
        self.kind = kind
        self.constants = {t.name: t for t in model.graph.initializer}
        self.made_by = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}
        self.instead: dict[str, NodeProto | None] = {}  # by a node's first output
        self.added: list[onnx.TensorProto] = []

    def constant(self, name: str) -> Floats | None:
        """Return a constant of the type, be it stored or a stored matrix turned over."""
        found = self.constants.get(name)
        if found is not None:
            value = numpy_helper.to_array(found)
            return value if value.dtype == self.kind else None
        node = self.made_by.get(name)
        if node is None or node.op_type != "Transpose":
            return None
        value_before = self.constant(node.input[0])
        if value_before is None or value_before.ndim != 2:
            return None
        return np.ascontiguousarray(value_before.T)

    def only_reader(self, node: NodeProto) -> NodeProto | None:
        """Return what reads a node's output, if it is one and the graph does not give it out."""
        (name,) = node.output
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def followed(self, product: NodeProto) -> _Followed | None:
        """Return a product by a constant matrix with the bias and activation behind it."""
        weights = self.constant(product.input[1])
        if weights is None or weights.ndim != 2:
            return None
        columns = weights.shape[1]
        nodes, bias, activation = [product], None, 0
        reader = self.only_reader(product)
        if reader is not None and reader.op_type in ("Add", "BiasGelu"):
            other = [name for name in reader.input if name != product.output[0]]
            added = self.constant(other[0]) if len(other) == 1 else None
            if added is not None and added.shape == (columns,):
                nodes, bias = [*nodes, reader], added
                if reader.op_type == "BiasGelu":
                    return _Followed(nodes, weights, bias, _ACTIVATIONS["Gelu"])
                reader = self.only_reader(reader)
        if reader is not None and reader.op_type in _ACTIVATIONS and _is_exact(reader):
            nodes, activation = [*nodes, reader], _ACTIVATIONS[reader.op_type]
        return _Followed(nodes, weights, bias, activation)

    def fuse(self, product: NodeProto) -> None:
        """Replace a product by a constant, and the bias and activation behind it."""
        found = self.followed(product)
        if found is None:
            return
        columns = found.weights.shape[1]
        bias = np.zeros(columns, np.float32) if found.bias is None else found.bias
        stored = {
            "stripes": stripe_weights(found.weights),
            "bias": stripe_weights(bias[None])[:, 0],
        }
        self._replace_product(LINEAR, found, stored, columns=columns)

    def fuse_half(self, product: NodeProto) -> None:
        """The same for CUDA, where there is a bias: without one a product is best as it is."""
        found = self.followed(product)
        if found is not None and found.bias is not None:
            self._replace_product(
                HALF_LINEAR, found, {"weights": found.weights, "bias": found.bias}
            )

    def _replace_product(
        self, kind: str, found: _Followed, stored: dict[str, Floats], **attributes: Any
    ) -> None:
        product, last = found.nodes[0], found.nodes[-1]
        name = product.name or product.output[0]
        keys = [f"{name}/{part}" for part in stored]
        self.added += [
            numpy_helper.from_array(value, key)
            for key, value in zip(keys, stored.values(), strict=True)
        ]
        made = helper.make_node(
            kind,
            [product.input[0], *keys],
            [last.output[0]],
            name=name,
            domain=DOMAIN,
            activation=found.activation,
            **attributes,
        )
        self.replace(made, found.nodes)

    def replace(self, made: NodeProto, nodes: list[NodeProto]) -> None:
        """Put ``made`` where the last of ``nodes`` is, and take the others away."""
        for node in nodes[:-1]:
            self.instead[node.output[0]] = None
        self.instead[nodes[-1].output[0]] = made

    def write(self) -> None:
        """Write the nodes anew, without what nothing reads any more."""
        nodes = [self.instead.get(n.output[0], n) for n in self.graph.node]
        kept = [copy.deepcopy(node) for node in nodes if node is not None]
        self.graph.initializer.extend(self.added)
        while True:  # a turned matrix whose product is gone, and then the matrix
            used = Counter(name for node in kept for name in node.input)
            needed = [n for n in kept if any(o in used or o in self.outputs for o in n.output)]
            if len(needed) == len(kept):
                break
            kept = needed
        del self.graph.node[:]
        self.graph.node.extend(kept)
        constants = [copy.deepcopy(t) for t in self.graph.initializer if t.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(constants)


def _is_exact(node: NodeProto) -> bool:
    """Whether an activation is not the approximate kind of GELU."""
    return all(a.name != "approximate" or a.s == b"none" for a in node.attribute)
