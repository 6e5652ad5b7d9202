"""Whose weights are these? Marks by which a file's tensors tell the family, ours or not."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

__all__ = ["MODEL_TYPES", "families_in", "said_of"]

Mark = Callable[[Collection[str]], bool]


def _starts(*prefixes: str) -> Mark:
    return lambda names: any(name.startswith(prefixes) for name in names)


def _hiera(names: Collection[str]) -> bool:
    return "image_encoder.trunk.pos_embed_window" in names


def _plain_trunk(names: Collection[str]) -> bool:
    return "image_encoder.trunk.pos_embed" in names and not _hiera(names)


_MARKS: tuple[tuple[str, Mark], ...] = (
    ("SAM 2", _hiera),
    ("EdgeTAM", _starts("spatial_perceiver.", "image_encoder.trunk.body.")),
    ("EfficientTAM", _plain_trunk),
    ("SAM 3", _starts("detector.", "tracker.", "detector_model.", "tracker_model.")),
    ("the first SAM", _starts("image_encoder.blocks.", "image_encoder.patch_embed.")),
    ("DINOv3", _starts("storage_tokens", "rope_embed.")),
    ("DINOv2", lambda names: "pos_embed" in names and "blocks.0.norm1.weight" in names),
)

MODEL_TYPES = {
    "sam": "the first SAM",
    "sam3": "SAM 3",
    "sam3_video": "SAM 3",
    "sam3_tracker": "SAM 3",
    "sam3_tracker_video": "SAM 3",
    "edgetam": "EdgeTAM for images, without its memory",
    "edgetam_video": "EdgeTAM",
    "sam2": "SAM 2",
    "sam2_video": "SAM 2",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2",
    "dinov3_vit": "DINOv3",
    "dinov3_convnext": "DINOv3",
}
"""Families by what ``config.json`` calls them, where that is not plain."""


def families_in(tensors: Any) -> tuple[str, ...]:
    """Return the families whose marks are among the names of a file's tensors."""
    names = set(tensors)
    return tuple(family for family, mark in _MARKS if mark(names))


def said_of(tensors: Any) -> str:
    """Return what a message says of a file that is not of the family that was expected."""
    found = families_in(tensors)
    first = ", ".join(repr(name) for name in list(tensors)[:3])
    if len(found) > 1:
        return f"it mixes tensors of {' and '.join(found)}"
    if found:
        return f"it is one of {found[0]}"
    return f"its first tensors are {first}"
