"""Number types are changed where they should be, nowhere else, and the emulation shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from recallseg.engines.budget import graph_bytes
from recallseg.engines.bundle import Bundle
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import ExportError, InputError, VerificationError
from recallseg.engines.onnxruntime_cuda import OnnxRuntimeCuda
from recallseg.engines.specs import GRAPHS
from recallseg.engines.verification import mask_dice, verify_engines
from recallseg.export import converting
from recallseg.export.converting import convert_bundle
from recallseg.export.emulation import EmulatedEngine
from recallseg.export.precision import FLOATING, convert_graph, emulate

BF16_STEP, FP16_STEP = 2.0**-8, 2.0**-11


def attention_model(width: int = 8, scale: float = 0.5) -> ModelProto:
    """A projection, a softmax attention on it, and a normalisation: small, with every case."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(width, width)).astype(np.float32)
    ones = np.ones(width, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"]),
        helper.make_node("Mul", ["q", "s"], ["qs"]),
        helper.make_node("Transpose", ["x"], ["kt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["qs", "kt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "x"], ["o"]),
        helper.make_node("LayerNormalization", ["o", "g", "b"], ["l"], axis=-1),
        helper.make_node("MatMul", ["l", "w"], ["y"]),
    ]
    shape = [1, "n", width]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.float32(scale), "s"),
            numpy_helper.from_array(ones, "g"),
            numpy_helper.from_array(ones * 0, "b"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model: ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return found


def types_of(model: ModelProto) -> dict[str, int]:
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return {v.name: v.type.tensor_type.elem_type for v in typed.graph.value_info}


def test_inputs_and_outputs_stay_fp32() -> None:
    for precision in FLOATING:
        converted = convert_graph(attention_model(), precision, "attend")
        for value in (*converted.graph.input, *converted.graph.output):
            assert value.type.tensor_type.elem_type == TensorProto.FLOAT


def test_mixed_hands_scores_on_in_fp32() -> None:
    """A cast to fp16 between product and softmax would make the core's fp32 worthless."""
    converted = convert_graph(attention_model(), "mixed", "attend")
    made_by = {name: node for node in converted.graph.node for name in node.output}
    softmax = next(node for node in converted.graph.node if node.op_type == "Softmax")
    assert made_by[softmax.input[0]].op_type == "MatMul"
    users = [node for node in converted.graph.node if softmax.output[0] in node.input]
    assert [user.op_type for user in users] == ["MatMul"]
    types = types_of(converted)
    assert types[softmax.input[0]] == types[softmax.output[0]] == TensorProto.FLOAT
    # ... while a projection is in fp16.
    weights = {t.name: t.data_type for t in converted.graph.initializer}
    assert TensorProto.FLOAT16 in weights.values()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_elsewhere_the_core_is_low_too(precision: str) -> None:
    converted = convert_graph(attention_model(), precision, "attend")
    low = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    softmax = next(node for node in converted.graph.node if node.op_type == "Softmax")
    assert types_of(converted)[softmax.output[0]] == low
    others = {TensorProto.FLOAT16, TensorProto.BFLOAT16} - {low}
    assert not others & set(types_of(converted).values())


def test_bf16_weights_are_rounded_once_from_fp32() -> None:
    model = attention_model()
    # Above by less than half of an fp16 step: through fp16 it would round to even, downwards.
    value = np.float32(1 + 2.0**-8 + 2.0**-14)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((8, 8), value), "w"))
    converted = convert_graph(model, "bf16", "attend")
    weight = next(t for t in converted.graph.initializer if t.name == "w")
    assert weight.data_type == TensorProto.BFLOAT16
    assert numpy_helper.to_array(weight).astype(np.float32)[0, 0] == 1 + 2.0**-7


@pytest.mark.parametrize(("precision", "step"), [("fp16", FP16_STEP), ("bf16", BF16_STEP)])
def test_emulation_rounds_as_the_type_does(precision: str, step: float) -> None:
    x = np.random.default_rng(1).normal(size=(1, 32, 8)).astype(np.float32)
    model = attention_model()
    exact = run(model, x)
    found = run(emulate(convert_graph(model, precision, "attend")), x)
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert step / 4 < error < step * 16


def test_emulation_overflows_where_fp16_does() -> None:
    x = np.full((1, 4, 8), 300, np.float32)
    x[0, 1] = 299
    model = attention_model(scale=8.0)  # 300 * 300 * 8 * 8 is far beyond 65,504
    assert np.isfinite(run(model, x)).all()
    assert not np.isfinite(run(emulate(convert_graph(model, "fp16", "attend")), x)).all()
    assert np.isfinite(run(emulate(convert_graph(model, "bf16", "attend")), x)).all()


def test_a_softmax_summed_in_fp16_ends_before_16_exemplars_at_1024_px() -> None:
    """Why mixed keeps the core in fp32: 16 x 64 x 64 equal keys are more than fp16 can count."""
    with np.errstate(over="ignore"):
        assert np.float16(16 * 64 * 64) == np.inf
        assert np.isfinite(np.float16(15 * 64 * 64))


def test_what_is_asked_for_must_exist() -> None:
    with pytest.raises(InputError, match="not 'int8'"):
        convert_graph(attention_model(), "int8", "attend")


def test_the_demo_model_in_every_precision(converted_demo: Bundle) -> None:
    demo = Bundle.open("demo")
    assert converted_demo.identity == demo.identity  # libraries stay valid
    assert converted_demo.precisions["portable"] == ("fp32", *FLOATING)
    parity = [e for e in converted_demo.manifest["parity"] if e["variant"].startswith("portable/")]
    assert {e["variant"] for e in parity} == {f"portable/{name}" for name in FLOATING}
    # Those with ONNX Runtime's own operators are for its CUDA provider.
    fused = [e for e in converted_demo.manifest["parity"] if e["variant"].startswith("ort-cuda/")]
    assert {e["variant"] for e in fused} == {f"ort-cuda/{name}" for name in FLOATING}
    assert converted_demo.graph_file("attend", OnnxRuntimeCuda.variants, "fp16")[1] == "ort-cuda"
    assert converted_demo.graph_file("decode", OnnxRuntimeCuda.variants, "fp16")[1] == "portable"
    assert converted_demo.graph_file("attend", OnnxRuntimeCuda.variants, "fp32")[1] == "portable"
    for entry in (*parity, *fused):
        assert entry["error"] <= entry["tolerance"]
        if entry["variant"] != "portable/mixed" and entry["tensor"] == "features":
            assert entry["error"] > 1e-4  # it was rounded at all
    for graph in GRAPHS:
        sizes = [
            graph_bytes(converted_demo, (graph,), ("portable",), precision)
            for precision in ("fp16", "fp32")
        ]
        assert sizes[0] < 0.6 * sizes[1]


def test_a_converted_bundle_can_be_verified_again(converted_demo: Bundle) -> None:
    engines = {
        graph: EmulatedEngine(
            converted_demo.specs[graph],
            converted_demo.graph_file(graph, ("portable",), "mixed")[0],
            EngineOptions(threads=1),
        )
        for graph in GRAPHS
    }
    result = verify_engines(converted_demo, engines, "mixed")
    errors = {check.tensor: check.error for check in result.checks}
    assert errors["embedding"] < 1e-4  # embed stays fp32 in mixed
    assert errors["masks (1 - Dice)"] <= 0.002
    assert mask_dice(np.ones(3, bool), np.ones(3, bool)) == 1.0


def test_a_precision_that_fails_its_gate_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: ModelProto, precision: str, graph: str) -> ModelProto:
        made = convert_graph(model, precision, graph)
        if graph == "encode":
            name = next(node.input[1] for node in made.graph.node if node.op_type == "Conv")
            weight = next(t for t in made.graph.initializer if t.name == name)
            values = numpy_helper.to_array(weight)
            weight.CopyFrom(numpy_helper.from_array(values * np.asarray(2, values.dtype), name))
        return made

    monkeypatch.setattr(converting, "convert_graph", spoil)
    with pytest.raises(VerificationError, match="'features' is off by"):
        convert_bundle(Bundle.open("demo"), tmp_path / "demo", ["fp16"])
    assert list(tmp_path.iterdir()) == []


def test_bad_requests(tmp_path: Path) -> None:
    demo = Bundle.open("demo")
    with pytest.raises(ExportError, match=r"precisions must be of .* got fp8"):
        convert_bundle(demo, tmp_path / "demo", ["fp16", "fp8"])
    (tmp_path / "there").mkdir()
    with pytest.raises(ExportError, match="exists"):
        convert_bundle(demo, tmp_path / "there", ["fp16"])
