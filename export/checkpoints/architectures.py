"""The architectures that official checkpoints have, and what an image size changes in them.

The numbers are those of Meta's configuration files (``sam2/configs`` of the PyPI package ``sam2``;
``dinov2/models/vision_transformer.py``). Head counts, window sizes and the blocks with global
attention leave no trace in the shapes of the weights, so that a checkpoint without a configuration
can only be one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    EdgeTamVideoConfig,
    Sam2VideoConfig,
)

from recallseg.export.families.edgetam import EDGETAM_FAMILY
from recallseg.export.families.repvit import RepVitConfig
from recallseg.export.families.sam2 import SAM2_FAMILY

__all__ = [
    "DINOV2",
    "DINOV2_ALIASES",
    "SAM2",
    "SAM2_ALIASES",
    "SEGMENTER_NAMES",
    "Dinov2Architecture",
    "Hiera",
    "dinov2_config",
    "dinov2_name",
    "edgetam_config",
    "sam2_config",
    "sam2_name",
    "set_edgetam_size",
    "set_image_size",
]


@dataclass(frozen=True)
class Hiera:
    """What tells the image encoders of SAM 2 apart.

    Attributes
    ----------
    width : channels of the first stage; each stage doubles them.
    heads : attention heads of the first stage; each stage doubles them.
    blocks : blocks per stage.
    global_blocks : indices of the blocks that attend to the whole image.
    background : height and width of the position embedding that is interpolated to the image.
    windows : window size per stage.
    """

    width: int
    heads: int
    blocks: tuple[int, int, int, int]
    global_blocks: tuple[int, int, int]
    background: tuple[int, int]
    windows: tuple[int, int, int, int]

    @property
    def widths(self) -> list[int]:
        """Channels per stage."""
        return [self.width * 2**stage for stage in range(4)]


SAM2: Mapping[str, Hiera] = {
    "tiny": Hiera(96, 1, (1, 2, 7, 2), (5, 7, 9), (7, 7), (8, 4, 14, 7)),
    "small": Hiera(96, 1, (1, 2, 11, 2), (7, 10, 13), (7, 7), (8, 4, 14, 7)),
    "base-plus": Hiera(112, 2, (2, 3, 16, 3), (12, 16, 20), (14, 14), (8, 4, 14, 7)),
    "large": Hiera(144, 2, (2, 6, 36, 4), (23, 33, 43), (7, 7), (8, 4, 16, 8)),
}

SAM2_ALIASES: Mapping[str, str] = {
    **{name: name for name in SAM2},
    **{"t": "tiny", "s": "small", "base+": "base-plus", "base_plus": "base-plus"},
    **{"b+": "base-plus", "l": "large"},
}


EDGETAM = "edgetam"

SEGMENTER_NAMES = (*SAM2_ALIASES, EDGETAM)
"""What may follow ``random:`` for a segmenter."""


@dataclass(frozen=True)
class Dinov2Architecture:
    """What tells the DINOv2 encoders apart; every head has 64 channels."""

    width: int
    depth: int
    swiglu: bool = False

    @property
    def heads(self) -> int:
        """Attention heads per block."""
        return self.width // 64


DINOV2: Mapping[str, Dinov2Architecture] = {
    "small": Dinov2Architecture(384, 12),
    "base": Dinov2Architecture(768, 12),
    "large": Dinov2Architecture(1024, 24),
    "giant": Dinov2Architecture(1536, 40, swiglu=True),
}

DINOV2_ALIASES: Mapping[str, str] = {
    alias: name
    for name in DINOV2
    for alias in (name, name[0], f"vit{name[0]}", f"vit{name[0]}14", f"dinov2-{name}")
}

DINOV2_PATCH = 14
DINOV2_TRAINING_SIZE = 518
"""Side in pixels that Meta's position embeddings (37x37 patches) belong to."""
DINOV2_REGISTERS = 4


def set_image_size(config: Sam2VideoConfig, image_size: int) -> None:
    """Set every size in ``config`` that follows from the image size, in place.

    No weight depends on it: Hiera's position embedding is interpolated from its background, and the
    rotary and sine encodings are computed.

    Raises
    ------
    InputError
        When the architecture cannot take that size.
    """
    SAM2_FAMILY.sizes.check(image_size, SAM2_FAMILY.title)
    vision: Any = config.vision_config
    backbone = vision.backbone_config
    first = image_size // backbone.patch_stride[0]
    step = backbone.query_stride[0]
    sizes = [first // step**level for level in range(vision.num_feature_levels)]
    backbone.image_size = [image_size, image_size]
    vision.backbone_feature_sizes = [[size, size] for size in sizes]
    config.image_size = image_size
    prompt: Any = config.prompt_encoder_config
    prompt.image_size = image_size
    config.memory_attention_rope_feat_sizes = [sizes[-1], sizes[-1]]


def sam2_config(name: str, *, newer: bool, image_size: int) -> Sam2VideoConfig:
    """Return the configuration of an official architecture.

    Parameters
    ----------
    name : key of :data:`SAM2`.
    newer : SAM 2.1, which adds an embedding for the memory of an absent structure and time codes
        for object pointers, instead of SAM 2.
    image_size : side of the square image in pixels.
    """
    hiera = SAM2[name]
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_channel_list": hiera.widths[::-1],
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": hiera.width,
                "num_attention_heads": hiera.heads,
                "embed_dim_per_stage": hiera.widths,
                "num_attention_heads_per_stage": [hiera.heads * 2**stage for stage in range(4)],
                "blocks_per_stage": list(hiera.blocks),
                "global_attention_blocks": list(hiera.global_blocks),
                "window_size_per_stage": list(hiera.windows),
                "window_positional_embedding_background_size": list(hiera.background),
            },
        },
        prompt_encoder_config={},
        mask_decoder_config={},
        enable_occlusion_spatial_embedding=newer,
        enable_temporal_pos_encoding_for_object_pointers=newer,
    )
    set_image_size(config, image_size)
    return config


def sam2_name(config: Sam2VideoConfig) -> str:
    """Name a configuration, e.g. ``sam2.1-hiera-tiny``; ``...-custom`` if not official."""
    newer = (
        config.enable_occlusion_spatial_embedding
        and config.enable_temporal_pos_encoding_for_object_pointers
    )
    vision: Any = config.vision_config
    backbone = vision.backbone_config
    found = Hiera(
        backbone.hidden_size,
        backbone.num_attention_heads,
        tuple(backbone.blocks_per_stage),
        tuple(backbone.global_attention_blocks),
        tuple(backbone.window_positional_embedding_background_size),
        tuple(backbone.window_size_per_stage),
    )
    name = next((name for name, hiera in SAM2.items() if hiera == found), "custom")
    return f"{'sam2.1' if newer else 'sam2'}-hiera-{name}"


def set_edgetam_size(config: EdgeTamVideoConfig, image_size: int) -> None:
    """Set every size in ``config`` that follows from the image size, in place.

    Raises
    ------
    InputError
        When EdgeTAM cannot take that size.
    """
    EDGETAM_FAMILY.sizes.check(image_size, EDGETAM_FAMILY.title)
    vision: Any = config.vision_config
    sizes = [image_size // stride for stride in (4, 8, 16)]
    vision.backbone_feature_sizes = [[size, size] for size in sizes]
    config.image_size = image_size
    prompt: Any = config.prompt_encoder_config
    prompt.image_size = image_size
    config.memory_attention_rope_feat_sizes = [sizes[-1], sizes[-1]]


def edgetam_config(
    *, image_size: int, occlusion: bool = False, pointer_time: bool = False
) -> EdgeTamVideoConfig:
    """Return EdgeTAM's configuration; what the published weights lack is off.

    Parameters
    ----------
    image_size : side of the square image in pixels.
    occlusion : an embedding for the memory of an absent structure.
    pointer_time : time codes for object pointers.
    """
    config = EdgeTamVideoConfig(
        vision_config={
            "model_type": "edgetam_vision_model",
            "backbone_config": {"model_type": RepVitConfig.model_type},
        },
        enable_occlusion_spatial_embedding=occlusion,
        enable_temporal_pos_encoding_for_object_pointers=pointer_time,
    )
    set_edgetam_size(config, image_size)
    return config


def dinov2_config(
    name: str, *, registers: int, image_size: int = DINOV2_TRAINING_SIZE
) -> Dinov2Config | Dinov2WithRegistersConfig:
    """Return the configuration of an official architecture.

    Parameters
    ----------
    name : key of :data:`DINOV2`.
    registers : number of register tokens; 0 for the models without.
    image_size : side in pixels that the stored position embedding belongs to.
    """
    architecture = DINOV2[name]
    settings: dict[str, Any] = {
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.heads,
        "use_swiglu_ffn": architecture.swiglu,
        "image_size": image_size,
        "patch_size": DINOV2_PATCH,
    }
    if registers:
        return Dinov2WithRegistersConfig(num_register_tokens=registers, **settings)
    return Dinov2Config(**settings)


def dinov2_name(config: Dinov2Config | Dinov2WithRegistersConfig) -> str:
    """Name a configuration, e.g. ``dinov2-small-registers``; ``dinov2-custom`` if not official."""
    found = Dinov2Architecture(
        config.hidden_size, config.num_hidden_layers, bool(config.use_swiglu_ffn)
    )
    name = next((name for name, known in DINOV2.items() if known == found), "custom")
    suffix = "-registers" if isinstance(config, Dinov2WithRegistersConfig) else ""
    return f"dinov2-{name}{suffix}"
