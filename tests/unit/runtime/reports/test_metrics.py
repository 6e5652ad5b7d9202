"""Dice, IoU, HD95 and surface Dice against implementations that share no code with ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from recallseg.engines.errors import InputError
from recallseg.runtime.reports.metrics import compare_masks

MASKS = arrays(np.bool_, (7, 9))
SPACINGS = ((1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (3.0, 1.5, 0.4), (0.8, 1.3))


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
        assert found.hd95 == pytest.approx(compare_masks(reference, predicted, spacing).hd95)


def test_known_distance() -> None:
    a, b = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    a[10:20, 10:20] = True
    b[10:20, 15:25] = True
    assert compare_masks(a, b).hd95 == 5.0
    assert compare_masks(a, b, (9.0, 0.5)).hd95 == 2.5


def test_empty_masks() -> None:
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    both = compare_masks(empty, empty)
    assert (both.dice, both.iou, both.hd95, both.surface_dice) == (1.0, 1.0, 0.0, 1.0)
    for one in (compare_masks(empty, full), compare_masks(full, empty)):
        assert (one.dice, one.iou, one.surface_dice) == (0.0, 0.0, 0.0)
        assert math.isnan(one.hd95)


def blob(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """A lump with a ragged surface that reaches the border."""
    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, 1.5) > 0.05


def pairs() -> list[tuple[np.ndarray, np.ndarray, tuple[float, ...]]]:
    found = []
    for seed, spacing in enumerate(SPACINGS):
        shape = (24, 20, 9) if len(spacing) == 3 else (40, 33)
        a = blob(seed, shape)
        found += [(a, blob(seed + 50, shape), spacing), (a, np.roll(a, 2, 0), spacing)]
        found.append((a, np.zeros(shape, bool), spacing))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tolerance", [0.0, 1.0, 2.5])
def test_agrees_with_monai(tolerance: float) -> None:
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    for predicted, reference, spacing in pairs():
        a, b = (
            torch.from_numpy(mask[None, None].astype(np.uint8)) for mask in (predicted, reference)
        )
        ours = compare_masks(predicted, reference, spacing, tolerance=tolerance)
        dice = metrics.compute_dice(a, b, ignore_empty=False)
        hd95 = metrics.compute_hausdorff_distance(
            a, b, include_background=True, percentile=95, spacing=spacing
        )
        surface = metrics.compute_surface_dice(
            a, b, [tolerance], include_background=True, spacing=spacing
        )
        assert ours.dice == pytest.approx(float(dice), abs=1e-6)
        assert ours.surface_dice == pytest.approx(float(surface), abs=1e-6)
        if reference.any():
            assert ours.hd95 == pytest.approx(float(hd95), rel=1e-5)
        else:  # MONAI: infinite or NaN, by version
            assert math.isnan(ours.hd95)
            assert not math.isfinite(float(hd95))


@pytest.mark.filterwarnings("ignore")  # it imports what SciPy has renamed
def test_agrees_with_surface_distance_on_smooth_shapes() -> None:
    """Which weighs surface elements by area and measures between voxels: close, not the same."""
    other = pytest.importorskip("surface_distance")
    z, y, x = np.mgrid[:40, :40, :40] - 20
    reference = x**2 + y**2 + z**2 < 12**2
    for spacing, shift in (((1.0, 1.0, 1.0), 1), ((1.0, 1.0, 1.0), 3), ((0.8, 0.8, 1.2), 2)):
        predicted = np.roll(reference, shift, 0) & (y > -10)
        distances = other.compute_surface_distances(reference, predicted, spacing)
        ours = compare_masks(predicted, reference, spacing, tolerance=1.0)
        assert ours.dice == pytest.approx(other.compute_dice_coefficient(reference, predicted))
        if len(set(spacing)) == 1:
            theirs = other.compute_surface_dice_at_tolerance(distances, 1.0)
            assert ours.surface_dice == pytest.approx(theirs, abs=0.1)
        assert ours.hd95 == pytest.approx(other.compute_robust_hausdorff(distances, 95), abs=0.5)


def test_thick_slices_count_in_mm() -> None:
    """One slice of 5 mm more is 5 mm away, and within a tolerance of 5 mm."""
    a, b = np.zeros((20, 20, 6), bool), np.zeros((20, 20, 6), bool)
    a[5:15, 5:15, 2:4] = True
    b[5:15, 5:15, 2:5] = True
    spacing = (0.5, 0.5, 5.0)
    assert compare_masks(a, b, spacing, tolerance=4.9).surface_dice < 1
    assert compare_masks(a, b, spacing, tolerance=5.0).surface_dice == 1
    found = compare_masks(a, b, spacing)
    assert found.hd95 == 5.0
    assert (found.reference_volume, found.predicted_volume) == (375.0, 250.0)


@pytest.mark.parametrize("spacing", [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_bad_spacing(spacing: tuple[float, float]) -> None:
    mask = np.ones((2, 2), bool)
    with pytest.raises(InputError, match="spacing"):
        compare_masks(mask, mask, spacing)


def test_a_spacing_for_each_axis_and_no_negative_tolerance() -> None:
    mask = np.ones((2, 2, 2), bool)
    with pytest.raises(InputError, match="3 positive numbers"):
        compare_masks(mask, mask, (1.0, 1.0))
    with pytest.raises(InputError, match="tolerance"):
        compare_masks(mask, mask, tolerance=-1.0)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="differ in shape"):
        compare_masks(np.ones((2, 2), bool), np.ones((2, 3), bool))
