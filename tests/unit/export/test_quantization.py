"""What int8 would spoil is found by measuring, and left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from recallseg.engines.engine import Tensor
from recallseg.engines.operators import ATTENTION, DOMAIN
from recallseg.engines.specs import GraphSpec, TensorSpec
from recallseg.engines.verification import relative_error
from recallseg.export.quantization import layers, quantize_graph, sensitive_layers

WIDTH = 64
SPEC = GraphSpec(
    "two",
    (TensorSpec("x", "float32", (16, WIDTH)),),
    (TensorSpec("y", "float32", (16, WIDTH)),),
)


def two_layers(outlier: float) -> ModelProto:
    """``first`` gets plain numbers; ``second`` gets one channel that is ``outlier`` times larger.

    A range that reaches to the outlier leaves few of 256 steps to the other channels.
    """
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8 for _ in range(2))
    gain = np.ones(WIDTH, np.float32)
    gain[0] = outlier
    second[0] /= outlier
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Mul", ["a", "gain"], ["b"], name="gain"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], name="second"),
    ]
    shape = [16, WIDTH]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(first, "w1"),
            numpy_helper.from_array(gain, "gain"),
            numpy_helper.from_array(second, "w2"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def inputs() -> dict[str, Tensor]:
    return {"x": np.random.default_rng(1).normal(size=(16, WIDTH)).astype(np.float32)}


def kinds(model: ModelProto) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in model.graph.node:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def test_a_layer_whose_input_has_an_outlier_stays_in_fp32() -> None:
    keep, error = sensitive_layers(two_layers(1000.0), SPEC, inputs())
    assert keep == {"second"}
    assert 0 < error < 2e-2
    quantised = quantize_graph(two_layers(1000.0), keep)
    assert kinds(quantised)["MatMul"] == 1
    assert kinds(quantised)["MatMulInteger"] == 1


def test_without_an_outlier_everything_is_quantised() -> None:
    keep, _ = sensitive_layers(two_layers(1.0), SPEC, inputs())
    assert keep == frozenset()
    assert "MatMul" not in kinds(quantize_graph(two_layers(1.0)))


def sharing() -> ModelProto:
    """Two products of one tensor, whose quantised form is made once for both, and one of theirs."""
    rng = np.random.default_rng(2)
    names = ("first", "second", "third")
    weights = [rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8 for _ in names]
    nodes = [
        helper.make_node("MatMul", ["x", "first.w"], ["a"], name="first"),
        helper.make_node("MatMul", ["x", "second.w"], ["b"], name="second"),
        helper.make_node("Add", ["a", "b"], ["c"], name="add"),
        helper.make_node("MatMul", ["c", "third.w"], ["y"], name="third"),
    ]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [16, WIDTH]) for n in "xy"]
    constants = [numpy_helper.from_array(w, f"{n}.w") for n, w in zip(names, weights, strict=True)]
    graph = helper.make_graph(nodes, "sharing", tensors[:1], tensors[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("model", [two_layers(1.0), two_layers(1000.0), sharing()])
def test_errors_are_those_of_each_layer_quantised_alone(model: ModelProto) -> None:
    def run(one: ModelProto) -> Tensor:
        session = onnxruntime.InferenceSession(
            one.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return np.asarray(session.run(None, inputs())[0])

    exact, names = run(model), {node.name for node in layers(model)}
    alone = {
        n: relative_error(run(quantize_graph(model, frozenset(names - {n}))), exact) for n in names
    }
    assert len(set(alone.values())) == len(names) > 1
    keep, error = sensitive_layers(model, SPEC, inputs(), budget=np.inf)
    assert keep == frozenset()
    assert error == pytest.approx(np.linalg.norm(list(alone.values())), rel=1e-6)
    worst = max(alone, key=lambda name: alone[name])
    assert sensitive_layers(model, SPEC, inputs(), budget=error * 0.9999)[0] == {worst}


def attention_between(gain: float) -> ModelProto:
    """One attention of tokens among themselves; ``gain`` is the size of its scores."""
    node = helper.make_node(
        "MultiHeadAttention",
        ["x", "x", "x"],
        ["y"],
        name="attention",
        domain="com.microsoft",
        num_heads=4,
        scale=gain,
    )
    shape = [1, 16, WIDTH]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph([node], "attention", tensors[:1], tensors[1:])
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=9)


@pytest.mark.usefixtures("native_operators")
def test_attention_is_measured_like_every_layer() -> None:
    tensors = [TensorSpec(name, "float32", (1, 16, WIDTH)) for name in "xy"]
    spec = GraphSpec("attention", (tensors[0],), (tensors[1],))
    x = {"x": inputs()["x"][None]}
    model = attention_between(0.25)
    keep, error = sensitive_layers(model, spec, x, native=True)
    assert keep == frozenset()
    assert 0 < error < 2e-2
    assert [n.domain for n in quantize_graph(model, keep, native=True).graph.node] == ["recallseg"]
    assert kinds(quantize_graph(model)) == {"MultiHeadAttention": 1}
    keep, error = sensitive_layers(model, spec, x, budget=1e-9, native=True)
    assert keep == {"attention"}
    assert error == 0.0
    (kept,) = quantize_graph(model, keep, native=True).graph.node
    assert (kept.domain, kept.op_type) == (DOMAIN, ATTENTION)


def test_a_tighter_budget_keeps_more() -> None:
    keep, error = sensitive_layers(two_layers(1.0), SPEC, inputs(), budget=1e-9)
    assert keep == {"first", "second"}
    assert error == 0.0


def test_the_model_given_is_left_as_it_is() -> None:
    model = two_layers(1.0)
    before = model.SerializeToString()
    quantize_graph(model)
    assert model.SerializeToString() == before
    assert len(layers(model)) == 2
