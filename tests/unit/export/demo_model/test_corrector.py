"""What corrects is trained on what the segmenter makes, and leaves the segmenter as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recallseg.export.correcting import is_corrector, load_corrector, with_corrector
from recallseg.export.demo_model.checkpoints import save_tensors
from recallseg.export.demo_model.corrector_training import (
    CorrectorTrainer,
    generate,
    person_clicks,
)
from recallseg.export.demo_model.models import build_sam2, set_image_size
from recallseg.export.demo_model.recipe import load_recipe

SIZE = 128


def test_a_person_clicks_into_the_largest_error() -> None:
    wanted = np.zeros((50, 50), bool)
    wanted[10:21, 20:31] = True
    assert person_clicks(wanted, np.zeros_like(wanted), None) == (25, 15, 1)
    found = wanted.copy()
    found[30:49, 5:45] = True
    x, y, label = person_clicks(wanted, found, None)
    assert label == 0
    assert found[int(y), int(x)]
    assert not wanted[int(y), int(x)]


@pytest.mark.timeout(600)
def test_steps_change_what_corrects_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = load_recipe()
    recipe["corrector"].update(tasks=1, samples=2, rounds=2, warmup=1)
    model = build_sam2(recipe["sam2"])
    set_image_size(model, SIZE)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert generate(model, tmp_path / "cache", SIZE, 1, 0.001) >= 1
    trainer = CorrectorTrainer(recipe, model, tmp_path / "cache")
    start = {name: value.clone() for name, value in trainer.tensors().items()}
    for _ in range(3):
        assert np.isfinite(trainer.train_step()["loss"])
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
