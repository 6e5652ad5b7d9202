"""Families of generated anatomy: label maps that stand for what doctors and biologists annotate.

A family turns a `Source` of random numbers into label maps and says which unions of labels are
structures worth asking for. It knows nothing of intensities; `rendering` paints the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recallseg.export.demo_model.fields import Source, per_seed

__all__ = ["FAMILIES", "Anatomy"]


@dataclass(frozen=True)
class Anatomy:
    """Label maps of ``T`` tasks and how they want to be painted.

    Attributes
    ----------
    labels
        ``T x M x S x S``, int64, 0 is the background.
    structures
        Unions of labels that may be asked for.
    colour
        Probability that a task of this family is painted in colour.
    contrast
        Range of the spread of intensities between labels (1: full range).
    blank
        Probability that the background is truly empty.
    turns
        True where orientation carries no meaning (cells): each subject is turned at will.
    alike
        Labels that are likely to be painted alike, as pairs (copy, of).
    """

    labels: Tensor
    structures: tuple[tuple[int, ...], ...]
    colour: float = 0.1
    contrast: tuple[float, float] = (0.5, 1.0)
    blank: float = 0.5
    turns: bool = False
    alike: tuple[tuple[int, int], ...] = ()


def _mirrored(source: Source, centre: Tensor, axes: Tensor, angle: Tensor) -> Tensor:
    """Level of an ellipse and its mirror image about the vertical midline."""
    flip = torch.tensor([-1.0, 1.0], device=source.device)
    left = source.ellipse(centre, axes, angle)
    right = source.ellipse(centre * flip, axes, -angle)
    return torch.maximum(left, right)


def _outline(source: Source, low: float, high: float, rough: float, vary: float = 0.05) -> Tensor:
    """Level of a large, centred, irregular body: positive inside, relative to its radius.

    ``vary`` is how much its size differs between subjects, or between the slices of a volume.
    """
    axes = source.uniform(low, high, 1, 2) - vary * source.normal(1).abs()
    axes = (axes + 0.03 * source.normal(2)).clamp(min=0.25)
    centre = 0.06 * source.normal(2)
    angle = 0.15 * source.normal()
    body = source.ellipse(centre, axes, angle, power=2.0 + 0.5 * source.integer(0, 2))
    return body + rough * source.field(4)


def brain(source: Source) -> Anatomy:
    """A head in section: scalp, skull, fluid, folded grey band, white matter, deep nuclei."""
    head = _outline(source, 0.75, 0.97, 0.03, vary=0.15)
    stripped = source.chance(0.5, 1, 1, 1)
    scalp = torch.where(stripped, 0.0, source.uniform(0.02, 0.09, 1, 1, 1))
    skull = scalp + torch.where(stripped, 0.0, source.uniform(0.03, 0.09, 1, 1, 1))
    fluid = skull + source.uniform(0.0, 0.05, 1, 1, 1) + 0.01 * source.field(5)
    surface = head - fluid

    cells = source.integer(8, 22)
    # The gradient of this noise is about 0.6 * cells per unit length, so that the ridge distance
    # below is in coordinate units and the grey band has the same width along every fold.
    ridge = source.field(cells).abs() / (0.6 * cells)
    depth = source.uniform(0.15, 0.7, 1, 1, 1) + 0.08 * source.field(5)
    ridge = ridge + (surface - depth).clamp(min=0.0) * 2.0
    midline = (source.x + 0.03 * source.field(3)).abs()
    callosum = source.uniform(0.1, 0.5, 1, 1, 1)
    midline = midline + (callosum - (source.y - 0.1 * source.normal(1, 1)).abs()).clamp(min=0) * 3
    inner = torch.minimum(torch.minimum(surface, ridge), midline)
    gap = (source.uniform(-0.01, 0.02, 1, 1, 1) + 0.008 * source.field(8)).clamp(min=-0.01)
    band = source.uniform(0.03, 0.09, 1, 1, 1) * (1.0 + 0.15 * source.field(6))

    labels = torch.zeros_like(head, dtype=torch.int64)
    labels[head > 0] = 1
    labels[head > scalp] = 2
    labels[head > skull] = 3
    labels[(surface > 0) & (inner > gap)] = 4
    labels[(surface > 0) & (inner > gap + band)] = 5

    for label in (7, 8, 9):
        centre = source.uniform(-0.3, 0.3, 1, 2) + 0.02 * source.normal(2)
        centre = torch.stack([centre[..., 0].abs() + 0.06, centre[..., 1]], dim=-1)
        axes = source.uniform(0.04, 0.15, 1, 2) * (1.0 + 0.25 * source.normal(1))
        # Sections beyond a nucleus do not show it: a negative size would turn it inside out.
        axes = axes.clamp(min=0.005)
        angle = source.uniform(-1.0, 1.0, 1) + 0.1 * source.normal()
        level = _mirrored(source, centre, axes, angle)
        labels[(level + 0.12 * source.field(10) > 0) & (labels >= 4)] = label

    centre = torch.cat([source.uniform(0.04, 0.14, 1, 1), source.uniform(-0.25, 0.25, 1, 1)], -1)
    axes = torch.cat([source.uniform(0.03, 0.1, 1, 1), source.uniform(0.1, 0.3, 1, 1)], dim=-1)
    axes = (axes * (1.0 + 0.35 * source.normal(1))).clamp(min=0.005)
    level = _mirrored(source, centre + 0.02 * source.normal(2), axes, 0.3 * source.normal())
    labels[(level + 0.15 * source.field(7) > 0) & (labels >= 4)] = 6

    return Anatomy(
        labels,
        structures=(
            (4, 5, 6, 7, 8, 9), (3, 4, 5, 6, 7, 8, 9), (4,), (4,), (5,), (5,), (4, 7, 8, 9),
            (4, 7, 8, 9), (3, 6), (6,), (7,), (8,), (9,), (7,), (8,), (9,), (2,), (4, 5, 7, 8, 9),
        ),
        colour=0.0,
        contrast=(0.5, 1.0),
        blank=0.75,
        alike=((6, 3), (7, 4), (8, 4)),
    )  # fmt: skip


def organs(source: Source) -> Anatomy:
    """A body section with organs: blobs, rings with a lumen, a wall round the body."""
    body = _outline(source, 0.75, 1.1, 0.05, vary=0.1)
    labels = (body > 0).to(torch.int64)
    labels[body > source.uniform(0.04, 0.15, 1, 1, 1)] = 2
    structures: list[tuple[int, ...]] = [(1, 2), (1,)]
    label = 3
    for _ in range(source.integer(4, 7)):
        centre = source.uniform(-0.6, 0.6, 1, 2) + 0.06 * source.normal(2)
        axes = source.uniform(0.1, 0.38, 1, 2) * torch.exp(0.2 * source.normal(1))
        angle = source.uniform(0.0, math.pi, 1) + 0.2 * source.normal()
        level = source.ellipse(centre, axes, angle, power=2.0 + 0.5 * source.integer(0, 2))
        level = level + source.uniform(0.02, 0.25, 1, 1, 1) * source.field(source.integer(4, 9))
        inside = (level > 0) & (body > 0.05)
        labels[inside] = label
        wall = source.uniform(0.12, 0.4, 1, 1, 1)
        if source.integer(0, 2) == 0:
            labels[inside & (level > wall)] = label + 1
            structures += [(label,), (label + 1,), (label, label + 1)]
            label += 2
        else:
            structures.append((label,))
            label += 1
    return Anatomy(labels, tuple(structures), colour=0.15, contrast=(0.3, 1.0))


def tissue(source: Source) -> Anatomy:
    """Tissues told apart by intensity alone: their places differ from subject to subject."""
    classes = source.integer(3, 6)
    cells = source.integer(3, 12)
    fields = torch.stack([source.rough_field(cells, 3) for _ in range(classes)], dim=2)
    fields = fields + source.uniform(-0.4, 0.4, 1, classes, 1, 1)
    labels = fields.argmax(dim=2) + 1
    outside = _outline(source, 0.6, 1.3, 0.06) < 0
    labels[outside & source.chance(0.6, 1, 1, 1)] = 0
    return Anatomy(
        labels,
        tuple((label,) for label in range(1, classes + 1)),
        colour=0.3,
        contrast=(0.4, 1.0),
        blank=0.7,
        turns=bool(source.integer(0, 1)),
    )


def small(source: Source) -> Anatomy:
    """Many small things of low contrast in a body; one of them (or one pair) is meant."""
    body = _outline(source, 0.6, 1.0, 0.04)
    labels = (body > 0).to(torch.int64)
    structures: list[tuple[int, ...]] = []
    count = source.integer(6, 10)
    drift = 0.05 * source.normal(2)
    for label in range(2, count + 2):
        centre = source.uniform(-0.5, 0.5, 1, 2) + drift + 0.02 * source.normal(2)
        axes = source.uniform(0.035, 0.13, 1, 2) * torch.exp(0.15 * source.normal(1))
        angle = source.uniform(0.0, math.pi, 1) + 0.15 * source.normal()
        if source.integer(0, 2) == 0:
            level = _mirrored(source, centre, axes, angle)
        else:
            level = source.ellipse(centre, axes, angle)
        level = level + 0.15 * source.field(12)
        labels[(level > 0) & (body > 0)] = label
        structures.append((label,))
    return Anatomy(labels, tuple(structures), colour=0.1, contrast=(0.2, 0.7))


def vessels(source: Source) -> Anatomy:
    """Thin winding and branching lines of two kinds, with taper and gaps."""
    labels = torch.ones_like(source.field(3), dtype=torch.int64)
    outside = _outline(source, 0.7, 1.3, 0.05) < 0
    for label in (2, 3):
        width = source.uniform(0.008, 0.035, 1, 1, 1) * torch.exp(0.4 * source.field(4))
        if source.integer(0, 1) == 0:
            cells = source.integer(4, 9)
            line = source.rough_field(cells, 2).abs() / (0.8 * cells)
        else:
            seeds = source.seeds(source.integer(4, 8), 0.35)
            stretch = source.uniform(0.7, 1.4)
            first, second, _ = source.nearest_seeds(seeds, stretch=stretch, bend=0.06)
            line = (second - first) * 0.5
        gaps = source.field(source.integer(3, 6)) > source.uniform(-1.2, 0.4, 1, 1, 1)
        labels[(line < width) & gaps] = label
    if source.integer(0, 1) == 0:
        labels[source.field(3) > 1.0] = 4
    labels[outside & source.chance(0.6, 1, 1, 1)] = 0
    return Anatomy(
        labels, ((2,), (3,), (2, 3), (2,), (3,), (4,)), colour=0.35, contrast=(0.4, 1.0), turns=True
    )


def cells(source: Source) -> Anatomy:
    """Cells with nuclei: two kinds of nucleus, cytoplasm, matrix, debris."""
    seeds = source.seeds(source.integer(4, 11), source.integer(1, 3) * 0.15)
    pitch = 2.4 / math.sqrt(seeds.shape[2])
    first, second, index = source.nearest_seeds(
        seeds, stretch=source.uniform(0.7, 1.4), bend=source.integer(0, 2) * 0.1 * pitch
    )
    count = seeds.shape[2]
    radius = source.uniform(0.2, 0.42, 1, 1) * torch.exp(0.2 * source.own_normal(count)) * pitch
    kind = source.own_uniform(0.0, 1.0, count)
    share = source.uniform(0.2, 0.8, 1, 1)
    absent = source.uniform(0.0, 0.4, 1, 1)
    kind = torch.where(kind < absent, 0, torch.where(kind < absent + (1 - absent) * share, 1, 2))
    kind_size = torch.where(kind == 2, source.uniform(0.6, 1.2, 1, 1), 1.0)
    level = per_seed(radius * kind_size, index) - first + 0.02 * pitch * source.field(24)
    kind_map = per_seed(kind, index)

    labels = torch.ones_like(first, dtype=torch.int64)
    if source.integer(0, 2) > 0:
        reach = source.uniform(0.1, 0.6, 1, 1, 1) * pitch
        edge = source.uniform(0.02, 0.12, 1, 1, 1) * pitch
        body = (level > -reach) & (second - first > edge) & (kind_map > 0)
        labels[body] = 4
        labels[body & (kind_map == 2)] = 4 + source.integer(0, 1)
    labels[(level > 0) & (kind_map == 1)] = 2
    labels[(level > 0) & (kind_map == 2)] = 3
    if source.integer(0, 1) == 0:
        labels[source.field(source.integer(3, 6)) > 1.1] = 6
    if source.integer(0, 2) == 0:
        labels[source.field(32) > 2.2] = 7
    return Anatomy(
        labels,
        ((2,), (3,), (2, 3), (2, 3), (4, 5), (4,), (2, 4), (6,), (2,), (3,), (2, 3, 4, 5)),
        colour=0.6,
        contrast=(0.4, 1.0),
        blank=0.3,
        turns=True,
    )


def membranes(source: Source) -> Anatomy:
    """Packed cells as in electron microscopy: membranes, interiors, organelles."""
    seeds = source.seeds(source.integer(4, 10), 0.3)
    pitch = 2.4 / math.sqrt(seeds.shape[2])
    first, second, index = source.nearest_seeds(
        seeds, stretch=source.uniform(0.6, 1.6), bend=0.22 * pitch
    )
    width = source.uniform(0.012, 0.04, 1, 1, 1)
    gap = (second - first) * 0.5 / width + 0.25 * source.field(16)
    kind = (source.own_uniform(0.0, 1.0, seeds.shape[2]) < source.uniform(0.0, 0.5, 1, 1)).long()
    labels = per_seed(kind, index) + 1
    organelle = source.field(source.integer(9, 16)) - source.uniform(1.1, 1.9, 1, 1, 1)
    labels[(organelle > 0) & (gap > 2.0)] = 4
    labels[(organelle > 0) & (organelle < source.uniform(0.1, 0.4, 1, 1, 1)) & (gap > 2.0)] = 5
    labels[gap < 1.0] = 3
    return Anatomy(
        labels,
        ((3,), (3,), (4, 5), (4, 5), (1, 2), (2,), (1, 2, 4, 5)),
        colour=0.05,
        contrast=(0.4, 1.0),
        blank=0.0,
        turns=True,
    )


def lesions(source: Source) -> Anatomy:
    """An organ with lesions that lie elsewhere in each subject, among other spots."""
    body = _outline(source, 0.6, 1.0, 0.05)
    labels = (body > 0).to(torch.int64)
    inner = source.field(source.integer(3, 6))
    labels[(body > 0.1) & (inner > 0.3)] = 2
    for _ in range(source.integer(0, 2)):
        centre = source.uniform(-0.4, 0.4, 1, 2) + 0.05 * source.normal(2)
        level = source.ellipse(centre, source.uniform(0.1, 0.3, 1, 2), source.normal())
        labels[(level + 0.1 * source.field(6) > 0) & (body > 0)] = 5
    for label in (4, 3):
        if source.integer(0, 1) == 0:
            spots = source.field(source.integer(5, 14), own=True)
            spots = spots - source.uniform(1.2, 2.2, 1, 1, 1) - 0.3 * source.own_normal(1, 1)
        else:
            centre = 0.4 * source.own_normal(2)
            axes = source.own_uniform(0.06, 0.3, 2)
            spots = source.ellipse(centre, axes, 3.0 * source.own_normal())
            spots = spots + 0.25 * source.rough_field(7, own=True)
        labels[(spots > 0) & (body > 0.03)] = label
    return Anatomy(
        labels,
        ((3,), (3,), (4,), (3, 4), (1, 2, 3, 4, 5), (5,)),
        colour=0.3,
        contrast=(0.3, 1.0),
    )


def layers(source: Source) -> Anatomy:
    """Stacked wavy layers: retina, skin, vessel wall."""
    count = source.integer(4, 8)
    shift = 0.25 * source.field(3)[..., :1, :] + 0.08 * source.field(6)[..., :1, :]
    height = source.y + shift + 0.15 * source.normal(1, 1)
    if source.integer(0, 2) == 0:
        centre = 0.1 * source.normal(2)
        height = source.uniform(-0.6, 0.1, 1, 1, 1) + 1.5 * (
            1.0 - source.ellipse(centre, torch.ones_like(centre), source.normal())
        )
        height = height + 0.08 * source.field(4)
    thickness = source.uniform(0.04, 0.3, 1, count, 1, 1)
    labels = torch.zeros_like(source.field(3), dtype=torch.int64)
    edge = source.uniform(-0.7, -0.2, 1, 1, 1).expand(-1, source.subjects, 1, 1)
    for label in range(1, count + 1):
        labels[height > edge] = label
        edge = edge + thickness[:, :, label - 1] * torch.exp(0.25 * source.field(3)[..., :1, :])
    structures = [(label,) for label in range(1, count + 1)]
    return Anatomy(labels, tuple(structures), colour=0.15, contrast=(0.4, 1.0), blank=0.3)


FAMILIES: dict[str, Callable[[Source], Anatomy]] = {
    "brain": brain,
    "organs": organs,
    "tissue": tissue,
    "small": small,
    "vessels": vessels,
    "cells": cells,
    "membranes": membranes,
    "lesions": lesions,
    "layers": layers,
}
"""Every family by its name; `tasks` draws from them, each with a floor of its own."""
