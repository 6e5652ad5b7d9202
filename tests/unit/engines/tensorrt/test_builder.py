"""What the builder tells TensorRT, by a stand-in; the real one is in integration/."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from support.fake_tensorrt import HostGpu, make_tensorrt, small_graph

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import EngineRunError, EngineUnavailableError, InputError
from recallseg.engines.specs import GraphSpec
from recallseg.engines.tensorrt import building
from recallseg.engines.tensorrt.builder import BuildRequest, build_plan
from recallseg.engines.tensorrt.building import build_bundle
from recallseg.engines.tensorrt.flavour import FLAVOURS, flavour_named
from recallseg.engines.tensorrt.plans import PlanCache
from recallseg.engines.tensorrt.profile import Profile, Range
from recallseg.engines.tensorrt.targets import Target

TRT, RTX = FLAVOURS["tensorrt"], FLAVOURS["tensorrt-rtx"]


def request_for(*targets: str, precision: str = "fp32", **more: Any) -> BuildRequest:
    return BuildRequest(TRT, precision, Profile(), Target.parse(targets or None, TRT), **more)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = make_tensorrt("10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


def graph(bundle: Bundle, name: str) -> tuple[Path, GraphSpec]:
    return bundle.graph_file(name, ("portable",), "fp32")[0], bundle.specs[name]


@pytest.mark.parametrize(("version", "flags"), [("10.3.0", 2), ("10.16.1", 2), ("11.4.0", 0)])
def test_networks_are_strongly_typed_in_every_version(
    monkeypatch: pytest.MonkeyPatch, demo: Bundle, version: str, flags: int
) -> None:
    module = make_tensorrt(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    built = build_plan(*graph(demo, "embed"), request_for())
    assert module.made[0][0].flags == flags
    assert built.version == version


def test_the_profile_holds_n_and_k(tensorrt: Any, demo: Bundle) -> None:
    build_plan(*graph(demo, "attend"), request_for())
    (_, config) = tensorrt.made[0]
    tokens = demo.geometry.tokens
    assert config.profiles[0].shapes["memories"] == [
        (1, 1, tokens, 64),
        (1, 4, tokens, 64),
        (4, 16, tokens, 64),
    ]
    assert set(config.profiles[0].shapes) == {"memories", "pointers", "pointer_time"}


def test_fp32_means_fp32(tensorrt: Any, demo: Bundle) -> None:
    for precision in ("fp32", "fp16"):
        build_plan(*graph(demo, "embed"), request_for(precision=precision))
    assert ["TF32" in config.flags for _, config in tensorrt.made] == [False, True]


def test_options_reach_the_builder(tensorrt: Any, demo: Bundle) -> None:
    request = request_for("ampere+", "version", strip_weights=True, workspace_bytes=1 << 20)
    build_plan(*graph(demo, "embed"), request)
    (_, config) = tensorrt.made[0]
    assert {"STRIP_PLAN", "VERSION_COMPATIBLE"} <= config.flags
    assert config.hardware_compatibility_level == tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.limits == {tensorrt.MemoryPoolType.WORKSPACE: 1 << 20}


def write(path: Path, operator: str) -> Path:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node(operator, ["x"], ["y"], name="node_7")
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [result])), path)
    return path


def test_every_message_of_the_parser_is_shown(tensorrt: Any, demo: Bundle, tmp_path: Path) -> None:
    spec = demo.specs["embed"]
    with pytest.raises(EngineRunError, match=r"RoiAlign 'node_7': no importer registered for op"):
        build_plan(write(tmp_path / "a.onnx", "RoiAlign"), spec, request_for())
    with pytest.raises(EngineRunError, match=r"needs TensorRT 10\.14"):
        build_plan(write(tmp_path / "b.onnx", "Attention"), spec, request_for())
    (tmp_path / "c.onnx").write_bytes(b"\x08no graph")
    with pytest.raises(EngineRunError, match="not a model"):
        build_plan(tmp_path / "c.onnx", spec, request_for())


def test_a_graph_with_other_tensors_is_refused(tensorrt: Any, demo: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineRunError, match="has the inputs"):
        build_plan(small_graph(tmp_path / "a.onnx"), demo.specs["embed"], request_for())


def test_inputs_and_outputs_are_fp32(tensorrt: Any, demo: Bundle, tmp_path: Path) -> None:
    path, spec = graph(demo, "embed")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "embed.onnx")
    with pytest.raises(EngineRunError, match=r"outputs that are not fp32: .'embedding'"):
        build_plan(tmp_path / "embed.onnx", spec, request_for())


def test_a_failed_build_says_what_the_builder_said(tensorrt: Any, demo: Bundle) -> None:
    tensorrt.fail_build = "Error Code 10: no implementation for node_MatMul_7"
    with pytest.raises(EngineRunError, match="node_MatMul_7"):
        build_plan(*graph(demo, "embed"), request_for())


def test_an_interruption_leaves_the_builder(tensorrt: Any, demo: Bundle) -> None:
    def interrupt(step: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(*graph(demo, "embed"), request_for(), interrupt)


def test_a_missing_or_old_tensorrt_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineUnavailableError, match="JetPack"):
        TRT.load()
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt("8.6.1"))
    with pytest.raises(EngineUnavailableError, match=r"needs TensorRT 10\.3 or newer, this is 8"):
        TRT.load()


def test_targets_are_checked() -> None:
    assert Target.parse(None, RTX).names == ("sm86", "sm89", "sm120")
    assert Target.parse(("sm120", "sm86"), RTX).capabilities == (86, 120)
    assert str(Target.parse(None, TRT)) == "current"
    for names, flavour in (
        (("sm90",), RTX),
        (("current",), RTX),
        (("sm86",), TRT),
        (("ampere+", "same-capability"), TRT),
        (("current", "ampere+"), TRT),
    ):
        with pytest.raises(InputError):
            Target.parse(names, flavour)
    with pytest.raises(InputError, match="not for 'onnxruntime-cpu'"):
        flavour_named("onnxruntime-cpu")


def test_ranges_rise() -> None:
    for bad in ((0, 1, 1), (2, 1, 3), (1, 4, 3)):
        with pytest.raises(InputError, match="must rise"):
            Range(*bad)
    assert 16 in Profile().k
    assert 17 not in Profile().k


def test_a_profile_larger_than_the_graphs_is_refused(
    tensorrt: Any, demo: Bundle, tmp_path: Path
) -> None:
    request = BuildRequest(TRT, "fp32", Profile(k=Range(1, 4, 64)), Target.parse(("ampere+",), TRT))
    with pytest.raises(InputError, match="k up to 64"):
        list(build_bundle(demo, request, cache=PlanCache(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_this_gpu_names_it(
    tensorrt: Any, demo: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "open_device", HostGpu.open)
    cache = PlanCache(tmp_path)
    steps: list[tuple[str, str]] = []

    def build() -> list[building.BuiltGraph]:
        return list(
            build_bundle(
                demo,
                request_for(),
                graphs=("embed", "decode"),
                cache=cache,
                report=lambda graph, step: steps.append((graph, step)),
            )
        )

    first = build()
    assert [item.fresh for item in first] == [True, True]
    assert first[0].plan.key.target == "current on sm87 Stand-in"
    assert ("decode", "Building engine") in steps
    assert [item.fresh for item in build()] == [False, False]
    monkeypatch.setattr(tensorrt, "__version__", "10.3.1")
    assert [item.fresh for item in build()] == [True, True]


def test_without_a_gpu_a_plan_for_this_gpu_is_not_built(
    tensorrt: Any, demo: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recallseg.engines.device.device.PROVIDERS", ())
    with pytest.raises(EngineUnavailableError, match="cuda-bindings nor PyCUDA"):
        list(build_bundle(demo, request_for(), cache=PlanCache(tmp_path)))
