"""EdgeTAM: its file is recognised and used up, RepViT is timm's, the five graphs are the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fixtures.checkpoints import recipe
from support.making import exported_once
from torch import Tensor, nn
from transformers import EdgeTamVideoModel

from recallseg import Library, Segmenter
from recallseg.engines.bundle import Bundle, MemorySemantics
from recallseg.engines.composition import Composition
from recallseg.engines.engine import EngineOptions
from recallseg.engines.errors import CheckpointError, ExportError, InputError, ParityError
from recallseg.engines.golden import make_case, run_case
from recallseg.engines.registry import load_engines
from recallseg.engines.specs import GRAPHS, graph_specs
from recallseg.engines.verification import relative_error
from recallseg.export.bundling import DEFAULT_VARIANTS, VARIANTS, export_bundle
from recallseg.export.checkpoints import (
    Loaded,
    load_dinov2,
    load_sam2,
    load_segmenter,
    meta_edgetam,
    state_digest,
)
from recallseg.export.checkpoints.architectures import edgetam_config
from recallseg.export.checkpoints.strict import tensor_shapes
from recallseg.export.correcting import Correct
from recallseg.export.families.base import IMAGENET
from recallseg.export.families.edgetam import LatentAttention
from recallseg.export.families.repvit import RepVit, RepVitConfig, fused
from recallseg.export.graphs import Attend, build_graphs, read_geometry
from recallseg.export.onnx_export import example_inputs
from recallseg.export.ort_cpu import build_ort_cpu_graphs
from recallseg.export.ort_cuda import build_ort_cuda_graphs
from recallseg.export.parity import Measured, TorchEngine, check_corrections, check_definition

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "checkpoints"
SIZE = 256

pytestmark = pytest.mark.timeout(900)  # an export takes minutes where many share the cores
TOLERANCE = 1e-5


def _layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of Meta's ``edgetam.pt``.

    The image encoder's are timm's; the perceiver's are those of its class in Meta's repository
    (``sam2/modeling/perceiver.py``) with the published settings; the rest is SAM 2's with half the
    layers of memory attention, another neck and none of what SAM 2.1 added.
    """
    layout = recipe.unfold(json.loads((FIXTURES / "edgetam_layout.json").read_text()))
    layouts = json.loads((FIXTURES / "meta_layouts.json").read_text())["sam2.1-hiera-tiny"]
    left_out = ("image_encoder.trunk.", "memory_attention.layers.2.", "memory_attention.layers.3.")
    for name, shape in recipe.unfold(layouts["tensors"]).items():
        if not name.startswith(left_out) and name not in layouts["not_in_sam2"]:
            layout[name] = shape
    for level, width in enumerate((384, 192, 96, 48)):
        layout[f"image_encoder.neck.convs.{level}.conv.weight"] = (256, width, 1, 1)
    layout |= {"spatial_perceiver.latents": (256, 64), "spatial_perceiver.latents_2d": (256, 64)}
    layout |= {f"spatial_perceiver.norm.{leaf}": (64,) for leaf in ("weight", "bias")}
    for layer in range(2):
        prefix = f"spatial_perceiver.layers.{layer}"
        for norm in ("attn.norm_x", "attn.norm_latents", "self_attn.norm", "ff.0", "self_ff.0"):
            layout |= {f"{prefix}.{norm}.{leaf}": (64,) for leaf in ("weight", "bias")}
        for attention in ("attn", "self_attn"):
            layout[f"{prefix}.{attention}.to_q.weight"] = (64, 64)
            layout[f"{prefix}.{attention}.to_kv.weight"] = (128, 64)
            layout[f"{prefix}.{attention}.to_out.weight"] = (64, 64)
        for inner in ("ff", "self_ff"):
            layout[f"{prefix}.{inner}.1.weight"] = (256, 64)
            layout[f"{prefix}.{inner}.3.weight"] = (64, 256)
    return layout


def _weights() -> dict[str, Tensor]:
    return {n: torch.from_numpy(np.asarray(recipe.weight(n, s))) for n, s in _layout().items()}


def test_the_published_layout_is_used_up() -> None:
    layout = _layout()
    config = edgetam_config(image_size=512)
    shapes = tensor_shapes(EdgeTamVideoModel, config)
    pieces = {name: meta_edgetam.resolve(name, {}) for name in shapes}
    sources = {s: p.source_shape(shapes[n]) for n, p in pieces.items() for s in p.sources}
    assert sources == layout


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A file of Meta's layout, with the counters that training leaves in it."""
    weights = _weights()
    counter = "image_encoder.trunk.body.stem.conv1.bn.num_batches_tracked"
    file = tmp_path_factory.mktemp("meta") / "edgetam.pt"
    torch.save({"model": {**weights, counter: torch.tensor(7)}}, file)
    loaded = load_segmenter(str(file), image_size=SIZE)
    file.unlink()
    assert loaded.digest == state_digest(weights)
    return loaded


def test_a_published_file_is_recognised(published: Loaded) -> None:
    assert published.architecture == "edgetam"
    assert published.source == "pretrained"
    assert isinstance(published.model, EdgeTamVideoModel)
    config = published.model.config
    assert not config.enable_temporal_pos_encoding_for_object_pointers
    assert not config.enable_occlusion_spatial_embedding
    assert sum(p.numel() for p in published.model.parameters()) == 13_895_794


def test_keys_and_values_of_the_perceiver_come_apart(published: Loaded) -> None:
    both = torch.from_numpy(
        np.asarray(recipe.weight("spatial_perceiver.layers.1.attn.to_kv.weight", (128, 64)))
    )
    state = published.model.state_dict()
    prefix = "spatial_perceiver.layers.1.cross_attention"
    assert torch.equal(state[f"{prefix}.k_proj.weight"], both[:64])
    assert torch.equal(state[f"{prefix}.v_proj.weight"], both[64:])


@pytest.mark.parametrize("fuse", [False, True])
def test_repvit_is_timms_before_and_after_fusing(published: Loaded, fuse: bool) -> None:
    backbone = RepVit(RepVitConfig()).eval()
    vision: Any = published.model.vision_encoder
    backbone.load_state_dict(vision.backbone.timm_model.state_dict())
    if fuse:
        fused(backbone)
        assert not any("bn" in name for name, _ in backbone.named_modules())
    with torch.inference_mode():
        maps = backbone(torch.from_numpy(recipe.image("query", SIZE)))
    with np.load(FIXTURES / "timm_repvit.npz") as reference:
        for index, found in enumerate(maps):
            expected = reference[f"stage {index}"]
            sample = recipe.sample(f"stage {index}", found.numpy())
            assert abs(sample[0] / expected[0] - 1) < TOLERANCE
            assert np.abs(sample[1:] - expected[1:]).max() < TOLERANCE * np.abs(expected[1:]).max()


Models = tuple[Loaded, Loaded]


@pytest.fixture(scope="module")
def models() -> Models:
    return load_segmenter("random:edgetam", image_size=SIZE), load_dinov2("random:demo")


def compare(
    models: Models,
    *,
    spoil: Callable[[dict[str, nn.Module]], None] = lambda modules: None,
    object_pointers: bool = True,
    k: int = 3,
) -> Measured:
    segmenter, embedder = models[0].model, models[1].model
    geometry = read_geometry(segmenter, embedder, embed_size=126)
    specs = graph_specs(geometry, object_pointers=object_pointers)
    modules = build_graphs(segmenter, embedder, object_pointers=object_pointers)
    spoil(modules)
    composition = Composition({name: TorchEngine(specs[name], modules[name]) for name in GRAPHS})
    return check_definition(
        composition,
        segmenter,
        make_case(3, k=k),
        geometry,
        IMAGENET,
        MemorySemantics(object_pointers, 0.0),
    )


@pytest.mark.parametrize(("k", "object_pointers"), [(1, True), (3, True), (3, False)])
def test_the_modules_are_the_video_model(models: Models, k: int, object_pointers: bool) -> None:
    measured = compare(models, k=k, object_pointers=object_pointers)
    assert 0 < measured.error < TOLERANCE


def test_all_that_the_default_configuration_turns_on_is_held_to_the_model_too() -> None:
    config = edgetam_config(image_size=512, occlusion=True, pointer_time=True)
    drawn = load_segmenter("random:edgetam", image_size=512)
    model = EdgeTamVideoModel(config).eval()
    model.load_state_dict(drawn.model.state_dict(), strict=False)
    loaded = Loaded(model, "edgetam", "random", "", (), "", "")
    assert compare((loaded, load_dinov2("random:demo"))).error < TOLERANCE


def test_corrections_are_the_video_models_own_step(models: Models) -> None:
    segmenter, embedder = models[0].model, models[1].model
    geometry = read_geometry(segmenter, embedder, embed_size=126)
    spec = graph_specs(geometry, optional=("correct",))["correct"]
    generator = torch.Generator().manual_seed(3)
    tensors = {
        tensor.name: torch.randn(tensor.resolve(), generator=generator).numpy()
        for tensor in spec.inputs
        if tensor.name in ("conditioned", "skip0", "skip1")
    }
    modules = Composition({"correct": TorchEngine(spec, Correct(segmenter).eval())})
    measured = list(check_corrections(modules, segmenter, tensors))
    assert max(m.error for m in measured) < TOLERANCE


def turn_no_key(modules: dict[str, nn.Module]) -> None:
    attention = modules["attend"].memory_attention
    assert isinstance(attention, LatentAttention)
    attention.key_cos = torch.ones_like(attention.key_cos)
    attention.key_sin = torch.zeros_like(attention.key_sin)


def turn_every_key(modules: dict[str, nn.Module]) -> None:
    attention = modules["attend"].memory_attention
    assert isinstance(attention, LatentAttention)
    half = len(attention.key_cos) // 2
    attention.key_cos = attention.key_cos[half:].repeat(2, 1)
    attention.key_sin = attention.key_sin[half:].repeat(2, 1)


def forget_places(modules: dict[str, nn.Module]) -> None:
    attend = modules["attend"]
    assert isinstance(attend, Attend)
    attend.memory_position = torch.zeros_like(attend.memory_position)


def forget_places_in_the_perceiver(modules: dict[str, nn.Module]) -> None:
    perceiver: Any = modules["memorize"].to_tokens
    perceiver.position = torch.zeros_like(perceiver.position)


@pytest.mark.parametrize(
    "spoil", [turn_no_key, turn_every_key, forget_places, forget_places_in_the_perceiver]
)
def test_a_term_left_out_is_seen(
    models: Models, spoil: Callable[[dict[str, nn.Module]], None]
) -> None:
    with pytest.raises(ParityError, match="'logits' is off"):
        compare(models, spoil=spoil)


@pytest.fixture(scope="module")
def exported(models: Models, pytestconfig: pytest.Config) -> Bundle:
    """The bundle in the variants that a CPU uses, through the whole gate; do not change it."""

    def make(folder: Path) -> None:
        export_bundle(*models, folder / "bundle")

    return Bundle.open(exported_once(pytestconfig, "edgetam", make, __file__) / "bundle")


@pytest.mark.slow
def test_every_variant_passes_the_gate(models: Models, tmp_path: Path) -> None:
    bundle = export_bundle(*models, tmp_path / "bundle", variants=VARIANTS)
    assert {e["variant"] for e in bundle.manifest["parity"]} == {"modules", *VARIANTS}
    assert max(e["error"] for e in bundle.manifest["parity"]) < TOLERANCE


def test_a_bundle_says_what_its_memories_are(exported: Bundle) -> None:
    geometry = exported.geometry
    assert (geometry.tokens, geometry.memory_grid) == (512, (16, 16))
    assert exported.segmenter.architecture == "edgetam"
    assert max(e["error"] for e in exported.manifest["parity"]) < TOLERANCE
    variants = {e["variant"] for e in exported.manifest["parity"]}
    assert variants == {"modules", *DEFAULT_VARIANTS}


def test_branches_are_one_convolution_each(exported: Bundle) -> None:
    path, _ = exported.graph_file("encode", ("portable",), "fp32")
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert "BatchNormalization" not in operators
    # Stem 2; 20 blocks of 3, and every second with a gate of 2; 3 times down by 3 + 2 + 2; neck 4,
    # and the decoder's 2.
    assert operators.count("Conv") == 2 + 20 * 3 + 10 * 2 + 3 * 7 + 4 + 2


@pytest.mark.parametrize("variant", DEFAULT_VARIANTS)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (3, 16)])
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
            assert relative_error(found[tensor.name], value.numpy()) < TOLERANCE


@pytest.mark.parametrize("build", [build_ort_cpu_graphs, build_ort_cuda_graphs])
@pytest.mark.parametrize("size", [512])
def test_variants_are_the_modules_where_windows_hold_more_than_one_place(
    build: Any, size: int
) -> None:
    segmenter, embedder = (
        load_segmenter("random:edgetam", image_size=size),
        load_dinov2("random:demo"),
    )
    plain = build_graphs(segmenter.model, embedder.model)
    made = build(segmenter.model, embedder.model)
    specs = graph_specs(read_geometry(segmenter.model, embedder.model, embed_size=126))
    for graph in ("encode", "attend"):
        inputs = example_inputs(specs[graph], torch.Generator().manual_seed(2), n=2, k=2)
        with torch.inference_mode():
            found = made.get(graph, plain[graph])(*inputs.values())
            expected = plain[graph](*inputs.values())
        for one, other in zip(
            found if isinstance(found, tuple) else (found,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        ):
            assert relative_error(one.numpy(), other.numpy()) < TOLERANCE


def test_a_library_and_a_query_with_512_tokens(exported: Bundle, tmp_path: Path) -> None:
    case = make_case(5, k=3, n=1)
    with Library.create(tmp_path / "library", exported) as library:
        for image, masks in zip(case.images, case.masks, strict=False):
            library.add(image, {"disc": masks[0].astype(bool)})
    with Segmenter(tmp_path / "library", k=3) as segmenter:
        first, again = segmenter.segment(case.images[-1]), segmenter.segment(case.images[-1])
    assert first == again
    assert len(first.recalled["disc"]) == 3
    engines = load_engines(exported, "onnxruntime-cpu")
    tensors = run_case(
        case, Composition(engines), exported.geometry, exported.normalisation, exported.memory
    )
    assert tensors["memories"].shape == (1, 3, 512, 64)
    # Images are resampled another way, and memories are stored in fp16.
    score = first.scores["disc"]
    assert score.iou == pytest.approx(float(tensors["iou"][0]), abs=0.05)


def test_memories_of_latents_are_not_pooled(models: Models) -> None:
    with pytest.raises(ExportError, match="memories of EdgeTAM are latents"):
        build_ort_cpu_graphs(models[0].model, models[1].model, pool=2)


@pytest.mark.parametrize("size", [384, 640, 128])
def test_sizes_without_equal_windows_are_refused(size: int) -> None:
    with pytest.raises(InputError, match=r"does not fit EdgeTAM.*multiple of 256"):
        load_segmenter("random:edgetam", image_size=size)


def test_a_file_of_edgetam_is_named_where_sam_2_is_wanted(tmp_path: Path) -> None:
    torch.save({"model": _weights()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"no SAM 2 file.*it is one of EdgeTAM"):
        load_sam2(str(tmp_path / "x.pt"), image_size=256)


def test_a_mixture_of_families_is_named(tmp_path: Path) -> None:
    mixed = {**_weights(), "image_encoder.trunk.pos_embed_window": torch.zeros(1, 96, 8, 8)}
    torch.save({"model": mixed}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="mixes tensors of SAM 2 and EdgeTAM"):
        load_segmenter(str(tmp_path / "x.pt"), image_size=256)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("image_encoder.trunk.pos_embed", "EfficientTAM"),
        ("detector.backbone.x", "SAM 3"),
        ("image_encoder.blocks.0.norm1.weight", "the first SAM"),
    ],
)
def test_families_that_cannot_be_exported_are_named(tmp_path: Path, name: str, family: str) -> None:
    torch.save({name: torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=f"no SAM 2 or EdgeTAM file.*one of {family}"):
        load_segmenter(str(tmp_path / "x.pt"), image_size=256)


def test_a_part_of_a_file_names_what_is_missing(tmp_path: Path) -> None:
    weights = _weights()
    del weights["spatial_perceiver.latents_2d"]
    torch.save({"model": weights}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"missing tensors .*'spatial_perceiver.latents_2d'"):
        load_segmenter(str(tmp_path / "x.pt"), image_size=256)


def test_a_hugging_face_folder_gives_the_same_weights(tmp_path: Path, published: Loaded) -> None:
    published.model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["backbone_config"] = {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1.dist_in1k",
        "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    }
    file.write_text(json.dumps(config))
    loaded = load_segmenter(str(tmp_path), image_size=SIZE)
    assert loaded.digest == published.digest
    config["vision_config"]["backbone_config"]["architecture"] = "repvit_m2"
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="image encoder 'repvit_m2'"):
        load_segmenter(str(tmp_path), image_size=SIZE)
