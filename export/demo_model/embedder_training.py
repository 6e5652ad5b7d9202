"""Training of the demo embedder: slices that show the same things in the same places lie close.

A task is a generated volume seen slice by slice in slightly different subjects. For every slice
the others are to be ranked by how much their structures overlap with its own, which is what the
library asks of an embedding: the nearest exemplar should be the most useful one. No image is
annotated for this; the generator knows what it drew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recallseg.export.demo_model.checkpoints import load_checkpoint, save_checkpoint
from recallseg.export.demo_model.embedder_start import start_as_thumbnail
from recallseg.export.demo_model.families import FAMILIES
from recallseg.export.demo_model.models import build_dinov2
from recallseg.export.demo_model.optimizers import apply_step, build_optimizers
from recallseg.export.demo_model.tasks import TaskBatch, make_tasks
from recallseg.export.graphs import Embed

__all__ = ["EmbedderTrainer", "neighbour_loss", "overlap", "ranking_gain", "volume_tasks"]

# Side of the thumbnails in which overlap is measured and that the embedding must be able to
# redraw: as fine as "the same place" needs to be.
THUMBNAIL = 9


def volume_tasks(
    generator: torch.Generator, families: list[str], slices: int, size: int
) -> list[TaskBatch]:
    """Generate one volume per named family, each ``1 x slices x ...`` with four structures."""
    device = generator.device
    tasks = []
    for family in families:
        draw = torch.rand(3, generator=generator, device=device)
        positions = torch.rand(1, slices, generator=generator, device=device)
        positions = 0.5 + (0.3 + 0.7 * draw[0]) * (positions - 0.5)
        own = 0.02 + 0.2 * draw[1]
        shared = (1.0 - own) * 0.4 * draw[2]
        likeness = (positions, shared.view(1), (1.0 - own - shared).view(1))
        tasks.append(make_tasks(generator, family, 1, slices, 4, size, likeness=likeness))
    return tasks


def overlap(masks: Tensor) -> Tensor:
    """How alike the slices of each task are, beyond what all slices of the task share.

    Parameters
    ----------
    masks
        ``T x M x P x S x S``.

    Returns
    -------
    Tensor
        ``T x M x M`` cosine similarities in -1..1.
    """
    small = F.adaptive_avg_pool2d(masks.flatten(0, 1), THUMBNAIL)
    flat = small.view(*masks.shape[:2], -1)
    flat = F.normalize(flat - flat.mean(dim=1, keepdim=True), dim=-1)
    return flat @ flat.transpose(1, 2)


def neighbour_loss(embeddings: Tensor, alike: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy between the ranking by embedding and the ranking by overlap.

    Parameters
    ----------
    embeddings
        ``T x M x D``, unit length.
    alike
        ``T x M x M`` from `overlap`.
    """
    tasks, slices, _ = embeddings.shape
    same = torch.eye(slices, dtype=torch.bool, device=embeddings.device)
    target = (alike / temperature).masked_fill(same, -math.inf).softmax(dim=-1)
    flat = embeddings.flatten(0, 1)
    itself = torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    # Slices of other volumes are candidates too, all of them wrong.
    logs = (flat @ flat.T / temperature).masked_fill(itself, -math.inf).log_softmax(dim=-1)
    logs = logs.view(tasks, slices, tasks, slices)
    own = torch.diagonal(logs, dim1=0, dim2=2).permute(2, 0, 1)
    return -(target * own.masked_fill(same, 0.0)).sum(dim=-1).mean()


def ranking_gain(embeddings: Tensor, alike: Tensor) -> float:
    """Overlap of the slice found, between chance (0) and the best there is (1)."""
    slices = embeddings.shape[1]
    same = torch.eye(slices, dtype=torch.bool, device=embeddings.device)
    similar = (embeddings @ embeddings.transpose(1, 2)).masked_fill(same, -math.inf)
    found = alike.gather(2, similar.argmax(dim=2, keepdim=True)).mean()
    best = alike.masked_fill(same, -math.inf).amax(dim=2).mean()
    chance = alike.masked_fill(same, 0.0).sum(dim=2).mean() / (slices - 1)
    return float((found - chance) / (best - chance))


class EmbedderTrainer:
    """The whole state of an embedder training and one step of it."""

    def __init__(self, recipe: Mapping[str, Any], device: str = "cpu") -> None:
        self.settings = recipe["embedder"]
        self.device = torch.device(device)
        torch.manual_seed(int(self.settings["seed"]))
        self.model = build_dinov2(recipe["dinov2"])
        start_as_thumbnail(self.model)
        self.model.to(self.device)  # type: ignore[arg-type]
        width = int(recipe["dinov2"]["width"])
        self.head = nn.Linear(width, THUMBNAIL * THUMBNAIL).to(self.device)
        self.size = int(recipe["dinov2"]["image_size"])
        self.graph = Embed(self.model)
        self.optimizers = build_optimizers([self.model, self.head], self.settings)
        self.step = 0

    @property
    def total_steps(self) -> int:
        """Steps in the whole recipe."""
        return int(self.settings["steps"])

    def rate(self) -> float:
        """Learning rate of the present step: warm-up, then a cosine to zero."""
        warm = min(1.0, (self.step + 1) / float(self.settings["warmup"]))
        part = self.step / self.total_steps
        return float(self.settings["rate"]) * warm * 0.5 * (1.0 + math.cos(math.pi * part))

    def draw(self) -> list[TaskBatch]:
        """Generate the present step's volumes: a function of the seed and the step."""
        generator = torch.Generator(device=self.device)
        generator.manual_seed(int(self.settings["seed"]) * 1_000_003 + self.step)
        names = list(FAMILIES)
        weights = torch.tensor([float(self.settings["weights"].get(n, 1.0)) for n in names])
        count = int(self.settings["volumes"])
        picks = torch.multinomial(
            weights.to(self.device), count, replacement=False, generator=generator
        )
        families = [names[int(pick)] for pick in picks]
        return volume_tasks(generator, families, int(self.settings["slices"]), self.size)

    def train_step(self) -> dict[str, float]:
        """Do one step and return what is worth logging."""
        started = time.monotonic()
        tasks = self.draw()
        images = torch.cat([task.images for task in tasks])
        alike = overlap(torch.cat([task.masks for task in tasks]))
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            token = self.model(images.flatten(0, 1)).pooler_output
            redrawn = self.head(token).float()
        embeddings = F.normalize(token.float(), dim=-1).view(*images.shape[:2], -1)
        ranking = neighbour_loss(embeddings, alike, temperature=float(self.settings["temperature"]))
        # Redrawing a thumbnail teaches where things are long before the ranking can.
        thumbnail = F.adaptive_avg_pool2d(images.flatten(0, 1).mean(dim=1), THUMBNAIL).flatten(1)
        drawing = F.mse_loss(redrawn, thumbnail)
        (ranking + drawing).backward()
        norm = apply_step(self.optimizers, self.rate(), clip=1.0)
        self.step += 1
        return {
            "loss": float(ranking.detach()),
            "drawing": float(drawing.detach()),
            "gain": ranking_gain(embeddings.detach(), alike),
            "norm": norm,
            "step_s": time.monotonic() - started,
        }

    def save(self, folder: Path) -> None:
        """Write everything that a later piece needs."""
        save_checkpoint(
            folder,
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "head": self.head.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
        )

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = load_checkpoint(folder, self.device)
        self.model.load_state_dict(state["model"], strict=True)
        self.head.load_state_dict(state["head"], strict=True)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["step"])

    def pieces(self, minutes: float) -> Iterator[dict[str, float]]:
        """Train until the time or the recipe is up, yielding each step's figures."""
        until = time.monotonic() + 60.0 * minutes
        while self.step < self.total_steps and time.monotonic() < until:
            yield self.train_step()
