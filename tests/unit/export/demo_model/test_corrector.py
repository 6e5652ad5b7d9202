"""What corrects is trained on what the segmenter makes, and leaves the segmenter as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import Sam2VideoModel

from recallseg.engines.verification import mask_dice
from recallseg.export.correcting import is_corrector, load_corrector, with_corrector
from recallseg.export.demo_model import corrector_training
from recallseg.export.demo_model.checkpoints import save_tensors
from recallseg.export.demo_model.corrector_training import (
    CorrectorTrainer,
    generate,
    largest_error,
    person_clicks,
)
from recallseg.export.demo_model.models import build_sam2, set_image_size
from recallseg.export.demo_model.recipe import load_recipe

SIZE = 128
WEIGHTS = Path(corrector_training.__file__).parent / "weights" / "sam2"


def test_a_person_clicks_into_the_largest_error() -> None:
    wanted = np.zeros((50, 50), bool)
    wanted[10:21, 20:31] = True
    region, label = largest_error(wanted, np.zeros_like(wanted))
    assert label == 1
    assert person_clicks(region, None) == (25, 15)
    found = wanted.copy()
    found[30:49, 5:45] = True
    region, label = largest_error(wanted, found)
    x, y = person_clicks(region, None)
    assert label == 0
    assert found[int(y), int(x)]
    assert not wanted[int(y), int(x)]
    assert largest_error(wanted, wanted)[1] == 1


@pytest.mark.timeout(600)
def test_steps_change_what_corrects_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = load_recipe()
    recipe["corrector"].update(
        tasks=1, samples=2, rounds={"others": 2}, warmup=1, persons=2, prior_steps=2
    )
    model = build_sam2(recipe["sam2"])
    set_image_size(model, SIZE)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert generate(model, tmp_path / "cache", SIZE, 1, 0.001) >= 1
    held_out = tmp_path / "cache/00019.pt"
    shutil.copy(tmp_path / "cache/00000.pt", held_out)
    trainer = CorrectorTrainer(recipe, model, tmp_path / "cache")
    start = {name: value.clone() for name, value in trainer.tensors().items()}
    for _ in range(3):
        assert np.isfinite(trainer.train_step()["loss"])
    assert set(trainer.evaluate(1)) == set(recipe["corrector"]["kinds"])
    trainer.save(tmp_path / "checkpoint")
    again = CorrectorTrainer(recipe, model, tmp_path / "cache")
    again.load(tmp_path / "checkpoint")
    assert again.step == 3
    moved = {n for n, v in again.tensors().items() if not torch.equal(v, start[n])}
    assert "prompt_encoder.point_embed.weight" in moved
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(v, before[n]) for n, v in again.model.state_dict().items()
               if not is_corrector(n))  # fmt: skip
    save_tensors(again.tensors(), tmp_path / "corrector.safetensors")
    made = load_corrector(tmp_path / "corrector.safetensors", source="demo", licence="Apache-2.0")
    assert set(made.tensors) == set(load_file(tmp_path / "corrector.safetensors"))
    assert made.weights.source == "demo"
    with_corrector(model, made.tensors)


def test_at_the_start_priors_and_points_are_heard(tmp_path: Path) -> None:
    """Before the first step: a prior comes out as the mask, a click raises or lowers its place.

    So much is drawn that eight seeds out of eight showed it: rounding, and so the machine, decides
    as much as a seed does.
    """
    torch.manual_seed(0)
    recipe, tasks = load_recipe(), 3
    recipe["corrector"].update(tasks=tasks, samples=8, prior_steps=60, absent=0)
    model = Sam2VideoModel.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    set_image_size(model, 192)
    while generate(model, tmp_path / "cache", 192, 1, 1e-6) < tasks:
        pass
    trainer = CorrectorTrainer(recipe, model, tmp_path / "cache")
    trainer.begin()
    batch = trainer.draw(np.random.default_rng(0))
    n, masks = len(batch["masks"]), F.avg_pool2d(batch["masks"][:, None], 4)

    def logits(label: int, *, prior: bool = False, place: float = 96.0) -> torch.Tensor:
        found, iou, _ = trainer.correct.candidates(
            batch["features"],
            batch["skip0"],
            batch["skip1"],
            torch.full((n, 1, 2), place),
            torch.full((n, 1), label),
            (masks * 2 - 1) * 8,
            torch.full((n,), prior),
        )
        return found[torch.arange(n), iou[:, 1:].argmax(dim=1) + 1]

    def moved(clicked: int, seen: int) -> float:
        """By how much a click's label moves the logits at a place; in pixels of logits."""
        inside, outside = (logits(label, place=clicked * 4.0) for label in (1, 0))
        near = slice(seen - 4, seen + 4)
        return float((inside - outside)[:, near, near].mean())

    with torch.no_grad():
        wanted = masks[:, 0] > 0.5
        without, having = (
            mask_dice((logits(-1, prior=prior) > 0).numpy(), wanted.numpy())
            for prior in (False, True)
        )
        assert having > max(0.5, without + 0.2)
        middle, corner = 24, 12
        there = moved(middle, middle) + moved(corner, corner)
        assert there > max(0, moved(middle, corner) + moved(corner, middle))
