"""``embed``: DINOv2 with its layer scale folded, and only the class token behind the last layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Dinov2Model, Dinov2WithRegistersModel

from recallseg.engines.errors import ExportError
from recallseg.export.fused import skip_norm
from recallseg.export.ort_cuda.parts import Patches, SelfAttention, TwoLayers, constant

__all__ = ["CudaEmbed"]


class _Layer(nn.Module):
    """One layer of DINOv2, from the normalised rows on; it normalises for the next one."""

    attention_bias: Tensor
    bias: Tensor

    def __init__(self, layer: Any, following: nn.LayerNorm) -> None:
        super().__init__()
        attention = layer.attention
        query, key, value, out = _projections(attention)
        scale = layer.layer_scale1.lambda1.detach()
        scaled = nn.Linear(out.in_features, out.out_features)
        with torch.no_grad():
            scaled.weight.copy_(out.weight * scale[:, None])
            scaled.bias.copy_(out.bias * scale)
        heads = int(_heads(attention))
        self.attention = SelfAttention(
            (query.weight, _bias(query)),
            (key.weight, _bias(key)),
            (value.weight, _bias(value)),
            scaled,
            heads,
            (query.out_features // heads) ** -0.5,
        )
        constant(self, "attention_bias", self.attention.bias)
        if not hasattr(layer.mlp, "fc1"):
            raise ExportError(
                "the ort-cuda variant has no form of DINOv2's gated layers (giant); export the "
                "portable and the ort-cpu variant only."
            )
        self.layers = TwoLayers(layer.mlp.fc1, layer.mlp.fc2, layer.layer_scale2.lambda1)
        constant(self, "bias", self.layers.bias)
        self.norm, self.following = layer.norm2, following

    def forward(self, normed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        normed, x = skip_norm(self.attention(normed), x, self.norm, self.attention_bias)
        return skip_norm(self.layers(normed), x, self.following, self.bias)


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias


def _projections(attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """Queries', keys', values' and output's; transformers has moved them about."""
    if hasattr(attention, "q_proj"):
        return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    inner = attention.attention
    return inner.query, inner.key, inner.value, attention.output.dense


def _heads(attention: Any) -> int:
    found = attention if hasattr(attention, "num_attention_heads") else attention.attention
    return int(found.num_attention_heads)


class CudaEmbed(nn.Module):
    """:class:`recallseg.export.graphs.Embed` for one image, as this package's docstring says."""

    def __init__(self, dinov2: Dinov2Model | Dinov2WithRegistersModel) -> None:
        super().__init__()
        embeddings: Any = dinov2.embeddings
        layers = list(_layers(dinov2))
        convolution = embeddings.patch_embeddings.projection
        position = embeddings.position_embeddings.detach()[0]
        side = round(len(position) ** 0.5)
        if side * side + 1 != len(position):
            raise ExportError(f"{len(position)} positions are no square and a class token.")
        before = [embeddings.cls_token.detach()[0] + position[:1]]
        if hasattr(embeddings, "register_tokens"):
            before.append(embeddings.register_tokens.detach()[0])
        # Rows that see nothing of the image, and then those of its patches.
        count = sum(map(len, before))
        token = np.concatenate([np.full(count, -1), np.arange(side * side)])
        self.patches = Patches(convolution, side, token, torch.cat([*before, position[1:]]))
        self.norm = layers[0].norm1
        norms = [layer.norm1 for layer in layers[1:]] + [dinov2.layernorm]
        self.layers = nn.ModuleList(map(_Layer, layers, norms))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        normed = self.norm(x)
        for layer in self.layers:
            normed, x = layer(normed, x)
        return nn.functional.normalize(normed[:1], dim=-1)


def _layers(dinov2: Any) -> Any:
    """The model's layers; transformers has moved them about."""
    return dinov2.encoder.layer if hasattr(dinov2, "encoder") else dinov2.layer
