"""The ``tensorrt`` variant is the same function, in the form that TensorRT fuses and 10.3 takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import ExportError
from recallseg.engines.specs import GRAPHS
from recallseg.export.tensorrt import (
    MAX_OPSET,
    OPERATORS,
    REARRANGED,
    check_operators,
)


def load(bundle: Bundle, graph: str, variant: str = "tensorrt") -> onnx.ModelProto:
    path, found = bundle.graph_file(graph, (variant,), "fp32")
    assert found == variant
    return onnx.load(path)


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


@pytest.mark.parametrize("graph", GRAPHS)
def test_only_what_tensorrt_10_3_takes(exported: Bundle, graph: str) -> None:
    model = load(exported, graph)
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]


@pytest.mark.parametrize("graph", GRAPHS)
def test_attention_is_two_products_with_a_softmax_between(exported: Bundle, graph: str) -> None:
    model = load(exported, graph)
    made_by = producers(model)
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert softmaxes
    for softmax in softmaxes:
        product = made_by[softmax.input[0]]
        users = [node for node in model.graph.node if softmax.output[0] in node.input]
        assert product.op_type == "MatMul"
        assert [user.op_type for user in users] == ["MatMul"]


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_query_is_scaled_before_the_product_and_the_keys_are_not(
    exported: Bundle, graph: str
) -> None:
    model = load(exported, graph)
    made_by = producers(model)
    for softmax in (node for node in model.graph.node if node.op_type == "Softmax"):
        product = made_by[softmax.input[0]]
        query, key = (made_by[name] for name in product.input)
        assert query.op_type == "Mul"
        assert key.op_type in ("Transpose", "Reshape")


@pytest.mark.parametrize("graph", REARRANGED)
def test_it_moves_no_more_than_it_must(exported: Bundle, graph: str) -> None:
    now, before = (
        Counter(node.op_type for node in load(exported, graph, variant).graph.node)
        for variant in ("tensorrt", "portable")
    )
    assert {"Pad", "Conv", "ConvTranspose", "Resize", "MaxPool"}.isdisjoint(now)
    assert now["Transpose"] < before["Transpose"]
    assert now.total() < 0.9 * before.total()


def test_portable_attention_would_not_have_passed(exported: Bundle) -> None:
    """Else the two tests above prove nothing."""
    model = load(exported, "attend", "portable")
    made_by = producers(model)
    keys = [
        made_by[made_by[node.input[0]].input[1]].op_type
        for node in model.graph.node
        if node.op_type == "Softmax"
    ]
    assert "Mul" in keys


def write(path: Path, operator: str, *, opset: int = 18, domain: str = "") -> Path:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    graph = helper.make_graph([node], "g", [value], [result])
    opsets = [helper.make_opsetid(name, opset) for name in {"", domain}]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


def test_what_10_3_does_not_take_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="uses RoiAlign"):
        check_operators(write(tmp_path / "a.onnx", "RoiAlign"))
    with pytest.raises(ExportError, match=r"com\.microsoft::Relu"):
        check_operators(write(tmp_path / "b.onnx", "Relu", domain="com.microsoft"))
    with pytest.raises(ExportError, match=f"operator set {MAX_OPSET + 1}"):
        check_operators(write(tmp_path / "c.onnx", "Relu", opset=MAX_OPSET + 1))
    check_operators(write(tmp_path / "d.onnx", "Relu", opset=MAX_OPSET))
