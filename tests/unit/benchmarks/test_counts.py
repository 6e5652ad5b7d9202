"""Kernels and bytes of a graph, told from the graph: renaming is free, a bias is a pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from recallseg.benchmarks.gpu.counts import count_graph
from recallseg.engines.specs import GraphSpec, TensorSpec


def test_what_is_counted(tmp_path: Path) -> None:
    constants = {
        "w": np.ones((8, 4), np.float32),
        "b": np.ones(4, np.float32),
        "table": np.array([0, 2], np.int64),
        "flat": np.array([-1, 8], np.int64),
    }
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Shape", ["sum"], ["size"]),
        helper.make_node("Relu", ["sum"], ["positive"]),
        helper.make_node("Gather", ["positive", "table"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    spec = GraphSpec(
        "g", (TensorSpec("x", "float32", ("n", 5, 8)),), (TensorSpec("y", "float32", (2, 4)),)
    )
    counts = count_graph(path, spec, n=2, k=1, float_bytes=2)
    assert counts.by_operator == {
        "MatMul": (1, 2 * (80 + 32 + 40)),
        "bias": (1, 2 * 2 * 40),
        "Relu": (1, 2 * 2 * 40),
        "Gather": (1, 2 * 2 * 8 + 2 * 8),
    }
    assert counts.launches == 4
    assert counts.bytes == sum(moved for _, moved in counts.by_operator.values())
    wide = count_graph(path, spec, n=2, k=1, float_bytes=4)
    assert wide.bytes == 2 * counts.bytes - 16
