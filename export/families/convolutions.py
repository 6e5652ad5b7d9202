"""``encode`` of a convolutional network as ONNX Runtime's CPU kernels like it.

Exact up to the order of summation:

- layers that look at one place at a time are products of rows, with places for rows and channels
  for columns; depthwise layers between them see maps. ONNX Runtime's blocked layout for
  convolutions has no GELU, and would reorder every map before and behind it; and products of rows
  are what ``int8`` and the native operators know;
- the neck and the mask decoder's 1x1 convolution behind it are one product: 256 channels at stride
  4 are never written.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from recallseg.export.families.repvit import ChannelMixer

__all__ = ["RowEncode"]


class _Rows(nn.Module):
    """A 1x1 convolution on rows BxPxC."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().float().T.contiguous(), persistent=False)
        self.register_buffer("bias", bias.detach().float().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _of(convolution: nn.Conv2d) -> _Rows:
    assert convolution.bias is not None
    return _Rows(convolution.weight.flatten(1), convolution.bias)


class _RowMixer(nn.Module):
    """:class:`.repvit.ChannelMixer`, fused, on rows."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.first, self.second = _of(mixer.conv1), _of(mixer.conv2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).transpose(1, 2)
        rows = self.second(nn.functional.gelu(self.first(rows)))
        return rows.transpose(1, 2).reshape(x.shape)


class RowEncode(nn.Module):
    """:class:`recallseg.export.graphs.Encode` around a fused RepViT, as said above."""

    def __init__(self, encode: Any) -> None:
        super().__init__()
        vision = encode.vision_encoder
        self.backbone = _on_rows(copy.deepcopy(vision.backbone))
        last = len(vision.convs) - 1
        lateral: list[Any] = [vision.convs[last - level] for level in range(last + 1)]
        self.top_down = tuple(level for level in vision.top_down if level < last)
        self.neck = nn.ModuleList()
        further = (encode.conv_s0, encode.conv_s1)
        for level, convolution in enumerate(lateral):
            weight, bias = convolution.weight.flatten(1).double(), convolution.bias.double()
            if level < len(further):
                after = further[level]
                outer = after.weight.flatten(1).double()
                weight, bias = outer @ weight, outer @ bias + after.bias.double()
            self.neck.append(_Rows(weight, bias))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.backbone(image)
        levels: list[Tensor] = []
        for level in range(len(maps) - 1, -1, -1):
            x = maps[level]
            rows = self.neck[level](x.flatten(2).transpose(1, 2)).transpose(1, 2)
            made = rows.unflatten(2, x.shape[2:])
            if level in self.top_down:
                made = made + nn.functional.interpolate(levels[0], scale_factor=2.0, mode="nearest")
            levels.insert(0, made)
        return levels[2], levels[0], levels[1]


def _on_rows(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, ChannelMixer):
            setattr(module, name, _RowMixer(child))
        else:
            _on_rows(child)
    return module
