"""What was exported is what was asked for, for every number of structures and memories."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.making import exported_once
from transformers import Sam2VideoModel

from recallseg.engines.bundle import Bundle
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import EngineUnavailableError, ExportError, ParityError
from recallseg.engines.operators import ATTENTION, DOMAIN, LINEAR, QUANTIZED_ATTENTION
from recallseg.engines.precisions import PRECISIONS, precisions_made
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS, graph_specs
from recallseg.engines.verification import relative_error, verify_engines
from recallseg.export.bundling import VARIANTS, export_bundle
from recallseg.export.checkpoints import Loaded
from recallseg.export.converting import convert_bundle
from recallseg.export.graphs import build_graphs, read_geometry
from recallseg.export.onnx_export import example_inputs
from recallseg.export.ort_cpu import build_ort_cpu_graphs
from recallseg.export.ort_cuda import build_ort_cuda_graphs
from recallseg.export.parity import PARITY_TOLERANCE, check_graph

Models = tuple[Loaded, Loaded]


def test_the_manifest_holds_what_was_measured(exported: Bundle) -> None:
    parity = exported.manifest["parity"]
    assert {entry["graph"] for entry in parity} == {
        *GRAPHS,
        "correct",
        "definition",
        "definition of correct",
        "end to end",
    }
    assert {entry["inputs"].partition(",")[0] for entry in parity} == {"random", "image-like"}
    for entry in parity:
        assert entry["error"] <= entry["tolerance"]


def test_graphs_say_nothing_of_the_machine_that_made_them(exported: Bundle) -> None:
    here = [str(Path(module.__file__ or "").parent).encode() for module in (torch, onnx, np)]
    for bundle in (exported, Bundle.open("demo")):
        for file in sorted(bundle.path.rglob("*.onnx")):
            content = file.read_bytes()
            assert not any(path in content for path in here), file
            assert b".py" not in content, file


def test_the_shipped_bundle_says_where_its_weights_come_from() -> None:
    weights = Bundle.open("demo").manifest["weights"]
    assert {network["source"] for network in weights.values()} == {"demo"}
    assert {network["licence"] for network in weights.values()} == {"Apache-2.0"}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 32), (16, 1), (3, 16)])
def test_structures_and_memories_are_dynamic(
    models: Models, exported: Bundle, variant: str, n: int, k: int
) -> None:
    modules = build_graphs(models[0].model, models[1].model)
    options = EngineOptions(threads=1)
    engines = load_engines(
        exported, "onnxruntime-cpu", options=options, variants=(variant, "portable")
    )
    for graph in ("memorize", "attend", "decode"):
        spec = exported.specs[graph]
        inputs = example_inputs(spec, torch.Generator().manual_seed(5), n=n, k=k)
        found = engines[graph].allocate_outputs(n=n)
        engines[graph].run({name: value.numpy() for name, value in inputs.items()}, found)
        with torch.inference_mode():
            expected = modules[graph](*inputs.values())
        expected = expected if isinstance(expected, tuple) else (expected,)
        for tensor, value in zip(spec.outputs, expected, strict=True):
            assert relative_error(found[tensor.name], value.numpy()) < PARITY_TOLERANCE


def test_the_ort_cpu_variant_is_fused_and_held_to_the_same_gate(exported: Bundle) -> None:
    variants = {e["variant"] for e in exported.manifest["parity"]}
    assert variants == {"modules", "ort-cpu/pooled", *VARIANTS}
    for graph in ("embed", "encode", "attend"):
        path, variant = exported.graph_file(graph, ("ort-cpu", "portable"), "fp32")
        assert variant == "ort-cpu"
        operators = [node.op_type for node in onnx.load(path).graph.node]
        assert "MultiHeadAttention" in operators
        assert "Softmax" not in operators
        assert graph != "encode" or not {"Split", "Slice"} & set(operators)
    assert exported.graph_file("decode", ("ort-cpu", "portable"), "fp32")[1] == "portable"


def test_the_ort_cuda_variant_moves_no_more_than_it_must(exported: Bundle) -> None:
    variants = ("ort-cuda", "portable")
    for graph in ("embed", "encode", "attend", "decode"):
        path, variant = exported.graph_file(graph, variants, "fp32")
        assert variant == "ort-cuda"
        nodes = onnx.load(path).graph.node
        operators = Counter(node.op_type for node in nodes)
        assert {"Pad", "Softmax", "Conv", "ConvTranspose", "Resize"}.isdisjoint(operators)
        assert operators["SkipLayerNormalization"] > operators["LayerNormalization"]
        for node in nodes:  # outputs that nothing reads are not made
            if node.op_type == "SkipLayerNormalization":
                assert set(node.output[1:3]) <= {""}
    encode = Counter(
        node.op_type
        for node in onnx.load(exported.graph_file("encode", variants, "fp32")[0]).graph.node
    )
    # Cutting the image, and one for each output.
    assert encode["Transpose"] == 4
    # Keys and values have no bias left; queries and the first rows do.
    assert encode["Add"] <= encode["MultiHeadAttention"] + 6


@pytest.mark.parametrize("graph", ["embed", "encode", "attend", "decode"])
def test_the_ort_cuda_variant_joins_and_splits_equal_sizes_only(
    exported: Bundle, tmp_path: Path, graph: str
) -> None:
    """For others ONNX Runtime on CUDA copies tables from pinned memory, recordings or not."""
    settings = onnxruntime.SessionOptions()
    settings.enable_profiling = True
    settings.profile_file_prefix = str(tmp_path / "trace")
    path, _ = exported.graph_file(graph, ("ort-cuda",), "fp32")
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    spec = exported.specs[graph]
    inputs = example_inputs(spec, torch.Generator().manual_seed(2), n=2, k=3)
    session.run(None, {name: value.numpy() for name, value in inputs.items()})
    for event in json.loads(Path(session.end_profiling()).read_text()):
        facts = event.get("args", {})
        sides = {"Concat": "input_type_shape", "Split": "output_type_shape"}
        parts = facts.get(sides.get(facts.get("op_name", ""), ""), [])
        shapes = [tuple(part["float"]) for part in parts if "float" in part]
        assert len(set(shapes)) <= 1, (event["name"], shapes)


@pytest.mark.parametrize("object_pointers", [True, False])
def test_the_ort_cuda_graphs_are_the_same_functions(models: Models, object_pointers: bool) -> None:
    sam2, dinov2 = models[0].model, models[1].model
    assert isinstance(sam2, Sam2VideoModel)
    assert not isinstance(dinov2, Sam2VideoModel)
    plain = build_graphs(sam2, dinov2, object_pointers=object_pointers)
    made = build_ort_cuda_graphs(sam2, dinov2, object_pointers=object_pointers)
    size = int(dinov2.config.image_size)
    specs = graph_specs(
        read_geometry(sam2, dinov2, embed_size=size), object_pointers=object_pointers
    )
    for graph, module in made.items():
        inputs = example_inputs(specs[graph], torch.Generator().manual_seed(3), n=2, k=3)
        with torch.inference_mode():
            found, expected = module(*inputs.values()), plain[graph](*inputs.values())
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True)
        assert all(relative_error(x.numpy(), y.numpy()) < 1e-5 for x, y in pairs)


@pytest.mark.parametrize("object_pointers", [True, False])
def test_the_rearranged_attention_is_the_same_function(
    models: Models, object_pointers: bool
) -> None:
    sam2, dinov2 = models[0].model, models[1].model
    assert isinstance(sam2, Sam2VideoModel)
    assert not isinstance(dinov2, Sam2VideoModel)
    plain = build_graphs(sam2, dinov2, object_pointers=object_pointers)["attend"]
    folded = build_ort_cpu_graphs(sam2, dinov2, object_pointers=object_pointers)["attend"]
    geometry = read_geometry(sam2, dinov2, embed_size=126)
    spec = graph_specs(geometry, object_pointers=object_pointers)["attend"]
    inputs = example_inputs(spec, torch.Generator().manual_seed(2), n=2, k=3).values()
    with torch.inference_mode():
        expected, found = plain(*inputs), folded(*inputs)
    assert relative_error(found.numpy(), expected.numpy()) < PARITY_TOLERANCE


def test_pooling_is_exact_where_neighbouring_memories_are_equal(models: Models) -> None:
    """Four equal tokens with one key are one token that counts four times: log 4 is right.

    Keys differ within a place by position alone; with positions and rotation made equal too, pooled
    and plain attention are the same function, and nothing else is.
    """
    sam2, dinov2 = models[0].model, models[1].model
    assert isinstance(sam2, Sam2VideoModel)
    assert not isinstance(dinov2, Sam2VideoModel)
    plain = build_ort_cpu_graphs(sam2, dinov2)["attend"]
    pooled = build_ort_cpu_graphs(sam2, dinov2, pool=2)["attend"]
    geometry = read_geometry(sam2, dinov2, embed_size=126)
    side = geometry.feature_size

    def spread(table: torch.Tensor) -> torch.Tensor:
        grid = table.unflatten(-2, (side // 2, side // 2))
        return grid.repeat_interleave(2, -3).repeat_interleave(2, -2).flatten(-3, -2)

    plain.key_cos, plain.key_sin = spread(pooled.key_cos), spread(pooled.key_sin)
    plain.position = spread(pooled.position)
    spec = graph_specs(geometry)["attend"]
    inputs = example_inputs(spec, torch.Generator().manual_seed(2), n=2, k=3)
    few = torch.randn(2, 3, (side // 2) ** 2, geometry.memory_dim)
    inputs["memories"] = spread(few)
    with torch.inference_mode():
        expected, found = plain(*inputs.values()), pooled(*inputs.values())
        assert relative_error(found.numpy(), expected.numpy()) < PARITY_TOLERANCE
        inputs["memories"] = torch.randn_like(inputs["memories"])
        expected, found = plain(*inputs.values()), pooled(*inputs.values())
        assert relative_error(found.numpy(), expected.numpy()) > 10 * PARITY_TOLERANCE


def test_pooled_is_a_precision_of_its_own(exported: Bundle) -> None:
    keys = exported.manifest["graphs"]
    assert keys["ort-cpu/pooled/encode"] == keys["ort-cpu/fp32/encode"]
    assert keys["ort-cpu/pooled/decode"] == keys["portable/fp32/decode"]
    assert keys["ort-cpu/pooled/attend"] != keys["ort-cpu/fp32/attend"]
    assert verify_engines(
        exported, load_engines(exported, "onnxruntime-cpu", "pooled"), "pooled"
    ).passed


def test_pooled_without_its_variant_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'ort-cpu'"):
        export_bundle(*models, tmp_path / "bundle", variants=("portable",), pooled=True)


def converted(config: pytest.Config, exported: Bundle, *precisions: str) -> Bundle:
    """Return the bundle with these precisions too; what is sensitive takes long to measure."""

    def make(folder: Path) -> None:
        convert_bundle(exported, folder / "bundle", precisions)

    name = "-".join(("converted", *precisions))
    sources = (__file__, Path(__file__).with_name("conftest.py"))
    return Bundle.open(exported_once(config, name, make, *sources) / "bundle")


def test_int8_keeps_what_is_sensitive_and_passes_its_gate(
    exported: Bundle, pytestconfig: pytest.Config
) -> None:
    plain = [name for name in precisions_made("quantized") if not PRECISIONS[name].native]
    made = converted(pytestconfig, exported, *plain)
    assert made.identity == exported.identity
    for precision in plain:
        engines = load_engines(made, "onnxruntime-cpu", precision)
        assert verify_engines(made, engines, precision).passed
        assert any(e["variant"] == f"ort-cpu/{precision}" for e in made.manifest["parity"])
        path, variant = made.graph_file("encode", ("ort-cpu", "portable"), precision)
        assert variant == "ort-cpu"
        fp32, _ = made.graph_file("encode", ("ort-cpu",), "fp32")
        assert _weight_bytes(path) < 0.5 * _weight_bytes(fp32)
        memorize = made.manifest["graphs"][f"ort-cpu/{precision}/memorize"]
        assert memorize == made.manifest["graphs"]["portable/fp32/memorize"]


def _weight_bytes(file: Path) -> int:
    """Size of a graph's weights, wherever they are stored."""
    weights = onnx.load(file, load_external_data=False).graph.initializer
    stored = [{entry.key: entry.value for entry in weight.external_data} for weight in weights]
    return sum(
        int(where.get("length", len(weight.raw_data)))
        for weight, where in zip(weights, stored, strict=True)
    )


def _nodes(bundle: Bundle, precision: str, graph: str) -> list[tuple[str, str]]:
    model = onnx.load(bundle.graph_file(graph, ("ort-cpu",), precision)[0])
    return [(node.domain, node.op_type) for node in model.graph.node]


FUSED = ("com.microsoft", "MultiHeadAttention")


@pytest.mark.usefixtures("native_operators")
def test_int8_native_runs_attention_by_our_operator(
    exported: Bundle, pytestconfig: pytest.Config
) -> None:
    made = converted(pytestconfig, exported, "int8-native")
    engines = load_engines(made, "onnxruntime-cpu", "int8-native")
    assert verify_engines(made, engines, "int8-native").passed
    kept = made.manifest["kept_in_fp32"]["int8-native"]
    for graph in ("encode", "attend"):
        nodes = _nodes(made, "int8-native", graph)
        exact = nodes.count((DOMAIN, ATTENTION))
        assert exact + nodes.count((DOMAIN, LINEAR)) == len(kept[graph])
        assert nodes.count((DOMAIN, QUANTIZED_ATTENTION)) > exact
        assert FUSED not in nodes


@pytest.mark.usefixtures("native_operators")
def test_fp32_native_is_fp32_by_other_operators(exported: Bundle, tmp_path: Path) -> None:
    made = convert_bundle(exported, tmp_path / "native", ["fp32-native"])
    engines = load_engines(made, "onnxruntime-cpu", "fp32-native")
    result = verify_engines(made, engines, "fp32-native")
    assert result.passed
    assert max(check.error for check in result.checks) < 2e-5
    for graph in ("embed", "encode", "attend"):
        before, after = _nodes(made, "fp32", graph), _nodes(made, "fp32-native", graph)
        assert after.count((DOMAIN, ATTENTION)) == before.count(FUSED) > 0
        assert after.count((DOMAIN, LINEAR)) == before.count(("", "MatMul")) > 0
        assert not {FUSED, ("", "MatMul"), ("", "Gelu")} & set(after)
    memorize = made.manifest["graphs"]["ort-cpu/fp32-native/memorize"]
    assert memorize == made.manifest["graphs"]["portable/fp32/memorize"]


@pytest.mark.usefixtures("no_operators")
@pytest.mark.parametrize("precision", ["fp32-native", "int8-native"])
def test_what_is_native_is_not_made_where_it_cannot_be_run(
    exported: Bundle, tmp_path: Path, precision: str
) -> None:
    with pytest.raises(EngineUnavailableError, match=rf"{precision}.*wheel\.cmake=true"):
        convert_bundle(exported, tmp_path / "native", [precision])
    assert not (tmp_path / "native").exists()


def test_int8_needs_the_graphs_that_it_is_made_from(tmp_path: Path) -> None:
    bundle = Bundle.open("demo")
    with pytest.raises(ExportError, match="--pooled"):
        convert_bundle(bundle, tmp_path / "int8", ["int8-pooled"])
    assert not (tmp_path / "int8").exists()


def test_portable_graphs_use_standard_operators_only(exported: Bundle) -> None:
    for graph in GRAPHS:
        path, _ = exported.graph_file(graph, ("portable",), "fp32")
        model = onnx.load(path)
        assert {opset.domain for opset in model.opset_import} == {""}
        assert [value.name for value in model.graph.input] == [
            tensor.name for tensor in exported.specs[graph].inputs
        ]


def test_a_graph_that_differs_is_refused_and_the_tensor_named(
    models: Models, exported: Bundle
) -> None:
    modules = build_graphs(models[0].model, models[1].model)
    engines = load_engines(exported, "onnxruntime-cpu", graphs=("embed",))
    layernorm = modules["embed"].get_submodule("dinov2.layernorm")
    assert isinstance(layernorm, torch.nn.LayerNorm)
    with torch.no_grad():
        layernorm.weight[0] += 0.1
    try:
        with pytest.raises(ParityError, match="'embedding' is off by"):
            list(check_graph(engines["embed"], modules["embed"]))
    finally:
        with torch.no_grad():
            layernorm.weight[0] -= 0.1


def test_verification_needs_no_torch(exported: Bundle) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from recallseg.engines.bundle import Bundle\n"
        "from recallseg.engines.registry import load_engines\n"
        "from recallseg.engines.verification import verify_engines\n"
        f"bundle = Bundle.open({str(exported.path)!r})\n"
        "print(verify_engines(bundle, load_engines(bundle, 'onnxruntime-cpu'), 'fp32').passed)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_an_existing_folder_is_left_alone(models: Models, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ExportError, match="exists"):
        export_bundle(*models, tmp_path)
    assert (tmp_path / "precious").read_text() == "x"


def test_a_failed_export_leaves_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise ParityError("no")

    monkeypatch.setattr("recallseg.export.bundling.check_definition", refuse)
    monkeypatch.setattr(
        "recallseg.export.bundling.export_graph",
        lambda module, spec, geometry, path, opset: path.write_bytes(b""),  # an empty graph
    )
    with pytest.raises(ParityError):
        export_bundle(*models, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 7, 127])
def test_an_embedding_size_that_does_not_fit_the_patch_is_refused(
    models: Models, tmp_path: Path, size: int
) -> None:
    with pytest.raises(ExportError, match="multiple of"):
        export_bundle(*models, tmp_path / "bundle", embed_size=size)


def test_swapped_models_are_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="in this order"):
        export_bundle(models[1], models[0], tmp_path / "bundle")


def test_an_image_comes_out_the_same_from_any_number_of_threads(exported: Bundle) -> None:
    image = np.random.default_rng(0).normal(size=(1, 3, 126, 126)).astype(np.float32)
    found = []
    for threads in (1, 2):
        engine = load_engines(
            exported, "onnxruntime-cpu", options=EngineOptions(threads), graphs=("embed",)
        )["embed"]
        outputs = engine.allocate_outputs()
        engine.run({"image": image}, outputs)
        found.append(outputs["embedding"])
    assert relative_error(found[0], found[1]) < 1e-5
