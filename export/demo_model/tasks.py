"""Tasks: what one training step or one held-out set is made of.

A task is a handful of subjects of one family, painted alike, with a few structures asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recallseg.export.demo_model.families import FAMILIES
from recallseg.export.demo_model.fields import Source, mixing_matrix
from recallseg.export.demo_model.rendering import normalise, paint, turn

__all__ = ["TaskBatch", "draw_families", "family_weights", "make_batch", "make_tasks"]

# A structure must cover this part of an image (of all its subjects together, on average) to be
# asked for: about 25 pixels at 256 x 256.
SMALLEST_PART = 4e-4
# It must be in this share of the subjects. The others are where "absent" is learnt.
PRESENT_SHARE = 0.45


@dataclass(frozen=True)
class TaskBatch:
    """Tasks of equal shape.

    Attributes
    ----------
    images
        ``T x M x 3 x S x S`` float32, normalised for the networks.
    masks
        ``T x M x P x S x S`` float32, 0 or 1.
    positions
        ``T x M`` places along the volume, 0..1; only meaningful where subjects are slices.
    families
        ``T`` names.
    """

    images: Tensor
    masks: Tensor
    positions: Tensor
    families: tuple[str, ...]


def _likeness(
    generator: torch.Generator, tasks: int, subjects: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw positions and how alike subjects are: independent, similar, or neighbouring slices."""
    device = generator.device
    draw = torch.rand(tasks, 5, generator=generator, device=device)
    # What is recalled is near: in a third of the tasks subjects lie as close along the body as the
    # slices of one volume, so that place tells more than looks.
    near = draw[:, 4:5] < 1 / 3
    spread = torch.where(near, 0.03 + 0.12 * draw[:, 0:1], 0.15 + 0.85 * draw[:, 0:1])
    positions = torch.rand(tasks, subjects, generator=generator, device=device)
    positions = 0.5 + spread * (positions - 0.5)
    kind = draw[:, 1]
    shared = torch.where(kind < 0.35, 0.9 * draw[:, 2], 0.3 * draw[:, 2])
    along = torch.where((kind > 0.4) | near[:, 0], (1.0 - shared) * (1.0 - 0.3 * draw[:, 3]), 0.0)
    return positions, shared, along


def _choose_structures(
    source: Source, labels: Tensor, structures: tuple[tuple[int, ...], ...], count: int
) -> Tensor:
    """Choose ``count`` structures per task among those that are there: ``T x count x 16``."""
    tasks, subjects = labels.shape[:2]
    member = torch.zeros(len(structures), 16, device=source.device)
    for row, group in enumerate(structures):
        member[row, list(group)] = 1.0
    counts = torch.zeros(tasks, subjects, 16, device=source.device)
    flat = labels.flatten(2)
    counts.scatter_add_(2, flat, torch.ones_like(flat, dtype=counts.dtype))
    part = counts @ member.T / flat.shape[2]
    present = (part > 0.3 * SMALLEST_PART).float().mean(dim=1)
    usable = (
        (part.mean(dim=1) > SMALLEST_PART) & (present > PRESENT_SHARE) & (part.mean(dim=1) < 0.9)
    )
    score = torch.rand(usable.shape, generator=source.generator, device=source.device)
    score = score + usable.float() * 2.0
    # A task in which nothing qualifies takes what covers most: its masks may be small, never none.
    score = score + part.mean(dim=1).clamp(max=0.9) * (~usable.any(dim=1, keepdim=True)).float() * 9
    chosen = score.argsort(dim=1, descending=True)
    fallback = chosen[:, :1].expand(-1, count)
    if len(structures) >= count:
        wanted = chosen[:, :count]
        good = torch.gather(usable, 1, wanted)
        chosen = torch.where(good, wanted, fallback)
    else:
        chosen = fallback
    return member[chosen]


def make_tasks(
    generator: torch.Generator,
    family: str,
    tasks: int,
    subjects: int,
    structures: int,
    size: int,
    *,
    likeness: tuple[Tensor, Tensor, Tensor] | None = None,
) -> TaskBatch:
    """Generate tasks of one family.

    Parameters
    ----------
    generator
        Decides every random number and, by its device, where the work is done.
    family
        A name in `FAMILIES`.
    tasks, subjects, structures, size
        ``T``, ``M``, ``P`` and ``S`` (pixels, even) of the result.
    likeness
        ``positions`` (``T x M``), ``shared`` (``T``), ``along`` (``T``) for `mixing_matrix`;
        drawn at random where left out.
    """
    drawn = _likeness(generator, tasks, subjects) if likeness is None else likeness
    positions, shared, along = drawn
    mixing = mixing_matrix(positions, shared=shared, along=along)
    source = Source(generator, mixing, size)
    anatomy = FAMILIES[family](source)
    labels = anatomy.labels
    if anatomy.turns or source.integer(0, 3):
        labels = turn(source, labels, any_angle=anatomy.turns)
    members = _choose_structures(source, labels, anatomy.structures, structures)
    images = paint(source, anatomy, labels)
    index = labels.flatten(1)[:, None].expand(-1, structures, -1)
    masks = torch.gather(members, 2, index).view(tasks, structures, subjects, size, size)
    return TaskBatch(
        images=normalise(images),
        masks=masks.transpose(1, 2),
        positions=positions,
        families=(family,) * tasks,
    )


def family_weights(scores: Mapping[str, float], floor: float) -> dict[str, float]:
    """Give hard families more room, and every family at least ``floor`` of an equal share.

    Parameters
    ----------
    scores
        A running Dice in 0..1 per family.
    """
    need = {name: 1.05 - min(max(scores.get(name, 0.0), 0.0), 1.0) for name in FAMILIES}
    total = sum(need.values())
    equal = 1.0 / len(FAMILIES)
    return {name: floor * equal + (1.0 - floor) * value / total for name, value in need.items()}


def draw_families(
    generator: torch.Generator, weights: Mapping[str, float], count: int
) -> list[str]:
    """Draw ``count`` families by weight, evenly (systematic sampling keeps a step's mix wide)."""
    names = list(weights)
    cumulative = torch.tensor([weights[name] for name in names], dtype=torch.float64).cumsum(0)
    start = torch.rand((), generator=generator, device=generator.device).cpu()
    points = (torch.arange(count) + start) / count * cumulative[-1]
    picks = torch.searchsorted(cumulative, points.to(torch.float64)).clamp(max=len(names) - 1)
    return [names[int(pick)] for pick in picks]


def make_batch(
    generator: torch.Generator,
    families: list[str],
    subjects: int,
    structures: int,
    size: int,
) -> TaskBatch:
    """Generate one task of each named family and stack them."""
    parts = [make_tasks(generator, name, 1, subjects, structures, size) for name in families]
    return TaskBatch(
        images=torch.cat([part.images for part in parts]),
        masks=torch.cat([part.masks for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        families=tuple(families),
    )
