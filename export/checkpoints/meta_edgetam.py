"""Meta's EdgeTAM file (``edgetam.pt``): which configuration, and which tensor is which.

What is not told here lies as in SAM 2's files (:mod:`.meta_sam2`). The image encoder is ``timm``'s
RepViT under ``image_encoder.trunk.body``; the perceiver's keys and values are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import EdgeTamVideoConfig

from recallseg.engines.errors import CheckpointError
from recallseg.export.checkpoints import meta_sam2
from recallseg.export.checkpoints.architectures import edgetam_config
from recallseg.export.checkpoints.recognition import families_in
from recallseg.export.checkpoints.strict import Piece

__all__ = ["COUNTERS", "infer_config", "is_meta_edgetam", "resolve"]

COUNTERS = (".num_batches_tracked",)
"""Ends of names of what training counted and no model needs."""

_BACKBONE = ("vision_encoder.backbone.timm_model.", "image_encoder.trunk.body.")
_PERCEIVER = "spatial_perceiver."

_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS: Mapping[str, tuple[str, int, int]] = {
    # The model's module of a layer: Meta's, and which part of how many of its tensor.
    "layer_norm_input": ("attn.norm_x", 0, 1),
    "layer_norm_latents": ("attn.norm_latents", 0, 1),
    "layer_norm_self": ("self_attn.norm", 0, 1),
    **{
        f"{ours}.{part}": (f"{theirs}.{name}", index, parts)
        for ours, theirs in (("cross_attention", "attn"), ("self_attention", "self_attn"))
        for part, name, index, parts in (
            ("q_proj", "to_q", 0, 1),
            ("k_proj", "to_kv", 0, 2),
            ("v_proj", "to_kv", 1, 2),
            ("o_proj", "to_out", 0, 1),
        )
    },
    **{
        f"{ours}.{part}": (f"{theirs}.{number}", 0, 1)
        for ours, theirs in (("mlp", "ff"), ("self_mlp", "self_ff"))
        for part, number in (("layer_norm", 0), ("up_proj", 1), ("down_proj", 3))
    },
}
_WHOLE: Mapping[str, str] = {
    "latents_1d": "latents",
    "latents_2d": "latents_2d",
    "layer_norm.weight": "norm.weight",
    "layer_norm.bias": "norm.bias",
}
_INNER = ((".mlp.up_proj.", ".linear1."), (".mlp.down_proj.", ".linear2."))


def is_meta_edgetam(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the names are those of Meta's EdgeTAM file."""
    return families_in(tensors) == ("EdgeTAM",)


def infer_config(
    tensors: Mapping[str, Tensor], origin: str, *, image_size: int
) -> EdgeTamVideoConfig:
    """Return the configuration of a file.

    There is one architecture; the published weights have neither times of pointers nor an embedding
    of absent structures, which ``transformers``' default configuration turns on.
    """
    del origin  # strict loading names what does not fit
    return edgetam_config(
        image_size=image_size,
        occlusion=meta_sam2.OCCLUSION in tensors,
        pointer_time=meta_sam2.POINTER_TIME in tensors,
    )


def resolve(name: str, tensors: Mapping[str, Tensor]) -> Piece:
    """Say where the model's tensor ``name`` lies in Meta's file."""
    ours, theirs = _BACKBONE
    if name.startswith(ours):
        return Piece((theirs + name[len(ours) :],))
    if name.startswith(_PERCEIVER):
        rest = name[len(_PERCEIVER) :]
        if rest in _WHOLE:
            return Piece((_PERCEIVER + _WHOLE[rest],))
        if (found := _LAYER.fullmatch(rest)) and found[2] in _PARTS:
            source, part, parts = _PARTS[found[2]]
            return Piece((f"{_PERCEIVER}layers.{found[1]}.{source}.{found[3]}",), part, parts)
        raise CheckpointError(
            f"the installed transformers has a tensor '{name}' that Meta's EdgeTAM file is not "
            "known to hold. Install a transformers version that RecallSeg's export extra asks for."
        )
    if name.startswith("memory_attention."):
        for ours, theirs in _INNER:
            name = name.replace(ours, theirs)
    return meta_sam2.resolve(name, tensors)
