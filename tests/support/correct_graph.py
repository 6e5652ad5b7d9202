"""A toy graph ``correct``: its tensors are the real ones, and prove what they do."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from recallseg.engines.specs import Geometry, graph_specs

__all__ = ["write_correct"]


def write_correct(path: Path, geometry: Geometry) -> None:
    """Write a graph ``correct`` that tells its inputs apart: prior, sums of points and labels."""
    spec = graph_specs(geometry, optional=("correct",))["correct"]
    dtype = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "bool": TensorProto.BOOL}
    inputs, outputs = (
        [helper.make_tensor_value_info(t.name, dtype[t.dtype], t.shape) for t in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    nodes = [
        helper.make_node("Mul", ["prior", "nothing"], ["zeros"]),
        helper.make_node("Where", ["has_prior", "prior", "zeros"], ["chosen"]),
        helper.make_node("Squeeze", ["chosen", "first"], ["logits"]),
        helper.make_node("ReduceSum", ["points"], ["sum"], keepdims=0),
        helper.make_node("Unsqueeze", ["sum", "first"], ["iou"]),
        helper.make_node("Cast", ["point_labels"], ["labels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["labels"], ["count"], keepdims=0),
        helper.make_node("Unsqueeze", ["count", "first"], ["object_score"]),
    ]
    constants = [
        helper.make_tensor("nothing", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("first", TensorProto.INT64, [1], [0]),
    ]
    graph = helper.make_graph(nodes, "correct", inputs, outputs, constants)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path
    )
