"""The pixels' door: which implementation, and what it refuses."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from recallseg.engines import pixels as door
from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import EngineRunError, EngineUnavailableError, InputError
from recallseg.engines.pixels.native import NativePixels
from recallseg.engines.pixels.opencv import OpenCvPixels

PLAIN = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(params=["opencv", "native"])
def pixels(request: pytest.FixtureRequest) -> door.Pixels:
    if request.param == "opencv":
        return OpenCvPixels()
    return NativePixels(request.getfixturevalue("kernels"))


def test_opencv_where_nothing_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "native_kernels", lambda: None)
    monkeypatch.delenv(door.CHOICE, raising=False)
    assert isinstance(door.open_pixels(), OpenCvPixels)
    monkeypatch.setenv(door.CHOICE, "native")
    with pytest.raises(EngineUnavailableError, match="were not built"):
        door.open_pixels()


def test_native_where_it_was(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "recallseg.engines.pixels._native", kernels)
    monkeypatch.delenv(door.CHOICE, raising=False)
    found = door.open_pixels()
    assert isinstance(found, NativePixels)
    assert kernels.level() in repr(found)
    monkeypatch.setenv(door.CHOICE, "opencv")
    assert isinstance(door.open_pixels(), OpenCvPixels)


def test_another_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(door.CHOICE, "fast")
    with pytest.raises(InputError, match="'fast'"):
        door.open_pixels()


def test_kernels_that_cannot_be_loaded_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(door, "import_module", broken)
    monkeypatch.delenv(door.CHOICE, raising=False)
    with pytest.raises(EngineUnavailableError, match="undefined symbol"):
        door.open_pixels()


@pytest.mark.parametrize("shape", [(0, 5), (4,), (4, 4, 4), (4, 4, 3, 1)])
def test_images_of_another_shape(pixels: door.Pixels, shape: tuple[int, ...]) -> None:
    image, out = np.zeros(shape, np.uint8), np.zeros((1, 3, 8, 8), np.float32)
    with pytest.raises(InputError, match=r"HxW|empty"):
        pixels.prepare(image, (0.0, 1.0), [(out, PLAIN)])
    with pytest.raises(InputError, match=r"HxW|empty"):
        pixels.percentiles(image, 1.0, 99.0)


def test_images_of_another_dtype(pixels: door.Pixels) -> None:
    with pytest.raises(InputError, match="complex64"):
        pixels.percentiles(np.zeros((4, 4), np.complex64), 1.0, 99.0)


@pytest.mark.parametrize("window", [(2.0, 1.0), (float("nan"), 1.0), (0.0, 1e39)])
def test_windows_that_cannot_be(pixels: door.Pixels, window: tuple[float, float]) -> None:
    out = np.zeros((1, 3, 8, 8), np.float32)
    with pytest.raises(InputError, match="window"):
        pixels.prepare(np.zeros((4, 4)), window, [(out, PLAIN)])


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((1, 3, 8, 8)),
        np.zeros((3, 8, 8), np.float32),
        np.zeros((1, 3, 8, 9), np.float32),
        np.zeros((1, 3, 8, 16), np.float32)[..., ::2],
        np.broadcast_to(np.float32(0), (1, 3, 8, 8)),
    ],
)
def test_targets_that_cannot_be_written(pixels: door.Pixels, out: Any) -> None:
    with pytest.raises(InputError, match="network input"):
        pixels.prepare(np.zeros((4, 4)), (0.0, 1.0), [(out, PLAIN)])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(pixels: door.Pixels, bad: float) -> None:
    logits = np.zeros((2, 4, 4), np.float32)
    logits[1, 2, 2] = bad
    labels, masks = np.zeros((8, 8), np.uint8), np.zeros((2, 8, 8), np.bool_)
    pixels.finish(logits, [True, False], labels, masks)
    with pytest.raises(EngineRunError, match="structure 2 of 2"):
        pixels.finish(logits, [True, True], labels, masks)


def test_outputs_that_do_not_fit(pixels: door.Pixels) -> None:
    logits = np.zeros((2, 4, 4), np.float32)
    labels, masks = np.zeros((8, 8), np.uint8), np.zeros((2, 8, 8), np.bool_)
    for arguments in (
        (logits.astype("f8"), [True] * 2, labels, masks),
        (logits[:, ::2], [True] * 2, labels, masks),
        (logits, [True], labels, masks),
        (logits, [True] * 2, labels.astype("i4"), masks),
        (logits, [True] * 2, labels, masks[:, 1:]),
        (logits, [True] * 2, labels, masks.astype(np.uint8)),
        (np.zeros((256, 4, 4), np.float32), [True] * 256, labels, np.zeros((256, 8, 8), bool)),
    ):
        with pytest.raises(InputError):
            pixels.finish(*arguments)  # type: ignore[arg-type]


def test_memories_that_do_not_fit(pixels: door.Pixels) -> None:
    half, out = np.zeros((5, 64), np.float16), np.zeros((2, 5, 64), np.float32)
    small, scale = np.zeros((5, 64), np.int8), np.zeros(5, np.float32)
    for rows, to, scales in (
        ([half], out, None),
        ([half, half[1:]], out, None),
        ([half, half.astype("f4")], out, None),
        ([half, half], out.astype("f8"), None),
        ([half, half], out[:, :, ::2], None),
        ([small, small], out, None),
        ([small, small], out, [scale]),
        ([small, small], out, [scale, scale[1:]]),
        ([half, half], out, [scale, scale]),
    ):
        with pytest.raises(InputError):
            pixels.gather(rows, to, scales)


def test_the_kernels_check_what_could_reach_beyond_a_buffer(kernels: Any) -> None:
    image, out = np.zeros((4, 4), np.uint8), np.zeros((1, 3, 8, 8), np.float32)
    labels, masks = np.zeros((8, 8), np.uint8), np.zeros((2, 8, 8), np.bool_)
    logits, half = np.zeros((2, 4, 4), np.float32), np.zeros((5, 64), np.float16)
    thirds = [1.0, 1.0, 1.0]
    for call in (
        lambda: kernels.prepare(image.astype("i8"), 0.0, 1.0, out, thirds, thirds, 1),
        lambda: kernels.prepare(image, 0.0, 1.0, out[:, :2], thirds, thirds, 1),
        lambda: kernels.prepare(image, 0.0, 1.0, out[..., ::2], thirds, thirds, 1),
        lambda: kernels.order_statistics(image, [16]),
        lambda: kernels.order_statistics(image, [-1]),
        lambda: kernels.finish(logits, [True], labels, masks, 1),
        lambda: kernels.finish(logits, [True] * 2, labels[1:], masks, 1),
        lambda: kernels.finish(logits[:, :, ::2], [True] * 2, labels, masks, 1),
        lambda: kernels.gather([half], np.zeros((1, 6, 64), np.float32), None),
        lambda: kernels.gather([half, half], np.zeros((1, 5, 64), np.float32), None),
        lambda: kernels.gather([half.astype("f4")], np.zeros((1, 5, 64), np.float32), None),
    ):
        with pytest.raises(ValueError, match=r"array|shape|out|rank|row|image"):
            call()
    with pytest.raises(ValueError, match="read-only"):
        kernels.prepare(image, 0.0, 1.0, np.broadcast_to(out[:1], out.shape), thirds, thirds, 1)
