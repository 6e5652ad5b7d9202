"""A start for the embedder from which a short training gets somewhere.

A transformer that starts from noise needs millions of images before its class token knows where
things are. Here every attention head starts by looking at a region of its own and noting its
brightness, texture and colour, so that the untrained embedding already is a coarse drawing of the
image; training refines what is noted, where, and what it is worth. The architecture is untouched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Model

__all__ = ["look_around"]

# Residual channels: what a patch shows, where it is, and (from there on) the class token's notes.
CONTENT, PLACE = 32, 32
BRIGHTNESS, RED_BLUE, ACROSS, DOWN, TEXTURE = 0, 1, 2, 3, 4
NOTES = (BRIGHTNESS, TEXTURE, RED_BLUE)
# Attention logit at a region's centre over that far from it: regions overlap by about a half.
SHARPNESS = 0.8


def _waves(places: Tensor) -> Tensor:
    """Codes of places ``n x 2`` in 0..1 whose products fall off with distance: ``n x PLACE``."""
    frequency = torch.linspace(1.0, 4.5, PLACE // 4) * math.pi
    angle = (places[..., None] * frequency).flatten(1)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def _filters(weight: Tensor) -> None:
    """Let the first patch filters see brightness, colour and slopes; the others random texture."""
    _, _, height, width = weight.shape
    weight.mul_(0.05)
    area = float(height * width)
    ramp = torch.linspace(-1.0, 1.0, width)
    texture = torch.randn(CONTENT, 1, height, width) / math.sqrt(3.0 * area)
    weight[:CONTENT] = (texture - texture.mean(dim=(2, 3), keepdim=True)).expand(-1, 3, -1, -1)
    weight[BRIGHTNESS] = 1.0 / (3.0 * area)
    weight[RED_BLUE] = torch.tensor([1.0, 0.0, -1.0])[:, None, None] / area
    weight[ACROSS] = ramp.expand(height, width) * 2.0 / (3.0 * area)
    weight[DOWN] = ramp[:, None].expand(height, width) * 2.0 / (3.0 * area)
    weight[TEXTURE] = 0.0


def _regions(layers: int, heads: int) -> Tensor:
    """Centres (x, y) that the heads look at: a grid, one row of it per layer."""
    columns = (torch.arange(heads) + 0.5) / heads
    rows = (torch.arange(layers) + 0.5) / layers
    grid = torch.meshgrid(columns, rows, indexing="xy")
    return torch.stack(grid, dim=-1).view(layers, heads, 2)


def _layer_parts(layer: nn.Module) -> dict[str, nn.Linear]:
    found = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            found[name.rsplit(".", 1)[-1]] = module
    return found


@torch.no_grad()
def look_around(model: Dinov2Model) -> None:
    """Overwrite the weights of an untrained model, in place."""
    config: Any = model.config
    side = int(config.image_size) // int(config.patch_size)
    heads = int(config.num_attention_heads)
    head_width = int(config.hidden_size) // heads
    layers = list(model.encoder.layer)
    if (
        head_width < PLACE
        or CONTENT + PLACE + len(NOTES) * heads * len(layers) > config.hidden_size
    ):
        return  # Too narrow to start this way: such models are for tests only.

    _filters(model.embeddings.patch_embeddings.projection.weight)
    axis = (torch.arange(side) + 0.5) / side
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 2)
    place = slice(CONTENT, CONTENT + PLACE)
    model.embeddings.position_embeddings[:, 1:, place] = _waves(grid)

    regions = _regions(len(layers), heads)
    for depth, layer in enumerate(layers):
        parts = _layer_parts(layer)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "fc2"):
            parts[name].weight.mul_(0.2)
        if depth == 0:
            # The size of every filter's answer, whatever its sign, adds up to texture.
            seen = [ACROSS, DOWN, *range(TEXTURE + 1, CONTENT)]
            for row, channel in enumerate(seen):
                for sign in (0, 1):
                    unit = 2 * row + sign
                    parts["fc1"].weight[unit].zero_()
                    parts["fc1"].weight[unit, channel] = 1.0 - 2.0 * sign
                    parts["fc2"].weight[TEXTURE, unit] = 3.0 / len(seen)
        for head in range(heads):
            rows = slice(head * head_width, head * head_width + PLACE)
            parts["k_proj"].weight[rows, place] += torch.eye(PLACE)
            parts["q_proj"].bias[rows] = SHARPNESS * _waves(regions[depth, head][None])[0]
            for number, channel in enumerate(NOTES):
                source = head * head_width + number
                target = CONTENT + PLACE + len(NOTES) * (depth * heads + head) + number
                parts["v_proj"].weight[source, channel] += 1.0
                parts["o_proj"].weight[target, source] += 1.0
