"""Weights and living tensors of a graph, read from its file, against what is counted by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from recallseg.engines.budget import graph_bytes
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import BundleError
from recallseg.engines.graph_sizes import GraphSizes

FLOAT, KIB = TensorProto.FLOAT, 1 << 10


def store(path: Path, nodes: list[Any], shapes: dict[str, list[Any]], **constants: Any) -> Path:
    """Store a graph from x to y whose inner tensors have these shapes."""
    tensors = {name: helper.make_tensor_value_info(name, FLOAT, s) for name, s in shapes.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [tensors.pop("x")],
        [tensors.pop("y")],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
        value_info=[*tensors.values()],
    )
    onnx.save(helper.make_model(graph), path)
    return path


def node(operator: str, inputs: str, output: str) -> Any:
    return helper.make_node(operator, inputs.split(), [output])


def test_what_lives_at_once_is_counted(tmp_path: Path) -> None:
    shapes = {
        "x": ["n", 4], "y": ["n", 16], "a": ["n", 16], "b": ["n", 16], "c": ["k*n", 100],
        "d": [16, "n"], "e": ["n", 16],
    }  # fmt: skip
    nodes = [
        node("MatMul", "x w", "a"),
        node("Relu", "a", "b"),  # a and b: 32 numbers
        node("Expand", "b s", "c"),  # a, b and c
        node("ReduceSum", "c", "e"),  # a, c and e: b is not read any more
        node("Reshape", "a t", "d"),  # a under another name, which keeps it alive
        node("Add", "e d", "y"),
    ]
    w = np.ones((4, 16), np.float32)
    sizes = GraphSizes(store(tmp_path / "g.onnx", nodes, shapes, w=w))
    assert sizes.weights == w.nbytes
    for n, k, width in ((1, 1, 4), (3, 2, 4), (3, 2, 2)):
        most = max(32 * n + 100 * k * n, 0)
        found = sizes.peak({"n": n, "k": k}, float_bytes=width, fused=False)
        assert found == most * width


def test_scores_of_fused_attention_are_not_stored(tmp_path: Path) -> None:
    shapes = {"x": ["n", 4], "y": ["n", 4], "q": ["n", 4], "s": ["n", 1000], "p": ["n", 1000]}
    nodes = [
        node("MatMul", "x w", "q"),
        node("MatMul", "q keys", "s"),
        node("Softmax", "s", "p"),
        node("MatMul", "p values", "y"),
    ]
    path = store(tmp_path / "g.onnx", nodes, shapes)
    peaks = [GraphSizes(path).peak({"n": 2}, float_bytes=4, fused=fused) for fused in (True, False)]
    assert peaks == [2 * 4 * 4, 2 * 2000 * 4]


def test_a_shape_that_was_lost_is_that_of_what_it_is_made_from(tmp_path: Path) -> None:
    shapes = {"x": ["n", 4], "y": ["n", 4], "a": ["n", 4], "b": ["", 4]}
    nodes = [node("Relu", "x", "a"), node("Transpose", "a", "b"), node("Relu", "b", "y")]
    path = store(tmp_path / "g.onnx", nodes, shapes)
    assert GraphSizes(path).peak({"n": 5}, float_bytes=4, fused=True) == 2 * 5 * 4 * 4


@pytest.mark.parametrize("damage", ["empty", "missing", "cut off"])
def test_what_is_no_graph_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "g.onnx"
    if damage != "missing":
        nodes = [node("Relu", "x", "y")]
        stored = store(path, nodes, {"x": [1], "y": [1]}).read_bytes()
        path.write_bytes(b"" if damage == "empty" else stored[:-5])
    with pytest.raises(BundleError, match="Export the bundle again"):
        GraphSizes(path)


def test_of_a_shared_file_a_graph_counts_what_it_needs(tmp_path: Path) -> None:
    """And each of two graphs its own, as each is a session with weights of its own."""
    (tmp_path / "shared.weights").write_bytes(bytes(1 << 20))
    entries = {}
    for name, size in (("embed", 4 * KIB), ("encode", 8 * KIB)):
        path = store(tmp_path / f"{name}.onnx", [node("Relu", "x", "y")], {"x": [1], "y": [1]})
        model = onnx.load(path)
        tensor = TensorProto(name="w", data_type=FLOAT, dims=[size // 4])
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "shared.weights"), ("offset", "64"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        model.graph.initializer.append(tensor)
        path.write_bytes(model.SerializeToString())
        entries[f"portable/fp32/{name}"] = {
            "file": path.name, "data": [{"file": "shared.weights"}]
        }  # fmt: skip
    bundle: Any = SimpleNamespace(path=tmp_path, manifest={"graphs": entries})
    found = graph_bytes(bundle, ("embed", "encode", "attend"), ("ort-cpu", "portable"), "fp32")
    assert found == 12 * KIB


def test_every_graph_that_is_shipped_can_be_read() -> None:
    demo = Bundle.open("demo")
    for key, entry in demo.manifest["graphs"].items():
        sizes = GraphSizes(demo.path / entry["file"])
        model = onnx.load(demo.path / entry["file"])
        assert sizes.weights == sum(
            numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer
        )
        if "/fp32/" in key:
            symbols = {"n": 1, "k": 4, "p": 3}
            assert 100 * KIB < sizes.peak(symbols, float_bytes=4, fused=True) < 100 << 20
