from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import InputError
from recallseg.engines.pixels import open_pixels
from recallseg.runtime.model.preprocess import (
    Intensity,
    prepare_image,
    prepare_mask,
    scale_intensities,
)

ALL = Intensity("window", 0.0, 1.0)  # leaves 0..1 as it is
PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32, np.float64])
def test_percentiles_do_not_depend_on_the_dtype(dtype: type) -> None:
    ramp = np.arange(100).reshape(10, 10)
    scaled = scale_intensities(ramp.astype(dtype), Intensity())
    np.testing.assert_allclose(scaled, np.clip((ramp - 0.99) / 97.02, 0, 1), atol=1e-6)
    assert scaled.dtype == np.float32


def test_gain_and_offset_do_not_matter() -> None:
    image = np.random.default_rng(0).normal(size=(32, 32))
    first, second = (scale_intensities(x, Intensity()) for x in (image, 300 * image - 77))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_window_is_in_the_images_own_unit() -> None:
    hounsfield = np.array([[-1000, -160, 40, 240, 1000]], np.int16)
    scaled = scale_intensities(hounsfield, Intensity("window", -160, 240))
    np.testing.assert_allclose(scaled, [[0, 0, 0.5, 1, 1]])


def test_range_is_that_of_the_dtype() -> None:
    assert scale_intensities(np.array([[255]], np.uint8), Intensity("range"))[0, 0] == 1.0
    assert scale_intensities(np.array([[0.25]]), Intensity("range"))[0, 0] == np.float32(0.25)


def test_a_bright_spot_on_an_empty_ground_survives() -> None:
    image = np.zeros((100, 100))
    image[0, :50] = 7.0
    assert scale_intensities(image, Intensity()).max() == 1.0


def test_a_constant_image_is_zero_and_finite() -> None:
    assert not scale_intensities(np.full((4, 4), 9), Intensity()).any()


def test_colours_share_one_window() -> None:
    image = np.zeros((10, 10, 3))
    image[..., 0], image[::2, :, 1] = 1.0, 0.5
    scaled = scale_intensities(image, Intensity())
    np.testing.assert_allclose(scaled[0, 0], [1, 0.5, 0])


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing", 1, 99),
        ("percentile", 99, 1),
        ("percentile", -1, 99),
        ("window", 0, float("nan")),
    ],
)
def test_an_impossible_rule_is_refused(arguments: tuple[str, float, float]) -> None:
    with pytest.raises(InputError):
        Intensity(*arguments)  # type: ignore[arg-type]


def test_a_rule_survives_json() -> None:
    rule = Intensity("window", -160.0, 240.0)
    assert Intensity.from_json(rule.to_json()) == rule


@pytest.mark.parametrize("shape", [(64, 64), (31, 97), (64, 64, 3), (200, 30, 3)])
def test_any_shape_fills_the_square(shape: tuple[int, ...]) -> None:
    out = np.full((1, 3, 64, 64), np.nan, np.float32)
    half, normalisation = np.full(shape, 0.5, np.float32), Normalisation((0.5,) * 3, (2.0,) * 3)
    prepare_image(half, ALL, open_pixels(), (out, normalisation))
    np.testing.assert_allclose(out, 0.0, atol=1e-6)


def test_channels_and_normalisation_are_in_order() -> None:
    image = np.zeros((8, 8, 3), np.float32)
    image[..., 2] = 1.0
    out = np.zeros((1, 3, 8, 8), np.float32)
    normalisation = Normalisation((0.0, 0.0, 0.5), (1.0, 1.0, 0.25))
    prepare_image(image, ALL, open_pixels(), (out, normalisation))
    np.testing.assert_allclose(out[0, :, 0, 0], [0, 0, 2])


def test_pixel_centres_are_at_half_integers() -> None:
    ramp = np.tile(np.arange(8, dtype=np.float32) + 0.5, (8, 1)) / 8
    out = np.zeros((1, 3, 16, 16), np.float32)
    prepare_image(ramp, ALL, open_pixels(), (out, PLAIN))
    expected = (np.arange(16) + 0.5) / 16
    np.testing.assert_allclose(out[0, 0, 0, 1:-1], expected[1:-1], atol=1e-6)


@given(
    st.integers(1, 90), st.integers(1, 90), st.sampled_from([16, 32, 64]), st.integers(0, 2**32 - 1)
)
def test_a_mask_with_a_pixel_is_never_lost(height: int, width: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    mask[rng.integers(height), rng.integers(width)] = True
    out = np.zeros((side, side), np.float32)
    prepare_mask(mask, out)
    assert out.any()
    assert set(np.unique(out)) <= {0.0, 1.0}


def test_a_mask_keeps_its_area() -> None:
    y, x = np.mgrid[:200, :300]
    mask = ((y - 100) / 60) ** 2 + ((x - 150) / 90) ** 2 < 1
    out = np.zeros((64, 64), np.float32)
    prepare_mask(mask, out)
    assert abs(out.mean() - mask.mean()) < 0.01
