"""The native kernels give what OpenCV and numpy give, over what an image can be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import InputError
from recallseg.engines.pixels.interface import PREPARE_TOLERANCE, Pixels
from recallseg.engines.pixels.native import NativePixels
from recallseg.engines.pixels.opencv import OpenCvPixels

DTYPES = ("u1", "i2", "u2", "f4", "f8", "i4", ">u2", "f2")
PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_ULP = 2.0**-11  # of fp16, relative
side = st.integers(1, 70)
many = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def draw(shape: tuple[int, ...], dtype: str, seed: int) -> NDArray[Any]:
    """Pixels over the dtype's range, or constant, as the seed has it."""
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    if kind.kind == "f":
        image = rng.normal(scale=rng.choice([1e-3, 1.0, 3e3]), size=shape)
    else:
        limits = np.iinfo(kind)
        image = rng.integers(max(limits.min, -40000), min(limits.max, 70000), shape, endpoint=True)
    if seed % 7 == 0:
        image = np.full(shape, image.flat[0])
    return image.astype(kind)


def strided(image: NDArray[Any], layout: int) -> NDArray[Any]:
    """The same values in another layout."""
    match layout:
        case 1:
            return np.asfortranarray(image)
        case 2:
            return np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
        case 3:
            wide = np.zeros((2 * image.shape[0], 3 * image.shape[1], *image.shape[2:]), image.dtype)
            wide[::2, ::3] = image
            return wide[::2, ::3]
        case 4:  # not aligned
            raw = np.zeros(image.nbytes + 1, np.uint8)
            moved = raw[1:].view(image.dtype).reshape(image.shape)
            moved[...] = image
            return moved
    return image


def window_of(image: NDArray[Any], choice: int) -> tuple[float, float]:
    low, high = float(image.min()), float(image.max())
    middle = (low + high) / 2
    return [
        (low, high),
        (middle, middle),  # empty
        (middle, float(np.nextafter(middle, np.inf))),  # a step
        (-3e38, 3e38),
        (high + 1, high + 2),  # all below
        (low - (high - low), low + (high - low) / 3),
    ][choice]


def prepared(
    pixels: Pixels,
    image: NDArray[Any],
    window: tuple[float, float],
    size: int,
    normalisation: Normalisation = PLAIN,
    dtype: type = np.float32,
) -> NDArray[Any]:
    out = np.full((1, 3, size, size), np.nan, dtype)
    pixels.prepare(image, window, [(out, normalisation)])
    return out


@many
@given(side, side, side, st.booleans(), st.sampled_from(DTYPES), st.integers(0, 4),
       st.integers(0, 5), st.integers(0, 2**32 - 1))  # fmt: skip
@example(60, 50, 61, False, "f4", 0, 0, 1)  # the fraction of a pixel is rounded late
@example(2, 64, 32, True, "u1", 0, 0, 1)  # one axis shrinks, the other grows
def test_prepare(
    native: NativePixels, height: int, width: int, size: int, colour: bool, dtype: str,
    layout: int, choice: int, seed: int,
) -> None:  # fmt: skip
    image = draw((height, width, 3) if colour else (height, width), dtype, seed)
    window = window_of(image, choice)
    if choice == 2:  # a step amplifies rounding: it is compared before the resize only
        size, image = 8, np.resize(image, (8, 8))
    expected = prepared(OpenCvPixels(), image, window, size)
    found = prepared(native, strided(image, layout), window, size)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= PREPARE_TOLERANCE


@pytest.mark.parametrize("shape", [(256, 256), (512, 512), (300, 700), (333, 1100), (2048, 1500)])
@pytest.mark.parametrize("size", [224, 512, 1024])
def test_prepare_at_real_sizes(native: NativePixels, shape: tuple[int, int], size: int) -> None:
    image = draw(shape, "u2", 3)
    expected = prepared(OpenCvPixels(), image, (500.0, 60000.0), size, IMAGENET)
    found = prepared(native, image, (500.0, 60000.0), size, IMAGENET)
    assert np.abs(found - expected).max() <= PREPARE_TOLERANCE / min(IMAGENET.std)


@given(side, side, side, st.booleans(), st.integers(0, 2**32 - 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prepare_in_half_precision(
    native: NativePixels, height: int, width: int, size: int, colour: bool, seed: int
) -> None:
    image = draw((height, width, 3) if colour else (height, width), "i2", seed)
    window = window_of(image, 0)
    wide = prepared(native, image, window, size, IMAGENET)
    found = prepared(native, image, window, size, IMAGENET, np.float16)
    assert np.array_equal(found, wide.astype(np.float16))
    expected = prepared(OpenCvPixels(), image, window, size, IMAGENET, np.float16)
    error = np.abs(found.astype("f8") - expected)
    assert (error <= 2 * HALF_ULP * np.abs(wide) + PREPARE_TOLERANCE / 0.224).all()


def test_threads_and_levels_change_no_bit(kernels: Any) -> None:
    image, best = draw((300, 200, 3), "u1", 1), kernels.level()
    results = []
    for level in kernels.levels():
        kernels.choose(level)
        for threads in (1, 3, 200):
            pixels = NativePixels(kernels, threads)
            results += [prepared(pixels, image, (9.0, 201.0), size) for size in (64, 250, 1024)]
    kernels.choose(best)
    for i, result in enumerate(results):
        assert np.array_equal(result, results[i % 3])


@many
@given(st.integers(1, 300), side, st.booleans(), st.sampled_from(DTYPES), st.integers(0, 4),
       st.sampled_from([(1.0, 99.0), (0.0, 100.0), (0.1, 33.3), (49.9, 50.1)]),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_percentiles(
    native: NativePixels, height: int, width: int, colour: bool, dtype: str, layout: int,
    ends: tuple[float, float], seed: int,
) -> None:  # fmt: skip
    image = draw((height, width, 3) if colour else (height, width), dtype, seed)
    found = native.percentiles(strided(image, layout), *ends)
    assert found == OpenCvPixels().percentiles(image, *ends)
    expected = np.percentile(image.astype(np.float64), ends)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


def test_percentiles_do_not_overflow(native: NativePixels) -> None:
    image = np.array([[-32768, 32767]], np.int16)
    for pixels in (native, OpenCvPixels()):
        assert pixels.percentiles(image, 0.0, 50.0) == (-32768.0, -0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_percentiles_refuse_what_is_not_finite(
    native: NativePixels, bad: float, dtype: str
) -> None:
    image = np.zeros((9, 9), dtype)
    image[4, 4] = bad
    for pixels in (native, OpenCvPixels()):
        with pytest.raises(InputError, match="NaN or infinite"):
            pixels.percentiles(image, 1.0, 99.0)


LOGIT_TOLERANCE = 1e-4
"""Masks and labels may differ where logits of size 10 differ by less: rounding of 24 bits."""


def smooth(n: int, height: int, width: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 10.0
    phase = rng.uniform(0, 7, (4, n, 1, 1))
    waves = np.sin(x * phase[0] + phase[1]) + np.cos(y * phase[2] + phase[3])
    return (5 * waves + rng.normal(size=(n, height, width))).astype(np.float32)


@many
@given(st.integers(0, 6), st.tuples(side, side), st.tuples(side, side), st.integers(0, 63),
       st.integers(0, 3), st.integers(0, 2**32 - 1))  # fmt: skip
def test_finish(
    native: NativePixels, n: int, grid: tuple[int, int], shape: tuple[int, int], absent: int,
    layout: int, seed: int,
) -> None:  # fmt: skip
    logits = smooth(n, *grid, seed)
    present = [not absent >> i & 1 for i in range(n)]
    expected_labels, expected_masks = np.zeros(shape, np.uint8), np.zeros((n, *shape), np.bool_)
    OpenCvPixels().finish(logits, present, expected_labels, expected_masks)
    labels = strided(np.full(shape, 99, np.uint8), layout)
    masks = np.ones((n, shape[0], 2 * shape[1]), np.bool_)[:, :, ::2]
    native.finish(logits, present, labels, masks)

    near = np.zeros(shape, bool)  # where rounding may decide: another threshold, another mask
    upsampled = []
    for i in range(n):
        for sign in (-1, 1):
            moved = (logits[i : i + 1] + np.float32(sign * LOGIT_TOLERANCE)).copy()
            other, mask = np.zeros(shape, np.uint8), np.zeros((1, *shape), np.bool_)
            OpenCvPixels().finish(moved, [True], other, mask)
            upsampled.append(mask[0])
        differ = masks[i] != expected_masks[i]
        near |= upsampled[-1] != upsampled[-2]
        assert not (differ & (upsampled[-1] == upsampled[-2])).any()
        assert not masks[i].any() or present[i]
    # A label differs where two logits are as good as equal, which is rare in what was drawn.
    wrong = (labels != expected_labels) & ~near
    assert wrong.sum() <= 1 + wrong.size // 500


def test_overlaps_go_to_the_highest_and_ties_to_the_first(native: NativePixels) -> None:
    logits = np.stack([np.full((4, 4), value, np.float32) for value in (1, 3, 3, -2)])
    for pixels in (native, OpenCvPixels()):
        labels, masks = np.zeros((9, 7), np.uint8), np.zeros((4, 9, 7), np.bool_)
        pixels.finish(logits, [True, True, True, True], labels, masks)
        assert (labels == 2).all()
        assert masks.all(axis=(1, 2)).tolist() == [True, True, True, False]


def test_255_structures(native: NativePixels) -> None:
    logits = np.linspace(-1, 1, 255 * 16, dtype=np.float32).reshape(255, 4, 4)
    labels, masks = np.zeros((8, 8), np.uint8), np.zeros((255, 8, 8), np.bool_)
    native.finish(logits, [True] * 255, labels, masks)
    assert (labels == 255).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_finite_fp16_is_gathered_exactly(native: NativePixels, dtype: type) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]  # not a multiple of any vector
    for pixels in (native, OpenCvPixels()):
        out = np.full((3, 1, values.size), np.nan, dtype)
        pixels.gather([values[None], values[None, ::-1].copy(), values[None]], out)
        bits = np.uint32 if dtype is np.float32 else np.uint16
        assert np.array_equal(out[2, 0].view(bits), values.astype(dtype).view(bits))
        assert np.array_equal(out[1, 0, ::-1], out[0, 0])


def test_a_large_gather_goes_past_the_caches(native: NativePixels) -> None:
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(5, 4099, 64)).astype(np.float16)
    out = np.zeros((4, 4099, 64), np.float32)
    native.gather([bank[i] for i in (4, 0, 4, 2)], out)
    assert np.array_equal(out, bank[[4, 0, 4, 2]].astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_int8_memories(native: NativePixels, dtype: type) -> None:
    rng = np.random.default_rng(0)
    rows = list(rng.integers(-128, 128, (2, 33, 64), np.int8))
    scales = list(rng.uniform(1e-4, 2, (2, 33)).astype(np.float32))
    results = []
    for pixels in (native, OpenCvPixels()):
        out = np.zeros((2, 33, 64), dtype)
        pixels.gather(rows, out, scales)
        results.append(out)
    assert np.array_equal(*results)
    assert results[0][1, 3, 5] == dtype(np.float32(rows[1][3, 5]) * scales[1][3])


def test_narrowing_rounds_to_the_nearest_even(native: NativePixels) -> None:
    """Through prepare: every fp16, the ties between neighbours, and beside the ties."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([halves, ties, np.nextafter(ties, 0), np.nextafter(ties, 9e9)])
    values = np.resize(np.concatenate([values, -values]), (512, 512)).astype(np.float32)
    scale = np.float32(2.0**17)
    inside = values / scale / 2 + np.float32(0.5)
    back = Normalisation((0.5,) * 3, (1 / (2 * scale),) * 3)
    wide = prepared(native, inside, (0.0, 1.0), 512, back)
    half = prepared(native, inside, (0.0, 1.0), 512, back, np.float16)
    with np.errstate(over="ignore"):
        assert np.array_equal(half.view(np.uint16), wide.astype(np.float16).view(np.uint16))
