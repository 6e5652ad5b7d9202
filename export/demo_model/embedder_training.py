"""Training of the demo embedder: slices that lie close in a volume lie close in the embedding.

A task is a generated volume seen slice by slice in slightly different subjects. For every slice
the others are to be ranked by how much their structures overlap with its own and by how near they
are in the volume, which is what the library asks of an embedding: the nearest exemplar should be
the most useful one. No image is annotated by hand for this, but it is supervised all the same: the
generator knows the masks and the positions of what it drew.

That is for bodies. Where there is no place to learn, as in pictures of cells, it is likeness that
makes an exemplar useful, and the start knows it: there its ranking is to be kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recallseg.export.demo_model.arithmetic import fast_arithmetic
from recallseg.export.demo_model.checkpoints import load_checkpoint, save_checkpoint
from recallseg.export.demo_model.embedder_start import freeze_thumbnail, start_as_thumbnail
from recallseg.export.demo_model.families import FAMILIES
from recallseg.export.demo_model.models import build_dinov2
from recallseg.export.demo_model.optimizers import apply_step, build_optimizers
from recallseg.export.demo_model.tasks import TaskBatch, make_tasks
from recallseg.export.graphs import Embed

__all__ = [
    "EmbedderTrainer",
    "held_out_regret",
    "keeping_loss",
    "neighbour_loss",
    "overlap",
    "ranking_gain",
    "recall_regret",
    "taper",
    "volume_tasks",
]

# Side of the thumbnails in which overlap is measured: as fine as "the same place" needs to be.
THUMBNAIL = 9
# Families that are bodies: their sections get small towards both ends of a volume.
BODIES = ("brain", "organs", "small")
# Distances, in parts of a volume, over which slices count as near.
REACHES = (0.05, 0.15)
# Held-out volumes come from seeds that no training step uses.
HELD_OUT_SEED = 2**41
HELD_OUT_FAMILIES = ("brain", "organs", "small", "tissue")
HELD_OUT_VOLUMES, HELD_OUT_SLICES = 16, 16
# How many slices a recall may ask for.
RECALLED = (1, 4, 8)


def _shrink(task: TaskBatch, part: Tensor) -> TaskBatch:
    """Draw every slice at ``part`` (``M``) of its size, about the centre."""
    count, size = part.numel(), task.images.shape[-1]
    rows = torch.zeros(count, 2, 3, device=part.device)
    rows[:, 0, 0] = rows[:, 1, 1] = 1.0 / part
    grid = F.affine_grid(rows, [count, 1, size, size], align_corners=False)

    def draw(values: Tensor, mode: str) -> Tensor:
        moved = F.grid_sample(
            values[0], grid, mode=mode, padding_mode="border", align_corners=False
        )
        return moved[None]

    return TaskBatch(
        draw(task.images, "bilinear"), draw(task.masks, "nearest"), task.positions, task.families
    )


def taper(generator: torch.Generator, task: TaskBatch) -> TaskBatch:
    """Let a volume (``T`` = 1) get smaller towards both ends, as a head does.

    Sections of the two ends then have the same size and must be told apart by what they show.
    """
    draw = torch.rand(3, generator=generator, device=generator.device)
    along = task.positions[0].clamp(0.0, 1.0) ** torch.exp(0.8 * (draw[0] - 0.5))
    power = 2.0 + 2.0 * draw[1]
    depth = 0.2 + 0.7 * draw[2]
    return _shrink(task, torch.sqrt(1.0 - depth * (2.0 * along - 1.0).abs() ** power))


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
        task = make_tasks(generator, family, 1, slices, 4, size, likeness=likeness)
        if family in BODIES and float(torch.rand((), generator=generator, device=device)) < 0.6:
            task = taper(generator, task)
        tasks.append(task)
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


def neighbour_loss(
    embeddings: Tensor, alike: Tensor, positions: Tensor, *, temperature: float
) -> Tensor:
    """Cross-entropy between the ranking by embedding and those by overlap and by distance.

    Parameters
    ----------
    embeddings
        ``T x M x D``, unit length.
    alike
        ``T x M x M`` from `overlap`.
    positions
        ``T x M``, 0..1 along the volume.
    """
    slices = embeddings.shape[1]
    same = torch.eye(slices, dtype=torch.bool, device=embeddings.device)
    distance = (positions[:, :, None] - positions[:, None]).abs()
    scores = [alike / temperature, *(-distance / reach for reach in REACHES)]
    targets = [score.masked_fill(same, -math.inf).softmax(dim=-1) for score in scores]
    return _ranking_loss(embeddings, torch.stack(targets).mean(dim=0), temperature)


def keeping_loss(embeddings: Tensor, before: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy between the ranking by embedding and that by another, ``T x M x D`` both.

    After Li and Hoiem, "Learning without Forgetting" (arXiv 1606.09282).
    """
    same = torch.eye(before.shape[1], dtype=torch.bool, device=before.device)
    similar = before @ before.transpose(1, 2) / temperature
    target = similar.masked_fill(same, -math.inf).softmax(dim=-1)
    return _ranking_loss(embeddings, target, temperature)


def _ranking_loss(embeddings: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Cross-entropy to ``target``, ``T x M x M`` with rows that sum to 1 beside the diagonal."""
    same = torch.eye(target.shape[1], dtype=torch.bool, device=target.device)
    similar = embeddings @ embeddings.transpose(1, 2) / temperature
    logs = similar.masked_fill(same, -math.inf).log_softmax(dim=-1)
    return -(target * logs.masked_fill(same, 0.0)).sum(dim=-1).mean()


def ranking_gain(embeddings: Tensor, alike: Tensor) -> float:
    """Overlap of the slice found, between chance (0) and the best there is (1)."""
    slices = embeddings.shape[1]
    same = torch.eye(slices, dtype=torch.bool, device=embeddings.device)
    similar = (embeddings @ embeddings.transpose(1, 2)).masked_fill(same, -math.inf)
    found = alike.gather(2, similar.argmax(dim=2, keepdim=True)).mean()
    best = alike.masked_fill(same, -math.inf).amax(dim=2).mean()
    chance = alike.masked_fill(same, 0.0).sum(dim=2).mean() / (slices - 1)
    return float((found - chance) / (best - chance))


def recall_regret(embeddings: Tensor, positions: Tensor) -> float:
    """Mean distance of the slices recalled, between the least possible (0) and chance (1).

    Parameters
    ----------
    embeddings
        ``T x M x D``, unit length; every slice is a query to the others of its volume.
    positions
        ``T x M`` along the volume.
    """
    slices = embeddings.shape[1]
    same = torch.eye(slices, dtype=torch.bool, device=embeddings.device)
    similar = (embeddings @ embeddings.transpose(1, 2)).masked_fill(same, -math.inf)
    distance = (positions[:, :, None] - positions[:, None]).abs()
    chance = distance.sum(dim=(1, 2)) / (slices * (slices - 1))
    found = distance.gather(2, similar.argsort(dim=2, descending=True))
    least = distance.masked_fill(same, math.inf).sort(dim=2).values
    parts = []
    for count in RECALLED:
        count = min(count, slices - 1)
        best = least[:, :, :count].mean(dim=(1, 2))
        parts.append(
            (found[:, :, :count].mean(dim=(1, 2)) - best) / (chance - best).clamp(min=1e-6)
        )
    return float(torch.stack(parts).mean())


@torch.no_grad()
def held_out_regret(model: nn.Module, size: int, device: torch.device) -> dict[str, float]:
    """Compute `recall_regret` per family on generated volumes that are never trained on."""
    graph = Embed(model).eval()
    regrets = {}
    for number, family in enumerate(HELD_OUT_FAMILIES):
        generator = torch.Generator(device=device)
        generator.manual_seed(HELD_OUT_SEED + number)
        tasks = volume_tasks(generator, [family] * HELD_OUT_VOLUMES, HELD_OUT_SLICES, size)
        embeddings = torch.stack([graph(task.images[0]) for task in tasks])
        positions = torch.cat([task.positions for task in tasks])
        regrets[family] = recall_regret(embeddings, positions)
    graph.train()
    return regrets


class EmbedderTrainer:
    """The whole state of an embedder training and one step of it."""

    def __init__(self, recipe: Mapping[str, Any], device: str = "cpu") -> None:
        self.settings = recipe["embedder"]
        self.device = torch.device(device)
        torch.manual_seed(int(self.settings["seed"]))
        self.model = build_dinov2(recipe["dinov2"])
        start_as_thumbnail(self.model)
        self.model.to(self.device)  # type: ignore[arg-type]
        freeze_thumbnail(self.model)
        self.start = copy.deepcopy(self.model).requires_grad_(False)
        self.size = int(recipe["dinov2"]["image_size"])
        self.average = copy.deepcopy(self.model)
        self.best = copy.deepcopy(self.model)
        self.best_regret = math.inf
        self.optimizers = build_optimizers([self.model], self.settings)
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
        embeddings = self._embed(self.model, images)
        positions = torch.cat([task.positions for task in tasks])
        ranking = torch.stack(
            [
                neighbour_loss(
                    embeddings[i : i + 1],
                    alike[i : i + 1],
                    positions[i : i + 1],
                    temperature=float(self.settings["temperature"]),
                )
                if task.families[0] in BODIES
                else self._keeping(embeddings[i : i + 1], task)
                for i, task in enumerate(tasks)
            ]
        ).mean()
        ranking.backward()
        norm = apply_step(self.optimizers, self.rate(), clip=1.0)
        self.step += 1
        self._update_average()
        if self.step % int(self.settings["evaluate_every"]) == 0:
            self.evaluate()
        return {
            "loss": float(ranking.detach()),
            "gain": ranking_gain(embeddings.detach(), alike),
            "norm": norm,
            "best_regret": self.best_regret,
            "step_s": time.monotonic() - started,
        }

    def _embed(self, model: nn.Module, images: Tensor) -> Tensor:
        """Embed images ``T x M x ...``: ``T x M x D`` of unit length."""
        with fast_arithmetic(self.device):
            token = model(images.flatten(0, 1)).pooler_output
        return F.normalize(token.float(), dim=-1).view(*images.shape[:2], -1)

    def _keeping(self, embeddings: Tensor, task: TaskBatch) -> Tensor:
        with torch.no_grad():
            before = self._embed(self.start, task.images)
        temperature = float(self.settings["keeping_temperature"])
        return keeping_loss(embeddings, before, temperature=temperature)

    @torch.no_grad()
    def _update_average(self) -> None:
        # A young average must not remember the start for longer than it has lived.
        decay = min(float(self.settings["ema_decay"]), self.step / (self.step + 9.0))
        for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(value, 1.0 - decay)

    def evaluate(self) -> dict[str, float]:
        """Measure the averaged weights on held-out volumes and keep them if they are the best."""
        regrets = held_out_regret(self.average, self.size, self.device)
        regret = sum(regrets.values()) / len(regrets)
        if regret < self.best_regret:
            self.best_regret = regret
            self.best.load_state_dict(self.average.state_dict())
        return regrets

    def save(self, folder: Path) -> None:
        """Write everything that a later piece needs."""
        save_checkpoint(
            folder,
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "best": self.best.state_dict(),
                "best_regret": self.best_regret,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
        )

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = load_checkpoint(folder, self.device)
        self.model.load_state_dict(state["model"], strict=True)
        self.average.load_state_dict(state["average"], strict=True)
        self.best.load_state_dict(state["best"], strict=True)
        self.best_regret = float(state["best_regret"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["step"])

    def pieces(self, minutes: float) -> Iterator[dict[str, float]]:
        """Train until the time or the recipe is up, yielding each step's figures."""
        until = time.monotonic() + 60.0 * minutes
        if self.step == 0:
            self.evaluate()
        while self.step < self.total_steps and time.monotonic() < until:
            yield self.train_step()
