"""Operators that ONNX Runtime has fused, each with the same in PyTorch.

Inside of an export a function becomes one node; outside it computes what that node does, so that a
module's parity can be told from PyTorch alone. Within :func:`spelled_out` it does so in an export
too, in standard operators that TensorRT fuses by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

__all__ = [
    "attend",
    "attend_fused",
    "bias_gelu",
    "largest_of_four",
    "rotate",
    "skip_norm",
    "spelled_out",
]

_SPELLED: ContextVar[bool] = ContextVar("spelled", default=False)


@contextmanager
def spelled_out() -> Iterator[None]:
    """Let exports write these functions in standard operators while the context lasts."""
    token = _SPELLED.set(True)
    try:
        yield
    finally:
        _SPELLED.reset(token)


def _one_node() -> bool:
    return torch.onnx.is_in_onnx_export() and not _SPELLED.get()


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention on B x heads x length x width tensors, the scale applied to the query."""
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    return torch.matmul(nn.functional.softmax(scores, dim=-1), value)


def attend_fused(query: Tensor, key: Tensor, value: Tensor, *, heads: int, scale: float) -> Tensor:
    """Attention on BxSx(heads*D) queries, BxLx(heads*D) keys and BxLx(heads*V) values."""
    shape = (query.shape[0], query.shape[1], value.shape[2])
    if _one_node():
        fused: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            (query, key, value),
            {"num_heads": heads, "scale": scale},
            dtype=query.dtype,
            shape=shape,
            version=1,
        )
        return fused

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    parts = split(query), split(key), split(value)
    if _SPELLED.get():
        out = attend(*parts, scale)
    else:
        out = nn.functional.scaled_dot_product_attention(*parts, scale=scale)
    return out.transpose(1, 2).reshape(shape)


def rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary encoding of neighbouring pairs of channels: ``x`` BxLxD at ``positions`` BxL.

    ``cos`` and ``sin`` are Tx(D/2), one row for each position of the feature map.
    """
    if _one_node():
        rotated: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding",
            (x, positions, cos, sin),
            {"interleaved": 1, "num_heads": 1, "rotary_embedding_dim": 0},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return rotated
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[positions], sin[positions]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (by the error function) of ``x`` ...xC plus ``bias`` C."""
    if _one_node():
        fused: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::BiasGelu", (x, bias), {}, dtype=x.dtype, shape=x.shape, version=1
        )
        return fused
    return nn.functional.gelu(x + bias)


def skip_norm(x: Tensor, skip: Tensor, norm: nn.LayerNorm, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalised sum of ``x``, ``skip`` and ``bias``, and the sum itself.

    Parameters
    ----------
    x : TxC or NxTxC.
    skip : the same, or 1xTxC.
    norm : over the last axis, with weight and bias.
    bias : C.
    """
    if _one_node():
        normed, _, _, total = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::SkipLayerNormalization",
            (x, skip, norm.weight, norm.bias, bias),
            {"epsilon": float(norm.eps)},
            dtypes=(x.dtype,) * 4,
            shapes=(x.shape, (1,), (1,), x.shape),
            version=1,
        )
        return normed, total
    total = x + skip + bias
    return norm(total), total


def largest_of_four(x: Tensor) -> Tensor:
    """Largest of every four rows that follow each other: 4TxC -> TxC."""
    if _SPELLED.get():
        return x.unflatten(0, (-1, 4)).amax(dim=1)
    grouped = x.reshape(1, -1, 4, x.shape[-1])
    return nn.functional.max_pool2d(grouped, (4, 1), (4, 1)).reshape(-1, x.shape[-1])
