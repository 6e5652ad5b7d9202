"""Real plans by TensorRT-RTX, which builds without a GPU; running them carries the mark gpu."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.making import exported_once

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import EngineRunError
from recallseg.engines.specs import GRAPHS, Geometry, GraphSpec, graph_specs
from recallseg.engines.tensorrt.builder import BuildRequest, build_plan
from recallseg.engines.tensorrt.building import build_bundle
from recallseg.engines.tensorrt.flavour import FLAVOURS
from recallseg.engines.tensorrt.plans import PlanCache
from recallseg.engines.tensorrt.profile import Profile
from recallseg.engines.tensorrt.targets import Target
from recallseg.export import tensorrt
from recallseg.export.checkpoints import Loaded, load_dinov2, load_sam2, load_segmenter
from recallseg.export.graphs import build_graphs, read_geometry
from recallseg.export.onnx_export import export_graph
from recallseg.export.precision import FLOATING, convert_graph

RTX = FLAVOURS["tensorrt-rtx"]
PRECISIONS = ("fp32", *FLOATING)
MALFORMED = 32  # EngineInvalidityDiagnostics.MALFORMED_ENGINE


@pytest.fixture(scope="module")
def api() -> Any:
    for module in RTX.modules:
        pytest.importorskip(module, reason="TensorRT-RTX is not installed: recallseg[tensorrt-rtx]")
    return importlib.import_module(RTX.modules[-1])


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return Bundle.open("demo")


def test_what_the_engine_asks_of_a_context_is_there(api: Any) -> None:
    # It is asked on a GPU only; names that do not exist would show there first.
    assert hasattr(api.DynamicShapesKernelSpecializationStrategy, "EAGER")
    names = ("dynamic_shapes_kernel_specialization_strategy", "create_runtime_cache")
    assert set(names) | {"set_runtime_cache"} <= set(dir(api.IRuntimeConfig))
    assert {"serialize", "deserialize"} <= set(dir(api.IRuntimeCache))
    wanted = {"create_runtime_config", "create_execution_context", "device_memory_size_v2"}
    assert wanted <= set(dir(api.ICudaEngine))
    calls = {"set_input_shape", "set_tensor_address", "execute_async_v3"}
    assert calls <= set(dir(api.IExecutionContext))


def request_for(*targets: str, precision: str = "fp32") -> BuildRequest:
    return BuildRequest(RTX, precision, Profile(), Target.parse(targets or None, RTX))


@pytest.mark.parametrize(
    "precision",
    # Each takes the compiler seven seconds, and what is mixed holds what is half.
    [pytest.param(p, marks=[] if p in ("fp32", "mixed") else pytest.mark.slow) for p in PRECISIONS],
)
def test_every_graph_builds_and_only_known_messages_come(
    api: Any, converted_demo: Bundle, tmp_path: Path, precision: str
) -> None:
    items = list(
        build_bundle(converted_demo, request_for(precision=precision), cache=PlanCache(tmp_path))
    )
    assert [item.graph for item in items] == [*GRAPHS, "correct"]
    for item in items:
        check_plan(api, item.graph, item.plan.read(), item.plan.made)


def check_plan(api: Any, graph: str, plan: bytes, made: Mapping[str, Any]) -> None:
    assert len(plan) > 1_000_000
    assert made["layers"] > made["kernels"] > 20
    assert made["activation_bytes"] > 1_000_000
    # memorize's mask head never uses the skips; nothing else is remarkable.
    for message in made["messages"]:
        assert graph == "memorize", message
        assert "skip" in message
    # The whole verdict needs a driver; that the header is one of this version does not.
    runtime = api.Runtime(make_logger(api))
    assert not runtime.get_engine_validity(plan)[1] & MALFORMED
    assert runtime.get_engine_validity(b"x" + plan[1:])[1] & MALFORMED


def export_graphs(
    folder: Path,
    sam2: Loaded,
    dinov2: Loaded,
    graphs: Sequence[str],
    *,
    embed_size: int,
    forms: Sequence[str] = ("tensorrt",),
) -> None:
    """Write graphs as ``FORM/GRAPH.onnx``, with attention that TensorRT fuses in every form."""
    models: Any = sam2.model, dinov2.model
    geometry = read_geometry(*models, embed_size=embed_size)
    (folder / "geometry.json").write_text(json.dumps(asdict(geometry)))
    specs, modules = graph_specs(geometry), build_graphs(*models)
    for form in forms:
        (folder / form).mkdir()
        if form == "tensorrt":
            modules.update(tensorrt.build_tensorrt_graphs(*models))
        for graph in graphs:
            path = folder / form / f"{graph}.onnx"
            with tensorrt.fusable_attention(*models):
                export_graph(modules[graph], specs[graph], geometry, path, opset=tensorrt.OPSET)


def read_specs(folder: Path) -> dict[str, GraphSpec]:
    """Return the specs of graphs that were exported so."""
    kept = json.loads((folder / "geometry.json").read_text())
    return graph_specs(Geometry(**{**kept, "memory_grid": tuple(kept["memory_grid"])}))


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_sam_2_1_tiny_at_512_px(api: Any, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """The true architecture, graph by graph; its parity has tests of its own."""
    graphs = ("encode", "attend", "decode")

    def make(folder: Path) -> None:
        sam2, dinov2 = load_sam2("random:tiny", image_size=512), load_dinov2("random:small")
        export_graphs(folder, sam2, dinov2, graphs, embed_size=224)

    folder = exported_once(pytestconfig, "rtx-tiny", make, __file__)
    specs = read_specs(folder)
    for graph in graphs:
        path = folder / "tensorrt" / f"{graph}.onnx"
        for precision in ("fp32", "fp16"):
            file = tmp_path / f"{precision}.onnx"
            model = onnx.load(path)
            onnx.save(
                model if precision == "fp32" else convert_graph(model, precision, graph), file
            )
            built = build_plan(file, specs[graph], request_for(precision=precision))
            check_plan(api, graph, built.plan, vars(built))


@pytest.mark.slow
@pytest.mark.parametrize("graph", tensorrt.REARRANGED)
def test_what_was_rearranged_has_fewer_kernels_and_works_in_less(
    api: Any, tmp_path: Path, pytestconfig: pytest.Config, graph: str
) -> None:
    """Than the same function in the portable form, whose attention it fuses as well."""

    def make(folder: Path) -> None:
        sam2, dinov2 = load_sam2("random:demo", image_size=256), load_dinov2("random:demo")
        forms = ("portable", "tensorrt")
        export_graphs(folder, sam2, dinov2, tensorrt.REARRANGED, embed_size=126, forms=forms)

    folder = exported_once(pytestconfig, "rtx-demo", make, __file__)
    spec, path = read_specs(folder)[graph], tmp_path / f"{graph}.onnx"
    built = []
    for form in ("portable", "tensorrt"):
        model = onnx.load(folder / form / f"{graph}.onnx")
        onnx.save(convert_graph(model, "fp16", graph), path)
        built.append(build_plan(path, spec, request_for("sm89", precision="fp16")))
    before, now = built
    assert before.kernels is not None
    assert now.kernels is not None
    assert now.kernels < before.kernels
    assert now.layers < before.layers
    assert now.activation_bytes is not None
    assert before.activation_bytes is not None
    assert now.activation_bytes < before.activation_bytes


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 1024])
def test_every_graph_of_edgetam_builds(api: Any, tmp_path: Path, size: int) -> None:
    """Those that differ from SAM 2's, at both sizes; all of its graphs have parity tests."""
    segmenter = load_segmenter("random:edgetam", image_size=size).model
    embedder: Any = load_dinov2("random:demo").model
    geometry = read_geometry(segmenter, embedder, embed_size=126)
    modules, specs = build_graphs(segmenter, embedder), graph_specs(geometry)
    modules.update(tensorrt.build_tensorrt_graphs(segmenter, embedder))
    for graph in ("encode", "memorize", "attend", "decode"):
        path = tmp_path / f"{graph}.onnx"
        with tensorrt.fusable_attention(segmenter, embedder):
            export_graph(modules[graph], specs[graph], geometry, path, opset=tensorrt.OPSET)
        tensorrt.check_operators(path)
        onnx.save(convert_graph(onnx.load(path), "fp16", graph), path)
        built = build_plan(path, specs[graph], request_for(precision="fp16"))
        check_plan(api, graph, built.plan, vars(built))


def test_turing_without_fp32_products_is_explained(api: Any, demo: Bundle) -> None:
    path, _ = demo.graph_file("embed", ("portable",), "fp32")
    with pytest.raises(EngineRunError, match=r"FP32 GEMM is not supported[\s\S]*--precision fp16"):
        build_plan(path, demo.specs["embed"], request_for("sm75"))


def test_a_damaged_graph_is_refused_with_the_parsers_words(
    api: Any, demo: Bundle, tmp_path: Path
) -> None:
    path, _ = demo.graph_file("embed", ("portable",), "fp32")
    broken = tmp_path / "embed.onnx"
    broken.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(EngineRunError, match=r"parser does not take embed\.onnx"):
        build_plan(broken, demo.specs["embed"], request_for())


def test_another_graph_than_the_spec_says_is_refused(api: Any, demo: Bundle) -> None:
    path, _ = demo.graph_file("decode", ("portable",), "fp32")
    with pytest.raises(EngineRunError, match="has the inputs"):
        build_plan(path, demo.specs["embed"], request_for())


def make_logger(api: Any) -> Any:
    class Quiet(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            pass

    return Quiet()
