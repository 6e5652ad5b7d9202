"""Training of the demo segmenter on generated tasks, in pieces that resume exactly."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, Sam2VideoModel

from recallseg.export.demo_model.arithmetic import fast_arithmetic
from recallseg.export.demo_model.checkpoints import load_checkpoint, save_checkpoint
from recallseg.export.demo_model.families import FAMILIES
from recallseg.export.demo_model.losses import appearance_loss, coarse_loss, segmentation_loss
from recallseg.export.demo_model.models import build_sam2, set_image_size
from recallseg.export.demo_model.optimizers import apply_step, build_optimizers, parameters_of
from recallseg.export.demo_model.tasks import TaskBatch, draw_families, family_weights, make_batch
from recallseg.export.demo_model.workers import mean_over_workers, rank_and_count
from recallseg.export.graphs import build_graphs

__all__ = ["POINTER_TIME", "SegmenterTrainer", "evaluate_segmenter", "held_out", "run_batch"]

# Recalled exemplars have no time. SAM 2's code for an object pointer is (frames apart) /
# (max pointers - 1); every exemplar is given that of the frame just before the query.
POINTER_TIME = 1.0 / 15.0


@dataclass(frozen=True)
class Predictions:
    """Outputs for every subject as the query of its task, ``n = T * M * P`` in that order."""

    logits: Tensor
    iou: Tensor
    object_score: Tensor
    conditioned: Tensor
    usable: Tensor


def _tiny_dinov2() -> Dinov2Model:
    """A stand-in: the graph builder makes all five graphs, training needs only four."""
    return Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))


def segmenter_graphs(model: Sam2VideoModel) -> dict[str, nn.Module]:
    """Return the deployed graphs of a model at its present image size (they share its weights)."""
    return build_graphs(model, _tiny_dinov2())


def run_batch(graphs: Mapping[str, Any], batch: TaskBatch, memories: int) -> Predictions:
    """Segment every subject with ``memories`` of its task's other subjects as exemplars."""
    tasks, subjects, structures, size, _ = batch.masks.shape
    features, skip0, skip1 = graphs["encode"](batch.images.flatten(0, 1))

    def per_structure(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(structures, dim=0)

    features_n, skip0_n, skip1_n = map(per_structure, (features, skip0, skip1))
    masks = batch.masks.reshape(-1, 1, size, size)
    tokens, pointers = graphs["memorize"](features_n, skip0_n, skip1_n, masks)

    # Subject q recalls q + 1, q + 2, ... (cyclic): with random subjects that is a random choice.
    step = torch.arange(1, memories + 1, device=tokens.device)
    recalled = (torch.arange(subjects, device=tokens.device)[:, None] + step) % subjects

    def gather(tensor: Tensor) -> Tensor:
        shaped = tensor.view(tasks, subjects, structures, *tensor.shape[1:])[:, recalled]
        return shaped.transpose(2, 3).flatten(0, 2)

    known = batch.masks.flatten(3).amax(dim=3)[:, recalled].amax(dim=2).flatten()
    time = torch.full((len(masks), memories), POINTER_TIME, device=tokens.device)
    conditioned = graphs["attend"](features_n, gather(tokens), gather(pointers), time)
    decode: Any = graphs["decode"]
    logits, iou, score = decode.candidates(conditioned, skip0_n, skip1_n)
    return Predictions(logits.float(), iou.float(), score.float(), conditioned.float(), known)


class SegmenterTrainer:
    """The whole state of a training and one step of it.

    Parameters
    ----------
    recipe
        The parsed ``config.toml``.
    device
        Where tasks are generated and the model is trained.
    """

    def __init__(self, recipe: Mapping[str, Any], device: str = "cpu") -> None:
        self.settings = recipe["segmenter"]
        self.device = torch.device(device)
        torch.manual_seed(int(self.settings["seed"]))
        self.model = build_sam2(recipe["sam2"]).to(self.device)  # type: ignore[arg-type]
        hidden = int(recipe["sam2"]["hidden_size"])
        # Read the conditioned features during training only: where, and what it looks like.
        self.head = nn.Conv2d(hidden, 1, 1).to(self.device)
        self.look = nn.Conv2d(hidden, 6, 1).to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizers = build_optimizers([self.head, self.model, self.look], self.settings)
        self.step = 0
        self.scores = dict.fromkeys(FAMILIES, 0.0)
        self.size = 0
        self.graphs: dict[str, nn.Module] = {}

    def stage(self) -> tuple[int, float]:
        """Return the image size and learning rate of the present step."""
        left = self.step
        for stage in self.settings["stages"]:
            steps = int(stage["steps"])
            if left < steps:
                first, last = stage["rates"]
                return int(stage["size"]), first + (last - first) * (left + 1) / steps
            left -= steps
        raise StopIteration("The recipe's stages are all done")

    @property
    def total_steps(self) -> int:
        return sum(int(stage["steps"]) for stage in self.settings["stages"])

    def _set_size(self, size: int) -> None:
        if size != self.size:
            set_image_size(self.model, size)
            self.graphs = {k: v.to(self.device) for k, v in segmenter_graphs(self.model).items()}
            self.size = size

    def draw(self, size: int) -> tuple[TaskBatch, int]:
        """Generate the present step's tasks from the seed, the step, the worker and the scores."""
        rank, workers = rank_and_count()
        generator = torch.Generator(device=self.device)
        seed = int(self.settings["seed"]) * 1_000_003 + self.step
        generator.manual_seed(seed)
        weights = torch.tensor(self.settings["memory_weights"], device=self.device)
        pick = torch.multinomial(weights, 1, generator=generator)
        memories = int(self.settings["memories"][int(pick)])
        # Larger images come in smaller steps, so that a step's cost does not grow with the area.
        images = int(self.settings["images_per_step"] * min(1.0, 256 / size))
        tasks = max(1, round(images / (memories + 1) / workers))
        # All workers recall equally many, so that none waits for another; their tasks differ.
        generator.manual_seed(seed + 2**36 * rank)
        shares = family_weights(self.scores, float(self.settings["family_floor"]))
        families = draw_families(generator, shares, tasks)
        structures = int(self.settings["structures"])
        return make_batch(generator, families, memories + 1, structures, size), memories

    def train_step(self) -> dict[str, float]:
        """Do one step and return what is worth logging."""
        size, rate = self.stage()
        self._set_size(size)
        started = time.monotonic()
        batch, memories = self.draw(size)
        generated = time.monotonic()
        self.model.train()
        with fast_arithmetic(self.device):
            out = run_batch(self.graphs, batch, memories)
            coarse = self.head(out.conditioned)[:, 0].float()
            looks = self.look(out.conditioned).float()
        masks = batch.masks.flatten(0, 2)
        weights = out.usable.float()
        loss = segmentation_loss(out.logits, out.iou, out.object_score, masks, weights)
        images = batch.images.flatten(0, 1).repeat_interleave(batch.masks.shape[2], dim=0)
        appearance = appearance_loss(looks, images, masks, weights)
        total = loss.total + 0.3 * coarse_loss(coarse, masks, weights) + 0.5 * appearance
        total.backward()
        self._share_gradients()
        norm = apply_step(self.optimizers, rate, float(self.settings["clip"]))
        self._update_average()
        dice = loss.dice.view(len(batch.families), -1).mean(dim=1).tolist()
        self._update_scores(batch.families, dice)
        self.step += 1
        return {
            "loss": float(total.detach()),
            "dice": sum(dice) / len(dice),
            "appearance": float(appearance.detach()),
            "norm": norm,
            "generate_s": generated - started,
            "step_s": time.monotonic() - started,
            "rate": rate,
            "memories": memories,
        }

    @torch.no_grad()
    def _share_gradients(self) -> None:
        parameters = parameters_of(self.optimizers)
        for parameter in parameters:
            # A weight may rest in one worker and not in another; all must exchange the same.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        mean_over_workers([p.grad for p in parameters if p.grad is not None])

    def _update_scores(self, families: tuple[str, ...], dice: list[float]) -> None:
        """Follow each family's Dice; all workers must agree, their draws depend on it."""
        names = list(self.scores)
        sums = torch.zeros(2, len(names))
        for name, value in zip(families, dice, strict=True):
            sums[:, names.index(name)] += torch.tensor([value, 1.0])
        mean_over_workers([sums])
        for name, value, seen in zip(names, *sums.tolist(), strict=True):
            if seen > 0:
                self.scores[name] = 0.95 * self.scores[name] + 0.05 * value / seen

    @torch.no_grad()
    def _update_average(self) -> None:
        # A short memory at first: the average must not drag the untrained weights along.
        decay = min(float(self.settings["ema_decay"]), (1 + self.step) / (10 + self.step))
        names = [n for n, v in self.average.items() if v.is_floating_point()]
        state = self.model.state_dict()
        torch._foreach_lerp_(
            [self.average[n] for n in names], [state[n] for n in names], 1.0 - decay
        )

    def finished_model(
        self, recipe: Mapping[str, Any], size: int, *, averaged: bool = False
    ) -> Sam2VideoModel:
        """Return a copy at an image size.

        In the middle of a training the averaged weights are the better ones; once the learning
        rate has come down to zero they lag behind.
        """
        model = build_sam2(recipe["sam2"])
        model.load_state_dict(self.average if averaged else self.model.state_dict(), strict=True)
        # Training shows exemplars only. Memories of earlier frames, which propagation along a
        # volume or a stream adds, have rows of this table of their own: they are given the
        # exemplars', because what the initialisation left there is noise.
        with torch.no_grad():
            rows = model.memory_temporal_positional_encoding
            rows.copy_(rows[-1:].expand_as(rows))
        set_image_size(model, size)
        return model.to(self.device).eval()  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """Write everything that a later piece needs."""
        save_checkpoint(
            folder,
            {
                "step": self.step,
                "scores": self.scores,
                "model": self.model.state_dict(),
                "head": self.head.state_dict(),
                "look": self.look.state_dict(),
                "average": self.average,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            },
        )

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = load_checkpoint(folder, self.device)
        self.model.load_state_dict(state["model"], strict=True)
        self.head.load_state_dict(state["head"], strict=True)
        self.look.load_state_dict(state["look"], strict=True)
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.scores = int(state["step"]), dict(state["scores"])

    def start_from(self, folder: Path, step: int = 0) -> None:
        """Begin at exported weights instead of noise, with fresh optimizers, at a recipe's step."""
        weights = Sam2VideoModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        self.model.load_state_dict(weights, strict=True)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.step = step

    def pieces(self, minutes: float) -> Iterator[dict[str, float]]:
        """Train until the time or the recipe is up, yielding each step's figures."""
        until = time.monotonic() + 60.0 * minutes
        while self.step < self.total_steps:
            # The first worker's clock decides for all: none may wait for one that has left.
            late = torch.tensor(float(time.monotonic() >= until and rank_and_count()[0] == 0))
            mean_over_workers([late])
            if late > 0:
                return
            yield self.train_step()


def held_out(family: str, size: int, tasks: int, device: str = "cpu") -> TaskBatch:
    """Generate the fixed test tasks of a family: four subjects, two structures each."""
    generator = torch.Generator(device=device)
    # Training seeds are far below: no step ever draws these numbers.
    generator.manual_seed(2**40 + sorted(FAMILIES).index(family))
    parts = [make_batch(generator, [family], 4, 2, size) for _ in range(tasks)]
    return TaskBatch(
        images=torch.cat([part.images for part in parts]),
        masks=torch.cat([part.masks for part in parts]),
        positions=torch.cat([part.positions for part in parts]),
        families=(family,) * tasks,
    )


@torch.no_grad()
def evaluate_segmenter(model: Sam2VideoModel, size: int, tasks: int = 6) -> dict[str, float]:
    """Mean Dice per family on held-out tasks, three memories per query, on the logits' grid."""
    graphs = segmenter_graphs(model)
    scores: dict[str, float] = {}
    for family in FAMILIES:
        batch = held_out(family, size, tasks)
        with fast_arithmetic(model.device):
            out = run_batch(graphs, batch, 3)
        loss = segmentation_loss(
            out.logits, out.iou, out.object_score, batch.masks.flatten(0, 2), out.usable
        )
        usable = out.usable > 0
        scores[family] = round(float(loss.dice[usable].mean()), 4)
    return scores
