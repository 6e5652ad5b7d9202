"""What the segmenter is trained on: masks, its own estimate of their quality, and presence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "SegmentationLoss",
    "appearance_loss",
    "coarse_loss",
    "hard_dice",
    "mask_loss",
    "segmentation_loss",
]

# Pixels (at a quarter of the image size) added to both sides of the Dice ratio: keeps it finite
# for an absent structure and makes a few false pixels there cost something, but not everything.
DICE_SMOOTHING = 4.0


@dataclass(frozen=True)
class SegmentationLoss:
    """Loss of one step and what was seen on the way.

    Attributes
    ----------
    total
        Scalar to minimise.
    dice
        ``n`` Dice of the mask that deployment would pick (highest IoU estimate), detached.
    """

    total: Tensor
    dice: Tensor


def hard_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Dice of thresholded masks over the last two axes; 1 where both are empty."""
    found, wanted = logits > 0, target > 0.5
    overlap = (found & wanted).flatten(-2).sum(-1)
    total = found.flatten(-2).sum(-1) + wanted.flatten(-2).sum(-1)
    return torch.where(total > 0, 2.0 * overlap / total.clamp(min=1), 1.0)


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Dice plus cross-entropy per mask over the last two axes; soft targets are welcome."""
    found = logits.sigmoid()
    overlap = (found * target).flatten(-2).sum(-1)
    total = (found.square() + target.square()).flatten(-2).sum(-1)
    dice = 1.0 - (2.0 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)
    cross = F.binary_cross_entropy_with_logits(logits, target.expand_as(logits), reduction="none")
    return dice + 2.0 * cross.flatten(-2).mean(-1)


def segmentation_loss(
    logits: Tensor, iou: Tensor, object_score: Tensor, masks: Tensor, weights: Tensor
) -> SegmentationLoss:
    """Compare three candidates per structure with the truth.

    Parameters
    ----------
    logits
        ``n x 3 x S/4 x S/4``.
    iou
        ``n x 3`` estimated IoU in 0..1.
    object_score
        ``n`` logits for the structure being there.
    masks
        ``n x S x S``, 0 or 1.
    weights
        ``n``; 0 leaves a sample out.
    """
    target = F.avg_pool2d(masks[:, None], 4)
    losses = mask_loss(logits, target)
    best = losses.argmin(dim=1)
    rows = torch.arange(len(best), device=best.device)
    # The best candidate is judged on a finer grid, so that the logits, enlarged bilinearly as in
    # deployment, put thin things and edges where they are within a pixel of the small grid.
    fine = F.interpolate(logits[rows, best][:, None], scale_factor=2.0, mode="bilinear")
    best_loss = mask_loss(fine, F.avg_pool2d(masks[:, None], 2))[:, 0]

    with torch.no_grad():
        dice = hard_dice(logits, target)
        actual_iou = dice / (2.0 - dice)
        picked = dice[rows, iou.argmax(dim=1)]
        present = (masks.flatten(1).amax(dim=1) > 0).float()
    quality = (iou - actual_iou).abs().mean(dim=1)
    presence = F.binary_cross_entropy_with_logits(object_score, present, reduction="none")
    sample = best_loss + 0.1 * losses.mean(dim=1) + 0.5 * quality + 0.5 * presence
    total = (sample * weights).sum() / weights.sum().clamp(min=1.0)
    return SegmentationLoss(total=total, dice=picked)


def coarse_loss(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Loss of a coarse mask ``n x h x w`` read straight from the conditioned features."""
    stride = masks.shape[-1] // logits.shape[-1]
    losses = mask_loss(logits, F.avg_pool2d(masks[:, None], stride)[:, 0])
    return (losses * weights).sum() / weights.sum().clamp(min=1.0)


def appearance_loss(found: Tensor, images: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Loss of knowing what the structure and its surroundings look like, place by place.

    Whether a structure is brighter or darker than what is round it changes from task to task and
    can only be learnt from the exemplars. Without being asked for it, the conditioned features
    carry where a structure is long before they carry how it looks, and masks stay as coarse as
    the features.

    Parameters
    ----------
    found
        ``n x 6 x h x w``: colour of the structure, then of its surroundings.
    images, masks
        ``n x 3 x S x S`` and ``n x S x S``.
    weights
        ``n``; 0 leaves a sample out.
    """
    stride = masks.shape[-1] // found.shape[-1]

    def near(values: Tensor) -> Tensor:
        # Surroundings reach two features far.
        return F.avg_pool2d(F.avg_pool2d(values, stride), 5, stride=1, padding=2)

    part = torch.stack([masks, 1.0 - masks], dim=1)
    shares = near(part)
    sums = torch.cat([near(images * part[:, :1]), near(images * part[:, 1:])], dim=1)
    wanted = sums / shares.clamp(min=1e-3).repeat_interleave(3, dim=1)
    valid = (shares > 0.01).all(dim=1, keepdim=True).float()
    error = F.smooth_l1_loss(found, wanted, reduction="none").mean(dim=1, keepdim=True)
    each = (error * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1.0)
    return (each * weights).sum() / weights.sum().clamp(min=1.0)
