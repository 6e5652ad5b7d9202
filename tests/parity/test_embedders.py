"""Embedders other than DINOv2: DINOv3, and any folder of transformers with a pooled output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import CheckpointError, ExportError
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.specs import graph_specs
from recallseg.export import ort_cpu, tensorrt
from recallseg.export.bundling import VARIANTS, export_bundle
from recallseg.export.checkpoints import Loaded, load_embedder, load_segmenter
from recallseg.export.checkpoints.embedders import DINOV3
from recallseg.export.families.embedders import embedder_family
from recallseg.export.graphs import Embed, read_geometry
from recallseg.export.onnx_export import export_graph
from recallseg.export.parity import check_graph

TOLERANCE = 1e-5
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}


def _clip() -> PreTrainedModel:
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 99,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=SMALL))


MODELS: dict[str, Any] = {
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=4, **SMALL)),
    "dinov3_convnext": lambda: DINOv3ConvNextModel(
        DINOv3ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1])
    ),
    "vit": lambda: ViTModel(ViTConfig(**SMALL)),
    "clip": _clip,
}


def _folder(path: Path, model: PreTrainedModel, size: int = 64, **changes: Any) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(path)
    said = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": size}, **changes}
    (path / "preprocessor_config.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("variant", ["ort-cpu", "tensorrt"])
def test_a_folders_image_tower_is_exported_as_it_is(
    tmp_path: Path, kind: str, variant: str
) -> None:
    model = MODELS[kind]()
    loaded = load_embedder(str(_folder(tmp_path / "hub", model)))
    assert loaded.architecture.startswith(kind)
    assert loaded.normalisation.std == (0.25, 0.25, 0.25)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        tower = getattr(model, "vision_model", model)
        expected = torch.nn.functional.normalize(tower(image).pooler_output, dim=-1)
        assert torch.allclose(Embed(loaded.model)(image), expected, atol=1e-6)
    family = embedder_family(loaded.model)
    size = family.size(loaded.model, 64)
    family.fix(loaded.model, size)
    segmenter = load_segmenter("random:demo", image_size=256).model
    geometry = read_geometry(segmenter, loaded.model, embed_size=size)
    spec = graph_specs(geometry)["embed"]
    contexts = {
        "ort-cpu": (ort_cpu.fused_attention, ort_cpu.OPSET),
        "tensorrt": (tensorrt.fusable_attention, tensorrt.OPSET),
    }
    context, opset = contexts[variant]
    file = tmp_path / "embed.onnx"
    with context(loaded.model):
        export_graph(Embed(loaded.model), spec, geometry, file, opset=opset)
    if variant == "tensorrt":
        tensorrt.check_operators(file)
    measured = list(check_graph(OnnxRuntimeCpu(spec, file), Embed(loaded.model)))
    assert max(m.error for m in measured) < TOLERANCE


@pytest.mark.slow
def test_a_whole_bundle_with_dinov3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = DINOv3ViTConfig(num_register_tokens=4, **SMALL)
    monkeypatch.setitem(DINOV3, "dinov3-small", small)  # type: ignore[arg-type]
    embedder = load_embedder("random:dinov3-small")
    segmenter = load_segmenter("random:demo", image_size=256)
    bundle = export_bundle(
        segmenter, embedder, tmp_path / "b", embed_size=64, variants=("portable",)
    )
    assert Bundle.open(bundle.path).embedder.architecture == "dinov3-small"
    assert bundle.geometry.embedding_dim == 64
    assert bundle.former_identities == ()


@pytest.mark.parametrize(("name", "millions"), [("small", 21.6), ("base", 85.7), ("large", 303.1)])
def test_dinov3_has_its_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = DINOv3ViTModel(DINOV3[f"dinov3-{name}"])
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.1)


def test_equal_weights_have_one_digest_in_any_file(tmp_path: Path) -> None:
    model = MODELS["vit"]()
    first = load_embedder(str(_folder(tmp_path / "a", model)))
    model.save_pretrained(tmp_path / "b", max_shard_size="50KB")
    (tmp_path / "b/preprocessor_config.json").write_bytes(
        (tmp_path / "a/preprocessor_config.json").read_bytes()
    )
    assert load_embedder(str(tmp_path / "b")).digest == first.digest


def test_what_would_be_random_is_refused(tmp_path: Path) -> None:
    model = ViTForImageClassification(ViTConfig(num_labels=3, **SMALL))
    with pytest.raises(CheckpointError, match=r"which would be random: 'pooler\."):
        load_embedder(str(_folder(tmp_path, model)))


def test_a_folder_must_say_how_its_images_are_made(tmp_path: Path) -> None:
    folder = _folder(tmp_path, MODELS["vit"]())
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(CheckpointError, match="does not say image_mean"):
        load_embedder(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no preprocessor_config\.json"):
        load_embedder(str(folder))


def test_a_gated_folder_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gated model's files come once its licence"):
        load_embedder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "dinov3_vit"}')
    wanted = r"of DINOv3, model_type 'dinov3_vit'\) but no weights.*once its licence was accepted"
    with pytest.raises(CheckpointError, match=wanted):
        load_embedder(str(tmp_path))


def test_what_is_no_embedder_of_images_is_named(tmp_path: Path) -> None:
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    from transformers import BertConfig, BertModel

    folder = _folder(tmp_path, BertModel(BertConfig.from_dict(config)))
    with pytest.raises(CheckpointError, match="type 'bert' that makes no vector of an image"):
        load_embedder(str(folder))


def test_sizes_that_an_embedder_does_not_take(tmp_path: Path) -> None:
    fixed = load_embedder(str(_folder(tmp_path, MODELS["vit"]()))).model
    with pytest.raises(ExportError, match="images of 64 px and no others, not 80"):
        embedder_family(fixed).size(fixed, 80)
    free = MODELS["dinov3_vit"]()
    with pytest.raises(ExportError, match=r"multiple of the embedder's patch of 16 px.*Try 96"):
        embedder_family(free).size(free, 100)


def test_the_model_in_another_place_is_refused(tmp_path: Path) -> None:
    embedder: Loaded = load_embedder("random:demo")
    with pytest.raises(ExportError, match=r"a segmenter .* and an embedder, in this order"):
        export_bundle(embedder, embedder, tmp_path / "b", variants=VARIANTS)
    assert np.size(list(tmp_path.iterdir())) == 0
