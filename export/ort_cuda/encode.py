"""``encode``: Hiera on rows in the order of its windows, and the neck as one product a level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recallseg.engines.errors import ExportError
from recallseg.export.fused import largest_of_four, skip_norm
from recallseg.export.graphs import Encode
from recallseg.export.ort_cuda.order import Order
from recallseg.export.ort_cuda.parts import (
    Chosen,
    Patches,
    Product,
    SelfAttention,
    TwoLayers,
    constant,
)

__all__ = ["CudaEncode"]


class _Block(nn.Module):
    """One block of Hiera, from the normalised rows on; it normalises for the next one.

    Parameters
    ----------
    block : ``Sam2MultiScaleBlock``.
    order : of the rows that come in.
    following : the next block's first normalisation; None for the last block, whose rows then still
        lack ``bias``.
    """

    attention_bias: Tensor
    bias: Tensor

    def __init__(self, block: Any, order: Order, following: nn.LayerNorm | None) -> None:
        super().__init__()
        self.pooled = block.query_stride is not None
        if self.pooled and tuple(block.query_stride) != (2, 2):
            raise ExportError(f"Hiera pools by (2, 2), not by {block.query_stride}.")
        size = int(block.window_size) or order.side
        windows = order.windows(size, pooled=self.pooled)
        self.order = order.pooled() if self.pooled else order
        joint, out = block.attn.qkv, block.attn.proj
        query, key, value = zip(joint.weight.chunk(3), joint.bias.chunk(3), strict=True)
        self.attention = SelfAttention(
            query,
            key,
            value,
            out,
            int(block.attn.num_attention_heads),
            float(block.attn.scale),
            windows=len(windows.rows),
            pooled=self.pooled,
            back=Chosen(windows.back, windows.rows.size // (4 if self.pooled else 1)),
        )
        self.partition = Chosen(windows.rows.ravel(), order.side**2)
        bias = self.attention.bias
        self.projected = block.dim != block.dim_out
        if self.projected:  # its bias is added behind the maximum
            self.projection = Product(block.proj.weight)
            bias = bias + block.proj.bias
        constant(self, "attention_bias", bias)
        layers = block.mlp
        if len(layers.layers) or not isinstance(layers.activation, nn.Module):
            raise ExportError("Hiera's blocks have two layers behind their attention.")
        _require_gelu(layers.activation)
        self.layers = TwoLayers(layers.proj_in, layers.proj_out)
        constant(self, "bias", self.layers.bias)
        self.norm, self.following = block.layer_norm2, following

    def forward(self, normed: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = x
        if self.projected:
            skip = self.projection(normed)
            skip = largest_of_four(skip) if self.pooled else skip
        seen = self.attention(self.partition(normed))
        normed, x = skip_norm(seen, skip, self.norm, self.attention_bias)
        out = self.layers(normed)
        if self.following is None:
            return x, x + out
        return skip_norm(out, x, self.following, self.bias)


def _require_gelu(activation: nn.Module) -> None:
    probe = torch.linspace(-3, 3, 7)
    if not torch.allclose(activation(probe), nn.functional.gelu(probe), atol=1e-6):
        raise ExportError(f"Hiera's activation is GELU, not {type(activation).__name__}.")


class _Level(nn.Module):
    """One level of the neck, seen through a further 1x1 convolution: all of it is linear.

    ``bias`` is what is left to add to its rows, those of the levels above it included.
    """

    def __init__(
        self, neck: Any, level: int, weight: Tensor, bias: Tensor, last_bias: Tensor
    ) -> None:
        super().__init__()
        most = len(neck.convs) - 1
        lateral = neck.convs[most - level]
        if lateral.kernel_size != (1, 1) or lateral.stride != (1, 1) or lateral.padding != (0, 0):
            raise ExportError("the neck's convolutions are 1x1 in every SAM 2.")
        joined = weight.double() @ lateral.weight.flatten(1).double()
        self.product = Product(joined)
        self.level = level
        self.bias = weight.double() @ lateral.bias.double() + bias.double()
        if level == most:
            self.bias = self.bias + joined @ last_bias.double()
        self.above: _Level | None = None
        if level in neck.fpn_top_down_levels and level < most:
            self.above = _Level(neck, level + 1, weight, torch.zeros(len(weight)), last_bias)
            self.bias = self.bias + self.above.bias

    def forward(self, stages: list[Tensor]) -> Tensor:
        out: Tensor = self.product(stages[self.level])
        if self.above is not None:  # each of its places lies over four neighbours here
            out = (out.unflatten(0, (-1, 4)) + self.above(stages)[:, None]).flatten(0, 1)
        return out


class _Output(nn.Module):
    """A level as the graph gives it out: 1xCxhxw, row by row."""

    raster: Tensor
    bias: Tensor

    def __init__(self, level: _Level, order: Order) -> None:
        super().__init__()
        self.level, self.side = level, order.side
        constant(self, "bias", level.bias[:, None])
        self.register_buffer("raster", torch.from_numpy(order.place), persistent=False)

    def forward(self, stages: list[Tensor]) -> Tensor:
        x = self.level(stages).index_select(0, self.raster)
        return (x.T + self.bias).reshape(1, -1, self.side, self.side)


class CudaEncode(nn.Module):
    """:class:`recallseg.export.graphs.Encode` for one image, as this package's docstring says."""

    def __init__(self, encode: Encode, image_size: int) -> None:
        super().__init__()
        vision: Any = encode.vision_encoder
        hiera, neck = vision.backbone, vision.neck
        convolution = hiera.patch_embed.projection
        side = image_size // int(convolution.stride[0])
        blocks = list(hiera.blocks)
        poolings = sum(block.query_stride is not None for block in blocks)
        order = Order(side, 2**poolings)
        with torch.no_grad():
            position = hiera._get_pos_embed((side, side)).reshape(side * side, -1)
            self.patches = Patches(
                convolution, side, order.token, position[torch.from_numpy(order.token)]
            )
            self.norm = blocks[0].layer_norm1
            self.blocks = nn.ModuleList()
            self.ends = [int(end) for end in hiera.stage_ends]
            orders: list[Order] = []
            for index, block in enumerate(blocks):
                last = index + 1 == len(blocks)
                made = _Block(block, order, None if last else blocks[index + 1].layer_norm1)
                self.blocks.append(made)
                order = made.order
                if index in self.ends:
                    orders.append(order)
            last_bias: Any = self.blocks[-1].bias
            channels = neck.convs[0].out_channels

            def output(level: int, further: nn.Conv2d | None) -> _Output:
                if further is None:
                    weight, bias = torch.eye(channels), torch.zeros(channels)
                elif further.bias is None:
                    raise ExportError("the mask decoder's convolutions have biases.")
                else:
                    weight, bias = further.weight.flatten(1), further.bias
                return _Output(_Level(neck, level, weight, bias, last_bias), orders[level])

            self.skip0, self.skip1 = output(0, encode.conv_s0), output(1, encode.conv_s1)
            self.features = output(2, None)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.patches(image)
        normed = self.norm(x)
        stages: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            normed, x = block(normed, x)
            if index in self.ends:
                stages.append(x)
        return self.features(stages), self.skip0(stages), self.skip1(stages)
