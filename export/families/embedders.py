"""Networks that make one vector of an image: what tells them apart.

An embedder is any model of ``transformers`` whose output has a ``pooler_output`` BxD. Two families
are built in, for the sake of random weights and of forms that variants have of their own: DINOv2
and DINOv3. Any other comes with its folder, which says what it is (:mod:`..checkpoints.embedders`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Model, Dinov2WithRegistersModel

from recallseg.engines.errors import ExportError

__all__ = ["EMBED_SIZE", "EmbedderFamily", "embedder_family", "pooled"]

EMBED_SIZE = 224


@dataclass(frozen=True)
class EmbedderFamily:
    """What differs between embedders; the callables take the model.

    Attributes
    ----------
    name : for programs.
    step : side in pixels of which images must be a multiple, None if they have one size.
    usual : side in pixels unless another is asked for.
    fix : makes constants of what depends on the size, in place.
    has_cuda_form : whether variant ``ort-cuda`` knows its layers.
    """

    name: str
    step: Callable[[Any], int | None]
    usual: Callable[[Any], int]
    fix: Callable[[Any, int], None]
    has_cuda_form: bool = False

    def size(self, model: Any, asked: int | None) -> int:
        """Return the side of the image: the usual or the asked one, if the model can take it."""
        step, usual = self.step(model), self.usual(model)
        size = usual if asked is None else asked
        if step is None and size != usual:
            raise ExportError(
                f"this embedder takes images of {usual} px and no others, not {size}."
            )
        if step is not None and (size < step or size % step):
            raise ExportError(
                f"the embedding size must be a multiple of the embedder's patch of {step} px, got "
                f"{size}. Try {max(1, round(size / step)) * step}."
            )
        return size


def pooled(model: Any, image: Tensor) -> Tensor:
    """Return the one vector BxD that a model makes of an image, not yet of unit length."""
    found = getattr(model(image), "pooler_output", None)
    if found is None:
        raise ExportError(f"{type(model).__name__} has no pooled output: it cannot be an embedder.")
    out: Tensor = found.flatten(1)
    return out


def _fix_dinov2(model: Any, size: int) -> None:
    """Interpolate the positional embedding here, so that no exporter has to (pitfall 9)."""
    embeddings = model.embeddings
    patches = (size // int(model.config.patch_size)) ** 2
    template = torch.zeros(1, patches + 1, model.config.hidden_size)
    with torch.no_grad():
        fixed = embeddings.interpolate_pos_encoding(template, size, size)
    embeddings.position_embeddings = nn.Parameter(fixed.clone(), requires_grad=False)


DINOV2_FAMILY = EmbedderFamily(
    name="dinov2",
    step=lambda model: int(model.config.patch_size),
    usual=lambda model: min(EMBED_SIZE, int(model.config.image_size)),
    fix=_fix_dinov2,
    has_cuda_form=True,
)

DINOV3_FAMILY = EmbedderFamily(  # rotary positions, or none: any multiple of the patch
    name="dinov3",
    step=lambda model: int(getattr(model.config, "patch_size", 32)),
    usual=lambda model: EMBED_SIZE,
    fix=lambda model, size: None,
)

OTHER = EmbedderFamily(
    name="other",
    step=lambda model: None,
    usual=lambda model: int(model.recallseg_size),
    fix=lambda model, size: None,
)


def embedder_family(model: Any) -> EmbedderFamily:
    """Return the family of a loaded model."""
    if isinstance(model, (Dinov2Model, Dinov2WithRegistersModel)):
        return DINOV2_FAMILY
    if str(getattr(model.config, "model_type", "")).startswith("dinov3"):
        return DINOV3_FAMILY
    return OTHER
