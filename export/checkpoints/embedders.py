"""Embedders from Hugging Face folders, whichever model of ``transformers`` they hold, and DINOv3.

The folder says all: ``config.json`` what the model is, ``preprocessor_config.json`` how its images
are made. ``transformers`` loads the weights, since only it knows how names changed between its
versions; that every tensor of the image tower came from the file is checked afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, DINOv3ConvNextConfig, DINOv3ViTConfig

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import CheckpointError
from recallseg.engines.reading import reason
from recallseg.export.checkpoints import huggingface
from recallseg.export.checkpoints.digest import state_digest
from recallseg.export.checkpoints.random_weights import random_state
from recallseg.export.checkpoints.sources import Loaded
from recallseg.export.checkpoints.strict import instantiate, tensor_shapes
from recallseg.export.families.base import IMAGENET
from recallseg.export.families.embedders import pooled

__all__ = ["DINOV3", "load_folder", "load_random_dinov3"]

GATED = "DINOv3 License (Meta's own; its files are gated: accept it on the hub)"
UNSTATED = "not stated in the folder: see the model's card"


@dataclass(frozen=True)
class _Vit:
    width: int
    depth: int
    inner: int
    gated: bool = False


DINOV3: Mapping[str, DINOv3ViTConfig | DINOv3ConvNextConfig] = {
    **{
        f"dinov3-{name}": DINOv3ViTConfig(
            hidden_size=vit.width,
            num_hidden_layers=vit.depth,
            num_attention_heads=vit.width // 64,
            intermediate_size=vit.inner,
            use_gated_mlp=vit.gated,
            hidden_act="silu" if vit.gated else "gelu",
            num_register_tokens=4,
        )
        for name, vit in {
            "small": _Vit(384, 12, 1536),
            "small-plus": _Vit(384, 12, 1536, gated=True),
            "base": _Vit(768, 12, 3072),
            "large": _Vit(1024, 24, 4096),
        }.items()
    },
    **{
        f"dinov3-convnext-{name}": DINOv3ConvNextConfig(hidden_sizes=widths, depths=depths)
        for name, widths, depths in (
            ("tiny", [96, 192, 384, 768], [3, 3, 9, 3]),
            ("small", [96, 192, 384, 768], [3, 3, 27, 3]),
            ("base", [128, 256, 512, 1024], [3, 3, 27, 3]),
            ("large", [192, 384, 768, 1536], [3, 3, 27, 3]),
        )
    },
}
"""Architectures of DINOv3 (Siméoni et al., arXiv 2508.10104) that can have random weights."""


def load_random_dinov3(name: str, seed: int) -> Loaded:
    """Return a DINOv3 of random weights; ``name`` is a key of :data:`DINOV3`."""
    config = DINOV3[name]
    model_class: Any = AutoModel._model_mapping[type(config)]
    state = random_state(tensor_shapes(model_class, config), seed)
    model = instantiate(model_class, config, state)
    how = f"random weights (seed {seed}): no useful masks come from them"
    return Loaded(model, name, "random", state_digest(state), (), "Apache-2.0", how)


def load_folder(path: Path, licence: str | None) -> Loaded:
    """Load the image tower of a folder.

    Raises
    ------
    CheckpointError
        If files are missing, a tensor does not come from them, or the model has no pooled output.
    """
    kind = str(huggingface.read_json(path / "config.json").get("model_type"))
    tensors = huggingface.read_weights(path)
    normalisation, size = _preprocessing(path, kind)
    model = _image_tower(path)
    try:
        with torch.inference_mode():
            vector = pooled(model, torch.zeros(1, 3, size, size))
    # A model that is no embedder of images can fail in any way.
    except Exception as error:
        raise CheckpointError(
            f"'{path}' holds a model of type '{kind}' that makes no vector of an image of {size} "
            f"px: {error}. An embedder takes pixel_values and gives a pooler_output."
        ) from error
    if not bool(torch.isfinite(vector).all()):
        raise CheckpointError(
            f"'{path}' makes a vector of NaN or infinite numbers: the file is damaged, or its "
            "training diverged. Get it again."
        )
    model.recallseg_size = size
    state = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    stated = licence or huggingface.read_licence(path)
    return Loaded(
        model,
        f"{kind}-{vector.shape[1]}",
        "pretrained",
        state_digest(state),
        (),
        stated or (GATED if kind.startswith("dinov3") else UNSTATED),
        f"Hugging Face folder '{path.resolve().name}' of type {kind}",
        normalisation=normalisation,
    )


def _image_tower(path: Path) -> Any:
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        model, found = AutoModel.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    # transformers has no one class of error for what it cannot load.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"'{path}' cannot be loaded by transformers ({type(error).__name__}: {reason}). Pass a "
            "folder that AutoModel reads without code of its own."
        ) from error
    tower = getattr(model, "vision_model", model)
    prefix = "vision_model." if tower is not model else ""
    missing = sorted(name for name in found["missing_keys"] if name.startswith(prefix))
    wrong = sorted(str(name[0]) for name in found["mismatched_keys"])
    if missing or wrong:
        named = ", ".join(repr(name) for name in (*missing, *wrong)[:4])
        raise CheckpointError(
            f"'{path}' lacks {len(missing) + len(wrong)} of its model's tensors, which would be "
            f"random: {named}. Weights of a classifier often have no pooling layer; pass the base "
            "model's folder."
        )
    return tower.eval()


def _preprocessing(path: Path, kind: str) -> tuple[Normalisation, int]:
    """Return normalisation and side in pixels; DINOv3's are known, others must be told."""
    file = path / "preprocessor_config.json"
    if not file.is_file():
        if kind.startswith("dinov3"):
            return IMAGENET, 224
        raise CheckpointError(
            f"'{path}' has no preprocessor_config.json, which says how images of this model are "
            "normalised and how large they are. Download the folder as a whole."
        )
    data = huggingface.read_json(file)
    try:
        mean, std = (tuple(map(float, data[name])) for name in ("image_mean", "image_std"))
        size = data.get("crop_size") or data["size"]
        side = size if isinstance(size, int) else size.get("height", size.get("shortest_edge"))
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0 or type(side) is not int or side <= 0:
            raise ValueError(json.dumps({"mean": mean, "std": std, "size": size}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"'{file}' does not say image_mean, image_std and size as expected ({reason(error)})."
        ) from error
    return Normalisation((mean[0], mean[1], mean[2]), (std[0], std[1], std[2])), side
