"""The optional graph ``correct`` as a PyTorch module: a mask decoder that heeds a person."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from recallseg.engines.bundle import Weights
from recallseg.engines.errors import CheckpointError, ExportError
from recallseg.export.checkpoints.digest import state_digest
from recallseg.export.families import Segmenter

__all__ = [
    "PRIOR_CLAMP",
    "Correct",
    "Corrector",
    "is_corrector",
    "load_corrector",
    "with_corrector",
]

PRIOR_CLAMP = 32.0
"""Logits of a mask before are held within +- this, as Meta's ``add_new_points_or_box`` does."""


@dataclass(frozen=True)
class Corrector:
    """A prompt encoder and mask decoder that were trained to be corrected, see ``with_corrector``.

    They decide neither embeddings nor memories nor what is proposed, so that the bundle's identity
    does not depend on them; the manifest states them as the weights ``corrector``.
    """

    tensors: Mapping[str, Tensor]
    weights: Weights


def load_corrector(path: Path, *, source: str, licence: str) -> Corrector:
    """Read a safetensors file of a corrector.

    Parameters
    ----------
    source, licence : see :class:`recallseg.engines.bundle.Weights`.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    try:
        tensors = {name: value.float() for name, value in load_file(path).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"the corrector {path} cannot be read: {error}.") from error
    return Corrector(tensors, Weights("corrector", source, state_digest(tensors), licence))


class Correct(nn.Module):
    """SAM 2's mask decoder with a person's prompts and the mask before them.

    Follows ``Sam2VideoModel._run_single_frame_inference(is_init_cond_frame=False)`` with
    ``point_inputs`` and ``prev_sam_mask_logits``, whose masks are here not replaced where
    ``object_score`` is negative:

    - one padding point is appended to the points (each further one would change the mask); a point
      labelled -1 is none, which is how no point at all is given: SAM 2 puts an empty one first;
    - with at most one real point it is the best of three masks by IoU estimate, otherwise the
      single mask, or the best of three where that is not stable;
    - a prior enters in the place of the "no mask" embedding, its logits within +-32, as Meta's
      predictor holds them.

    Parameters
    ----------
    sam2 : whose prompt encoder and mask decoder these are; they are shared, not copied.
    """

    image_position: Tensor

    def __init__(self, sam2: Segmenter) -> None:
        super().__init__()
        config = sam2.config
        if int(config.multimask_min_pt_num) != 0:
            raise ExportError("SAM 2 gives three masks for no point at all.")
        several = config.multimask_output_in_sam and config.multimask_output_for_tracking
        self.most_for_three = int(config.multimask_max_pt_num) if several else -1
        self.prompt_encoder = sam2.prompt_encoder
        decoder = sam2.mask_decoder
        self.delta = float(decoder.dynamic_multimask_stability_delta)
        self.threshold = float(decoder.dynamic_multimask_stability_thresh)
        if not decoder.dynamic_multimask_via_stability:
            self.threshold = -1.0  # any single mask is stable enough
        self.mask_decoder = copy.copy(decoder)  # of the object: its layers are the same ones
        self.mask_decoder.dynamic_multimask_via_stability = True
        self.mask_decoder._dynamic_multimask_via_stability = _all_masks
        position = sam2.get_image_wide_positional_embeddings().detach().clone()
        self.register_buffer("image_position", position, persistent=False)
        size: Any = sam2.prompt_encoder.input_image_size  # one number in every SAM 2
        self.size = float(size)

    def embed_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """Return the points' tokens and the padding's: nx(p+1)xC.

        Parameters
        ----------
        points : nxpx2, x and y in pixels, whose centres are at whole numbers.
        labels : nxp: 1 inside, 0 outside, 2 and 3 corners of a box, -1 none.
        """
        encoder = self.prompt_encoder
        position = encoder.shared_embedding((points + 0.5) / self.size)
        kinds = torch.arange(len(encoder.point_embed.weight), device=labels.device)
        kind = (labels[..., None] == kinds).to(points.dtype) @ encoder.point_embed.weight
        real = (labels >= 0)[..., None].to(points.dtype)
        none = encoder.not_a_point_embed.weight
        tokens = real * (position + kind) + (1 - real) * none
        return torch.cat([tokens, none[None].expand(len(points), -1, -1)], dim=1)

    def candidates(
        self,
        conditioned: Tensor,
        skip0: Tensor,
        skip1: Tensor,
        points: Tensor,
        point_labels: Tensor,
        prior: Tensor,
        has_prior: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the single mask and the three, nx4x(S/4)x(S/4), IoU estimates nx4, score n."""
        tokens = self.embed_points(points, point_labels)
        return self.decode(conditioned, skip0, skip1, tokens, prior, has_prior)

    def decode(
        self,
        conditioned: Tensor,
        skip0: Tensor,
        skip1: Tensor,
        tokens: Tensor,
        prior: Tensor,
        has_prior: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same with points that were embedded."""
        n = len(conditioned)
        encoder = self.prompt_encoder
        dense = torch.where(
            has_prior[:, None, None, None],
            encoder.mask_embed(prior.clamp(-PRIOR_CLAMP, PRIOR_CLAMP)),
            encoder.no_mask_embed.weight[..., None, None],
        )
        self.mask_decoder.training = False  # there is no dropout in it, and all masks are wanted
        logits, iou, _, object_score = self.mask_decoder(
            image_embeddings=conditioned,
            image_positional_embeddings=self.image_position.expand(n, -1, -1, -1),
            sparse_prompt_embeddings=tokens[:, None],
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[skip0, skip1],
        )
        return logits[:, 0], iou[:, 0], object_score[:, 0, 0]

    def choose(self, logits: Tensor, iou: Tensor, labels: Tensor) -> Tensor:
        """Return which of the four masks is given: n."""
        single = logits[:, 0].flatten(1)
        # Counts as sums of fp32, which hold them exactly.
        surely = (single > self.delta).to(torch.float32).sum(dim=1)
        maybe = (single > -self.delta).to(torch.float32).sum(dim=1)
        stable = surely >= self.threshold * maybe
        few = (labels >= 0).to(torch.float32).sum(dim=1) <= self.most_for_three
        best = iou[:, 1:].argmax(dim=1) + 1
        return torch.where(stable & ~few, torch.zeros_like(best), best)

    def forward(
        self,
        conditioned: Tensor,
        skip0: Tensor,
        skip1: Tensor,
        points: Tensor,
        point_labels: Tensor,
        prior: Tensor,
        has_prior: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, iou, object_score = self.candidates(
            conditioned, skip0, skip1, points, point_labels, prior, has_prior
        )
        chosen = self.choose(logits, iou, point_labels)
        return _pick(logits, chosen), _pick(iou, chosen), object_score


def with_corrector(sam2: Segmenter, corrector: Mapping[str, Tensor] | None = None) -> Segmenter:
    """Return the model whose prompt encoder and mask decoder the graph ``correct`` is made of.

    Parameters
    ----------
    corrector : tensors of a prompt encoder and a mask decoder that were trained to be corrected, by
        their names in ``sam2``; they take the place of its own in a copy. None: ``sam2`` itself.

    Raises
    ------
    ExportError
        If those are not the tensors of such a prompt encoder and mask decoder.
    """
    if corrector is None:
        return sam2
    own = copy.deepcopy(sam2)
    state = own.state_dict()
    shapes = {name: value.shape for name, value in state.items() if is_corrector(name)}
    given = {name: value.shape for name, value in corrector.items()}
    if shapes != given:
        odd = sorted(name for name in {*shapes, *given} if shapes.get(name) != given.get(name))
        raise ExportError(
            "a corrector has the tensors of the model's prompt encoder and mask decoder; "
            f"{len(odd)} are missing, unknown or of another shape, the first is '{odd[0]}'."
        )
    own.load_state_dict({**state, **corrector})
    return own.eval()


def is_corrector(name: str) -> bool:
    """Tell whether a tensor of SAM 2 is one of those that ``correct`` may have of its own.

    ``encode`` has applied the decoder's 1x1 convolutions already.
    """
    part, _, rest = name.partition(".")
    return part in ("prompt_encoder", "mask_decoder") and not rest.startswith("conv_s")


def _all_masks(logits: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
    """Let the mask decoder give out all four masks: the choice among them is made behind it."""
    return logits, iou


def _pick(candidates: Tensor, best: Tensor) -> Tensor:
    return candidates[torch.arange(candidates.shape[0], device=candidates.device), best]
