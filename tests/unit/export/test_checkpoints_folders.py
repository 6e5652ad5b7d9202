"""Hugging Face folders: every format gives the same weights; each difference is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Sam2VideoConfig, Sam2VideoModel

from recallseg.engines.errors import CheckpointError
from recallseg.export.checkpoints import (
    Loaded,
    architectures,
    load_dinov2,
    load_sam2,
    meta_sam2,
    state_digest,
)
from recallseg.export.checkpoints.names import weights_digest
from recallseg.export.checkpoints.random_weights import random_state
from recallseg.export.checkpoints.strict import tensor_shapes

State = dict[str, Tensor]


def _small_sam2_config() -> Sam2VideoConfig:
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "fpn_hidden_size": 32,
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2],
                "blocks_per_stage": [1, 1, 1, 1],
                "global_attention_blocks": [2],
            },
        },
        prompt_encoder_config={"hidden_size": 32, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
        memory_attention_hidden_size=32,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=64,
        memory_encoder_hidden_size=32,
        memory_encoder_output_channels=8,
        mask_downsampler_embed_dim=32,
        memory_fuser_embed_dim=32,
        memory_fuser_intermediate_dim=64,
    )
    architectures.set_image_size(config, 512)
    return config


@pytest.fixture(scope="module")
def sam2_state() -> State:
    return random_state(tensor_shapes(Sam2VideoModel, _small_sam2_config()), seed=5)


@pytest.fixture
def sam2_folder(tmp_path: Path, sam2_state: State) -> Path:
    folder = tmp_path / "sam2-small"
    folder.mkdir()
    _small_sam2_config().save_pretrained(folder)
    save_file(sam2_state, folder / "model.safetensors")
    return folder


def _load(path: Path) -> Loaded:
    return load_sam2(str(path), image_size=256)


def _edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_folder_loads_whole_at_another_image_size(sam2_folder: Path, sam2_state: State) -> None:
    loaded = _load(sam2_folder)
    assert loaded.former_digests == (state_digest(sam2_state),)
    assert loaded.architecture == "sam2.1-hiera-custom"
    assert loaded.source == "pretrained"
    assert "sam2-small" in loaded.description
    assert str(sam2_folder.parent) not in loaded.description
    assert loaded.model.config.image_size == 256


def test_every_file_format_gives_the_same_digest(sam2_folder: Path, sam2_state: State) -> None:
    wanted = weights_digest(sam2_state, meta_sam2.resolve)
    (sam2_folder / "model.safetensors").unlink()

    torch.save(sam2_state, sam2_folder / "pytorch_model.bin")
    assert _load(sam2_folder).digest == wanted
    (sam2_folder / "pytorch_model.bin").unlink()

    names = sorted(sam2_state)
    places = {n: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in set(places.values()):
        save_file({n: sam2_state[n] for n in names if places[n] == shard}, sam2_folder / shard)
    index = sam2_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert _load(sam2_folder).digest == wanted

    (sam2_folder / places[names[0]]).unlink()
    with pytest.raises(CheckpointError, match=r"lists the shard 'model-00001-of-00002"):
        _load(sam2_folder)


def test_index_cannot_point_out_of_its_folder(sam2_folder: Path) -> None:
    (sam2_folder / "model.safetensors").rename(sam2_folder.parent / "elsewhere.safetensors")
    index = sam2_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="not in its folder"):
        _load(sam2_folder)


def test_matrix_that_is_stored_once_is_used_twice(sam2_folder: Path, sam2_state: State) -> None:
    twin = "prompt_encoder.shared_embedding.positional_embedding"
    save_file({n: t for n, t in sam2_state.items() if n != twin}, sam2_folder / "model.safetensors")
    assert _load(sam2_folder).former_digests == (state_digest(sam2_state),)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(
    sam2_folder: Path, sam2_state: State, dtype: torch.dtype
) -> None:
    narrow = {n: t.to(dtype) for n, t in sam2_state.items()}
    save_file(narrow, sam2_folder / "model.safetensors")
    _edit_config(sam2_folder, dtype=str(dtype).removeprefix("torch."))
    loaded = _load(sam2_folder)
    assert {t.dtype for t in loaded.model.state_dict().values()} == {torch.float32}
    wide = {n: t.float() for n, t in narrow.items()}
    assert loaded.digest == weights_digest(wide, meta_sam2.resolve)


def test_folder_of_the_image_model_has_no_memory(sam2_folder: Path, sam2_state: State) -> None:
    _edit_config(sam2_folder, model_type="sam2")
    image_part = {n: t for n, t in sam2_state.items() if "memory" not in n}
    save_file(image_part, sam2_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing tensors \(\d+\): 'no_memory_embedding'; "):
        _load(sam2_folder)


def test_image_configuration_with_all_weights_loads(tmp_path: Path) -> None:
    # Its memory settings are the official ones, so that only official shapes can be written so.
    data = architectures.sam2_config("tiny", newer=True, image_size=1024).to_dict()
    parts = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    data = {"model_type": "sam2"} | {part: data[part] for part in parts}
    data["prompt_encoder_config"]["model_type"] = "sam2_prompt_encoder"
    (tmp_path / "config.json").write_text(json.dumps(data))
    (tmp_path / "model.safetensors").write_bytes(b"")
    from recallseg.export.checkpoints import huggingface

    config = huggingface.read_sam2_config(tmp_path, image_size=512)
    official = architectures.sam2_config("tiny", newer=True, image_size=512)
    assert tensor_shapes(Sam2VideoModel, config) == tensor_shapes(Sam2VideoModel, official)
    assert architectures.sam2_name(config) == "sam2.1-hiera-tiny"


@pytest.mark.parametrize("swiglu", [False, True])
def test_older_dinov2_names_are_understood(tmp_path: Path, swiglu: bool) -> None:
    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=56,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )
    state = random_state(tensor_shapes(Dinov2Model, config), seed=1)
    config.save_pretrained(tmp_path)
    old: State = {}
    for name, tensor in state.items():
        for new, legacy in (
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("attention.o_proj", "attention.output.dense"),
            ("mlp.down_proj", "mlp.weights_out"),
            ("mlp.gate_proj", "mlp.weights_in"),
        ):
            name = name.replace(new, legacy)
        if "weights_in" in name:
            up = name.replace("weights_in", "up_proj")
            original = name.replace("weights_in", "gate_proj")
            tensor = torch.cat([state[original], state[up]])
        if "up_proj" not in name:
            old[name] = tensor
    assert any("attention.attention.query" in name for name in old)
    save_file(old, tmp_path / "model.safetensors")
    loaded = load_dinov2(str(tmp_path))
    assert loaded.former_digests == (state_digest(state), state_digest(old))


def test_model_card_tells_the_licence(sam2_folder: Path) -> None:
    card = sam2_folder / "README.md"
    card.write_text("---\nlibrary_name: transformers\nlicense: cc-by-nc-4.0\n---\nlicense: no\n")
    assert _load(sam2_folder).licence == "cc-by-nc-4.0"
    card.write_text("---\nlibrary_name: transformers\n---\nlicense: no\n")
    assert _load(sam2_folder).licence.startswith("Apache-2.0 (assumed")
    assert load_sam2(str(sam2_folder), image_size=256, licence="MIT").licence == "MIT"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "resnet"}, r"model_type 'resnet'; expected 'sam2_video' or 'sam2'"),
        ({"model_type": "dinov2"}, r"expected 'sam2_video'"),
        ({"model_type": ["sam2"]}, r"model_type \['sam2'\]; expected 'sam2_video'"),
        ({"model_type": {}}, r"model_type {}; expected 'sam2_video'"),
        ({"model_type": "sam2", "vision_config": [1]}, r"no usable configuration"),
        ({"model_type": "sam2", "vision_config": "x"}, r"no usable configuration"),
        ({"num_maskmem": "seven"}, r"no usable configuration"),
        ({"vision_config": None, "image_size": 512}, r"does not fit the model"),
        ({"mask_decoder_config": {"hidden_size": 33}}, r"no working model|does not fit the model"),
        ({"memory_attention_num_layers": 2}, r"missing tensors.*'memory_attention.layers.1"),
    ],
)
def test_configuration_that_is_wrong(
    sam2_folder: Path, changes: dict[str, Any], message: str
) -> None:
    _edit_config(sam2_folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        _load(sam2_folder)


def test_folder_that_is_incomplete_or_damaged(sam2_folder: Path) -> None:
    config, weights = sam2_folder / "config.json", sam2_folder / "model.safetensors"
    text, content = config.read_text(), weights.read_bytes()
    config.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        _load(sam2_folder)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        _load(sam2_folder)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        _load(sam2_folder)
    config.write_text(text)
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        _load(sam2_folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        _load(sam2_folder)


# --- strictness -----------------------------------------------------------------------------------


def test_missing_unexpected_and_misshapen_tensors_are_named(
    sam2_folder: Path, sam2_state: State
) -> None:
    state = dict(sam2_state)
    del state["memory_encoder.projection.bias"]
    state["memory_encoder.extra"] = torch.ones(1)
    state["no_memory_embedding"] = torch.ones(1, 1, 31)
    save_file(state, sam2_folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        _load(sam2_folder)
    message = str(caught.value)
    assert "missing tensors (1): 'memory_encoder.projection.bias'." in message
    assert "unexpected tensors (1): 'memory_encoder.extra'." in message
    assert "'no_memory_embedding' (1, 1, 31), expected (1, 1, 32)" in message


def test_long_lists_are_counted(sam2_folder: Path, sam2_state: State) -> None:
    state = sam2_state | {f"extra.{i}": torch.ones(1) for i in range(9)}
    save_file(state, sam2_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensors \(9\): .*'extra.3' and 5 more"):
        _load(sam2_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(
    sam2_folder: Path, sam2_state: State, value: float
) -> None:
    bad = sam2_state["object_pointer_proj.proj_in.weight"].clone()
    bad[3, 4] = value
    state = sam2_state | {"object_pointer_proj.proj_in.weight": bad}
    save_file(state, sam2_folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'object_pointer_proj.proj_in.weight' has 1 of 1024"
    ):
        _load(sam2_folder)


def test_value_that_overflows_float32_is_refused(sam2_folder: Path, sam2_state: State) -> None:
    state = sam2_state | {"no_memory_embedding": torch.full((1, 1, 32), 1e300, dtype=torch.float64)}
    save_file(state, sam2_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'no_memory_embedding' has 32 of 32"):
        _load(sam2_folder)


def test_integer_weights_are_refused(sam2_folder: Path, sam2_state: State) -> None:
    state = sam2_state | {"no_memory_embedding": torch.ones(1, 1, 32, dtype=torch.int8)}
    save_file(state, sam2_folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'no_memory_embedding' has dtype torch.int8"):
        _load(sam2_folder)


def test_what_cannot_be_a_file_is_none(sam2_folder: Path) -> None:
    (sam2_folder / "model.safetensors").unlink()
    index = sam2_folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        _load(sam2_folder)
    index.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        _load(sam2_folder)
