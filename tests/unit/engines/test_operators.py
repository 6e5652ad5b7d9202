"""The native operators in ONNX Runtime, beside its own; and their errors."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession, SessionOptions

from recallseg.engines.engine import EngineOptions, Tensor
from recallseg.engines.errors import EngineRunError, EngineUnavailableError
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.operators import (
    ATTENTION,
    DOMAIN,
    LINEAR,
    QUANTIZED_ATTENTION,
    STRIPE,
    describe_operators,
    operators_library,
)
from recallseg.engines.specs import GraphSpec, TensorSpec
from recallseg.export.native import stripe_weights

SPEC = GraphSpec(
    "attend",
    tuple(TensorSpec(name, "float32", (1, 8, 12)) for name in ("query", "key", "value")),
    (TensorSpec("out", "float32", (1, 8, 12)),),
)
TOLERANCES = {QUANTIZED_ATTENTION: 0.03, ATTENTION: 3e-6}
"""Of the range of the values, for scores of a magnitude that networks have."""
FUSED = "MultiHeadAttention"

kinds = pytest.mark.parametrize("kind", [ATTENTION, QUANTIZED_ATTENTION])


def attention_model(kind: str, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(
        kind,
        ["query", "key", "value"],
        ["out"],
        domain="com.microsoft" if kind == FUSED else DOMAIN,
        **attributes,
    )
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{i}" for i in range(3)])
        for name in ("query", "key", "value", "out")
    ]
    graph = helper.make_graph([node], "attention", tensors[:3], tensors[3:])
    domains = [("", 20), ("com.microsoft", 1), (DOMAIN, 1)]
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*pair) for pair in domains], ir_version=9
    )


def run_model(
    library: Path, model: onnx.ModelProto, inputs: dict[str, Tensor], threads: int = 1
) -> Tensor:
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    session = InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    out: Tensor = session.run(None, inputs)[0]
    return out


def run(
    library: Path, inputs: dict[str, Tensor], kind: str, *, threads: int = 1, **more: Any
) -> Tensor:
    return run_model(library, attention_model(kind, **more), inputs, threads)


def tensors(
    shape: tuple[int, int, int, int, int, int], spread: float, seed: int
) -> dict[str, Tensor]:
    batch, heads, queries, keys, width, values = shape
    rng = np.random.default_rng(seed)
    return {
        "query": spread * rng.standard_normal((batch, queries, heads * width), np.float32),
        "key": spread * rng.standard_normal((batch, keys, heads * width), np.float32)
        + rng.standard_normal((1, 1, heads * width), np.float32),
        "value": rng.uniform(-1, 1, (batch, keys, heads * values)).astype(np.float32),
    }


@kinds
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 3, 100, 200, 70, 40))),
    spread=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_it_is_attention(
    level: Path, kind: str, shape: tuple[int, int, int, int, int, int], spread: float, seed: int
) -> None:
    inputs = tensors(shape, spread, seed)
    settings_of = {"num_heads": shape[1], "scale": float(shape[4] ** -0.5)}
    expected = run(level, inputs, FUSED, **settings_of)
    found = run(level, inputs, kind, **settings_of)
    assert np.abs(found - expected).max() <= TOLERANCES[kind] * 2
    assert np.array_equal(run(level, inputs, kind, threads=2, **settings_of), found)


@kinds
def test_one_key_is_passed_on_exactly(level: Path, kind: str) -> None:
    inputs = tensors((2, 2, 9, 1, 8, 24), 1.0, 0)
    found = run(level, inputs, kind, num_heads=2)
    np.testing.assert_array_equal(found, np.broadcast_to(inputs["value"], found.shape))


@kinds
def test_the_default_scale_is_that_of_the_operator_it_stands_for(level: Path, kind: str) -> None:
    inputs = tensors((1, 2, 30, 50, 16, 16), 1.0, 0)
    found = run(level, inputs, kind, num_heads=2)
    np.testing.assert_array_equal(found, run(level, inputs, kind, num_heads=2, scale=0.25))
    other = run(level, inputs, kind, num_heads=2, scale=0.5)
    assert np.abs(found - other).max() > TOLERANCES[kind]


@kinds
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("flaw", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(level: Path, kind: str, name: str, flaw: float) -> None:
    inputs = {key: np.abs(value) for key, value in tensors((2, 2, 7, 40, 8, 8), 1.0, 0).items()}
    inputs[name][0, 3, 5] = flaw
    found = run(level, inputs, kind, num_heads=2)
    assert not np.isfinite(found[0, 3, 5])
    assert np.isfinite(found[1]).all()


@kinds
def test_shapes_that_do_not_match_are_named(operators_file: Path, kind: str) -> None:
    inputs = tensors((1, 2, 7, 40, 8, 8), 1.0, 0)
    with pytest.raises(
        Exception, match=rf"{kind}.*multiples of num_heads = 3; got 1x7x16, 1x40x16"
    ):
        run(operators_file, inputs, kind, num_heads=3)
    with pytest.raises(Exception, match="BxLxF"):
        run(operators_file, {**inputs, "value": inputs["value"][:, 1:]}, kind, num_heads=2)
    with pytest.raises(Exception, match="scale must be"):
        run(operators_file, inputs, kind, num_heads=2, scale=-1.0)


@kinds
def test_no_queries_give_no_rows(operators_file: Path, kind: str) -> None:
    inputs = tensors((1, 2, 7, 40, 8, 8), 1.0, 0)
    inputs["query"] = inputs["query"][:, :0]
    assert run(operators_file, inputs, kind, num_heads=2).shape == (1, 0, 16)


def linear_model(weights: Tensor, bias: Tensor, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(LINEAR, ["x", "w", "b"], ["out"], domain=DOMAIN, **attributes)
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{i}" for i in range(3)])
        for name in ("x", "out")
    ]
    stored = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph([node], "linear", tensors[:1], tensors[1:], stored)
    domains = [("", 20), (DOMAIN, 1)]
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid(*pair) for pair in domains], ir_version=9
    )


def activated(x: Tensor, activation: int) -> Tensor:
    if activation == 1:
        half = np.vectorize(math.erfc)(-x / math.sqrt(2.0)) / 2.0
        return np.asarray(x * half)
    return np.maximum(x, 0.0) if activation == 2 else x


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 120, 90, 200))),
    activation=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_it_is_a_product_with_bias_and_activation(
    level: Path, shape: tuple[int, int, int, int], activation: int, seed: int
) -> None:
    batch, rows, width, columns = shape
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, rows, width), np.float32)
    weights = rng.standard_normal((width, columns), np.float32)
    bias = rng.standard_normal(columns, np.float32)
    model = linear_model(
        stripe_weights(weights),
        stripe_weights(bias[None])[:, 0],
        columns=columns,
        activation=activation,
    )
    found = run_model(level, model, {"x": x})
    wide = x.astype(np.float64) @ weights + bias
    size = np.abs(x).astype(np.float64) @ np.abs(weights) + np.abs(bias)
    assert found.shape == wide.shape
    assert (np.abs(found - activated(wide, activation)) <= 1e-6 * size).all()
    assert np.array_equal(run_model(level, model, {"x": x}, threads=2), found)


def test_weights_that_do_not_match_are_named(operators_file: Path) -> None:
    x = {"x": np.ones((1, 2, 5), np.float32)}
    weights, bias = np.ones((2, 5, STRIPE), np.float32), np.ones((2, STRIPE), np.float32)
    for wrong in ({"columns": 16}, {"columns": 33}):
        with pytest.raises(Exception, match=r"Linear: expected .* got 1x2x5, 2x5x16, 2x16"):
            run_model(operators_file, linear_model(weights, bias, activation=0, **wrong), x)
    with pytest.raises(Exception, match="activation must be 0"):
        run_model(operators_file, linear_model(weights, bias, activation=3, columns=32), x)
    with pytest.raises(Exception, match="columns must be at least 1"):
        run_model(operators_file, linear_model(weights, bias, activation=0, columns=0), x)


def test_an_older_onnx_runtime_is_refused(operators_file: Path) -> None:
    """A stand-in that knows version 1 only, with its function that makes an error."""
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    table = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    told: list[bytes] = []

    def make_error(code: int, message: bytes) -> int:
        told.append(message)
        return 1234

    functions = (create * 1)(create(make_error))
    asked: list[int] = []

    def find(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(functions) if version == 1 else None

    base = (ctypes.c_void_p * 2)()
    get = table(find)
    base[0] = ctypes.cast(get, ctypes.c_void_p)
    register = ctypes.CDLL(str(operators_file)).RegisterCustomOps
    register.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.addressof(base)) == 1234
    assert asked == [17, 1]
    assert b"1.17 or later" in told[0]


def test_the_engine_runs_it(native_operators: Path, tmp_path: Path) -> None:
    onnx.save(attention_model(ATTENTION, num_heads=2), tmp_path / "attend.onnx")
    engine = OnnxRuntimeCpu(SPEC, tmp_path / "attend.onnx", EngineOptions(threads=1))
    inputs = tensors((1, 2, 8, 8, 6, 6), 1.0, 0)
    outputs = engine.allocate_outputs()
    engine.run(inputs, outputs)
    np.testing.assert_array_equal(
        outputs["out"], run(native_operators, inputs, ATTENTION, num_heads=2)
    )
    assert operators_library() == native_operators
    assert describe_operators().startswith("native (vector units: ")


@pytest.mark.usefixtures("no_operators")
def test_where_it_was_not_built_a_graph_that_needs_it_is_refused(tmp_path: Path) -> None:
    onnx.save(attention_model(ATTENTION, num_heads=2), tmp_path / "attend.onnx")
    with pytest.raises(EngineUnavailableError, match=r"attend\.onnx.*wheel\.cmake=true"):
        OnnxRuntimeCpu(SPEC, tmp_path / "attend.onnx", EngineOptions(threads=1))
    assert describe_operators().startswith("not built")
    onnx.save(attention_model(FUSED, num_heads=2), tmp_path / "attend.onnx")
    OnnxRuntimeCpu(SPEC, tmp_path / "attend.onnx", EngineOptions(threads=1))


def test_a_library_that_cannot_be_loaded_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_operators.so").write_bytes(b"not a library")
    monkeypatch.setattr("recallseg.engines.operators._LIBRARY", tmp_path / "_operators.so")
    with pytest.raises(EngineUnavailableError, match="Build them anew"):
        describe_operators()
    onnx.save(attention_model(FUSED, num_heads=2), tmp_path / "attend.onnx")
    with pytest.raises(EngineRunError, match="_operators"):
        OnnxRuntimeCpu(SPEC, tmp_path / "attend.onnx", EngineOptions(threads=1))
