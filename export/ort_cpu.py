"""The ``ort-cpu`` variant: the same five graphs in the form that ONNX Runtime's CPU kernels like.

Four steps, all exact up to the order of summation:

- every attention becomes ONNX Runtime's fused ``MultiHeadAttention``, which never writes the scores
  to memory;
- Hiera's joint projection to queries, keys and values becomes three, so that nothing is split;
  other encoders are rewritten by :mod:`.families.convolutions`;
- rotary encoding becomes its ``RotaryEmbedding``, one pass instead of five;
- memory attention's cross-attention has one head, and values that are an affine map of 64-wide
  memory tokens m. Since the rows of P sum to 1, P (m W + b) = (P m) W + b: attend over the tokens
  themselves and fold W into the output projection. That saves the value projection of every
  recalled token, and three quarters of the second product.

What does not depend on the memories (the first self-attention and the first query) is computed once
for all structures. Outside of an export, the same functions compute the same in PyTorch.

One approximation is offered beside them, as a precision of its own called ``pooled``: memory
tokens are averaged over 2x2 places before cross-attention, as EfficientTAM does (Xiong et al.,
arXiv 2411.18933), neighbouring tokens being alike. A quarter of the keys is left. Each stands for
four, which adds log 4 to its score; object pointers stay as they are.
"""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recallseg.engines.errors import ExportError
from recallseg.export.attention import register_attention, use_attention
from recallseg.export.families import Embedder, Segmenter, segmenter_family
from recallseg.export.families.convolutions import RowEncode
from recallseg.export.fused import attend_fused, rotate
from recallseg.export.graphs import Attend, Encode, build_graphs

__all__ = ["GRAPHS", "OPSET", "POOL", "build_ort_cpu_graphs", "fused_attention"]

GRAPHS = ("embed", "encode", "attend")
"""Where attention takes the time; for the other two, engines take the portable graph."""

OPSET = 20
"""The first with ``Gelu`` as one operator."""

POOL = 2
"""Side in tokens of the places that ``pooled`` averages over."""

_NAME = "recallseg_ort_cpu"


def _attention_of_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Adapt BxHxSxD tensors to the fused operator; the signature is that of ``transformers``."""
    if attention_mask is not None:
        raise ExportError(f"{type(module).__name__} passes an attention mask; none is expected.")
    heads, width = query.shape[1], query.shape[3]
    out = attend_fused(
        *(x.transpose(1, 2).flatten(2) for x in (query, key, value)),
        heads=heads,
        scale=width**-0.5 if scaling is None else scaling,
    )
    return out.unflatten(-1, (heads, -1)), None


register_attention(_NAME, _attention_of_transformers)


def fused_attention(*models: PreTrainedModel) -> AbstractContextManager[None]:
    """Let these models call the fused operator while the context lasts."""
    return use_attention(_NAME, *models)


class _SeparateAttention(nn.Module):
    """Attention of a Hiera block, with a projection each for queries, keys and values.

    Follows ``Sam2MultiScaleAttention`` of ``transformers``, whose joint projection has its rows in
    this order.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        joint = attention.qkv
        self.parts = nn.ModuleList()
        for weight, bias in zip(joint.weight.chunk(3), joint.bias.chunk(3), strict=True):
            part = nn.Linear(joint.in_features, len(weight))
            with torch.no_grad():
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            self.parts.append(part.requires_grad_(False))
        self.output = attention.proj
        self.heads, self.scale = attention.num_attention_heads, float(attention.scale)
        self.stride = attention.query_stride

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Windows BxHxWxC -> BxH'xW'xC', half as large where the query is pooled."""
        size = hidden_states.shape[1:3]
        query, key, value = (part(hidden_states.flatten(1, 2)) for part in self.parts)
        if self.stride:
            image = query.unflatten(1, size).permute(0, 3, 1, 2)
            image = nn.functional.max_pool2d(image, self.stride, self.stride)
            size = image.shape[2:]
            query = image.flatten(2).transpose(1, 2)
        found = attend_fused(query, key, value, heads=self.heads, scale=self.scale)
        out: Tensor = self.output(found).unflatten(1, size)
        return out


def _separate_projections(encode: Encode) -> Encode:
    """Return a copy whose attention needs no split; the original stays as it is."""
    copied = copy.deepcopy(encode)
    vision: Any = copied.vision_encoder
    for block in vision.backbone.blocks:
        block.attn = _SeparateAttention(block.attn)
    return copied


class _Cross(nn.Module):
    """One cross-attention over raw memory tokens, its values folded into its output."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.cross_attn_image
        self.norm = layer.layer_norm2
        self.query, self.key = attention.q_proj, attention.k_proj
        self.scale = float(attention.scaling)
        out, value = attention.o_proj, attention.v_proj
        folded = nn.Linear(value.in_features, out.out_features)
        with torch.no_grad():
            folded.weight.copy_(out.weight.double() @ value.weight.double())
            folded.bias.copy_(out.weight.double() @ value.bias.double() + out.bias.double())
        self.output = folded.requires_grad_(False)


class FoldedAttend(nn.Module):
    """:class:`recallseg.export.graphs.Attend`, rearranged as this module's docstring says.

    Parameters
    ----------
    attend : what to rearrange.
    pool : side in tokens of the places whose memory tokens are averaged; 1 leaves them alone.
    """

    cos: Tensor
    sin: Tensor
    key_cos: Tensor
    key_sin: Tensor
    position: Tensor
    offset: Tensor

    def __init__(self, attend: Attend, pool: int = 1) -> None:
        super().__init__()
        attention: Any = attend.memory_attention
        if pool > 1 and attend.memory_position.shape[1] != len(attend.cos):
            raise ExportError(
                f"memories of {attend.family.title} are latents, few already and with no places to "
                "average over: precision 'pooled' is for SAM 2."
            )
        if int(attend.memory_position.shape[1]) % pool**2:
            raise ExportError(
                f"memories of {attend.memory_position.shape[1]} tokens cannot be pooled by {pool}: "
                "choose an image size whose feature map has an even side."
            )
        if attention.config.memory_attention_num_attention_heads != 1:
            raise ExportError(
                "the ort-cpu variant needs memory attention with one head, as every SAM 2 has; "
                f"this one has {attention.config.memory_attention_num_attention_heads}. Export "
                "the portable variant only."
            )
        self.attend = attend
        self.pool = pool
        self.layers = attention.layers
        self.cross = nn.ModuleList(_Cross(layer) for layer in attention.layers)
        self.norm = attention.layer_norm
        with torch.no_grad():
            position = attend.memory_position + attend.temporal[-1]
        cos, sin = attend.cos, attend.sin
        self.side = math.isqrt(len(cos))
        # Angles grow linearly along both axes: the direction of the mean is that of the middle.
        tables_of_keys = (attend.key_cos, attend.key_sin)
        key_cos, key_sin = (self._pooled(table[None])[0] for table in tables_of_keys)
        length = torch.hypot(key_cos, key_sin)
        tables = {"cos": cos, "sin": sin, "key_cos": key_cos / length, "key_sin": key_sin / length}
        for name, table in tables.items():
            self.register_buffer(name, table.contiguous(), persistent=False)
        position = self._pooled(position.detach())
        self.register_buffer("position", position.clone(), persistent=False)
        offset = 0.1 * attend.image_position.transpose(0, 1)
        self.register_buffer("offset", offset.clone(), persistent=False)

    def forward(
        self,
        features: Tensor,
        memories: Tensor,
        pointers: Tensor | None = None,
        pointer_time: Tensor | None = None,
    ) -> Tensor:
        n, k, _, width = memories.shape
        # One row per exemplar: the operator's table ends after one feature map.
        rows = self._pooled(memories.flatten(0, 1))
        tokens = rows.shape[1]
        values = rows.reshape(n, k * tokens, width)
        keys = rows + self.position
        pointer_keys = None
        if self.attend.object_pointers and pointers is not None and pointer_time is not None:
            vectors, times = self.attend.pointer_tokens(pointers, pointer_time)
            values = torch.cat([values, vectors], dim=1)
            pointer_keys = vectors + times

        x = features.flatten(2).transpose(1, 2) + self.offset
        cross: Any  # registered modules are typed as modules, without their attributes
        for index, (layer, cross) in enumerate(zip(self.layers, self.cross, strict=True)):
            x = x + self._self_attention(layer, layer.layer_norm1(x))
            query = self._rotate(cross.query(cross.norm(x)))
            if index == 0:  # until here nothing depended on the memories
                x, query = x.expand(n, -1, -1), query.expand(n, -1, -1)
            key = rotate(cross.key(keys), self._places(keys), self.key_cos, self.key_sin)
            key = key.reshape(n, k * tokens, -1)
            if pointer_keys is not None:
                other = cross.key(pointer_keys)
                if self.pool > 1:
                    query, key, other = _weigh(query, key, other, self.pool**2, cross.scale)
                key = torch.cat([key, other], dim=1)
            found = attend_fused(query, key, values, heads=1, scale=cross.scale)
            x = x + cross.output(found)
            first, activation, second = self.attend.family.inner_layers(layer)
            x = x + second(activation(first(layer.layer_norm3(x))))
        out: Tensor = self.norm(x).transpose(1, 2).unflatten(-1, features.shape[-2:])
        return out

    def _self_attention(self, layer: Any, x: Tensor) -> Tensor:
        attention = layer.self_attn
        out: Tensor = attention.o_proj(
            attend_fused(
                self._rotate(attention.q_proj(x)),
                self._rotate(attention.k_proj(x)),
                attention.v_proj(x),
                heads=1,
                scale=float(attention.scaling),
            )
        )
        return out

    def _rotate(self, x: Tensor) -> Tensor:
        return rotate(x, self._places(x), self.cos, self.sin)

    def _places(self, x: Tensor) -> Tensor:
        """Numbers 0, 1, ... of the tokens of BxLxD: BxL."""
        return torch.arange(x.shape[1])[None].expand(x.shape[0], -1)

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Average tokens BxTxD of the feature map over places of ``pool`` x ``pool``."""
        if self.pool == 1:
            return tokens
        side, pool = self.side // self.pool, self.pool
        grid = tokens.reshape(tokens.shape[0], side, pool, side, pool, tokens.shape[2])
        return grid.mean(dim=(2, 4)).flatten(1, 2)


def _weigh(
    query: Tensor, key: Tensor, other: Tensor, count: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Let every ``key`` count ``count`` times beside ``other``: log(count) on its scores.

    The fused operator takes no bias without writing all scores to memory, so the constant comes in
    by one more channel.
    """
    weight = torch.full_like(key[..., :1], math.log(count) / scale)
    return (
        torch.cat([query, torch.ones_like(query[..., :1])], dim=-1),
        torch.cat([key, weight], dim=-1),
        torch.cat([other, torch.zeros_like(other[..., :1])], dim=-1),
    )


def build_ort_cpu_graphs(
    sam2: Segmenter,
    dinov2: Embedder,
    *,
    object_pointers: bool = True,
    pool: int = 1,
) -> dict[str, nn.Module]:
    """Return this variant's modules by graph name; export them within :func:`fused_attention`.

    Parameters
    ----------
    sam2, dinov2 : the models; they stay as they are.
    object_pointers : whether memory attention takes SAM 2's object pointers too.
    pool : see :class:`FoldedAttend`; above 1, ``attend`` is the only graph that differs.

    Raises
    ------
    ExportError
        If memory attention has more than one head, or the feature map cannot be pooled.
    """
    modules = build_graphs(sam2, dinov2, object_pointers=object_pointers)
    attend, encode = modules["attend"], modules["encode"]
    if not isinstance(attend, Attend) or not isinstance(encode, Encode):  # for the type checker
        raise TypeError(f"{type(attend)}, {type(encode)}")
    folded = FoldedAttend(attend, pool).eval()
    if pool > 1:
        return {"attend": folded}
    hiera = segmenter_family(sam2).has_hiera
    return {
        "embed": modules["embed"],
        "encode": (_separate_projections(encode) if hiera else RowEncode(encode)).eval(),
        "attend": folded,
    }
