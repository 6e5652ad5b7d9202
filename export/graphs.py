"""The five graphs as PyTorch modules around a segmenter, SAM 2 or another, and an embedder.

Each module takes and returns the tensors of the same name in :mod:`recallseg.engines.specs`; sizes
come from the wrapped model's configuration. They hold no weights of their own, so that a module in
training and its exported graph are one definition. All are differentiable, and where a graph has a
leading 1 (one image) they accept any batch, matched to or broadcast over the structures.

The arithmetic follows ``transformers``' ``modeling_sam2_video.py`` (``_use_mask_as_output``,
``_encode_new_memory``, ``_prepare_memory_conditioned_features``, ``_single_frame_forward``) with
exemplars as mask-conditioned frames; the parity gate holds it to that model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recallseg.engines.specs import Geometry
from recallseg.export.families import Embedder, Segmenter, segmenter_family
from recallseg.export.families.embedders import pooled
from recallseg.export.families.rotation import rotation

__all__ = ["Attend", "Decode", "Embed", "Encode", "Memorize", "build_graphs", "read_geometry"]


class Embed(nn.Module):
    """An embedder: ``image`` Bx3xExE -> ``embedding`` BxD, its pooled output at unit length."""

    def __init__(self, dinov2: Embedder) -> None:
        super().__init__()
        self.dinov2 = dinov2

    def forward(self, image: Tensor) -> Tensor:
        return nn.functional.normalize(pooled(self.dinov2, image), dim=-1)


class Encode(nn.Module):
    """SAM 2's image encoder: ``image`` Bx3xSxS -> ``features``, ``skip0``, ``skip1``.

    ``features`` are the stride-16 features *without* the no-memory embedding; ``skip0`` and
    ``skip1`` (strides 4 and 8) have been through the mask decoder's 1x1 convolutions.
    """

    def __init__(self, sam2: Segmenter) -> None:
        super().__init__()
        self.vision_encoder = segmenter_family(sam2).vision_encoder(sam2)
        self.conv_s0 = sam2.mask_decoder.conv_s0
        self.conv_s1 = sam2.mask_decoder.conv_s1

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stride4, stride8, stride16 = self.vision_encoder(image).fpn_hidden_states
        return stride16, self.conv_s0(stride4), self.conv_s1(stride8)


class MaskHead(nn.Module):
    """Prompt encoder constants and mask decoder: what ``memorize`` and ``decode`` share."""

    image_position: Tensor

    def __init__(self, sam2: Segmenter) -> None:
        super().__init__()
        self.prompt_encoder = sam2.prompt_encoder
        self.mask_decoder = sam2.mask_decoder
        # Depends on the geometry only, so it is computed once and becomes a constant of the graph.
        position = sam2.get_image_wide_positional_embeddings().detach().clone()
        self.register_buffer("image_position", position, persistent=False)

    def forward(
        self, features: Tensor, skip0: Tensor, skip1: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Decode three candidates per structure.

        Parameters
        ----------
        features : nxCxhxw.
        skip0, skip1 : 1 or n times the stride-4 and stride-8 features.
        dense : 1 or n times the dense prompt embedding, broadcastable to ``features``.

        Returns
        -------
        logits : nx3x(S/4)x(S/4).
        iou : nx3, estimated in [0, 1].
        tokens : nx3xC, the decoder's mask tokens.
        object_score : nx1, a logit; positive means that the structure is there.
        """
        n = features.shape[0]
        # No click is given: SAM 2 then sees one empty point and one padding point.
        sparse = self.prompt_encoder.not_a_point_embed.weight.expand(n, 1, 2, -1)
        logits, iou, tokens, object_score = self.mask_decoder(
            image_embeddings=features,
            image_positional_embeddings=self.image_position.expand(n, -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
            high_resolution_features=[skip0, skip1],
        )
        return logits[:, 0], iou[:, 0], tokens[:, 0], object_score[:, 0]


def _pick(candidates: Tensor, best: Tensor) -> Tensor:
    """Return ``candidates[i, best[i]]`` for every row i."""
    rows = torch.arange(candidates.shape[0], device=candidates.device)
    return candidates[rows, best]


class Memorize(nn.Module):
    """Image features and given masks -> memory tokens and object pointers.

    ``masks`` is nx1xSxS with 0 and 1. An all-zero mask gives the memory of an absent structure, as
    SAM 2 does for an occluded object. The scale of the mask (20) and its bias (-10) are applied
    here, once.
    """

    def __init__(self, sam2: Segmenter, head: MaskHead) -> None:
        super().__init__()
        self.memory_encoder = sam2.memory_encoder
        self.to_tokens = segmenter_family(sam2).to_tokens(sam2)
        self.mask_downsample = sam2.mask_downsample
        self.object_pointer_proj = sam2.object_pointer_proj
        self.head = head
        self.no_object_pointer = sam2.no_object_pointer
        self.occlusion = sam2.occlusion_spatial_embedding_parameter
        self.scale = float(sam2.config.sigmoid_scale_for_mem_enc)
        self.bias = float(sam2.config.sigmoid_bias_for_mem_enc)

    def forward(
        self, features: Tensor, skip0: Tensor, skip1: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        features = features.expand(masks.shape[0], -1, -1, -1)
        present = (masks.flatten(1).amax(dim=1, keepdim=True) > 0).to(features.dtype)  # nx1

        memory, _ = self.memory_encoder(features, masks * self.scale + self.bias)
        if self.occlusion is not None:
            memory = memory + ((1 - present) * self.occlusion)[..., None, None]
        memories = self.to_tokens(memory)

        dense = self.head.prompt_encoder.mask_embed(self.mask_downsample(masks))
        _, iou, tokens, object_score = self.head(features, skip0, skip1, dense)
        pointer = self.object_pointer_proj(_pick(tokens, iou.argmax(dim=-1)))
        seen = present * (object_score > 0).to(features.dtype)
        pointers = seen * pointer + (1 - seen) * self.no_object_pointer
        return memories, pointers


def _sine_encoding(time: Tensor, channels: int) -> Tensor:
    """1-D sine/cosine encoding of ``time`` (...), as ``get_1d_sine_pe``: (...)x``channels``."""
    half = channels // 2
    index = torch.arange(half, dtype=torch.float32, device=time.device)
    period = 10000.0 ** (2 * (index // 2) / half)
    angle = time[..., None] / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Attend(nn.Module):
    """SAM 2's memory attention: the query's features, conditioned on what was recalled.

    Exemplars are conditioning frames, so all take the temporal position of one
    (``memory_temporal_positional_encoding[-1]``). Object pointers, if used, are split into tokens
    of the memory's width that rotary encoding leaves alone. ``cos`` and ``sin`` (hw)x(D/2) turn
    queries, ``key_cos`` and ``key_sin`` Tx(D/2) the keys of one memory.
    """

    image_position: Tensor
    memory_position: Tensor
    cos: Tensor
    sin: Tensor
    key_cos: Tensor
    key_sin: Tensor

    def __init__(self, sam2: Segmenter, object_pointers: bool = True) -> None:
        super().__init__()
        config = sam2.config
        self.family = segmenter_family(sam2)
        self.memory_attention = self.family.memory_attention(sam2)
        self.temporal = sam2.memory_temporal_positional_encoding
        self.time_projection = sam2.temporal_positional_encoding_projection_layer
        self.has_pointer_time = bool(config.enable_temporal_pos_encoding_for_object_pointers)
        self.object_pointers = object_pointers
        self.splits = sam2.hidden_dim // sam2.mem_dim
        h, w = sam2.backbone_feature_sizes[-1]
        image = sam2.vision_encoder.neck.position_encoding(
            (1, sam2.hidden_dim, h, w), "cpu", torch.float32
        )
        self.register_buffer("image_position", image.flatten(2).permute(2, 0, 1), persistent=False)
        self.register_buffer("memory_position", self.family.memory_position(sam2), persistent=False)
        attention = sam2.memory_attention
        cos, sin = rotation(attention, attention.position_ids)
        key_cos, key_sin = self.family.key_rotation(sam2)
        tables = {"cos": cos, "sin": sin, "key_cos": key_cos, "key_sin": key_sin}
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(
        self,
        features: Tensor,
        memories: Tensor,
        pointers: Tensor | None = None,
        pointer_time: Tensor | None = None,
    ) -> Tensor:
        n, k, tokens, width = memories.shape
        height, breadth = features.shape[-2:]
        query = features.flatten(2).permute(2, 0, 1).expand(-1, n, -1)
        memory = memories.reshape(n, k * tokens, width)
        position = (self.memory_position + self.temporal[-1]).repeat(n, k, 1)
        count = 0
        if self.object_pointers and pointers is not None and pointer_time is not None:
            vectors, times = self.pointer_tokens(pointers, pointer_time)
            memory = torch.cat([memory, vectors], dim=1)
            position = torch.cat([position, times], dim=1)
            count = k * self.splits
        conditioned = self.memory_attention(
            current_vision_features=query,
            current_vision_position_embeddings=self.image_position,
            memory=memory.transpose(0, 1),
            memory_posision_embeddings=position.transpose(0, 1),
            num_object_pointer_tokens=count,
        )
        # The model returns 1 x n x hw x C: it keeps an axis for prompts and one for time.
        conditioned = conditioned.reshape(n, height * breadth, -1).transpose(1, 2)
        out: Tensor = conditioned.reshape(n, -1, height, breadth)
        return out

    def pointer_tokens(self, pointers: Tensor, pointer_time: Tensor) -> tuple[Tensor, Tensor]:
        """Split pointers nxkxC into tokens of the memory's width, and encode their times nxk.

        Returns
        -------
        tokens, positions : each nx(k*splits)x64.
        """
        n, k, channels = pointers.shape
        width = channels // self.splits
        if self.has_pointer_time:
            time = self.time_projection(_sine_encoding(pointer_time, channels))
        else:  # SAM 2.0: pointers have no time; the input stays, so that all graphs have it
            time = pointer_time[..., None].expand(-1, -1, width) * 0.0
        time = time[:, :, None].expand(-1, -1, self.splits, -1)
        shape = (n, k * self.splits, width)
        return pointers.reshape(shape), time.reshape(shape)


class Decode(nn.Module):
    """SAM 2's mask decoder on conditioned features: the best of three masks by IoU estimate.

    ``logits`` are those of the decoder; SAM 2's replacement by -1024 where ``object_score`` is
    negative is left to the caller, who also wants to know what the mask would have been.
    """

    def __init__(self, head: MaskHead) -> None:
        super().__init__()
        self.head = head

    def candidates(
        self, conditioned: Tensor, skip0: Tensor, skip1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return all three masks nx3x(S/4)x(S/4), their IoU estimates nx3, object score n."""
        dense = self.head.prompt_encoder.no_mask_embed.weight[..., None, None]
        logits, iou, _, object_score = self.head(conditioned, skip0, skip1, dense)
        return logits, iou, object_score[:, 0]

    def forward(
        self, conditioned: Tensor, skip0: Tensor, skip1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, iou, object_score = self.candidates(conditioned, skip0, skip1)
        best = iou.argmax(dim=-1)
        return _pick(logits, best), _pick(iou, best), object_score


def build_graphs(
    sam2: Segmenter,
    dinov2: Embedder,
    *,
    object_pointers: bool = True,
) -> dict[str, nn.Module]:
    """Return the five modules by graph name. They share the models' parameters."""
    head = MaskHead(sam2)
    return {
        "embed": Embed(dinov2),
        "encode": Encode(sam2),
        "memorize": Memorize(sam2, head),
        "attend": Attend(sam2, object_pointers),
        "decode": Decode(head),
    }


def read_geometry(sam2: Segmenter, dinov2: Embedder, *, embed_size: int) -> Geometry:
    """Derive a bundle's geometry from the models' configurations."""
    channels = int(sam2.hidden_dim)
    size: Any = sam2.config.image_size  # one number in every SAM 2; pairs are allowed by type only
    tokens, grid = segmenter_family(sam2).memory_shape(sam2)
    return Geometry(
        image_size=int(size),
        embed_size=embed_size,
        embedding_dim=_width(dinov2, embed_size),
        channels=channels,
        feature_size=int(sam2.backbone_feature_sizes[-1][0]),
        skip0_channels=channels // 8,
        skip1_channels=channels // 4,
        memory_dim=int(sam2.mem_dim),
        tokens=tokens,
        memory_grid=grid,
    )


def _width(embedder: Embedder, size: int) -> int:
    with torch.inference_mode():
        return int(pooled(embedder, torch.zeros(1, 3, size, size)).shape[1])
