"""EdgeTAM: RepViT for an encoder, and memories of a few latents instead of a whole map.

A *spatial perceiver* (Zhou et al., arXiv 2501.07256, section 3.2) asks the memory encoder's map for
256 latents of the whole and 256 of one window each. Memory attention turns only the latter, on
their own grid of 16x16 places, and has two layers instead of four. The mask decoder and the prompt
encoder are SAM 2's.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EdgeTamVideoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.edgetam_video.modeling_edgetam_video import EdgeTamVideoInferenceSession

from recallseg.engines.errors import ExportError
from recallseg.export.families.base import IMAGENET, ImageSizes, SegmenterFamily
from recallseg.export.families.repvit import RepVit, fused
from recallseg.export.families.rotation import rotation

__all__ = ["EDGETAM_FAMILY", "FusedVision", "LatentAttention"]


class FusedVision(nn.Module):
    """``EdgeTamVisionModel`` with RepViT's branches fused, on maps that stay channels first."""

    def __init__(self, vision: Any) -> None:
        super().__init__()
        backbone = RepVit(vision.backbone.config)
        backbone.load_state_dict(vision.backbone.timm_model.state_dict())
        self.backbone = fused(backbone).eval()
        self.convs = vision.neck.convs
        self.top_down = tuple(vision.neck.fpn_top_down_levels)
        self.levels = int(vision.num_feature_levels)

    def forward(self, image: Tensor) -> SimpleNamespace:
        maps = self.backbone(image)
        last = len(maps) - 1
        made: list[Tensor] = []
        for level in range(last, -1, -1):
            x = self.convs[last - level](maps[level])
            if level in self.top_down and level < last:
                x = x + nn.functional.interpolate(made[0], scale_factor=2.0, mode="nearest")
            made.insert(0, x)
        return SimpleNamespace(fpn_hidden_states=tuple(made[: self.levels]))


class _Perceiver(nn.Module):
    """The spatial perceiver: a map nx64xhxw -> latents nxTx64, those of the whole map first."""

    position: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.perceiver = model.spatial_perceiver
        self.side = math.isqrt(self.perceiver.num_latents_2d)
        h, w = model.backbone_feature_sizes[-1]
        if h % self.side or w != h:
            raise ExportError(f"a map of {h}x{w} places has no {self.side}x{self.side} windows.")
        shape = (1, model.mem_dim, h, w)
        position = model.memory_encoder.position_encoding(shape, "cpu", torch.float32)
        self.register_buffer("position", position.flatten(2).transpose(1, 2), persistent=False)

    def forward(self, memory: Tensor) -> Tensor:
        n, width = memory.shape[:2]
        side, window = self.side, memory.shape[2] // self.side
        places = memory.flatten(2).transpose(1, 2)
        whole = self.perceiver.latents_1d[None].expand(n, -1, -1)
        for layer in self.perceiver.layers:
            whole = layer(whole, places, self.position.expand(n, -1, -1))
        # One latent for each window, and each a batch entry of its own.
        windows = memory.reshape(n, width, side, window, side, window)
        windows = windows.permute(0, 2, 4, 3, 5, 1).reshape(n * side**2, window**2, width)
        each = self.perceiver.latents_2d[None].expand(n, -1, -1).reshape(n * side**2, 1, width)
        for layer in self.perceiver.layers:
            each = layer(each, windows)
        out: Tensor = self.perceiver.layer_norm(
            torch.cat([whole, each.reshape(n, side**2, width)], dim=1)
        )
        return out


def _memory_shape(model: Any) -> tuple[int, tuple[int, int]]:
    perceiver = model.spatial_perceiver
    side = math.isqrt(perceiver.num_latents_2d)
    grid = tuple(model.config.memory_attention_rope_k_sizes)
    if side**2 != perceiver.num_latents_2d or grid != (side, side):
        raise ExportError(
            f"{perceiver.num_latents_2d} latents of windows on a rotary grid of {list(grid)}: "
            "every published EdgeTAM has 256 on 16x16."
        )
    return perceiver.num_latents_1d + perceiver.num_latents_2d, (side, side)


def _memory_position(model: Any) -> Tensor:
    """Zeros for latents of the whole map, sines of the grid for those of a window."""
    perceiver = model.spatial_perceiver
    _, (rows, columns) = _memory_shape(model)
    shape = (1, model.mem_dim, rows, columns)
    grid: Tensor = perceiver.positional_encoding(shape, "cpu", torch.float32)
    grid = grid.flatten(2).transpose(1, 2)
    return torch.cat([grid.new_zeros(1, perceiver.num_latents_1d, grid.shape[2]), grid], dim=1)


def _key_rotation(model: Any) -> tuple[Tensor, Tensor]:
    """No turn for latents of the whole map."""
    attention = model.memory_attention
    cos, sin = rotation(attention, attention.position_ids_k)
    before = (model.spatial_perceiver.num_latents_1d, cos.shape[1])
    return torch.cat([cos.new_ones(before), cos]), torch.cat([sin.new_zeros(before), sin])


class LatentAttention(nn.Module):
    """``EdgeTamVideoMemoryAttention`` for any number of memories.

    ``transformers``' own regroups keys by a number of memories that must be a constant of the
    graph; here every memory is turned by one table that knows which of its tokens have a place.
    """

    key_cos: Tensor
    key_sin: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        attention = model.memory_attention
        self.config = attention.config
        self.layers, self.layer_norm = attention.layers, attention.layer_norm
        self.rotary_emb = attention.rotary_emb
        self.position_ids = attention.position_ids
        cos, sin = rotation(attention, attention.position_ids)
        tables = dict(zip(("key_cos", "key_sin"), _key_rotation(model), strict=True))
        for name, table in {"cos": cos, "sin": sin, **tables}.items():
            self.register_buffer(name, table, persistent=False)

    def forward(
        self,
        current_vision_features: Tensor,
        current_vision_position_embeddings: Tensor,
        memory: Tensor,
        memory_posision_embeddings: Tensor,
        num_object_pointer_tokens: int,
    ) -> Tensor:
        """Lengths first, as the model's own: (hw)xnxC and Lxnx64 -> 1xnx(hw)xC."""
        x = current_vision_features + 0.1 * current_vision_position_embeddings
        x = x.transpose(0, 1)
        values = memory.transpose(0, 1)
        keys = values + memory_posision_embeddings.transpose(0, 1)
        turned = values.shape[1] - num_object_pointer_tokens
        for layer in self.layers:
            own, cross = layer.self_attn, layer.cross_attn_image
            normed = layer.layer_norm1(x)
            query, key = (_turn(p(normed), self.cos, self.sin) for p in (own.q_proj, own.k_proj))
            x = x + own.o_proj(_attend(own, query, key, own.v_proj(normed)))
            query = _turn(cross.q_proj(layer.layer_norm2(x)), self.cos, self.sin)
            key = cross.k_proj(keys)
            each = key[:, :turned].unflatten(1, (-1, self.key_cos.shape[0]))
            each = _turn(each, self.key_cos, self.key_sin).flatten(1, 2)
            key = torch.cat([each, key[:, turned:]], dim=1)
            x = x + cross.o_proj(_attend(cross, query, key, cross.v_proj(values)))
            x = x + layer.mlp(layer.layer_norm3(x))
        out: Tensor = self.layer_norm(x)[None]
        return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels of ...xPxD by tables Px(D/2)."""
    pairs = x.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention with one head, by the function in use (:mod:`recallseg.export.attention`)."""
    if attention.num_attention_heads != 1:
        raise ExportError("EdgeTAM's memory attention has one head.")
    function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation or "sdpa"]
    out: Tensor = function(
        attention,
        query[:, None],
        key[:, None],
        value[:, None],
        attention_mask=None,
        dropout=0.0,
        scaling=attention.scaling,
        is_causal=False,
    )[0]
    return out[:, :, 0]


EDGETAM_FAMILY = SegmenterFamily(
    name="edgetam",
    title="EdgeTAM",
    model_class=EdgeTamVideoModel,
    session_class=EdgeTamVideoInferenceSession,
    sizes=ImageSizes(
        256,
        256,
        (256, 512, 768, 1024),
        "its perceiver cuts the map at stride 16 into 16x16 windows of equal size",
    ),
    normalisation=IMAGENET,
    rounds_memories=False,
    has_hiera=False,
    vision_encoder=lambda model: FusedVision(model.vision_encoder),
    to_tokens=_Perceiver,
    memory_shape=_memory_shape,
    memory_position=_memory_position,
    memory_attention=LatentAttention,
    key_rotation=_key_rotation,
    inner_layers=lambda layer: (layer.mlp.up_proj, layer.mlp.act_fn, layer.mlp.down_proj),
    step_options={"run_mem_encoder": False},
)
