"""Training of what corrects: the demo segmenter's prompts, and a mask decoder that heeds them.

The segmenter stays as it is, and so do the memories and masks that it makes: a copy of its prompt
encoder and mask decoder is trained, which the graph ``correct`` alone has. What goes into it is
generated once (:func:`generate`) and kept. Several simulated persons are at work, each with a few
images at once; a step lets one of them correct (a click in the largest error, a box, a scribble, a
lasso) and judges what comes of it. With so many in turn, neighbouring steps have little in common.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2VideoModel

from recallseg.export.correcting import Correct, is_corrector
from recallseg.export.demo_model.arithmetic import fast_arithmetic
from recallseg.export.demo_model.checkpoints import load_checkpoint, save_checkpoint
from recallseg.export.demo_model.corrector_start import begin
from recallseg.export.demo_model.families import FAMILIES
from recallseg.export.demo_model.losses import hard_dice, mask_loss
from recallseg.export.demo_model.optimizers import apply_step, build_optimizers
from recallseg.export.demo_model.segmenter_training import run_batch, segmenter_graphs
from recallseg.export.demo_model.tasks import make_batch

__all__ = ["CorrectorTrainer", "generate", "largest_error", "person_clicks"]

SURE = 10.0
"""Logit of a mask that a person drew."""


@torch.no_grad()
def generate(model: Sam2VideoModel, folder: Path, size: int, seed: int, minutes: float) -> int:
    """Keep what goes into ``correct`` for generated tasks, a file each; return how many there are.

    A file holds, in half precision, features and skips of four images, and for two structures of
    each the features conditioned on the other three images, the logits that ``decode`` makes of
    them, and the mask.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs = segmenter_graphs(model)
    names = list(FAMILIES)
    until = time.monotonic() + 60 * minutes
    number = len(list(folder.glob("*.pt")))
    while time.monotonic() < until:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        batch = make_batch(generator, [names[number % len(names)]], 4, 2, size)
        with fast_arithmetic(model.device):
            features, skip0, skip1 = graphs["encode"](batch.images.flatten(0, 1))
            out = run_batch(graphs, batch, 1 + number // len(names) % 3)
        best = out.iou.argmax(dim=1)
        kept = {
            "features": features.half(),
            "skip0": skip0.half(),
            "skip1": skip1.half(),
            "conditioned": out.conditioned.half(),
            "logits": out.logits[torch.arange(len(best)), best].half(),
            "best": best,
            "masks": batch.masks.flatten(0, 2) > 0.5,
        }
        temporary = folder / f"{number:05d}.part"
        torch.save(kept, temporary)
        temporary.rename(folder / f"{number:05d}.pt")
        number += 1
    return number


def largest_error(
    wanted: np.ndarray[Any, Any], found: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], int]:
    """Return the largest connected error, and 1 where it is missing or 0 where it is too much.

    Where there is no error, the structure, or all where it is not there.
    """
    best: tuple[float, np.ndarray[Any, Any], int] | None = None
    for label, error in ((1, wanted & ~found), (0, found & ~wanted)):
        count, parts, stats, _ = cv2.connectedComponentsWithStats(error.astype(np.uint8))
        if count > 1:
            largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
            area = float(stats[largest, cv2.CC_STAT_AREA])
            if best is None or area > best[0]:
                best = area, parts == largest, label
    if best is None:
        return (wanted if wanted.any() else ~wanted), int(wanted.any())
    return best[1:]


def person_clicks(
    region: np.ndarray[Any, Any], rng: np.random.Generator | None
) -> tuple[float, float]:
    """Return where a person clicks into an error, x, y in pixels of the masks.

    The place farthest from its edge; with ``rng`` at times any place in it.
    """
    if rng is not None and rng.random() < 0.3:
        places = np.flatnonzero(region)
        y, x = divmod(int(rng.choice(places)), region.shape[1])
    else:
        inner = cv2.distanceTransform(np.pad(region, 1).astype(np.uint8), cv2.DIST_L2, 5)
        y, x = divmod(int(np.argmax(inner[1:-1, 1:-1])), region.shape[1])
    return float(x), float(y)


@dataclass
class Person:
    """Someone at work on a few images at once, and how far they are.

    ``batch`` has what goes into ``correct``; ``points``, ``labels``, ``prior`` and ``has_prior``
    are the next correction's; ``clicked`` is the error that the last point is in, a share of each
    cell of the logits; ``left`` counts down to 0.
    """

    batch: dict[str, Tensor]
    prior: Tensor
    has_prior: Tensor
    points: Tensor
    labels: Tensor
    clicked: Tensor
    left: int


class CorrectorTrainer:
    """The whole state of a training and one step of it.

    Parameters
    ----------
    recipe : the parsed ``config.toml``.
    model : the segmenter, at its image size; it stays as it is.
    cache : the folder that :func:`generate` fills; files that come meanwhile are used too.
    """

    def __init__(self, recipe: Mapping[str, Any], model: Sam2VideoModel, cache: Path) -> None:
        self.settings = recipe["corrector"]
        self.cache = cache
        self.size = int(model.config.image_size)  # type: ignore[arg-type]
        torch.manual_seed(int(self.settings["seed"]))
        own = copy.deepcopy(model)
        # One place has one code, whether it is a point's or the image's.
        own.prompt_encoder.shared_embedding.positional_embedding.data.copy_(
            own.shared_image_embedding.positional_embedding
        )
        self.correct = Correct(own)
        self.no_memory = own.no_memory_embedding.detach().reshape(1, -1, 1, 1)
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(is_corrector(name))
        self.model = own
        self.optimizers = build_optimizers(
            [self.correct.prompt_encoder, self.correct.mask_decoder], self.settings
        )
        self.step = 0
        self.persons: list[Person] = []
        self._listed: list[Path] = []
        self._listed_until = -1

    def begin(self) -> None:
        """Begin near what it has to do: the segmenter never had a point nor a single mask."""
        rng = np.random.default_rng(int(self.settings["seed"]))
        decoder = self.model.mask_decoder
        with torch.no_grad():
            decoder.mask_tokens.weight[0] = decoder.mask_tokens.weight[1]
            networks = decoder.output_hypernetworks_mlps
            networks[0].load_state_dict(networks[1].state_dict())
            last = decoder.iou_prediction_head.proj_out
            last.weight[0], last.bias[0] = last.weight[1], last.bias[1]
        begin(
            self.correct,
            self.no_memory,
            lambda: self.draw(rng),
            float(self.settings["sharpness"]),
            int(self.settings["prior_steps"]),
        )

    @property
    def total_steps(self) -> int:
        return int(self.settings["steps"])

    def rate(self) -> float:
        """Return the learning rate of the present step: up, then down to nothing."""
        warm = int(self.settings["warmup"])
        peak = float(self.settings["rate"])
        if self.step < warm:
            return peak * (self.step + 1) / warm
        return peak * (self.total_steps - self.step) / (self.total_steps - warm)

    def draw(self, rng: np.random.Generator, *, held_out: bool = False) -> dict[str, Tensor]:
        """Draw the samples of a step; every 20th task is never trained on."""
        files = [path for path in self._files() if (int(path.stem) % 20 == 19) == held_out]
        chosen = rng.choice(len(files), size=int(self.settings["tasks"]), replace=False)
        parts: list[dict[str, Tensor]] = []
        for index in chosen:
            held = torch.load(files[int(index)], weights_only=True, mmap=True)
            count = len(held["masks"])
            # Of what is not there some, so that it can be clicked away.
            there = held["masks"].flatten(1).any(dim=1).numpy()
            order = rng.permutation(count)
            late = ~there[order] & (rng.random(count) > self.settings["absent"])
            order = np.concatenate([order[~late], order[late]])
            rows = torch.from_numpy(order[: int(self.settings["samples"])])
            image = rows // (count // len(held["features"]))
            parts.append(
                {
                    **{name: held[name][image].float() for name in ("features", "skip0", "skip1")},
                    **{name: held[name][rows].float() for name in ("conditioned", "logits")},
                    "masks": held["masks"][rows].float(),
                }
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _files(self) -> list[Path]:
        if self.step >= self._listed_until:
            self._listed = sorted(self.cache.glob("*.pt"))
            self._listed_until = self.step + 200
        return self._listed

    def train_step(self) -> dict[str, float]:
        """Let one person correct once, learn from it, and return what is worth logging."""
        if self.step == 0 and not self.persons:
            self.begin()
        rng = np.random.default_rng([int(self.settings["seed"]), self.step])
        started = time.monotonic()
        while len(self.persons) < int(self.settings["persons"]):
            kind = str(rng.choice(list(self.settings["kinds"]), p=list(self.settings["shares"])))
            most = int(self.settings["rounds"].get(kind, self.settings["rounds"]["others"]))
            rounds = int(rng.integers(1, most + 1))
            self.persons.append(self._person(self.draw(rng), kind, rounds, rng))
        index = int(rng.integers(len(self.persons)))
        person = self.persons[index]
        loss, dice = self._correct(person, rng)
        loss.backward()
        if not person.left:
            del self.persons[index]
        rate = self.rate()
        norm = apply_step(self.optimizers, rate, float(self.settings["clip"]))
        self.step += 1
        return {
            "loss": float(loss.detach()),
            "dice": dice,
            "norm": norm,
            "rate": rate,
            "step_s": time.monotonic() - started,
        }

    @torch.no_grad()
    def evaluate(self, batches: int = 8) -> dict[str, list[float]]:
        """Mean Dice after each of four corrections, by how they begin, on samples of their own."""
        found = {}
        for kind in self.settings["kinds"]:
            seen = []
            for number in range(batches):
                rng = np.random.default_rng([2**31, number])
                person = self._person(self.draw(rng, held_out=True), kind, 4, rng)
                seen.append([self._correct(person, rng)[1] for _ in range(4)])
            found[kind] = [round(float(value), 3) for value in np.mean(seen, axis=0)]
        return found

    def _person(
        self, batch: dict[str, Tensor], kind: str, rounds: int, rng: np.random.Generator
    ) -> Person:
        """Return someone who begins with a kind of correction."""
        recalled = torch.from_numpy(rng.random(len(batch["masks"])) < self.settings["recalled"])
        if kind == "proposal":
            recalled[:] = True
        batch["conditioned"] = torch.where(
            recalled[:, None, None, None],
            batch["conditioned"],
            batch["features"] + self.no_memory,
        )
        return Person(batch, *self._begin(kind, batch, rng), rounds)

    def _correct(self, person: Person, rng: np.random.Generator) -> tuple[Tensor, float]:
        """Correct once, and prepare the next; return the loss and the mean Dice."""
        batch, masks, labels = person.batch, person.batch["masks"], person.labels
        tokens = self.correct.embed_points(person.points, labels)
        logits, iou, score = self.correct.decode(
            batch["conditioned"],
            batch["skip0"],
            batch["skip1"],
            tokens,
            person.prior,
            person.has_prior,
        )
        few = bool(((labels >= 0).sum(dim=1) <= 1).all())
        loss = self._loss(logits, iou, score, masks, few, person.clicked)
        with torch.no_grad():
            picked = self.correct.choose(logits, iou, labels)
            person.prior = logits[torch.arange(len(picked)), picked][:, None].detach()
            person.has_prior = torch.ones(len(picked), dtype=torch.bool)
            small = F.avg_pool2d(masks[:, None], 4)[:, 0]
            dice = float(hard_dice(person.prior[:, 0], small).mean())
        person.left -= 1
        if person.left:
            person.points, person.labels, person.clicked = self._click(
                person.points, labels, person.prior[:, 0], masks, rng
            )
        return loss, dice

    def _begin(
        self, kind: str, batch: Mapping[str, Tensor], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return prior, whether there is one, points, labels and error of the first correction."""
        masks = batch["masks"]
        n, side = len(masks), self.size // 4
        prior = torch.zeros(n, 1, side, side)
        has_prior = torch.zeros(n, dtype=torch.bool)
        none = torch.zeros(n, 0, 2), torch.zeros(n, 0, dtype=torch.int32)
        clicked = F.avg_pool2d(masks[:, None], 4)[:, 0]
        if kind == "click":
            blank = torch.full((n, side, side), -1.0)
            points, labels, clicked = self._click(*none, blank, masks, rng)
        elif kind == "proposal":
            prior, has_prior = batch["logits"][:, None], torch.ones(n, dtype=torch.bool)
            points, labels, clicked = self._click(*none, batch["logits"], masks, rng)
        elif kind == "draft":
            drafts = np.stack([_draft(mask, rng) for mask in masks.numpy()])
            sure = torch.from_numpy(rng.uniform(2, SURE, (n, 1, 1, 1))).float()
            prior = (F.avg_pool2d(torch.from_numpy(drafts)[:, None], 4) * 2 - 1) * sure
            has_prior = torch.ones(n, dtype=torch.bool)
            points, labels, clicked = self._click(*none, prior[:, 0], masks, rng)
        elif kind == "scribble":
            points, labels = _scribble(masks, int(rng.integers(3, 8)), rng)
        else:
            points, labels = _box(masks, rng)
            if kind == "lasso":
                drawn = np.stack([_drawn(mask, rng) for mask in masks.numpy()])
                prior = F.avg_pool2d(torch.from_numpy(drawn)[:, None], 4) * 2 * SURE - SURE
                has_prior = torch.ones(n, dtype=torch.bool)
        return prior, has_prior, points, labels, clicked

    def _click(
        self,
        points: Tensor,
        labels: Tensor,
        logits: Tensor,
        masks: Tensor,
        rng: np.random.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append to each sample's points the next click; return the errors clicked at as well."""
        found = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear")[:, 0] > 0
        errors = [
            largest_error(wanted, seen)
            for wanted, seen in zip((masks > 0.5).numpy(), found.numpy(), strict=True)
        ]
        places = torch.tensor([[person_clicks(region, rng)] for region, _ in errors])
        kinds = torch.tensor([[label] for _, label in errors], dtype=torch.int32)
        regions = torch.from_numpy(np.stack([region for region, _ in errors])).float()
        clicked = F.avg_pool2d(regions[:, None], 4)[:, 0]
        return torch.cat([points, places], dim=1), torch.cat([labels, kinds], dim=1), clicked

    def _loss(
        self,
        logits: Tensor,
        iou: Tensor,
        score: Tensor,
        masks: Tensor,
        few: bool,
        clicked: Tensor,
    ) -> Tensor:
        target = F.avg_pool2d(masks[:, None], 4)
        losses = mask_loss(logits, target)
        rows = torch.arange(len(logits))
        three = losses[:, 1:].argmin(dim=1) + 1
        chosen = three if few else torch.zeros_like(three)
        fine = F.interpolate(logits[rows, chosen][:, None], scale_factor=2.0, mode="bilinear")
        own = mask_loss(fine, F.avg_pool2d(masks[:, None], 2))[:, 0]
        beside = losses[rows, three] if not few else losses[:, 0]
        # What was clicked at must be put right, however small it is.
        wrong = F.binary_cross_entropy_with_logits(
            logits[rows, chosen], target[:, 0], reduction="none"
        )
        heard = (wrong * clicked).flatten(1).sum(1) / clicked.flatten(1).sum(1).clamp(min=1.0)
        with torch.no_grad():
            dice = hard_dice(logits, target)
            actual = dice / (2.0 - dice)
            present = (masks.flatten(1).amax(dim=1) > 0).float()
        quality = (iou - actual).abs().mean(dim=1)
        presence = F.binary_cross_entropy_with_logits(score, present, reduction="none")
        return (
            own
            + float(self.settings["heard"]) * heard
            + 0.3 * beside
            + 0.05 * losses.mean(dim=1)
            + 0.5 * quality
            + 0.2 * presence
        ).mean()

    def tensors(self) -> dict[str, Tensor]:
        """Return what was trained, by the names that the segmenter has for it."""
        return {n: v for n, v in self.model.state_dict().items() if is_corrector(n)}

    def save(self, folder: Path) -> None:
        """Write everything that a later piece needs."""
        state = {
            "step": self.step,
            "tensors": self.tensors(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_checkpoint(folder, state)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        state = load_checkpoint(folder, torch.device("cpu"))
        self.model.load_state_dict({**self.model.state_dict(), **state["tensors"]})
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["step"])

    def pieces(self, minutes: float) -> Iterator[dict[str, float]]:
        """Train until the time or the recipe is up, yielding each step's figures."""
        until = time.monotonic() + 60.0 * minutes
        while self.step < self.total_steps and time.monotonic() < until:
            yield self.train_step()


def _box(masks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return the corners of a box round each mask, as inexact as people are."""
    boxes = []
    size = masks.shape[-1]
    for mask in masks.numpy() > 0.5:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):  # nothing is there: any box
            rows = columns = np.array([size // 4, size // 2])
        ends = np.array([columns[0], rows[0], columns[-1], rows[-1]], float)
        sides = np.array([ends[2] - ends[0], ends[3] - ends[1]] * 2)
        ends += rng.normal(0, 1, 4) * np.minimum(0.05 * sides, 10)
        boxes.append(np.clip(ends, 0, size - 1).reshape(2, 2))
    points = torch.from_numpy(np.stack(boxes)).float()
    return points, torch.tensor([[2, 3]], dtype=torch.int32).expand(len(points), -1)


def _scribble(masks: Tensor, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return points along a stroke inside each mask (outside, where it is empty)."""
    strokes, labels = [], []
    for mask in masks.numpy() > 0.5:
        label = int(mask.any())
        inner = cv2.distanceTransform((mask if label else ~mask).astype(np.uint8), cv2.DIST_L2, 3)
        places = np.flatnonzero(inner >= min(3.0, inner.max()))
        start, end = (np.array(divmod(int(p), mask.shape[1])) for p in rng.choice(places, 2))
        line = np.linspace(start, end, 4 * count)
        line = line[inner[line[:, 0].astype(int), line[:, 1].astype(int)] > 0]
        line = line[np.linspace(0, len(line) - 1, count).astype(int)]
        strokes.append(line[:, ::-1])
        labels.append([label] * count)
    points = torch.from_numpy(np.stack(strokes)).float()
    return points, torch.tensor(labels, dtype=torch.int32)


def _draft(mask: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return a mask that is right but for one place, where some is missing or too much."""
    wanted = mask > 0.5
    draft = wanted.astype(np.float32)
    edge = cv2.dilate(draft, np.ones((9, 9), np.uint8)) > 0
    places = np.flatnonzero(edge if edge.any() else ~edge)
    y, x = divmod(int(rng.choice(places)), mask.shape[1])
    length = max(12.0, float(np.sqrt(wanted.sum())))
    axes = rng.uniform(0.15, 0.5, 2) * length
    disc = np.zeros(mask.shape, np.uint8)
    cv2.ellipse(disc, ((x, y), (2 * axes[0], 2 * axes[1]), float(rng.uniform(0, 180))), 1, -1)
    flipped = disc > 0
    draft[flipped] = 0.0 if wanted[flipped].mean() > 0.5 else 1.0
    return draft


def _drawn(mask: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return what a person would draw round a mask: smoother, and a little too large or small."""
    width = 2 * int(rng.integers(1, 7)) + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    plane: np.ndarray[Any, Any] = (mask > 0.5).astype(np.uint8)
    plane = cv2.morphologyEx(plane, cv2.MORPH_CLOSE, disc)
    drawn: np.ndarray[Any, Any] = cv2.dilate(plane, disc) if rng.random() < 0.8 else plane
    return drawn.astype(np.float32)
