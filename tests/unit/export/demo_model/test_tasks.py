"""The task generator: shapes, repeatability, and that every family gives something to segment."""

from __future__ import annotations

import pytest
import torch

from recallseg.export.demo_model.families import FAMILIES
from recallseg.export.demo_model.fields import Source, mixing_matrix
from recallseg.export.demo_model.tasks import (
    draw_families,
    family_weights,
    make_batch,
    make_tasks,
)

SIZE = 64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_gives_normalised_images_and_binary_masks(family: str) -> None:
    batch = make_tasks(seeded(), family, 2, 3, 2, SIZE)
    assert batch.images.shape == (2, 3, 3, SIZE, SIZE)
    assert batch.masks.shape == (2, 3, 2, SIZE, SIZE)
    assert batch.families == (family, family)
    assert torch.isfinite(batch.images).all()
    # 0..1 after ImageNet normalisation lies within these bounds.
    assert batch.images.min() >= -2.2
    assert batch.images.max() <= 2.7
    assert set(batch.masks.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family_asks_for_structures_that_are_there(family: str) -> None:
    there = 0
    for seed in range(6):
        masks = make_tasks(seeded(seed), family, 1, 4, 2, SIZE).masks
        there += int((masks.flatten(3).amax(3) > 0).sum())
    # Of 48 masks a few may be empty (structures come and go between slices), most are not.
    assert there >= 36


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_same_seed_same_task(family: str) -> None:
    one = make_tasks(seeded(5), family, 1, 2, 1, SIZE)
    two = make_tasks(seeded(5), family, 1, 2, 1, SIZE)
    other = make_tasks(seeded(6), family, 1, 2, 1, SIZE)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.masks, two.masks)
    assert not torch.equal(one.images, other.images)


def test_subjects_of_a_task_differ() -> None:
    batch = make_tasks(seeded(), "cells", 1, 2, 1, SIZE)
    assert not torch.equal(batch.masks[0, 0], batch.masks[0, 1])


def test_batch_stacks_one_task_of_each_named_family() -> None:
    batch = make_batch(seeded(), ["brain", "cells", "brain"], 2, 1, SIZE)
    assert batch.families == ("brain", "cells", "brain")
    assert batch.images.shape[:2] == (3, 2)


def test_mixing_keeps_variance_and_follows_positions() -> None:
    positions = torch.tensor([[0.1, 0.12, 0.9]])
    shared, along = torch.tensor([0.2]), torch.tensor([0.7])
    mixing = mixing_matrix(positions, shared=shared, along=along)
    alike = mixing[0] @ mixing[0].T
    torch.testing.assert_close(alike.diagonal(), torch.ones(3))
    assert alike[0, 1] > 0.85
    assert alike[0, 2] < 0.35


def test_field_has_about_unit_variance() -> None:
    mixing = mixing_matrix(
        torch.rand(16, 4, generator=seeded()), shared=torch.zeros(16), along=torch.zeros(16)
    )
    field = Source(seeded(), mixing, SIZE).field(8)
    assert field.shape == (16, 4, SIZE, SIZE)
    assert 0.6 < float(field.std()) < 1.4


def test_weights_favour_the_hard_and_keep_the_floor() -> None:
    scores = dict.fromkeys(FAMILIES, 0.95) | {"vessels": 0.1}
    weights = family_weights(scores, floor=0.5)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert max(weights, key=lambda name: weights[name]) == "vessels"
    assert min(weights.values()) >= 0.5 / len(FAMILIES)


def test_every_family_is_drawn_in_the_long_run() -> None:
    generator = seeded()
    weights = family_weights({}, floor=0.5)
    drawn = {name for _ in range(30) for name in draw_families(generator, weights, 4)}
    assert drawn == set(FAMILIES)
