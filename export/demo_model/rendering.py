"""Painting of label maps: what a scanner or a microscope would make of generated anatomy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recallseg.export.demo_model.families import Anatomy
from recallseg.export.demo_model.fields import Source

__all__ = ["IMAGE_MEAN", "IMAGE_STD", "normalise", "paint", "turn"]

# SAM 2 and DINOv2 share these (ImageNet); the deployed preprocessing applies the same.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def turn(source: Source, labels: Tensor, *, any_angle: bool) -> Tensor:
    """Place label maps anew: one view for the task, small differences between its subjects.

    Parameters
    ----------
    labels
        ``T x M x S x S``, int64.
    any_angle
        True where every subject may lie at an angle of its own.
    """
    tasks, subjects, size = source.tasks, source.subjects, source.size
    quarter = torch.pi / 2 * source.integer(0, 3)
    angle = quarter + 0.06 * source.normal() + 0.08 * source.own_normal()
    view = source.uniform(-0.25, 0.25, 1)
    angle = angle + torch.where(source.chance(0.3, 1), view, 0.0)
    if any_angle:
        angle = source.own_uniform(-torch.pi, torch.pi)
    zoom = torch.exp(source.uniform(-0.35, 0.15, 1) + 0.04 * source.own_normal())
    aspect = torch.exp(source.uniform(-0.15, 0.15, 1) + 0.02 * source.own_normal())
    flip = torch.where(source.chance(0.5, 1), -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    shift = source.uniform(-0.12, 0.12, 1, 2) + 0.03 * source.own_normal(2)
    rows = torch.stack(
        [
            torch.stack([flip * cos * zoom * aspect, -sin * zoom * aspect, shift[..., 0]], dim=-1),
            torch.stack([flip * sin * zoom / aspect, cos * zoom / aspect, shift[..., 1]], dim=-1),
        ],
        dim=-2,
    )
    grid = F.affine_grid(rows.flatten(0, 1), [tasks * subjects, 1, size, size], align_corners=False)
    if source.integer(0, 1):
        bend = source.own_normal(2 * 5, 5).view(-1, 2, 5, 5) * 0.03
        bend = F.interpolate(bend, size=(size, size), mode="bicubic")
        grid = grid + bend.permute(0, 2, 3, 1)
    # Scattered things go on as their mirror image past the edge; round a body lies background.
    padding = "reflection" if any_angle else "border"
    flat = labels.view(tasks * subjects, 1, size, size).float()
    moved = F.grid_sample(flat, grid, mode="nearest", padding_mode=padding, align_corners=False)
    return moved.view(tasks, subjects, size, size).round().long()


def _palette(source: Source, anatomy: Anatomy, count: int) -> tuple[Tensor, bool]:
    """Mean value of every label: ``T x M x count x channels`` in about 0..1."""
    colour = source.integer(0, 999) < 1000 * anatomy.colour
    tasks = source.tasks
    low, high = anatomy.contrast
    spread = source.uniform(low, high, 1, 1, 1)
    if not colour:
        means = source.uniform(0.0, 1.0, 1, count, 1)
        if source.integer(0, 1):
            # Evenly spaced values in random order: random ones alone often coincide.
            order = source.uniform(0.0, 1.0, 1, count).argsort(dim=-1).float()[..., None]
            means = (order + 0.6 * (means - 0.5)) / max(count - 1, 1)
    elif source.integer(0, 1):
        means = source.uniform(0.0, 1.0, 1, count, 3)
    else:
        # Two stains that absorb light, in random amounts for every label.
        stains = source.uniform(0.05, 1.0, 2, 3)
        amounts = source.uniform(0.0, 1.6, count, 2)
        means = torch.exp(-torch.bmm(amounts, stains))[:, None]
        if source.integer(0, 2) == 0:
            means = 1.0 - means
    means = means.mean(dim=2, keepdim=True) * (1.0 - spread) + means * spread
    for copy, original in anatomy.alike:
        same = source.chance(0.6, 1, 1)
        means[:, :, copy] = torch.where(same, means[:, :, original], means[:, :, copy])
    own = 0.03 * source.own_normal(count, means.shape[-1])
    means = means.expand(tasks, source.subjects, count, means.shape[-1]) + own * spread
    blank = source.chance(anatomy.blank, 1, 1)
    dark = torch.where(source.chance(0.8, 1, 1), 0.0, 1.0)
    means[:, :, 0] = torch.where(blank, dark, means[:, :, 0])
    return means, colour


def _lookup(table: Tensor, labels: Tensor) -> Tensor:
    """``T x M x L x C`` values at ``T x M x S x S`` labels: ``T x M x C x S x S``."""
    index = labels.flatten(2)[:, :, None].expand(-1, -1, table.shape[-1], -1)
    values = torch.gather(table.transpose(2, 3), 3, index)
    return values.reshape(*values.shape[:3], *labels.shape[2:])


def paint(source: Source, anatomy: Anatomy, labels: Tensor) -> Tensor:
    """Paint label maps.

    Returns
    -------
    Tensor
        ``T x M x 3 x S x S`` in 0..1; grey images repeat one channel and fill their 1st to 99th
        percentile, as the deployed preprocessing does.
    """
    size, count = source.size, 16
    means, colour = _palette(source, anatomy, count)
    image = _lookup(means, labels)

    amplitude = source.uniform(0.0, 0.12, 1, count, 1) * source.uniform(0.0, 1.0, 1, 1, 1)
    strong = source.chance(0.12, 1, count, 1)
    amplitude = torch.where(strong, amplitude + 0.15, amplitude)
    amplitude[:, :, 0] *= 0.3
    amplitude = amplitude.expand(-1, source.subjects, -1, -1)
    texture = source.grain(source.integer(size // 8, size // 2))
    if source.integer(0, 1):
        texture = texture + source.grain(source.integer(6, max(8, size // 8)))
    image = image + _lookup(amplitude, labels) * texture[:, :, None]

    # Partial volume: edges are mixtures of what they separate.
    flat = image.flatten(0, 1)
    for _ in range(source.integer(0, 2)):
        soft = F.avg_pool2d(flat, 3, stride=1, padding=1, count_include_pad=False)
        flat = flat + source.uniform(0.3, 1.0).mean() * (soft - flat)
    image = flat.view_as(image)

    if source.integer(0, 2):
        strength = 0.3 * source.uniform(0.0, 1.0, 1, 1, 1) ** 2
        image = image * torch.exp(strength * source.field(3, own=True))[:, :, None]
    gamma = torch.exp(source.uniform(-0.4, 0.4, 1, 1, 1, 1) + 0.08 * source.own_normal(1, 1, 1))
    image = image.clamp(0.0, 1.5).add(1e-4) ** gamma
    noise = source.uniform(0.0, 0.08, 1, 1, 1, 1) * source.uniform(0.0, 1.0, 1, 1, 1, 1)
    channels = image.shape[2] if source.integer(0, 1) else 1
    image = image + noise * source.own_normal(channels, size, size)
    if colour:
        gain = 1.0 + 0.05 * source.own_normal(3, 1, 1)
        return (image * gain).clamp(0.0, 1.0)
    return _window(image).expand(-1, -1, 3, -1, -1)


def _window(image: Tensor) -> Tensor:
    """Scale each image's 1st to 99th percentile to 0..1 (estimated from every fourth pixel)."""
    sample = image[..., 1::4, 2::4].flatten(2)
    ordered = sample.sort(dim=-1).values
    last = ordered.shape[-1] - 1
    low = ordered[..., round(0.01 * last)][..., None, None, None]
    high = ordered[..., round(0.99 * last)][..., None, None, None]
    return ((image - low) / (high - low).clamp(min=1e-3)).clamp(0.0, 1.0)


def normalise(images: Tensor) -> Tensor:
    """From 0..1 to what the networks take (``... x 3 x S x S``)."""
    mean = torch.tensor(IMAGE_MEAN, device=images.device)[:, None, None]
    std = torch.tensor(IMAGE_STD, device=images.device)[:, None, None]
    return (images - mean) / std
