"""ONNX Runtime's CUDA provider: proven before use, nothing on the CPU, recordings of their own."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from support.fake_driver import FakeDriver
from support.fake_onnxruntime import FakeSession, install
from support.fake_tensorrt import HostGpu

from recallseg.engines.bundle import Bundle
from recallseg.engines.composition import Composition
from recallseg.engines.device import Device, DeviceTensor
from recallseg.engines.device_engine import MOST_BINDINGS
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import (
    DeviceLostError,
    DeviceMemoryError,
    EngineRunError,
    EngineUnavailableError,
    InputError,
    VerificationError,
)
from recallseg.engines.onnxruntime_cuda import OnnxRuntimeCuda, work_on_the_cpu
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS

NAME = "onnxruntime-cuda"


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeSession]:
    return install(monkeypatch, tmp_path)


def test_it_is_proven_once_on_this_device(session: type[FakeSession], tiny_bundle: Bundle) -> None:
    engines = load_engines(tiny_bundle, NAME)
    assert [name for name, *_ in session.made] == [*tiny_bundle.specs, *GRAPHS]  # traced, for use
    assert [s.enable_profiling for *_, s in session.made] == [True] * 6 + [False] * 5
    session.made.clear()
    assert list(load_engines(tiny_bundle, NAME, graphs=("attend",))) == ["attend"]
    assert len(session.made) == 1
    assert {e.describe()["device"] for e in engines.values()} == {str(HostGpu.facts)}


def test_it_runs_on_our_stream_without_waiting(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    device = HostGpu.open()
    side = device.new_stream()
    options = EngineOptions(device=device, streams={"embed": side})
    load_engines(tiny_bundle, NAME, options=options)
    for graph, chosen, _ in session.made:
        stream = side if graph == "embed" else device.stream
        assert chosen["user_compute_stream"] == str(stream.handle)
        assert chosen["use_tf32"] == "0"
        # Nothing is recorded, and pinned memory is not given back from the stream either.
        assert chosen["enable_cuda_graph"] == "1"
    assert {run["gpu_graph_id"] for _, run in session.runs} == {"-1"}
    assert {run["disable_synchronize_execution_providers"] for _, run in session.runs} == {"1"}


def test_tensors_on_the_device_are_neither_copied_nor_waited_for(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    device = HostGpu.open()
    engine = load_engines(tiny_bundle, NAME, options=EngineOptions(device=device))["embed"]
    image = device.tensor((1, 3, tiny_bundle.geometry.embed_size, tiny_bundle.geometry.embed_size))
    device.stream.fill(image)
    embedding = device.tensor((1, tiny_bundle.geometry.embedding_dim))
    engine.run({"image": image}, {"embedding": embedding})
    before = device.allocations
    device.driver.calls.clear()  # type: ignore[attr-defined]
    engine.run({"image": image}, {"embedding": embedding})
    assert set(device.driver.calls) == {"set_context"}  # type: ignore[attr-defined]
    assert device.allocations == before

    blank = np.zeros(image.shape, np.float32)
    expected = np.zeros(embedding.shape, np.float32)
    host = load_engines(tiny_bundle, "onnxruntime-cpu", graphs=("embed",), variants=("portable",))
    Composition(host).embed(blank, expected)
    found = np.empty_like(expected)
    device.stream.copy_out(found, embedding)
    np.testing.assert_array_equal(found, expected)
    staged = np.empty_like(expected)
    engine.run({"image": blank}, {"embedding": staged})
    np.testing.assert_array_equal(staged, expected)
    with pytest.raises(EngineRunError, match="some tensors lie on the GPU and some on the CPU"):
        engine.run({"image": blank}, {"embedding": embedding})
    half = DeviceTensor(image.address, image.shape, np.dtype(np.float16), image)
    with pytest.raises(EngineRunError, match="must be float32 of shape"):
        engine.run({"image": half}, {"embedding": embedding})


def test_what_is_queued_is_done_before_a_session_goes(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    """A session's last pinned memory must not be freed from the stream: CUDA forbids it there."""
    device = HostGpu.open()
    engines = load_engines(
        tiny_bundle, NAME, options=EngineOptions(device=device), graphs=("embed",)
    )
    gone = weakref.ref(engines["embed"]._session)  # type: ignore[attr-defined]
    alive: list[bool] = []
    wait = device.driver.synchronize_stream

    def waited(stream: int) -> None:
        alive.append(gone() is not None)
        wait(stream)

    device.driver.synchronize_stream = waited  # type: ignore[method-assign]
    try:
        del engines
        gc.collect()
    finally:
        del device.driver.synchronize_stream
    assert gone() is None
    assert alive == [True]


def test_attention_of_one_wide_head_is_flash_attention(
    session: type[FakeSession], demo: Bundle, tmp_path: Path
) -> None:
    options = {
        precision: OnnxRuntimeCuda._provider_options(
            load_engines(demo, NAME, graphs=("attend",))["attend"],  # type: ignore[arg-type]
            precision,
        )
        for precision in ("fp32", "fp16")
    }
    assert "sdpa_kernel" not in options["fp32"]
    assert options["fp16"]["sdpa_kernel"] == "1"
    encode = load_engines(demo, NAME, graphs=("encode",))["encode"]
    assert "sdpa_kernel" not in encode._provider_options("fp16")  # type: ignore[attr-defined]


def test_each_binding_has_a_recording_of_its_own(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    options = EngineOptions(cuda_graphs=True, device=HostGpu.open())
    engine = load_engines(tiny_bundle, NAME, options=options, graphs=("embed",))["embed"]
    # Proven as it is and traced; recorded and replayed after it: six sessions more.
    assert len(session.made) == 13
    assert session.made[-1][1]["enable_cuda_graph"] == "1"
    session.runs.clear()
    image = np.zeros(
        (1, 3, tiny_bundle.geometry.embed_size, tiny_bundle.geometry.embed_size), np.float32
    )
    out = np.zeros((1, tiny_bundle.geometry.embedding_dim), np.float32)
    for _ in range(3):
        engine.run({"image": image}, {"embedding": out})
    assert [run["gpu_graph_id"] for _, run in session.runs] == ["1"] * 3
    device = options.device
    assert device is not None
    there = device.tensor(image.shape), device.tensor(out.shape)
    engine.run({"image": there[0]}, {"embedding": there[1]})
    assert session.runs[-1][1]["gpu_graph_id"] == "2"


def test_wrong_numbers_are_refused_and_stay_so(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    session.factor = 1.01
    with pytest.raises(
        VerificationError, match=r"'embedding' of graph 'embed' is off by 1\.00e-02"
    ):
        load_engines(tiny_bundle, NAME)
    session.factor = 1.0
    with pytest.raises(VerificationError, match=r"was refused on sm87.*, or remove .*try again\."):
        load_engines(tiny_bundle, NAME)


def test_work_on_the_cpu_is_refused(session: type[FakeSession], tiny_bundle: Bundle) -> None:
    session.astray = "Conv"
    said = r"\d+ nodes ran on the CPU, first Conv \(.*\) of graph 'embed'"
    with pytest.raises(VerificationError, match=said):
        load_engines(tiny_bundle, NAME)
    session.astray = ""
    with pytest.raises(VerificationError, match=said):
        load_engines(tiny_bundle, NAME)


def test_shapes_may_be_computed_on_the_cpu(tmp_path: Path) -> None:
    def node(size: str) -> dict[str, object]:
        facts = {"provider": "CPUExecutionProvider", "op_name": "Gather", "output_size": size}
        return {"cat": "Node", "name": "Gather_1_kernel_time", "args": facts}

    assert work_on_the_cpu([node("8"), {"cat": "Session", "name": "run"}]) == []
    assert work_on_the_cpu([node("8192")]) == ["Gather (Gather_1_kernel_time)"]


def test_a_lost_profile_is_an_error(
    session: type[FakeSession], tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "end_profiling", lambda self: str(Path("nowhere.json")))
    with pytest.raises(EngineRunError, match="Where graph 'embed' ran cannot be told"):
        load_engines(tiny_bundle, NAME)


def test_a_failing_run_says_what_failed(session: type[FakeSession], tiny_bundle: Bundle) -> None:
    engine = load_engines(tiny_bundle, NAME, graphs=("embed",))["embed"]
    session.failure = "CUBLAS_STATUS_EXECUTION_FAILED"
    image = np.zeros(
        (1, 3, tiny_bundle.geometry.embed_size, tiny_bundle.geometry.embed_size), np.float32
    )
    out = np.zeros((1, tiny_bundle.geometry.embedding_dim), np.float32)
    with pytest.raises(EngineRunError, match="graph 'embed': CUBLAS_STATUS"):
        engine.run({"image": image}, {"embedding": out})


@pytest.mark.parametrize(
    "said",
    [
        "CUDA failure 2: out of memory",
        "BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9",
    ],
)
def test_too_little_memory_is_named(
    session: type[FakeSession], tiny_bundle: Bundle, said: str
) -> None:
    engine = load_engines(tiny_bundle, NAME, graphs=("embed",))["embed"]
    session.failure = said
    image = np.zeros(
        (1, 3, tiny_bundle.geometry.embed_size, tiny_bundle.geometry.embed_size), np.float32
    )
    out = np.zeros((1, tiny_bundle.geometry.embedding_dim), np.float32)
    with pytest.raises(DeviceMemoryError, match=r"MiB are free.*smaller k"):
        engine.run({"image": image}, {"embedding": out})


def test_a_lost_device_is_told_from_a_run_that_failed(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    device = HostGpu.open()
    options = EngineOptions(device=device)
    engine = load_engines(tiny_bundle, NAME, options=options, graphs=("embed",))["embed"]
    session.failure = "CUDNN_STATUS_EXECUTION_FAILED"
    HostGpu.driver.fail("synchronize", 719)
    image = np.zeros(
        (1, 3, tiny_bundle.geometry.embed_size, tiny_bundle.geometry.embed_size), np.float32
    )
    out = np.zeros((1, tiny_bundle.geometry.embedding_dim), np.float32)
    with pytest.raises(DeviceLostError, match="engine onnxruntime-cpu"):
        engine.run({"image": image}, {"embedding": out})


def test_a_context_that_is_not_the_primary_one_is_refused(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    driver = HostGpu.driver = FakeDriver()
    driver.set_context(77)  # as pycuda.autoinit makes one
    with pytest.raises(EngineUnavailableError, match=r"pycuda\.autoprimaryctx"):
        load_engines(tiny_bundle, NAME, options=EngineOptions(device=Device(driver)))


def test_recordings_are_bounded(session: type[FakeSession], tiny_bundle: Bundle) -> None:
    device = HostGpu.open()
    options = EngineOptions(device=device, cuda_graphs=True)
    engine = load_engines(tiny_bundle, NAME, options=options, graphs=("embed",))["embed"]
    image = device.tensor((1, 3, tiny_bundle.geometry.embed_size, tiny_bundle.geometry.embed_size))
    device.stream.fill(image)
    session.runs.clear()
    kept = []
    for _ in range(MOST_BINDINGS + 2):
        out = device.tensor((1, tiny_bundle.geometry.embedding_dim))
        engine.run({"image": image}, {"embedding": out})
        kept.append(out)  # or the next would lie where it lay
    numbers = [run["gpu_graph_id"] for _, run in session.runs]
    assert numbers == [*map(str, range(1, MOST_BINDINGS + 1)), "-1", "-1"]


def test_a_silent_fall_back_is_an_error(session: type[FakeSession], tiny_bundle: Bundle) -> None:
    session.providers = ["CPUExecutionProvider"]
    with pytest.raises(EngineUnavailableError, match="not on CUDAExecutionProvider"):
        load_engines(tiny_bundle, NAME)


def test_precisions_that_it_has_no_kernels_for(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    with pytest.raises(InputError, match="not 'int8'"):
        load_engines(tiny_bundle, NAME, "int8")


def test_this_onnxruntime_without_the_provider_says_what_to_install(tiny_bundle: Bundle) -> None:
    if OnnxRuntimeCuda.provider in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(EngineUnavailableError, match="Install onnxruntime-gpu instead"):
        load_engines(tiny_bundle, NAME)


def test_the_profile_of_a_real_session_is_understood(demo: Bundle, tmp_path: Path) -> None:
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling = True
    settings.profile_file_prefix = str(tmp_path / "trace")
    path, _ = demo.graph_file("embed", ("portable",), "fp32")
    real = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    side = demo.geometry.embed_size
    real.run(None, {"image": np.zeros((1, 3, side, side), np.float32)})
    events = json.loads(Path(real.end_profiling()).read_text())
    assert any(node.startswith("Conv ") for node in work_on_the_cpu(events))
