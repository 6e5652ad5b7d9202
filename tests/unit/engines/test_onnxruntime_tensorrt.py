"""ONNX Runtime's TensorRT provider: its options, and that nothing runs elsewhere in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from support.fake_tensorrt import HostGpu

from recallseg.engines import onnxruntime_tensorrt
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import EngineUnavailableError, InputError, VerificationError
from recallseg.engines.onnxruntime_tensorrt import OnnxRuntimeTensorRt, provider_options
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS
from recallseg.engines.tensorrt.profile import Profile

TRT = "TensorrtExecutionProvider"


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


class Session:
    """An ONNX Runtime that claims to have run on TensorRT; the CPU does the work."""

    made: list[tuple[str, dict[str, str]]] = []  # noqa: RUF012
    providers: list[str] = [TRT, "CPUExecutionProvider"]  # noqa: RUF012
    factor = 1.0

    def __init__(self, path: str, sess_options: Any, providers: Any) -> None:
        ((name, options),) = providers
        assert name == TRT
        assert sess_options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        self.made.append((Path(path).stem, options))
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self._real = REAL(path, settings, providers=["CPUExecutionProvider"])
        self._embed = Path(path).stem == "embed"

    def get_providers(self) -> list[str]:
        return self.providers

    def io_binding(self) -> Any:
        return self._real.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        self._real.run_with_iobinding(binding)
        if self._embed and self.factor != 1.0:
            binding.get_outputs()[0].numpy()[:] *= self.factor


REAL = onnxruntime.InferenceSession


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [TRT, "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime_tensorrt, "open_device", HostGpu.open)
    monkeypatch.setattr(Session, "made", [])
    monkeypatch.setenv("RECALLSEG_CACHE", str(tmp_path))
    return onnxruntime


def test_caches_are_explicit_and_profiles_hold_n_and_k(demo: Bundle, tmp_path: Path) -> None:
    options = provider_options(demo.specs["attend"], "fp16", Profile(), tmp_path, "attend")
    assert options["trt_engine_cache_path"] == str(tmp_path)
    assert options["trt_engine_cache_prefix"] == "attend"
    assert options["trt_profile_max_shapes"].startswith("memories:4x16x576x64,pointers:4x16x128,")
    assert options["trt_profile_min_shapes"].startswith("memories:1x1x576x64,")
    assert options["trt_fp16_enable"] == "True"
    fixed = provider_options(demo.specs["embed"], "fp32", Profile(), tmp_path, "embed")
    assert not {key for key in fixed if "profile" in key or "fp16" in key or "bf16" in key}


def test_each_graph_has_a_folder_of_its_own(runtime: Any, demo: Bundle) -> None:
    engines = load_engines(demo, "onnxruntime-tensorrt")
    assert list(engines) == list(GRAPHS)
    folders = {options["trt_engine_cache_path"] for _, options in Session.made}
    assert len(folders) == len(GRAPHS)
    # Verified once: the second load makes only what is asked for.
    Session.made.clear()
    load_engines(demo, "onnxruntime-tensorrt", graphs=("embed",))
    assert [name for name, _ in Session.made] == ["embed"]


def test_another_version_has_other_caches(
    runtime: Any, demo: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_engines(demo, "onnxruntime-tensorrt", graphs=("embed",))
    before = {options["trt_engine_cache_path"] for _, options in Session.made}
    monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    Session.made.clear()
    load_engines(demo, "onnxruntime-tensorrt", graphs=("embed",))
    assert not before & {options["trt_engine_cache_path"] for _, options in Session.made}


def test_a_wrong_session_is_refused_and_stays_so(
    runtime: Any, demo: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "factor", 1.01)
    with pytest.raises(
        VerificationError, match=r"'embedding' of graph 'embed' is off by 1\.00e-02"
    ):
        load_engines(demo, "onnxruntime-tensorrt")
    monkeypatch.setattr(Session, "factor", 1.0)
    with pytest.raises(VerificationError, match="was refused on sm87"):
        load_engines(demo, "onnxruntime-tensorrt")


def test_a_silent_fall_back_is_an_error(
    runtime: Any, demo: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "providers", ["CPUExecutionProvider"])
    with pytest.raises(EngineUnavailableError, match="not on TensorrtExecutionProvider"):
        load_engines(demo, "onnxruntime-tensorrt")


def test_mixed_is_not_promised(runtime: Any, demo: Bundle) -> None:
    with pytest.raises(InputError, match="not 'mixed'"):
        load_engines(demo, "onnxruntime-tensorrt", "mixed")


def test_this_onnxruntime_without_the_provider_says_what_to_install(demo: Bundle) -> None:
    if TRT in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(EngineUnavailableError, match="Install onnxruntime-gpu instead"):
        load_engines(demo, "onnxruntime-tensorrt")
    path, _ = demo.graph_file("embed", ("portable",), "fp32")
    with pytest.raises(EngineUnavailableError):
        OnnxRuntimeTensorRt(demo.specs["embed"], path)
