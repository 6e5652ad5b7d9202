"""From cached plans to engines: proven ones only. A stand-in executes; the networks are real."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jsonschema_rs import Draft202012Validator
from onnx import numpy_helper
from support import fake_tensorrt
from support.fake_tensorrt import HostGpu, RuntimeCache, make_tensorrt
from typer.testing import CliRunner

from recallseg import Bundle, Library, Segmenter
from recallseg.cli import app
from recallseg.engines import registry
from recallseg.engines.budget import memory_budget
from recallseg.engines.device import DeviceFacts
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import (
    BundleError,
    DeviceMemoryError,
    EngineRunError,
    EngineUnavailableError,
    InputError,
    PlanError,
    VerificationError,
)
from recallseg.engines.proof import Candidate
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS
from recallseg.engines.tensorrt import building, loading
from recallseg.engines.tensorrt.builder import BuildRequest
from recallseg.engines.tensorrt.building import build_bundle
from recallseg.engines.tensorrt.engine import TensorRt
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.plans import PlanCache
from recallseg.engines.tensorrt.profile import Profile, Range
from recallseg.engines.tensorrt.targets import Target
from recallseg.runtime.model.model import GpuOptions

ORIN = str(HostGpu.facts)
SCHEMA = Path(__file__).parents[4] / "docs" / "schemas" / "budget.json"


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A stand-in for both TensorRTs, a GPU in host memory, and a cache of our own."""
    module = make_tensorrt("10.3.0")
    for name in ("tensorrt", "tensorrt_rtx_libs", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(building, "open_device", HostGpu.open)
    monkeypatch.setattr(loading, "open_device", HostGpu.open)
    monkeypatch.setenv("RECALLSEG_CACHE", str(tmp_path / "cache"))
    return module


def build(
    bundle: Bundle, *targets: str, engine: str = "tensorrt", profile: Profile | None = None
) -> dict[str, building.BuiltGraph]:
    flavour = FLAVOURS[engine]
    target = Target.parse(targets or None, flavour)
    request = BuildRequest(flavour, "fp32", profile or Profile(), target)
    return {item.graph: item for item in build_bundle(bundle, request)}


def states() -> dict[str, str | None]:
    return {
        plan.key.graph: plan.verdicts.states.get(ORIN, "built") for plan in PlanCache().entries()
    }


def test_the_first_load_verifies_and_the_second_remembers(
    api: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_bundle)
    assert set(states().values()) == {"built"}
    engines = load_engines(tiny_bundle, "tensorrt")
    assert list(engines) == list(GRAPHS)
    assert set(states().values()) == {"verified"}
    attend = next(p for p in PlanCache().entries() if p.key.graph == "attend")
    verdict = attend.verdicts.find(ORIN, tiny_bundle.golden_digest)
    assert verdict is not None
    assert [name for name, _, _ in verdict.checks] == [
        "conditioned",
        "conditioned at k=16",
        "conditioned at k=15",
    ]
    assert all(error < 1e-5 for _, error, _ in verdict.checks)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("verified twice")

    monkeypatch.setattr(Candidate, "judge", never)
    assert list(load_engines(tiny_bundle, "tensorrt", graphs=("embed",))) == ["embed"]
    description = load_engines(tiny_bundle, "tensorrt", graphs=("embed",))["embed"].describe()
    assert description["device"] == "sm87 Stand-in, driver 12.6"


def test_a_query_runs_through_the_plans(api: Any, tiny_bundle: Bundle, tmp_path: Path) -> None:
    build(tiny_bundle)
    rng = np.random.default_rng(0)
    image = rng.normal(100, 10, (96, 96))
    mask = np.zeros((96, 96), bool)
    mask[30:60, 40:75] = True
    image[mask] += 80
    results = []
    for engine in ("onnxruntime-cpu", "tensorrt"):
        with Library.create(tmp_path / engine, tiny_bundle) as library:
            for shift in (0, 5, 9):
                library.add(np.roll(image, shift, 1), {"disc": np.roll(mask, shift, 1)})
            gpu = GpuOptions(HostGpu.open()) if engine == "tensorrt" else None
            segmenter = Segmenter(library, k=3, structures=["disc"], engine=engine, gpu=gpu)
            results.append(segmenter.segment(np.roll(image, 4, 1)).masks["disc"])
    assert results[0].any()
    assert (results[0] == results[1]).mean() > 0.999


def disturb_weights(model: onnx.ModelProto) -> None:
    """One weight matrix of ten, a twentieth larger."""
    if "image" in {value.name for value in model.graph.input} and len(model.graph.output) == 3:
        matrices = [t for t in model.graph.initializer if len(t.dims) == 2]
        for tensor in matrices[:: max(1, len(matrices) // 3)]:
            values = numpy_helper.to_array(tensor) * np.float32(1.05)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def scale_twice(model: onnx.ModelProto) -> None:
    """The scale of attention, applied to the scores once more."""
    if "pointer_time" not in {value.name for value in model.graph.input}:
        return
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type == "Softmax":
            name = f"scaled_{index}"
            factor = numpy_helper.from_array(np.float32(128**-0.5), f"factor_{index}")
            model.graph.initializer.append(factor)
            scaling = onnx.helper.make_node("Mul", [node.input[0], factor.name], [name])
            node.input[0] = name
            model.graph.node.insert(index, scaling)


def mask_scale_twice(model: onnx.ModelProto) -> None:
    """``mask * 20 - 10`` applied to its own result (pitfall 12)."""
    if "masks" not in {value.name for value in model.graph.input}:
        return
    twenty, ten = (
        numpy_helper.from_array(np.float32(value), name)
        for value, name in ((20, "twenty_more"), (10, "ten_more"))
    )
    nodes = list(model.graph.node)
    constants = {
        tensor.name
        for tensor in model.graph.initializer
        if not tensor.dims and numpy_helper.to_array(tensor) == -10
    }
    shift = next(n for n in nodes if n.op_type == "Add" and constants.intersection(n.input))
    at = nodes.index(shift)
    result = shift.output[0]
    shift.output[0] = f"{result}_once"
    model.graph.initializer.extend([twenty, ten])
    more = [
        onnx.helper.make_node("Mul", [f"{result}_once", "twenty_more"], [f"{result}_scaled"]),
        onnx.helper.make_node("Sub", [f"{result}_scaled", "ten_more"], [result]),
    ]
    for offset, node in enumerate(more):
        model.graph.node.insert(at + 1 + offset, node)


def transposed(name: str, array: Any, inputs: Any) -> Any:
    return np.ascontiguousarray(array.swapaxes(2, 3)) if name == "skip1" else array


def nan_at_16(name: str, array: Any, inputs: Any) -> Any:
    if name == "conditioned" and inputs["memories"].shape[1] >= 16:
        array = array.copy()
        array.flat[::97] = np.nan
    return array


def wrong_beyond_10(name: str, array: Any, inputs: Any) -> Any:
    wrong = name == "conditioned" and inputs["memories"].shape[1] > 10
    return array * np.float32(1.01) if wrong else array


WRONG: dict[str, tuple[str, Callable[..., Any], str, str]] = {
    "weights disturbed": ("tamper", disturb_weights, "encode", "features"),
    "attention scale twice": ("tamper", scale_twice, "attend", "conditioned"),
    "mask scale twice": ("tamper", mask_scale_twice, "memorize", "memories"),
    "output transposed": ("spoil", transposed, "encode", "skip1"),
    "NaN at k = 16": ("spoil", nan_at_16, "attend", "conditioned at k=16"),
    "wrong beyond k = 10": ("spoil", wrong_beyond_10, "attend", "conditioned at k=16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_engine_is_refused_with_tensor_and_error(api: Any, demo: Bundle, case: str) -> None:
    hook, wrong, graph, tensor = WRONG[case]
    setattr(api, hook, wrong)
    build(demo)
    with pytest.raises(
        VerificationError, match=rf"'{tensor}' of graph '{graph}' is off by (inf|\d\.\d\de[+-]\d\d)"
    ):
        load_engines(demo, "tensorrt")
    found = states()
    assert found[graph] == "refused"
    assert found["embed"] == "verified"
    assert "refused" not in {state for name, state in found.items() if name != graph}
    # It stays refused without being run again, whatever the engine would do now.
    setattr(api, hook, make_tensorrt().spoil if hook == "spoil" else lambda model: None)
    said = rf"was refused on sm87.*'{tensor}'.*, or build it again: recallseg build --rebuild\."
    with pytest.raises(VerificationError, match=said):
        load_engines(demo, "tensorrt", graphs=(graph,))


def test_another_driver_or_golden_file_is_verified_anew(
    api: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_bundle, "ampere+")
    load_engines(tiny_bundle, "tensorrt")
    seen: list[str] = []
    real = Candidate.judge

    def watch(candidate: Candidate, engines: Any) -> Any:
        seen.append(candidate.device)
        return real(candidate, engines)

    monkeypatch.setattr(Candidate, "judge", watch)
    load_engines(tiny_bundle, "tensorrt")
    assert seen == []
    monkeypatch.setattr(HostGpu, "facts", replace(HostGpu.facts, driver="12.8"))
    load_engines(tiny_bundle, "tensorrt")
    assert seen == ["sm87 Stand-in, driver 12.8"]
    monkeypatch.setattr(Bundle, "golden_digest", property(lambda self: "other"))
    load_engines(tiny_bundle, "tensorrt")
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("targets", "gpu", "fits"),
    [
        ((), DeviceFacts("Stand-in", 87, "13.0"), True),
        ((), DeviceFacts("Stand-in", 89, "12.6"), False),
        ((), DeviceFacts("Another", 87, "12.6"), False),
        (("ampere+",), DeviceFacts("RTX 4090", 89, "12.6"), True),
        (("ampere+",), DeviceFacts("T4", 75, "12.6"), False),
        (("same-capability",), DeviceFacts("Another", 87, "12.6"), True),
        (("same-capability",), DeviceFacts("Another", 89, "12.6"), False),
    ],
)
def test_a_plan_for_another_gpu_is_not_loaded(
    api: Any,
    tiny_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    targets: tuple[str, ...],
    gpu: DeviceFacts,
    fits: bool,
) -> None:
    build(tiny_bundle, *targets)
    monkeypatch.setattr(HostGpu, "facts", gpu)
    monkeypatch.setattr(Candidate, "judge", lambda self, engines: {})
    if fits:
        assert list(load_engines(tiny_bundle, "tensorrt")) == list(GRAPHS)
    else:
        with pytest.raises(EngineUnavailableError, match=r"no complete set .* there are plans of"):
            load_engines(tiny_bundle, "tensorrt")


def test_a_plan_of_another_version_is_not_loaded(
    api: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_bundle)
    monkeypatch.setattr(api, "__version__", "10.3.1")
    with pytest.raises(EngineUnavailableError, match=r"there are plans of 10\.3\.0"):
        load_engines(tiny_bundle, "tensorrt")
    build(tiny_bundle, "version", "ampere+")
    monkeypatch.setattr(api, "__version__", "10.4.0")
    monkeypatch.setattr(Candidate, "judge", lambda self, engines: {})
    monkeypatch.setattr(api, "Runtime", make_tensorrt("10.4.0").Runtime)
    with pytest.raises(PlanError, match="does not take plan"):  # the stand-in is not so lenient
        load_engines(tiny_bundle, "tensorrt")
    monkeypatch.setattr(api, "__version__", "11.0.0")
    with pytest.raises(EngineUnavailableError):
        load_engines(tiny_bundle, "tensorrt")


def test_a_tampered_plan_is_refused_and_rebuilt(api: Any, tiny_bundle: Bundle) -> None:
    built = build(tiny_bundle)
    path = built["decode"].plan.folder / "plan"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(PlanError, match="changed or damaged"):
        load_engines(tiny_bundle, "tensorrt")
    again = build(tiny_bundle)
    assert [graph for graph, item in again.items() if item.fresh] == ["decode"]
    assert list(load_engines(tiny_bundle, "tensorrt")) == list(GRAPHS)


def test_a_tampered_golden_file_proves_nothing(
    api: Any, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    copy = Bundle.open(shutil.copytree(tiny_bundle.path, tmp_path / "demo"))
    build(copy)
    data = bytearray(copy.golden_file.read_bytes())
    data[len(data) // 2] ^= 1
    (copy.path / "golden" / "golden.npz").write_bytes(data)
    with pytest.raises(BundleError, match="changed or damaged"):
        load_engines(copy, "tensorrt")
    with pytest.raises(BundleError, match="changed or damaged"):
        build(copy)
    assert set(states().values()) == {"built"}
    assert list(load_engines(tiny_bundle, "tensorrt")) == list(
        GRAPHS
    )  # the plans are of the same graphs


def test_no_plans_no_engine(api: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineUnavailableError, match=r"recallseg build .*tiny --engine tensorrt"):
        load_engines(tiny_bundle, "tensorrt")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", api)
    monkeypatch.setattr("recallseg.engines.device.device.PROVIDERS", ())
    with pytest.raises(EngineUnavailableError, match="cuda-bindings nor PyCUDA"):
        load_engines(tiny_bundle, "tensorrt")


def test_more_than_the_profile_holds_is_refused(api: Any, tiny_bundle: Bundle) -> None:
    build(tiny_bundle, profile=Profile(Range(1, 1, 2), Range(1, 2, 4)))
    attend = load_engines(tiny_bundle, "tensorrt")["attend"]
    shapes = {t.name: np.zeros(t.resolve(n=1, k=5), np.float32) for t in attend.spec.inputs}
    with pytest.raises(EngineRunError, match=r"k = 5 was asked for.*--max-k 5"):
        attend.run(shapes, attend.allocate_outputs(n=1))
    with pytest.raises(InputError, match="golden case"):
        build(tiny_bundle, profile=Profile(Range(1, 1, 1), Range(1, 2, 4)))


def test_too_little_memory_is_named(
    api: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny_bundle)
    api.fail_load = "Error Code 2: OutOfMemory (Requested size was 9 bytes.)"
    with pytest.raises(DeviceMemoryError, match=r"no room for its plan, .* MiB are free"):
        load_engines(tiny_bundle, "tensorrt")
    api.fail_load = ""
    monkeypatch.setattr(fake_tensorrt.Engine, "device_memory_size_v2", 4 << 30)
    with pytest.raises(DeviceMemoryError, match=r"What graph 'embed' works in.* needs 4096 MiB"):
        load_engines(tiny_bundle, "tensorrt")


def test_the_largest_profile_is_preferred(api: Any, tiny_bundle: Bundle) -> None:
    for most in (16, 4, 8):
        build(tiny_bundle, profile=Profile(k=Range(1, 3, most)))
    found = loading.find_plans(
        tiny_bundle, "tensorrt", "fp32", "10.3.0", HostGpu.facts, PlanCache()
    )
    assert found["attend"].key.profile["k"] == [1, 3, 16]


def test_a_budget_takes_what_plans_say_they_work_in(api: Any, demo: Bundle) -> None:
    """For as much as they take; of what they do not, it stays an estimate."""
    assert loading.recorded_plans(demo, "tensorrt", "fp32") is None
    cache = PlanCache()
    for most, mib in ((4, 1), (8, 3)):
        for built in build(demo, profile=Profile(Range(1, 1, 2), Range(1, 3, most))).values():
            plan = built.plan
            cache.store(plan.key, plan.read(), {**plan.made, "activation_bytes": mib << 20})
    recorded = loading.recorded_plans(demo, "tensorrt", "fp32")
    assert recorded is not None
    assert (recorded.n, recorded.k, set(recorded.works_in)) == (2, 8, {*GRAPHS, "correct"})
    asked = {"precision": "fp32", "engine": "tensorrt", "plans": recorded}
    for n, k, side, told in ((2, 8, 384, True), (1, 1, 384, True), (2, 9, 384, False),
                             (3, 8, 384, False), (1, 4, 512, False)):  # fmt: skip
        budget = memory_budget(demo, n=n, k=k, image_size=side, **asked)  # type: ignore[arg-type]
        (line,) = (line for line in budget.lines if line.name == "activations")
        assert (line.kind, line.size == 5 * 3 << 20, budget.scores == 0) == (
            "recorded" if told else "estimated", told, told,
        )  # fmt: skip
    command = ["doctor", "--budget", "--precision", "fp32", "--memory", "3"]
    done = CliRunner().invoke(app, command)
    assert "n up to 2, k up to 8: as the plans of tensorrt 10.3.0 for " in done.stdout, done.output
    answer = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert answer["plans"]["works_in"]["attend"] == 3 << 20
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(answer)


def test_rtx_keeps_what_it_compiled(
    api: Any, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostGpu, "facts", DeviceFacts("RTX 4090", 89, "12.8"))
    built = build(tiny_bundle, "sm86", "sm89", engine="tensorrt-rtx")
    first = load_engines(tiny_bundle, "tensorrt-rtx")
    assert not first["embed"].describe()["kernels_found"]
    file = built["embed"].plan.folder / "runtime-sm89-RTX-4090--driver-12-8"
    assert file.read_bytes().startswith(RuntimeCache.kernels)
    again = load_engines(tiny_bundle, "tensorrt-rtx")
    assert again["embed"].describe()["kernels_found"]

    # Kernels of shapes that the proof did not ask for are kept when they are first needed.
    attend = again["attend"]
    assert isinstance(attend, TensorRt)
    kept = attend.plan.folder / file.name
    before = kept.read_bytes()
    tensors = {t.name: np.zeros(t.resolve(n=2, k=1), np.float32) for t in attend.spec.inputs}
    attend.run(tensors, attend.allocate_outputs(n=2))
    written = kept.stat().st_mtime_ns
    assert before != kept.read_bytes()
    attend.run(tensors, attend.allocate_outputs(n=2))
    assert kept.stat().st_mtime_ns == written
    file.write_bytes(b"of another driver")
    assert not load_engines(tiny_bundle, "tensorrt-rtx")["embed"].describe()["kernels_found"]
    monkeypatch.setattr(HostGpu, "facts", DeviceFacts("RTX 2080", 75, "12.8"))
    with pytest.raises(EngineUnavailableError):
        load_engines(tiny_bundle, "tensorrt-rtx")


def test_device_memory_is_given_back(api: Any, tiny_bundle: Bundle) -> None:
    build(tiny_bundle)
    engines = load_engines(tiny_bundle, "tensorrt", options=EngineOptions(threads=1))
    device: Any = engines["embed"].device  # type: ignore[attr-defined]
    # What the proof staged; engines that are given tensors of the device hold none.
    assert device.driver.live["buffers"] > 0
    engines.clear()
    assert device.driver.live["buffers"] == 0


def test_the_names_are_engines_now() -> None:
    for name in ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt"):
        assert registry.engine_class(name).name == name


def test_recorded_plans_are_proven_recorded(api: Any, tiny_bundle: Bundle) -> None:
    build(tiny_bundle)
    load_engines(tiny_bundle, "tensorrt", graphs=("embed",))
    device = HostGpu.open()
    options = EngineOptions(device=device, cuda_graphs=True)
    calls: list[str] = device.driver.calls  # type: ignore[attr-defined]
    engine = load_engines(tiny_bundle, "tensorrt", options=options)["embed"]
    assert calls.count("begin_capture") >= len(GRAPHS)
    assert calls.count("launch_graph") >= 2 * len(GRAPHS)
    assert engine.describe()["cuda_graph"] is True
