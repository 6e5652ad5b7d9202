"""Meta's SAM 2 and SAM 2.1 files: which architecture, and which tensor is which.

The layout is that of ``sam2/modeling`` in the PyPI package ``sam2`` (1.1.0), whose ``state_dict``
lies under the key ``model`` of a file. The parity tests hold this module to that code.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from torch import Tensor
from transformers import Sam2VideoConfig

from recallseg.engines.errors import CheckpointError
from recallseg.export.checkpoints.architectures import SAM2, sam2_config
from recallseg.export.checkpoints.recognition import families_in
from recallseg.export.checkpoints.strict import Piece, axes_of

__all__ = ["infer_config", "is_meta_sam2", "resolve"]

TRUNK = "image_encoder.trunk"
OCCLUSION = "no_obj_embed_spatial"
POINTER_TIME = "obj_ptr_tpos_proj.weight"
POINTS = 4
"""Point embeddings (negative, positive, two box corners): four tensors at Meta, here four rows."""

Rules = tuple[tuple[str, str], ...]

_MLP: Rules = (
    (r"(^|\.)layers\.0\.", r"\1layers.1."),
    (r"(^|\.)proj_in\.", r"\1layers.0."),
    (r"(^|\.)proj_out\.", r"\1layers.2."),
)
"""Three-layer perceptrons: Meta numbers the layers, transformers names the first and the last."""

_FEED_FORWARD: Rules = ((r"mlp\.proj_in", "mlp.layers.0"), (r"mlp\.proj_out", "mlp.layers.1"))
_NORM: Rules = ((r"layer_norm", "norm"),)
_OUT: Rules = ((r"\.o_proj\.", ".out_proj."),)

_PREFIXES: tuple[tuple[str, str, Rules], ...] = (
    # The model's prefix, Meta's prefix, what differs below it. The first prefix that fits counts.
    (
        "vision_encoder.backbone.",
        f"{TRUNK}.",
        ((r"patch_embed\.projection", "patch_embed.proj"), *_FEED_FORWARD, *_NORM),
    ),
    ("vision_encoder.neck.", "image_encoder.neck.", ((r"^convs\.(\d+)\.", r"convs.\1.conv."),)),
    ("memory_attention.", "memory_attention.", (*_OUT, *_NORM)),
    (
        "memory_encoder.memory_fuser.",
        "memory_encoder.fuser.",
        (
            (r"\.scale$", ".gamma"),
            (r"depthwise_conv", "dwconv"),
            (r"pointwise_conv", "pwconv"),
            *_NORM,
        ),
    ),
    (
        "memory_encoder.",
        "memory_encoder.",
        ((r"^feature_projection\.", "pix_feat_proj."), (r"^projection\.", "out_proj.")),
    ),
    (
        "prompt_encoder.",
        "sam_prompt_encoder.",
        (
            (r"^mask_embed\.conv1\.", "mask_downscaling.0."),
            (r"^mask_embed\.layer_norm1\.", "mask_downscaling.1."),
            (r"^mask_embed\.conv2\.", "mask_downscaling.3."),
            (r"^mask_embed\.layer_norm2\.", "mask_downscaling.4."),
            (r"^mask_embed\.conv3\.", "mask_downscaling.6."),
        ),
    ),
    (
        "mask_decoder.transformer.",
        "sam_mask_decoder.transformer.",
        (*_FEED_FORWARD, *_OUT, *_NORM),
    ),
    (
        "mask_decoder.",
        "sam_mask_decoder.",
        (
            (r"^upscale_conv1\.", "output_upscaling.0."),
            (r"^upscale_layer_norm\.", "output_upscaling.1."),
            (r"^upscale_conv2\.", "output_upscaling.3."),
            *_MLP,
        ),
    ),
    ("object_pointer_proj.", "obj_ptr_proj.", _MLP),
    ("temporal_positional_encoding_projection_layer.", "obj_ptr_tpos_proj.", ()),
    ("mask_downsample.", "mask_downsample.", ()),
)

_POSITION_MATRIX = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"

_WHOLE: Mapping[str, str] = {
    "no_memory_embedding": "no_mem_embed",
    "no_memory_positional_encoding": "no_mem_pos_enc",
    "memory_temporal_positional_encoding": "maskmem_tpos_enc",
    "no_object_pointer": "no_obj_ptr",
    "occlusion_spatial_embedding_parameter": OCCLUSION,
    # One random matrix at Meta; transformers stores it for the image and for the prompts.
    "shared_image_embedding.positional_embedding": _POSITION_MATRIX,
    "prompt_encoder.shared_embedding.positional_embedding": _POSITION_MATRIX,
}

_MASK_DOWNSAMPLER = re.compile(
    r"memory_encoder\.mask_downsampler\.(?:layers\.(\d+)\.(conv|layer_norm)|(final_conv))\.(\w+)"
)
"""Meta's is a flat sequence of (convolution, norm, GELU) and a last convolution."""


def is_meta_sam2(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the names are those of Meta's SAM 2 files, and of no other family's."""
    return set(families_in(tensors)) <= {"SAM 2"} and any(
        name.startswith(("image_encoder.", "sam_mask_decoder.")) for name in tensors
    )


def infer_config(tensors: Mapping[str, Tensor], origin: str, *, image_size: int) -> Sam2VideoConfig:
    """Recognise the architecture by its shapes and return its configuration.

    Raises
    ------
    CheckpointError
        When the image encoder is none of :data:`~.architectures.SAM2`.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(
                f"{origin} does not fit the model. Missing tensors (1): '{name}', which tells the "
                "architecture. Pass a complete SAM 2 checkpoint of Meta's, not a part of one."
            )
        return axes_of(tensors, name, 4, origin)

    _, width, *sides = shape(f"{TRUNK}.pos_embed")
    background = tuple(sides)
    window = shape(f"{TRUNK}.pos_embed_window")[-1]
    block = re.compile(re.escape(TRUNK) + r"\.blocks\.(\d{1,3})\.norm1\.weight")
    depth = max((int(found[1]) for name in tensors if (found := block.fullmatch(name))), default=-1)
    # A block that widens the features opens the next stage.
    starts = [i for i in range(depth + 1) if f"{TRUNK}.blocks.{i}.proj.weight" in tensors]
    edges = [0, *starts, depth + 1]
    blocks = tuple(after - before for before, after in itertools.pairwise(edges))
    for name, hiera in SAM2.items():
        known = (hiera.width, hiera.blocks, hiera.background, hiera.windows[0])
        if (width, blocks, background, window) == known:
            # Either addition of SAM 2.1 makes it one; the strict comparison then names the other if
            # it is missing.
            newer = OCCLUSION in tensors or POINTER_TIME in tensors
            return sam2_config(name, newer=newer, image_size=image_size)
    raise CheckpointError(
        f"{origin} has an image encoder of {width} channels with {blocks} blocks per stage, "
        f"position background {background} and first window {window}, which is none of SAM 2's "
        f"{', '.join(SAM2)}. Head counts and windows cannot be read from weights: convert it to a "
        "Hugging Face folder with a config.json and pass that."
    )


def _meta_name(name: str) -> str:
    """Translate a tensor name of ``Sam2VideoModel`` to Meta's."""
    if name in _WHOLE:
        return _WHOLE[name]
    if found := _MASK_DOWNSAMPLER.fullmatch(name):
        layer, kind, final, leaf = found.groups()
        index = 3 * 4 if final else 3 * int(layer) + (kind == "layer_norm")
        return f"memory_encoder.mask_downsampler.encoder.{index}.{leaf}"
    for ours, theirs, rules in _PREFIXES:
        if name.startswith(ours):
            rest = name[len(ours) :]
            for pattern, replacement in rules:
                rest = re.sub(pattern, replacement, rest)
            return theirs + rest
    raise CheckpointError(
        f"the installed transformers has a tensor '{name}' that Meta's SAM 2 files are not known "
        "to hold. Install a transformers version that RecallSeg's export extra asks for."
    )


def resolve(name: str, tensors: Mapping[str, Tensor]) -> Piece:
    """Say where the model's tensor ``name`` lies in one of Meta's files."""
    del tensors  # Meta's layout has one spelling.
    if name == "prompt_encoder.point_embed.weight":
        return Piece(
            tuple(f"sam_prompt_encoder.point_embeddings.{i}.weight" for i in range(POINTS))
        )
    return Piece((_meta_name(name),))
