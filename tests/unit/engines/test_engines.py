from __future__ import annotations

import gc
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from threading import get_native_id

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from support.measuring import measures

from recallseg.engines import onnxruntime_cpu
from recallseg.engines.bundle import Bundle
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import EngineRunError, HostMemoryError, InputError
from recallseg.engines.fake import FakeEngine
from recallseg.engines.machine_fault import SHORT_OF_MEMORY, machine_fault
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.registry import engine_class, load_engines
from recallseg.engines.specs import GraphSpec, TensorSpec
from recallseg.runtime.services.scheduling import Scheduling

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


@pytest.mark.skipif(
    tuple(map(int, version("onnxruntime").split(".")[:2])) < (1, 27),
    reason="this ONNX Runtime lets threads spin for as long as it likes",
)
@measures
def test_a_thread_without_work_leaves_its_core_to_others(tmp_path: Path) -> None:
    """Roots are taken by two threads; sums of all before, which take far longer, by one alone."""
    count = 2**20
    nodes = [
        helper.make_node("Sqrt", ["a"], ["root"]),
        helper.make_node("CumSum", ["root", "axis"], ["b"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [count]) for name in "ab"]
    axis = helper.make_tensor("axis", TensorProto.INT32, [], [0])
    graph = helper.make_graph(nodes, "sums", values[:1], values[1:], [axis])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "sums.onnx")
    one, other = (TensorSpec(name, "float32", (count,)) for name in "ab")
    spec = GraphSpec("decode", (one,), (other,))
    engine = OnnxRuntimeCpu(spec, tmp_path / "sums.onnx", EngineOptions(threads=2))
    a, b = np.ones(count, np.float32), np.zeros(count, np.float32)
    engine.run({"a": a}, {"b": b})
    every, own = time.process_time(), time.thread_time()
    for _ in range(20):
        engine.run({"a": a}, {"b": b})
    own = time.thread_time() - own
    others = time.process_time() - every - own
    assert others < 0.3 * own  # it is 0.5 and more if the other one spins meanwhile


def test_engines_of_one_file_share_a_session_while_one_of_them_lives(doubler: Path) -> None:
    one, two = (OnnxRuntimeCpu(SPEC, doubler, EngineOptions(threads=1)) for _ in range(2))
    assert one._session is two._session
    other = OnnxRuntimeCpu(SPEC, doubler, EngineOptions(threads=3))
    assert other._session is not one._session
    left = weakref.ref(one._session)
    del one
    a, b = np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)
    two.run({"a": a}, {"b": b})
    assert b.tolist() == [[2, 2]]
    del two
    gc.collect()
    assert left() is None


def test_threads_that_run_elsewhere_or_less_urgently_are_not_shared(doubler: Path) -> None:
    def opened() -> OnnxRuntimeCpu:
        return OnnxRuntimeCpu(SPEC, doubler, EngineOptions(threads=8))

    before = os.getpriority(os.PRIO_PROCESS, get_native_id())
    nice = Scheduling(nice=19 if before < 19 else 18)
    core = Scheduling(cores=(min(os.sched_getaffinity(0)),), nice=nice.nice)
    plain, slow, slow_too, there = opened(), nice.run(opened), nice.run(opened), core.run(opened)
    assert plain._session is not slow._session
    assert slow._session is slow_too._session
    if len(os.sched_getaffinity(0)) > 1:
        assert there._session is not slow._session
    assert opened()._session is plain._session


def test_a_number_of_threads_that_was_asked_for_is_not_shared(
    doubler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_cpu, "usable_cores", lambda: 8)
    for threads, shared in ((1, True), (2, False), (8, True), (None, True)):
        options = EngineOptions(threads=threads)
        one, two = (OnnxRuntimeCpu(SPEC, doubler, options) for _ in range(2))
        assert (one._session is two._session) is shared


def test_a_file_that_has_changed_is_read_anew(doubler: Path) -> None:
    one = OnnxRuntimeCpu(SPEC, doubler, EngineOptions(threads=1))
    model = onnx.load(doubler)
    model.graph.node[0].op_type = "Sub"
    doubler.unlink()
    onnx.save(model, doubler)
    a, b = np.ones((1, 2), np.float32), np.ones((1, 2), np.float32)
    two = OnnxRuntimeCpu(SPEC, doubler, EngineOptions(threads=1))
    two.run({"a": a}, {"b": b})
    assert b.tolist() == [[0, 0]]
    one.run({"a": a}, {"b": b})
    assert b.tolist() == [[2, 2]]


def test_engines_of_one_session_run_in_threads_of_their_own() -> None:
    demo = Bundle.open("demo")
    made = [load_engines(demo, "onnxruntime-cpu", graphs=("encode",))["encode"] for _ in range(3)]
    draw = np.random.default_rng(0)
    images = [draw.normal(size=demo.specs["encode"].inputs[0].shape) for _ in made]
    inputs = [{"image": image.astype(np.float32)} for image in images]
    expected = [made[0].allocate_outputs() for _ in made]
    for given, out in zip(inputs, expected, strict=True):
        made[0].run(given, out)
    found = [engine.allocate_outputs() for engine in made]

    def run(index: int) -> None:
        for _ in range(3):
            made[index].run(inputs[index], found[index])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    for one, other in zip(found, expected, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


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


def test_too_little_memory_is_no_fault_of_a_graph(tmp_path: Path) -> None:
    """Services try again what the machine had no room for, and set aside what is at fault."""
    nodes = [
        helper.make_node("Transpose", ["a"], ["turned"]),
        helper.make_node("MatMul", ["a", "turned"], ["square"]),
        helper.make_node("ReduceMean", ["square", "axes"], ["b"]),
    ]
    axes = onnx.numpy_helper.from_array(np.array([1], np.int64), "axes")
    given = [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 2])]
    made = [helper.make_tensor_value_info("b", TensorProto.FLOAT, ["n", 1])]
    graph = helper.make_graph(nodes, "square", given, made, [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "square.onnx")
    spec = GraphSpec("decode", SPEC.inputs, (TensorSpec("b", "float32", ("n", 1)),))
    engine = OnnxRuntimeCpu(spec, tmp_path / "square.onnx", EngineOptions(threads=1))
    n = 2**23  # whose square of floats no address reaches
    with pytest.raises(HostMemoryError, match="graph 'decode'") as caught:
        engine.run({"a": np.zeros((n, 2), np.float32)}, {"b": np.zeros((n, 1), np.float32)})
    assert machine_fault(caught.value) == SHORT_OF_MEMORY
