"""Dice, IoU and HD95 against a second implementation that shares no code with the first."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recallseg.engines.errors import InputError
from recallseg.runtime.reports.metrics import compare_masks, hausdorff95

MASKS = arrays(np.bool_, (7, 9))


def surface(mask: np.ndarray) -> np.ndarray:
    """Surface pixel coordinates, one neighbour at a time."""
    points = []
    for y, x in zip(*np.nonzero(mask), strict=True):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [
            0 <= i < mask.shape[0] and 0 <= j < mask.shape[1] and mask[i, j] for i, j in around
        ]
        if not all(inside):
            points.append((y, x))
    return np.array(points, float)


def brute_hd95(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float]) -> float:
    first, second = surface(a) * spacing, surface(b) * spacing
    distances = np.linalg.norm(first[:, None] - second[None], axis=-1)
    return float(
        max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95))
    )


@given(MASKS, MASKS, st.sampled_from([(1.0, 1.0), (0.5, 2.0), (3.0, 0.7)]))
def test_agrees_with_brute_force(
    predicted: np.ndarray, reference: np.ndarray, spacing: tuple[float, float]
) -> None:
    found = compare_masks(predicted, reference, spacing)
    a = {(int(y), int(x)) for y, x in np.argwhere(predicted)}
    b = {(int(y), int(x)) for y, x in np.argwhere(reference)}
    pixel = spacing[0] * spacing[1]
    assert found.reference_volume == pytest.approx(len(b) * pixel)
    assert found.predicted_volume == pytest.approx(len(a) * pixel)
    if a or b:
        assert found.dice == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        assert found.iou == pytest.approx(len(a & b) / len(a | b))
    if a and b:
        assert found.hd95 == pytest.approx(brute_hd95(predicted, reference, spacing), abs=1e-9)
        assert found.hd95 == pytest.approx(hausdorff95(reference, predicted, spacing))


def test_known_distance() -> None:
    a, b = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    a[10:20, 10:20] = True
    b[10:20, 15:25] = True
    assert hausdorff95(a, b) == 5.0
    assert hausdorff95(a, b, (9.0, 0.5)) == 2.5


def test_empty_masks() -> None:
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    both = compare_masks(empty, empty)
    assert (both.dice, both.iou, both.hd95) == (1.0, 1.0, 0.0)
    for one in (compare_masks(empty, full), compare_masks(full, empty)):
        assert (one.dice, one.iou) == (0.0, 0.0)
        assert math.isnan(one.hd95)


@pytest.mark.parametrize("spacing", [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_bad_spacing(spacing: tuple[float, float]) -> None:
    mask = np.ones((2, 2), bool)
    with pytest.raises(InputError, match="spacing"):
        compare_masks(mask, mask, spacing)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="differ in shape"):
        compare_masks(np.ones((2, 2), bool), np.ones((2, 3), bool))
