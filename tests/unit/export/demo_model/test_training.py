"""Two steps of training, and that a resumed training goes on as if it had never stopped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Model, Sam2VideoModel

from recallseg.export.demo_model.checkpoints import save_weights
from recallseg.export.demo_model.embedder_start import start_as_thumbnail
from recallseg.export.demo_model.embedder_training import (
    EmbedderTrainer,
    keeping_loss,
    neighbour_loss,
    overlap,
    ranking_gain,
    recall_regret,
    taper,
)
from recallseg.export.demo_model.losses import hard_dice, segmentation_loss
from recallseg.export.demo_model.models import build_dinov2, build_sam2
from recallseg.export.demo_model.recipe import load_recipe
from recallseg.export.demo_model.segmenter_training import SegmenterTrainer
from recallseg.export.demo_model.tasks import TaskBatch


@pytest.fixture
def recipe() -> dict[str, Any]:
    """The shipped recipe, with networks and images as small as their structure allows."""
    tiny = copy.deepcopy(load_recipe())
    tiny["sam2"] |= {
        "image_size": 64,
        "widths": [8, 16, 24, 32],
        "blocks": [1, 1, 2, 1],
        "heads": [1, 1, 1, 1],
        "windows": [8, 4, 4, 2],
        "global_blocks": [3],
        "hidden_size": 64,
        "decoder_feed_forward": 32,
        "memory_feed_forward": 32,
        "memory_layers": 1,
    }
    tiny["segmenter"] |= {
        "structures": 2,
        "images_per_step": 4,
        "memories": [1, 2],
        "memory_weights": [0.5, 0.5],
        "stages": [
            {"steps": 2, "size": 64, "rates": [1e-3, 1e-3]},
            {"steps": 2, "size": 96, "rates": [1e-3, 0.0]},
        ],
    }
    tiny["dinov2"] |= {"image_size": 28, "width": 16, "depth": 1, "heads": 2}
    tiny["embedder"] |= {"steps": 4, "volumes": 2, "slices": 3, "evaluate_every": 1}
    return tiny


def assert_same_weights(one: torch.nn.Module, two: torch.nn.Module) -> None:
    for left, right in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_segmenter_resumes_exactly(recipe: dict[str, Any], tmp_path: Path) -> None:
    through = SegmenterTrainer(recipe)
    figures = [through.train_step() for _ in range(3)]
    assert all(0.0 < step["loss"] < 20.0 for step in figures)

    first = SegmenterTrainer(recipe)
    first.train_step()
    first.save(tmp_path / "checkpoint")
    second = SegmenterTrainer(recipe)
    second.load(tmp_path / "checkpoint")
    second.train_step()
    second.train_step()

    assert second.step == through.step == 3
    assert second.scores == through.scores
    assert second.size == 96
    assert_same_weights(second.model, through.model)
    for name, value in through.average.items():
        torch.testing.assert_close(second.average[name], value, rtol=0, atol=0)


def test_checkpoint_parts_stay_small(recipe: dict[str, Any], tmp_path: Path) -> None:
    SegmenterTrainer(recipe).save(tmp_path / "checkpoint")
    parts = list((tmp_path / "checkpoint").iterdir())
    assert 1 <= len(parts) <= 8
    assert max(part.stat().st_size for part in parts) < 16 * 1024 * 1024


def test_missing_checkpoint_says_what_to_do(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train from the start"):
        SegmenterTrainer(recipe).load(tmp_path / "nothing")


def test_embedder_resumes_exactly(recipe: dict[str, Any], tmp_path: Path) -> None:
    through = EmbedderTrainer(recipe)
    through.train_step()
    through.save(tmp_path / "checkpoint")
    through.train_step()
    resumed = EmbedderTrainer(recipe)
    resumed.load(tmp_path / "checkpoint")
    resumed.train_step()
    assert_same_weights(resumed.model, through.model)
    assert_same_weights(resumed.best, through.best)
    assert 0.0 < resumed.best_regret == through.best_regret


def test_written_weights_load_strictly(recipe: dict[str, Any], tmp_path: Path) -> None:
    for name, model in (
        ("sam2", build_sam2(recipe["sam2"])),
        ("dinov2", build_dinov2(recipe["dinov2"])),
    ):
        save_weights(model, tmp_path / name)
        kind = Sam2VideoModel if name == "sam2" else Dinov2Model
        loaded, info = kind.from_pretrained(
            tmp_path / name, output_loading_info=True, dtype=torch.float32
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for key, value in model.state_dict().items():
            # Half precision keeps eleven bits.
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_loss_prefers_the_right_mask() -> None:
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:24, 8:24] = 1.0
    right = torch.nn.functional.avg_pool2d(masks[:, None], 4).mul(20).sub(10).expand(-1, 3, -1, -1)
    iou, score, weights = torch.ones(2, 3), torch.tensor([5.0, -5.0]), torch.ones(2)
    good = segmentation_loss(right, iou, score, masks, weights)
    bad = segmentation_loss(-right, iou, score, masks, weights)
    assert good.total < 0.2 < bad.total
    assert good.dice.tolist() == [1.0, 1.0]
    assert bad.dice.tolist() == [0.0, 0.0]


def test_dice_of_two_empty_masks_is_one() -> None:
    empty = torch.full((1, 8, 8), -1.0)
    assert hard_dice(empty, torch.zeros(1, 8, 8)).tolist() == [1.0]
    assert hard_dice(-empty, torch.zeros(1, 8, 8)).tolist() == [0.0]


def test_neighbour_loss_is_least_when_similarity_follows_overlap() -> None:
    angle = torch.tensor([[0.0, 0.2, 1.2, 1.4]])
    embeddings = torch.stack([angle.cos(), angle.sin()], dim=-1)
    alike = embeddings @ embeddings.transpose(1, 2)
    mixed = embeddings[:, [0, 2, 1, 3]]
    positions = angle / 2.0
    good = neighbour_loss(embeddings, alike, positions, temperature=0.1)
    assert good < neighbour_loss(mixed, alike, positions, temperature=0.1)
    assert ranking_gain(embeddings, alike) == pytest.approx(1.0)
    assert ranking_gain(mixed, alike) < 0.0


def test_keeping_loss_is_least_when_the_ranking_stays() -> None:
    angle = torch.tensor([[0.0, 0.2, 1.2, 1.4]])
    before = torch.stack([angle.cos(), angle.sin()], dim=-1)
    kept = keeping_loss(before, before, temperature=0.1)
    turned = torch.stack([-angle.sin(), angle.cos()], dim=-1)
    torch.testing.assert_close(keeping_loss(turned, before, temperature=0.1), kept)
    assert kept < keeping_loss(before[:, [0, 2, 1, 3]], before, temperature=0.1)


def test_overlap_compares_slices_beyond_what_they_share() -> None:
    masks = torch.zeros(1, 3, 1, 18, 18)
    masks[..., :4, :] = 1.0
    masks[0, :2, 0, 8:, :8] = 1.0
    masks[0, 2, 0, 8:, 10:] = 1.0
    alike = overlap(masks)
    torch.testing.assert_close(alike.diagonal(dim1=1, dim2=2), torch.ones(1, 3))
    assert alike[0, 0, 1] > 0.99
    assert alike[0, 0, 2] < 0.0


def test_embedder_starts_as_a_thumbnail() -> None:
    """Similarities of the untrained embedding are correlations of sharpened thumbnails."""
    torch.manual_seed(0)
    settings = load_recipe()["dinov2"]
    model = build_dinov2(settings).eval()
    start_as_thumbnail(model)
    patch = settings["patch_size"]
    small = torch.randn(6, 1, 9, 9).clamp(-2.0, 2.0)
    images = small.repeat_interleave(patch, 2).repeat_interleave(patch, 3).expand(-1, 3, -1, -1)
    with torch.no_grad():
        found = torch.nn.functional.normalize(model(images).pooler_output, dim=-1)
    blurred = torch.nn.functional.avg_pool2d(small, 3, 1, 1, count_include_pad=False)
    expected = torch.corrcoef((2.0 * small - blurred).flatten(1))
    torch.testing.assert_close(found @ found.T, expected, rtol=0, atol=0.1)
    assert (found @ found.T - expected).abs().mean() < 0.05


def test_recall_regret_is_zero_at_best_and_one_at_chance() -> None:
    positions = torch.tensor([[0.0, 0.1, 0.25, 0.5]])
    angle = positions * 2.0
    ordered = torch.stack([angle.cos(), angle.sin()], dim=-1)
    assert recall_regret(ordered, positions) == pytest.approx(0.0, abs=1e-6)
    assert recall_regret(ordered[:, [2, 0, 3, 1]], positions) > 0.3


def test_taper_makes_the_ends_of_a_volume_small() -> None:
    generator = torch.Generator().manual_seed(3)
    masks = torch.zeros(1, 3, 1, 64, 64)
    masks[..., 8:56, 8:56] = 1.0
    positions = torch.tensor([[0.0, 0.5, 1.0]])
    images = masks.expand(-1, -1, 3, -1, -1)
    tapered = taper(generator, TaskBatch(images, masks, positions, ("brain",)))
    area = tapered.masks.flatten(2).mean(dim=2)[0]
    assert area[1] > 0.9 * masks[0, 0].mean()
    assert max(area[0], area[2]) < 0.9 * area[1]
    assert tapered.images.shape == images.shape
    assert set(tapered.masks.unique().tolist()) == {0.0, 1.0}
