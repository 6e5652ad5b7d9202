"""What becomes a native operator, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession, SessionOptions

from recallseg.engines.engine import Tensor
from recallseg.engines.operators import DOMAIN, LINEAR, needs_operators
from recallseg.export.native import stripe_weights, use_native_operators

WIDTH = 24
Node = tuple[str, list[str], list[str], dict[str, Any]]


def model_of(*nodes: Node, outputs: tuple[str, ...] = ("y",)) -> ModelProto:
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((WIDTH, WIDTH), np.float32),
        "wide": rng.standard_normal((WIDTH, 40), np.float32),
        "b": rng.standard_normal(WIDTH, np.float32),
        "one": rng.standard_normal(1, np.float32),
    }
    graph = helper.make_graph(
        [helper.make_node(kind, ins, outs, **more) for kind, ins, outs, more in nodes],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 7, WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 7, name]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model


def run(model: ModelProto, library: Path) -> list[Tensor]:
    options = SessionOptions()
    options.register_custom_ops_library(str(library))
    session = InferenceSession(model.SerializeToString(), options)
    x = np.random.default_rng(1).standard_normal((2, 7, WIDTH), np.float32)
    found: list[Tensor] = session.run(None, {"x": x})
    return found


PRODUCT: Node = ("MatMul", ["x", "w"], ["p"], {})
BIAS: Node = ("Add", ["p", "b"], ["s"], {})
GELU: Node = ("Gelu", ["s"], ["y"], {})


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ([("MatMul", ["x", "w"], ["y"], {})], []),
        ([("MatMul", ["x", "wide"], ["y"], {})], []),
        ([PRODUCT, ("Add", ["b", "p"], ["y"], {})], []),
        ([PRODUCT, BIAS, GELU], []),
        ([PRODUCT, BIAS, ("Relu", ["s"], ["y"], {})], []),
        ([PRODUCT, ("Relu", ["p"], ["y"], {})], []),
        ([PRODUCT, BIAS, ("Gelu", ["s"], ["y"], {"approximate": "tanh"})], ["Gelu"]),
        ([PRODUCT, ("Add", ["p", "x"], ["y"], {})], ["Add"]),
        ([PRODUCT, ("Add", ["p", "p"], ["y"], {})], ["Add"]),
        ([PRODUCT, ("Add", ["p", "one"], ["y"], {})], ["Add"]),
        # The sum has another reader, so it must stay.
        (
            [PRODUCT, BIAS, ("Gelu", ["s"], ["g"], {}), ("Add", ["g", "s"], ["y"], {})],
            ["Gelu", "Add"],
        ),
        ([("Transpose", ["w"], ["t"], {"perm": [1, 0]}), ("MatMul", ["x", "t"], ["y"], {})], []),
        # Not a constant: the product of two tensors.
        (
            [
                ("Transpose", ["x"], ["t"], {"perm": [0, 2, 1]}),
                ("MatMul", ["x", "t"], ["y"], {}),
            ],
            ["Transpose", "MatMul"],
        ),
    ],
)
def test_the_graph_computes_the_same(
    nodes: list[Node], left: list[str], operators_file: Path, tmp_path: Path
) -> None:
    model = model_of(*nodes)
    before = model.SerializeToString()
    made = use_native_operators(model)
    assert model.SerializeToString() == before
    assert [n.op_type for n in made.graph.node if n.domain != DOMAIN] == left
    onnx.save(made, tmp_path / "made.onnx")
    assert needs_operators(tmp_path / "made.onnx") == ("MatMul" not in left)
    used = {name for node in made.graph.node for name in node.input}
    assert {tensor.name for tensor in made.graph.initializer} <= used
    for found, expected in zip(run(made, operators_file), run(model, operators_file), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_what_the_graph_gives_out_stays(operators_file: Path) -> None:
    model = model_of(PRODUCT, BIAS, GELU, outputs=("y", "p"))
    made = use_native_operators(model)
    assert [n.op_type for n in made.graph.node] == [LINEAR, "Add", "Gelu"]
    for found, expected in zip(run(made, operators_file), run(model, operators_file), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_stripes_hold_every_column_once() -> None:
    weights = np.arange(3 * 20, dtype=np.float32).reshape(3, 20)
    stripes = stripe_weights(weights)
    assert stripes.shape == (2, 3, 16)
    np.testing.assert_array_equal(np.concatenate(list(stripes), axis=1)[:, :20], weights)
    assert not stripes[1, :, 4:].any()
