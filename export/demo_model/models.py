"""The two small networks of the demo pair: true architectures, narrower and shallower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Sam2VideoConfig, Sam2VideoModel

__all__ = ["build_dinov2", "build_sam2", "set_image_size"]

STRIDE = 16


def build_sam2(settings: Mapping[str, Any]) -> Sam2VideoModel:
    """Build an untrained SAM 2.1 video model from the ``[sam2]`` table of the recipe."""
    size = int(settings["image_size"])
    hidden = int(settings["hidden_size"])
    widths = [int(width) for width in settings["widths"]]
    grid = size // STRIDE
    config = Sam2VideoConfig(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": widths[0],
                "image_size": [size, size],
                "embed_dim_per_stage": widths,
                "blocks_per_stage": list(settings["blocks"]),
                "num_attention_heads_per_stage": list(settings["heads"]),
                "window_size_per_stage": list(settings["windows"]),
                "global_attention_blocks": list(settings["global_blocks"]),
                "mlp_ratio": float(settings["mlp_ratio"]),
            },
            "backbone_channel_list": widths[::-1],
            "backbone_feature_sizes": [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]],
            "fpn_hidden_size": hidden,
        },
        prompt_encoder_config={"hidden_size": hidden, "image_size": size},
        mask_decoder_config={
            "hidden_size": hidden,
            "mlp_dim": int(settings["decoder_feed_forward"]),
            "num_attention_heads": int(settings["decoder_heads"]),
            "iou_head_hidden_dim": hidden,
        },
        image_size=size,
        memory_attention_hidden_size=hidden,
        memory_attention_num_layers=int(settings["memory_layers"]),
        memory_attention_feed_forward_hidden_size=int(settings["memory_feed_forward"]),
        memory_attention_downsample_rate=int(settings["memory_downsample_rate"]),
        memory_attention_num_attention_heads=int(settings["memory_heads"]),
        memory_attention_dropout=0.0,
        memory_attention_rope_dropout=0.0,
        memory_attention_rope_feat_sizes=[grid, grid],
        memory_encoder_hidden_size=hidden,
        mask_downsampler_embed_dim=hidden,
        memory_fuser_embed_dim=hidden,
        memory_fuser_intermediate_dim=4 * hidden,
    )
    model = Sam2VideoModel(config)
    with torch.no_grad():
        # At the published initialisation an untrained model says "absent" half of the time, and
        # an absent exemplar's pointer is a constant: nothing would be learnt through it.
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(2.0)
        fuser: Any = model.memory_encoder.memory_fuser
        for layer in fuser.layers:
            layer.scale.fill_(0.1)
    return model


def set_image_size(model: Sam2VideoModel, size: int) -> None:
    """Make a model work at another square image size, in place.

    No weight depends on the image size; what does are tables derived from it, here and in the
    configuration that is saved with the weights.
    """
    grid = size // STRIDE
    sizes = [[4 * grid, 4 * grid], [2 * grid, 2 * grid], [grid, grid]]
    config: Any = model.config
    config.image_size = size
    config.memory_attention_rope_feat_sizes = [grid, grid]
    config.prompt_encoder_config.image_size = size
    config.vision_config.backbone_feature_sizes = sizes
    config.vision_config.backbone_config.image_size = [size, size]
    model.image_size = size
    model.backbone_feature_sizes = sizes
    prompt = model.prompt_encoder
    prompt.image_embedding_size = (grid, grid)
    prompt.mask_input_size = (4 * grid, 4 * grid)
    prompt.input_image_size = size
    attention: Any = model.memory_attention
    positions = attention.precompute_positions(config)
    attention.position_ids = nn.Buffer(
        positions.to(attention.position_ids.device), persistent=False
    )


def build_dinov2(settings: Mapping[str, Any]) -> Dinov2Model:
    """Build an untrained DINOv2 from the ``[dinov2]`` table of the recipe."""
    width = int(settings["width"])
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=int(settings["depth"]),
        num_attention_heads=int(settings["heads"]),
        mlp_ratio=int(settings["mlp_ratio"]),
        image_size=int(settings["image_size"]),
        patch_size=int(settings["patch_size"]),
        layerscale_value=1.0,
        drop_path_rate=0.0,
    )
    return Dinov2Model(config)
