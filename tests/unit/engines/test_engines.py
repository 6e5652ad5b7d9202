from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from recallseg.engines.bundle import Bundle
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import EngineRunError, InputError
from recallseg.engines.fake import FakeEngine
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.registry import engine_class, load_engines
from recallseg.engines.specs import GraphSpec, TensorSpec

SPEC = GraphSpec(
    "decode", (TensorSpec("a", "float32", ("n", 2)),), (TensorSpec("b", "float32", ("n", 2)),)
)


@pytest.fixture
def doubler(tmp_path: Path) -> Path:
    """b = 2 a, as an ONNX file."""
    node = helper.make_node("Add", ["a", "a"], ["b"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "ab"]
    graph = helper.make_graph([node], "doubler", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "doubler.onnx")
    return tmp_path / "doubler.onnx"


def test_results_are_written_into_the_callers_memory(doubler: Path) -> None:
    engine = OnnxRuntimeCpu(SPEC, doubler, EngineOptions(threads=1))
    for n in (1, 3, 2):
        a = np.arange(2 * n, dtype=np.float32).reshape(n, 2)
        b = np.zeros((n, 2), np.float32)
        engine.run({"a": a}, {"b": b})
        np.testing.assert_array_equal(b, 2 * a)


def test_threads_and_provider_are_read_back(doubler: Path) -> None:
    described = OnnxRuntimeCpu(SPEC, doubler, EngineOptions(threads=1)).describe()
    assert described["threads"] == 1
    assert described["providers"] == ["CPUExecutionProvider"]


def test_missing_unknown_and_misshapen_tensors_are_refused(doubler: Path) -> None:
    engine = OnnxRuntimeCpu(SPEC, doubler, EngineOptions(threads=1))
    good = np.zeros((1, 2), np.float32)
    for inputs in ({}, {"a": good, "c": good}):
        with pytest.raises(EngineRunError, match="inputs must be a"):
            engine.run(inputs, {"b": good})
    with pytest.raises(EngineRunError, match=r"'b'.*n=1"):
        engine.run({"a": good}, {"b": np.zeros((2, 2), np.float32)})


def test_a_graph_with_other_tensors_is_refused(doubler: Path) -> None:
    other = GraphSpec("decode", SPEC.inputs, (TensorSpec("c", "float32", ("n", 2)),))
    with pytest.raises(EngineRunError, match="needs"):
        OnnxRuntimeCpu(other, doubler, EngineOptions(threads=1))


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineRunError, match="cannot load"):
        OnnxRuntimeCpu(SPEC, tmp_path / "x.onnx", EngineOptions(threads=1))


def test_unknown_names_and_options_are_refused(fake_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="onnxruntime-cpu"):
        engine_class("onnx")
    with pytest.raises(InputError, match="fp32"):
        load_engines(fake_bundle, "fake", "fp64")
    with pytest.raises(InputError, match="threads"):
        load_engines(fake_bundle, "fake", options=EngineOptions(threads=0))


def test_the_fake_engine_recalls_the_mask_of_the_exemplar(fake_bundle: Bundle) -> None:
    engines = load_engines(fake_bundle, "fake")
    assert all(isinstance(engine, FakeEngine) for engine in engines.values())
    side = fake_bundle.geometry.image_size
    masks = np.zeros((1, 1, side, side), np.float32)
    masks[..., : side // 2] = 1
    memory = engines["memorize"].allocate_outputs(n=1)
    features = engines["encode"].allocate_outputs()
    image = np.zeros((1, 3, side, side), np.float32)
    engines["encode"].run({"image": image}, features)
    engines["memorize"].run({**features, "masks": masks}, memory)
    conditioned = engines["attend"].allocate_outputs(n=1)
    engines["attend"].run(
        {
            "features": features["features"],
            "memories": memory["memories"][:, None],
            "pointers": memory["pointers"][:, None],
            "pointer_time": np.zeros((1, 1), np.float32),
        },
        conditioned,
    )
    decoded = engines["decode"].allocate_outputs(n=1)
    skips = {name: features[name] for name in ("skip0", "skip1")}
    engines["decode"].run({**conditioned, **skips}, decoded)
    quarter = decoded["logits"].shape[-1] // 2
    assert (decoded["logits"][0, :, :quarter] > 0).all()
    assert (decoded["logits"][0, :, quarter:] < 0).all()
