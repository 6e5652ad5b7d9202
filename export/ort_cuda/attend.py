"""``attend``: memory attention whose tokens are projected and rotated where they lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recallseg.engines.errors import ExportError
from recallseg.export.fused import attend_fused, rotate, skip_norm
from recallseg.export.graphs import Attend
from recallseg.export.ort_cuda.parts import Product, constant, folded

__all__ = ["CudaAttend"]


class _Layer(nn.Module):
    """One layer of memory attention, from the normalised tokens on; it normalises for the next.

    Values are as wide as keys: what attends over the raw 64-wide tokens instead (as ``ort-cpu``
    does) saves a small product, but is wrong in fp32 and keeps ONNX Runtime from its fast kernels.
    """

    self_bias: Tensor
    cross_bias: Tensor
    bias: Tensor

    def __init__(self, layer: Any, inner: Any, following: nn.LayerNorm) -> None:
        super().__init__()
        own, cross = layer.self_attn, layer.cross_attn_image
        self.queries = nn.ModuleList(Product(a.q_proj.weight, a.q_proj.bias) for a in (own, cross))
        # A rotated bias differs from key to key: these stay.
        self.keys = nn.ModuleList(Product(a.k_proj.weight, a.k_proj.bias) for a in (own, cross))
        self.values = nn.ModuleList(Product(a.v_proj.weight) for a in (own, cross))
        self.outs = nn.ModuleList(Product(a.o_proj.weight) for a in (own, cross))
        constant(self, "self_bias", folded(own.v_proj.bias, own.o_proj))
        constant(self, "cross_bias", folded(cross.v_proj.bias, cross.o_proj))
        self.scales = float(own.scaling), float(cross.scaling)
        first, self.activation, second = inner
        self.first = Product(first.weight, first.bias)
        self.second = Product(second.weight)
        constant(self, "bias", second.bias)
        self.norm2, self.norm3, self.following = layer.layer_norm2, layer.layer_norm3, following

    def forward(
        self,
        normed: Tensor,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        turn: tuple[Tensor, Tensor],
        key_turn: tuple[Tensor, Tensor],
        shape: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        n, k = shape
        found = attend_fused(
            _rotated(self.queries[0](normed), *turn),
            _rotated(self.keys[0](normed), *turn),
            self.values[0](normed),
            heads=1,
            scale=self.scales[0],
        )
        normed, x = skip_norm(self.outs[0](found), x, self.norm2, self.self_bias)
        query = _rotated(self.queries[1](normed), *turn)
        if query.shape[0] == 1:  # the first layer: until here nothing depended on the memories
            query = query.expand(n, -1, -1)
        key = _rotated(self.keys[1](keys), *key_turn)
        value = self.values[1](values)
        found = attend_fused(
            query,
            key.reshape(n, k * keys.shape[1], -1),
            value.reshape(n, k * keys.shape[1], -1),
            heads=1,
            scale=self.scales[1],
        )
        normed, x = skip_norm(self.outs[1](found), x, self.norm3, self.cross_bias)
        out = self.second(self.activation(self.first(normed)))
        return skip_norm(out, x, self.following, self.bias)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate tokens BxLxD, the first at the first angle and so on."""
    places = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
    return rotate(x, places, cos, sin)


class CudaAttend(nn.Module):
    """:class:`recallseg.export.graphs.Attend`, as this package's docstring says."""

    cos: Tensor
    sin: Tensor
    key_cos: Tensor
    key_sin: Tensor
    position: Tensor
    offset: Tensor
    of_memory: Tensor
    of_pointer: Tensor
    is_memory: Tensor

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        attention: Any = attend.memory_attention
        if attention.config.memory_attention_num_attention_heads != 1:
            raise ExportError(
                "the ort-cuda variant needs memory attention with one head, as every SAM 2 has; "
                f"this one has {attention.config.memory_attention_num_attention_heads}. Export "
                "the portable variant only."
            )
        self.attend = attend
        self.norm = attention.layers[0].layer_norm1
        norms = [layer.layer_norm1 for layer in attention.layers[1:]] + [attention.layer_norm]
        inner = map(attend.family.inner_layers, attention.layers)
        self.layers = nn.ModuleList(map(_Layer, attention.layers, inner, norms))
        with torch.no_grad():
            constant(self, "cos", attend.cos)
            constant(self, "sin", attend.sin)
            more = attend.splits if attend.object_pointers else 0
            # Behind the places of a memory lie its pointer's tokens, which nothing rotates.
            pairs = attend.cos.shape[1]
            constant(self, "key_cos", torch.cat([attend.key_cos, torch.ones(more, pairs)]))
            constant(self, "key_sin", torch.cat([attend.key_sin, torch.zeros(more, pairs)]))
            position = (attend.memory_position + attend.temporal[-1])[0]
            constant(self, "position", torch.cat([position, torch.zeros(more, len(position[0]))]))
            tokens = torch.arange(len(position) + more)
            self.register_buffer("is_memory", (tokens < len(position))[:, None], persistent=False)
            self.register_buffer("of_memory", tokens.clamp(max=len(position) - 1), persistent=False)
            self.register_buffer(
                "of_pointer", (tokens - len(position)).clamp(min=0), persistent=False
            )
            constant(self, "offset", 0.1 * attend.image_position.transpose(0, 1))

    def forward(
        self,
        features: Tensor,
        memories: Tensor,
        pointers: Tensor | None = None,
        pointer_time: Tensor | None = None,
    ) -> Tensor:
        n, k, _, width = memories.shape
        values = memories.flatten(0, 1)
        if self.attend.object_pointers and pointers is not None and pointer_time is not None:
            vectors, times = (
                tokens.reshape(n * k, -1, width)
                for tokens in self.attend.pointer_tokens(pointers, pointer_time)
            )
            longer = values.index_select(1, self.of_memory)
            values = self._joined(longer, vectors)
            keys = self._joined(longer + self.position, vectors + times)
        else:
            keys = values + self.position
        x = features.flatten(2).transpose(1, 2) + self.offset
        normed = self.norm(x)
        turn, key_turn = (self.cos, self.sin), (self.key_cos, self.key_sin)
        for layer in self.layers:
            normed, x = layer(normed, x, keys, values, turn, key_turn, (n, k))
        out: Tensor = normed.transpose(1, 2).unflatten(-1, features.shape[-2:])
        return out

    def _joined(self, longer: Tensor, pointers: Tensor) -> Tensor:
        """Put tokens of pointers behind those of memories, which were lengthened for them."""
        return torch.where(self.is_memory, longer, pointers.index_select(1, self.of_pointer))
