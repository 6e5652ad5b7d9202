"""ONNX Runtime's TensorRT provider: its options, and that nothing runs elsewhere in silence."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from support.fake_onnxruntime import FakeSession, install

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import (
    EngineUnavailableError,
    InputError,
    PlanError,
    VerificationError,
)
from recallseg.engines.onnxruntime_tensorrt import OnnxRuntimeTensorRt, provider_options
from recallseg.engines.paths import cache_folder
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS
from recallseg.engines.tensorrt.profile import Profile

TRT = "TensorrtExecutionProvider"


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeSession]:
    return install(monkeypatch, tmp_path)


def caches(session: type[FakeSession]) -> set[str]:
    return {options["trt_engine_cache_path"] for _, options, _ in session.made}


def test_caches_are_explicit_and_profiles_hold_n_and_k(demo: Bundle, tmp_path: Path) -> None:
    options = provider_options(demo.specs["attend"], "fp16", Profile(), tmp_path, "attend")
    assert options["trt_engine_cache_path"] == str(tmp_path)
    assert options["trt_engine_cache_prefix"] == "attend"
    assert options["trt_profile_max_shapes"].startswith("memories:4x16x576x64,pointers:4x16x128,")
    assert options["trt_profile_min_shapes"].startswith("memories:1x1x576x64,")
    assert options["trt_fp16_enable"] == "True"
    fixed = provider_options(demo.specs["embed"], "fp32", Profile(), tmp_path, "embed")
    assert not {key for key in fixed if "profile" in key or "fp16" in key or "bf16" in key}


def test_each_graph_has_a_folder_of_its_own(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    engines = load_engines(tiny_bundle, "onnxruntime-tensorrt")
    assert list(engines) == list(GRAPHS)
    assert len(caches(session)) == len((*GRAPHS, "correct"))  # which is proven with them
    for _, options, settings in session.made:
        assert options["user_compute_stream"] == str(engines["embed"].stream.handle)  # type: ignore[attr-defined]
        assert settings.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    # Verified once: the second load makes only what is asked for.
    session.made.clear()
    load_engines(tiny_bundle, "onnxruntime-tensorrt", graphs=("embed",))
    assert [name for name, *_ in session.made] == ["embed"]


def test_another_version_has_other_caches(
    session: type[FakeSession], tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_engines(tiny_bundle, "onnxruntime-tensorrt", graphs=("embed",))
    before = caches(session)
    monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    session.made.clear()
    load_engines(tiny_bundle, "onnxruntime-tensorrt", graphs=("embed",))
    assert not before & caches(session)


def test_what_others_could_have_compiled_is_refused(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    load_engines(tiny_bundle, "onnxruntime-tensorrt", graphs=("embed",))
    root = cache_folder() / "onnxruntime-tensorrt"
    assert root.stat().st_mode & 0o777 == 0o700
    (verdict,) = root.glob("*/state.json")  # what says that it was proven
    verdict.chmod(0o666)
    load_engines(
        tiny_bundle, "onnxruntime-tensorrt", graphs=("embed",)
    )  # nobody else can come here
    root.chmod(0o755)
    with pytest.raises(PlanError, match=f"others may write {verdict}"):
        load_engines(tiny_bundle, "onnxruntime-tensorrt", graphs=("embed",))


def test_a_wrong_session_is_refused_and_stays_so(
    session: type[FakeSession], tiny_bundle: Bundle
) -> None:
    session.factor = 1.01
    with pytest.raises(
        VerificationError, match=r"'embedding' of graph 'embed' is off by 1\.00e-02"
    ):
        load_engines(tiny_bundle, "onnxruntime-tensorrt")
    session.factor = 1.0
    with pytest.raises(VerificationError, match="was refused on sm87"):
        load_engines(tiny_bundle, "onnxruntime-tensorrt")


def test_a_silent_fall_back_is_an_error(session: type[FakeSession], tiny_bundle: Bundle) -> None:
    session.providers = ["CPUExecutionProvider"]
    with pytest.raises(EngineUnavailableError, match="not on TensorrtExecutionProvider"):
        load_engines(tiny_bundle, "onnxruntime-tensorrt")


def test_mixed_is_not_promised(session: type[FakeSession], tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match="not 'mixed'"):
        load_engines(tiny_bundle, "onnxruntime-tensorrt", "mixed")


def test_this_onnxruntime_without_the_provider_says_what_to_install(tiny_bundle: Bundle) -> None:
    if TRT in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.raises(EngineUnavailableError, match="Install onnxruntime-gpu instead"):
        load_engines(tiny_bundle, "onnxruntime-tensorrt")
    path, _ = tiny_bundle.graph_file("embed", ("portable",), "fp32")
    with pytest.raises(EngineUnavailableError):
        OnnxRuntimeTensorRt(tiny_bundle.specs["embed"], path)
