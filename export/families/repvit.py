"""RepViT, the image encoder of EdgeTAM: as it is trained, and as it is exported.

In training every depthwise layer is a sum of branches, each with its own normalisation; at
inference a normalisation is a scale and an offset for each channel, so that the sum *is* one 3x3
convolution (Wang et al., arXiv 2307.09283, section 3.3). :func:`fused` makes it that, exactly up to
rounding.

Tensors are named and shaped as in ``timm`` (``repvit_m1`` with ``features_only``), which wrote all
published files. ``timm`` itself would bring torchvision along and is not needed; a test holds this
module to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

__all__ = ["ChannelMixer", "RepVit", "RepVitBackbone", "RepVitConfig", "fused"]

_RATIO = 2
"""Width of the layers between channels, over that of the block."""


class RepVitConfig(PreTrainedConfig):
    """Width and number of blocks of every stage; the defaults are those of ``repvit_m1``."""

    model_type = "recallseg_repvit"

    def __init__(
        self,
        widths: tuple[int, ...] = (48, 96, 192, 384),
        depths: tuple[int, ...] = (2, 2, 14, 2),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.widths, self.depths = tuple(widths), tuple(depths)


class _Norm(nn.Module):
    """Normalisation by stored statistics: ``BatchNorm2d`` of evaluation, without its counter."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


class _ConvNorm(nn.Module):
    """A convolution without bias, and its normalisation."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = _Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.c(x))
        return out

    def fused(self) -> nn.Conv2d:
        """Return the one convolution that this is."""
        scale = self.bn.weight.double() / (self.bn.running_var.double() + self.bn.eps).sqrt()
        weight = self.c.weight.double() * scale[:, None, None, None]
        bias = self.bn.bias.double() - self.bn.running_mean.double() * scale
        return _convolution(self.c, weight, bias)


def _convolution(like: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    padding: Any = like.padding
    kernel: Any = weight.shape[2:]
    stride: Any = like.stride
    made = nn.Conv2d(
        like.in_channels, like.out_channels, tuple(kernel), stride, padding, groups=like.groups
    )
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)  # type: ignore[union-attr]
    return made.requires_grad_(False)


class _TokenMixer(nn.Module):
    """A depthwise 3x3 branch, a depthwise 1x1 branch and the input itself, added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _ConvNorm(width, width, 3, groups=width)
        self.conv1 = _ConvNorm(width, width, 1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.conv1(x) + x
        return out

    def fused(self) -> nn.Conv2d:
        """Return the one convolution that this is: the small branches act on its middle."""
        wide, narrow = self.conv.fused(), self.conv1.fused()
        assert wide.bias is not None
        assert narrow.bias is not None
        weight = wide.weight.double()
        weight[:, :, 1:2, 1:2] += narrow.weight.double() + 1.0
        return _convolution(wide, weight, wide.bias.double() + narrow.bias.double())


class _Gate(nn.Module):
    """Squeeze and excitation: every channel times a number that the whole map decides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = -(-(width // 4) // 8) * 8
        self.fc1 = nn.Conv2d(width, inner, 1)
        self.fc2 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.fc2(self.fc1(mean).relu()).sigmoid()


class ChannelMixer(nn.Module):
    """Two 1x1 layers with GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(width, _RATIO * width)
        self.conv2 = _ConvNorm(_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(nn.functional.gelu(self.conv1(x)))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        self.token_mixer = _TokenMixer(width)
        self.se = _Gate(width) if gated else nn.Identity()
        self.channel_mixer = ChannelMixer(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.token_mixer(x))
        out: Tensor = x + self.channel_mixer(x)
        return out


class _Downsample(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pre_block = _Block(inputs, gated=False)
        self.spatial_downsample = _ConvNorm(inputs, inputs, 3, 2, groups=inputs)
        self.channel_downsample = _ConvNorm(inputs, outputs)
        self.ffn = ChannelMixer(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel_downsample(self.spatial_downsample(self.pre_block(x)))
        out: Tensor = x + self.ffn(x)
        return out


class _Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int, first: bool) -> None:
        super().__init__()
        self.downsample = nn.Identity() if first else _Downsample(inputs, outputs)
        self.blocks = nn.Sequential(*(_Block(outputs, gated=i % 2 == 0) for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.downsample(x))
        return out


class _Stem(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(3, width // 2, 3, 2)
        self.conv2 = _ConvNorm(width // 2, width, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(nn.functional.gelu(self.conv1(x)))
        return out


class RepVit(nn.Module):
    """``image`` Bx3xSxS -> one map for each stage, at strides 4, 8, 16 and 32."""

    def __init__(self, config: RepVitConfig) -> None:
        super().__init__()
        self.stem = _Stem(config.widths[0])
        before = config.widths[0]
        self.count = len(config.widths)
        for index, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            self.add_module(f"stages_{index}", _Stage(before, width, depth, index == 0))
            before = width

    def forward(self, image: Tensor) -> list[Tensor]:
        x = self.stem(image)
        maps = []
        for stage in self.stages():
            x = stage(x)
            maps.append(x)
        return maps

    def stages(self) -> Iterator[nn.Module]:
        """Yield the stages in order."""
        for index in range(self.count):
            yield self.get_submodule(f"stages_{index}")


class RepVitBackbone(PreTrainedModel):
    """The same as ``transformers``' wrapper around ``timm`` gives it to ``EdgeTamVisionModel``."""

    config_class = RepVitConfig
    main_input_name = "pixel_values"

    def __init__(self, config: RepVitConfig) -> None:
        super().__init__(config)
        self.timm_model = RepVit(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights as they are made: strict loading replaces every one."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Return the maps, which ``EdgeTamVisionModel`` looks for in ``last_hidden_state``."""
        return BaseModelOutput(last_hidden_state=self.timm_model(pixel_values))


AutoConfig.register(RepVitConfig.model_type, RepVitConfig, exist_ok=True)
AutoModel.register(RepVitConfig, RepVitBackbone, exist_ok=True)


def fused(module: nn.Module) -> nn.Module:
    """Replace every branched or normalised layer below ``module`` by one convolution, in place."""
    for name, child in module.named_children():
        if isinstance(child, (_TokenMixer, _ConvNorm)):
            setattr(module, name, child.fused())
        else:
            fused(child)
    return module
