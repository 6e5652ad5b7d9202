"""A start for the embedder from which a short training gets somewhere.

A transformer that starts from noise needs millions of images before its class token knows where
things are. Here the weights are chosen such that the untrained embedding already is a thumbnail:
the first layer notes every patch's brightness in a channel of that patch's own, the second gathers
the notes in the class token, sharpened and less their mean, and the others leave it alone. The
cosine similarity of two embeddings then is the correlation of two sharpened images at the
resolution of the patches. Training refines what that is worth. The architecture is untouched.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Model

__all__ = ["freeze_thumbnail", "start_as_thumbnail"]

# Residual channels after the notes (one per patch).
BRIGHTNESS = 0
TEXTURES = 32
# The last channel is the same for all tokens and large, so that the layer norm keeps magnitudes.
LEVEL = 12.0
# What marks a patch's own channel, and how far a hidden unit is open at that patch and shut
# elsewhere: far enough that it answers to brightness linearly at the one and not at all elsewhere.
MARK = 6.0
GATE = 11.0
# Scale of what the later layers and the free weights start with.
QUIET = 0.01
# How much is added of what sets a patch apart from its neighbours: edges tell slices apart.
SHARPEN = 1.0


def _layer_parts(layer: nn.Module) -> dict[str, nn.Linear]:
    found = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            found[name.rsplit(".", 1)[-1]] = module
    return found


def _filters(weight: Tensor, notes: int) -> None:
    """Let one patch filter see brightness and some others random texture."""
    _, _, height, width = weight.shape
    area = float(height * width)
    weight.zero_()
    texture = torch.randn(TEXTURES, 1, height, width) / (3.0 * math.sqrt(area))
    texture = texture - texture.mean(dim=(2, 3), keepdim=True)
    weight[notes : notes + TEXTURES] = 0.3 * texture
    weight[notes + BRIGHTNESS] = 1.0 / (3.0 * area)


def _sharpening(side: int) -> Tensor:
    """Matrix that adds to a thumbnail what its 3 x 3 mean leaves out, and takes its mean away."""
    notes = side * side
    own = torch.eye(notes)
    blurred = F.avg_pool2d(
        own.view(notes, 1, side, side), 3, stride=1, padding=1, count_include_pad=False
    )
    sharp = own + SHARPEN * (own - blurred.view(notes, notes).T)
    return sharp - sharp.mean(dim=0)


@torch.no_grad()
def start_as_thumbnail(model: Dinov2Model) -> None:
    """Overwrite the weights of an untrained model, in place."""
    config: Any = model.config
    width = int(config.hidden_size)
    side = int(config.image_size) // int(config.patch_size)
    notes = side * side
    layers = [_layer_parts(layer) for layer in model.encoder.layer]
    if notes + TEXTURES >= width or 2 * notes > layers[0]["fc1"].out_features or len(layers) < 2:
        return  # Too narrow to start this way: such models are for tests only.

    own = torch.eye(notes)
    embeddings: Any = model.embeddings
    embeddings.cls_token.zero_()
    _filters(embeddings.patch_embeddings.projection.weight, notes)
    embeddings.patch_embeddings.projection.bias.zero_()
    places = embeddings.position_embeddings
    places.zero_()
    places[:, :, -1] = LEVEL
    places[:, 1:, :notes] = MARK * own
    for parts in layers:
        for name in ("o_proj", "fc2"):
            parts[name].weight.mul_(QUIET)

    # The layer norm's factor at a patch whose brightness is average.
    factor = math.sqrt(width) / math.hypot(LEVEL, MARK)
    first = layers[0]
    for sign, units in ((1.0, slice(0, notes)), (-1.0, slice(notes, 2 * notes))):
        # A pair of units per patch, the difference of which is its brightness; their sum is
        # known, and takes the mark back.
        first["fc1"].weight[units] = 0.0
        first["fc1"].weight[units, :notes] = 2.0 * GATE / (factor * MARK) * own
        first["fc1"].weight[units, notes + BRIGHTNESS] = sign
        first["fc1"].bias[units] = -GATE
        first["fc2"].weight[:, units] = 0.0
        first["fc2"].weight[:notes, units] = (sign - MARK / (2.0 * GATE)) * own

    second = layers[1]
    second["q_proj"].weight.mul_(QUIET)
    second["v_proj"].weight[:notes] = 0.0
    second["v_proj"].weight[:notes, :notes] = own
    gather = float(notes + 1) / 2.0
    second["o_proj"].weight[:, :notes] = 0.0
    second["o_proj"].weight[:notes, :notes] = gather * _sharpening(side)
    second["o_proj"].bias[-1] = -LEVEL


def freeze_thumbnail(model: Dinov2Model) -> None:
    """Exempt from training what makes the thumbnail: the embeddings and the first two layers.

    Their weights are chosen exactly; the steps of a training from noise would wash them out.
    """
    layers = list(model.encoder.layer)
    for module in (model.embeddings, *layers[:2]):
        if len(layers) > 2:
            module.requires_grad_(False)
