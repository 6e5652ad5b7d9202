"""SAM 2 and SAM 2.1: Hiera with three levels, one memory token for each place of the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from recallseg.export.families.base import IMAGENET, ImageSizes, SegmenterFamily
from recallseg.export.families.rotation import rotation

__all__ = ["SAM2_FAMILY"]


class _Flat(nn.Module):
    """A map nxCxhxw -> its places row by row, nx(hw)xC."""

    def forward(self, memory: Tensor) -> Tensor:
        return memory.flatten(2).transpose(1, 2)


def _position(model: Any) -> Tensor:
    h, w = model.backbone_feature_sizes[-1]
    shape = (1, model.mem_dim, h, w)
    position: Tensor = model.memory_encoder.position_encoding(shape, "cpu", torch.float32)
    return position.flatten(2).transpose(1, 2)


SAM2_FAMILY = SegmenterFamily(
    name="sam2",
    title="SAM 2",
    model_class=Sam2VideoModel,
    session_class=Sam2VideoInferenceSession,
    sizes=ImageSizes(
        256,
        32,
        (256, 384, 512, 768, 1024),
        "Hiera's coarsest stride: its pyramid doubles that map and adds it to the next one",
    ),
    normalisation=IMAGENET,
    rounds_memories=True,
    has_hiera=True,
    vision_encoder=lambda model: model.vision_encoder,
    to_tokens=lambda model: _Flat(),
    memory_shape=lambda model: (0, (0, 0)),
    memory_position=_position,
    memory_attention=lambda model: model.memory_attention,
    key_rotation=lambda model: rotation(
        model.memory_attention, model.memory_attention.position_ids
    ),
    inner_layers=lambda layer: (layer.linear1, layer.activation, layer.linear2),
)
