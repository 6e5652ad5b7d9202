"""Meta's DINOv2 files: which architecture, and which tensor is which.

The layout is that of ``dinov2/models/vision_transformer.py`` with unchunked blocks; the
``state_dict`` is the top level of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor
from transformers import Dinov2Config, Dinov2WithRegistersConfig

from recallseg.engines.errors import CheckpointError
from recallseg.export.checkpoints.architectures import (
    DINOV2,
    DINOV2_PATCH,
    Dinov2Architecture,
    dinov2_config,
)
from recallseg.export.checkpoints.strict import Piece, axes_of

__all__ = ["infer_config", "is_meta_dinov2", "resolve"]

_EMBEDDINGS: Mapping[str, str] = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}

_BLOCK: Mapping[str, tuple[str, int, int]] = {
    # The model's module: Meta's module, and which part of how many of its tensor.
    "norm1": ("norm1", 0, 1),
    "norm2": ("norm2", 0, 1),
    "attention.q_proj": ("attn.qkv", 0, 3),
    "attention.k_proj": ("attn.qkv", 1, 3),
    "attention.v_proj": ("attn.qkv", 2, 3),
    "attention.o_proj": ("attn.proj", 0, 1),
    "mlp.fc1": ("mlp.fc1", 0, 1),
    "mlp.fc2": ("mlp.fc2", 0, 1),
    "mlp.gate_proj": ("mlp.w12", 0, 2),
    "mlp.up_proj": ("mlp.w12", 1, 2),
    "mlp.down_proj": ("mlp.w3", 0, 1),
    # As transformers names them up to 5.17.
    "attention.attention.query": ("attn.qkv", 0, 3),
    "attention.attention.key": ("attn.qkv", 1, 3),
    "attention.attention.value": ("attn.qkv", 2, 3),
    "attention.output.dense": ("attn.proj", 0, 1),
    "mlp.weights_in": ("mlp.w12", 0, 1),
    "mlp.weights_out": ("mlp.w3", 0, 1),
}

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias|lambda1)")


def is_meta_dinov2(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the names are those of Meta's DINOv2 files."""
    return "pos_embed" in tensors and "patch_embed.proj.weight" in tensors


def infer_config(
    tensors: Mapping[str, Tensor], origin: str
) -> Dinov2Config | Dinov2WithRegistersConfig:
    """Recognise the architecture by its shapes and return its configuration.

    Raises
    ------
    CheckpointError
        When it is none of :data:`~.architectures.DINOV2`, has another patch size or a position
        embedding that is not square.
    """
    *_, height, breadth = axes_of(tensors, "patch_embed.proj.weight", 4, origin)
    _, positions, width = axes_of(tensors, "pos_embed", 3, origin)
    patch = [height, breadth]
    block = re.compile(r"blocks\.(\d{1,3})\.norm1\.weight")
    depth = 1 + max(
        (int(found[1]) for name in tensors if (found := block.fullmatch(name))), default=-1
    )
    found_architecture = Dinov2Architecture(width, depth, "blocks.0.mlp.w12.weight" in tensors)
    side = math.isqrt(max(positions - 1, 0))
    name = next((name for name, known in DINOV2.items() if known == found_architecture), None)
    if name is None or patch != [DINOV2_PATCH, DINOV2_PATCH] or side * side != positions - 1:
        raise CheckpointError(
            f"{origin} has {width} channels, {depth} blocks, patches of {patch} pixels and "
            f"{positions} positions, which is none of DINOv2's {', '.join(DINOV2)} with patches of "
            f"{DINOV2_PATCH}. Pass dinov2_vit{{s,b,l,g}}14[_reg4]_pretrain.pth, or a Hugging Face "
            "folder with a config.json."
        )
    registers = 0
    if "register_tokens" in tensors:
        _, registers, _ = axes_of(tensors, "register_tokens", 3, origin)
    return dinov2_config(name, registers=registers, image_size=side * DINOV2_PATCH)


def resolve(name: str, tensors: Mapping[str, Tensor]) -> Piece:
    """Say where the model's tensor ``name`` lies in one of Meta's files."""
    del tensors  # Meta's layout has one spelling.
    if name in _EMBEDDINGS:
        return Piece((_EMBEDDINGS[name],))
    if found := _LAYER.fullmatch(name):
        layer, module, leaf = found.groups()
        if leaf == "lambda1":
            return Piece((f"blocks.{layer}.{module.replace('layer_scale', 'ls')}.gamma",))
        if module in _BLOCK:
            source, part, parts = _BLOCK[module]
            return Piece((f"blocks.{layer}.{source}.{leaf}",), part, parts)
    raise CheckpointError(
        f"the installed transformers has a tensor '{name}' that Meta's DINOv2 files are not known "
        "to hold. Install a transformers version that RecallSeg's export extra asks for."
    )
