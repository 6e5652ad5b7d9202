"""The CUDA kernels, run on the CPU: the very bits of the native kernels; arguments; refusals."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cuda_driver import DriverKernels
from support.emulated_gpu import EmulatedKernels, OnDevice
from support.kernels import build_fatbin

from recallseg.engines.bundle import Normalisation
from recallseg.engines.errors import EngineUnavailableError, InputError
from recallseg.engines.pixels import device
from recallseg.engines.pixels.device import DevicePixels
from recallseg.engines.pixels.interface import window_gain
from recallseg.engines.pixels.native import NativePixels
from recallseg.runtime.model.preprocess import Intensity, intensity_window

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STREAM = object()
Machine = EmulatedKernels | DriverKernels
SCRATCH = DevicePixels.scratch_bytes(512, 512)
side = st.integers(1, 70)
shared = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def gpu(emulator: ctypes.CDLL) -> EmulatedKernels:
    return EmulatedKernels(emulator)


@pytest.fixture
def pixels(gpu: EmulatedKernels) -> DevicePixels:
    return DevicePixels(gpu, OnDevice(np.zeros(SCRATCH, np.uint8)))


@pytest.fixture(scope="session")
def real(pytestconfig: pytest.Config) -> DriverKernels:
    return DriverKernels(build_fatbin(pytestconfig))


@pytest.fixture(params=["emulator", pytest.param("real", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    """What runs the kernels: this processor, or a GPU."""
    found = request.getfixturevalue(request.param)
    return EmulatedKernels(found) if request.param == "emulator" else found


def made_on(machine: Machine) -> DevicePixels:
    return DevicePixels(machine, machine.put(np.zeros(SCRATCH, np.uint8)))


def random_image(shape: tuple[int, ...], dtype: str, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=shape) if dtype == "f4" else rng.integers(0, 250, shape)
    return image.astype(dtype)


class Interface:
    """An array whose interface says something else."""

    def __init__(self, array: OnDevice, **more: Any) -> None:
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **more}


@shared
@given(side, side, side, st.booleans(), st.sampled_from(["u1", "i2", "u2", "f4"]), st.booleans(),
       st.booleans(), st.integers(0, 2**32 - 1))  # fmt: skip
def test_prepare(
    machine: Machine, kernels: Any, height: int, width: int, size: int, colour: bool,
    dtype: str, half: bool, flipped: bool, seed: int,
) -> None:  # fmt: skip
    image = random_image((height, width, 3) if colour else (height, width), dtype, seed)
    image = image[::-1, ::-1] if flipped else image
    expected = np.zeros((1, 3, size, size), np.float16 if half else np.float32)
    found = np.full_like(expected, np.nan)
    NativePixels(kernels).prepare(image, (0.5, 201.25), [(expected, IMAGENET)])
    pixels, put = made_on(machine), machine.put
    pixels.prepare(put(image), (0.5, 201.25), put(found), IMAGENET, STREAM)
    machine.fetch()
    assert np.array_equal(found, expected)


def window_of(
    machine: Machine, kernels: Any, image: Any, ends: tuple[float, float]
) -> tuple[float, float]:
    """Compare a window, and what is prepared with it, with the CPU's; return the CPU's."""
    native = NativePixels(kernels)
    low, high = intensity_window(image, Intensity("percentile", *ends), native)
    room = np.zeros(DevicePixels.window_bytes(image.dtype), np.uint8)
    pixels, put = made_on(machine), machine.put
    there = put(room)
    pixels.percentile_window(put(image), *ends, there, STREAM)
    expected, found = np.zeros((2, 1, 3, 16, 16), np.float32)
    native.prepare(image, (low, high), [(expected, IMAGENET)])
    pixels.prepare(put(image), there, put(found), IMAGENET, STREAM)
    machine.fetch()
    assert room[:8].view(np.float32).tolist() == [np.float32(low), window_gain(low, high)]
    assert room[DevicePixels.WRONG].view(np.uint32) == 0
    assert np.array_equal(found, expected)
    return low, high


@shared
@given(side, side, st.booleans(), st.sampled_from(["u1", "i2", "u2"]), st.booleans(),
       st.tuples(st.floats(0, 40), st.floats(60, 100)), st.sampled_from([1, 3, 250, 70000]),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_percentile_window(
    machine: Machine, kernels: Any, height: int, width: int, colour: bool, dtype: str,
    flipped: bool, ends: tuple[float, float], values: int, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    limits = np.iinfo(dtype)
    shape = (height, width, 3) if colour else (height, width)
    image = rng.integers(limits.min, min(limits.max, limits.min + values) + 1, shape).astype(dtype)
    image = np.where(rng.random(shape) < 0.5, image, limits.max).astype(dtype)
    window_of(machine, kernels, image[::-1, ::-1] if flipped else image, ends)


@shared
@given(side, side, st.booleans(), st.booleans(), st.tuples(st.floats(0, 40), st.floats(60, 100)),
       st.sampled_from([1e-45, 1e-38, 1e-3, 1.0, 1e5, 3e38]), st.integers(0, 3),
       st.sampled_from([0.0, 0.5, 0.999, 1.0]), st.integers(0, 2**32 - 1))  # fmt: skip
def test_percentile_window_of_floats(
    machine: Machine, kernels: Any, height: int, width: int, colour: bool, flipped: bool,
    ends: tuple[float, float], size: float, digits: int, ground: float, seed: int,
) -> None:  # fmt: skip
    """Of any size, signed, with equal ones, on a ground of one value or all of it."""
    rng = np.random.default_rng(seed)
    shape = (height, width, 3) if colour else (height, width)
    image = (size * rng.uniform(-1, 1, shape).round(digits or 9)).astype(np.float32)
    image[rng.random(shape) < ground] = -0.0
    image = image[::-1, ::-1] if flipped else image
    low, high = window_of(machine, kernels, image, ends)
    if high > low:  # numpy's own rule, which the CPU's is
        expected = np.percentile(image.astype(np.float64), ends)
        if expected[0] < expected[1]:
            np.testing.assert_allclose([low, high], expected, rtol=1e-12)


@pytest.mark.parametrize("spoilt", [np.nan, -np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_counted(machine: Machine, spoilt: float) -> None:
    image = np.arange(700, dtype=np.float32).reshape(20, 35)
    image[3, 4:9] = spoilt
    rooms = [np.full(DevicePixels.window_bytes(np.float32), 7, np.uint8) for _ in "ab"]
    pixels, put = made_on(machine), machine.put
    pixels.percentile_window(put(image), 1, 99, put(rooms[0]), STREAM)
    pixels.count_wrong(put(image), put(rooms[1]), STREAM)
    machine.fetch()
    assert [int(room[DevicePixels.WRONG].view(np.uint32)[0]) for room in rooms] == [5, 5]


def test_nothing_to_stride_over(machine: Machine) -> None:
    """No structures: drivers give arrays without elements strides of 0."""
    labels, masks = np.full((8, 8), 7, np.uint8), np.zeros((0, 8, 8), np.bool_)
    put = machine.put
    nothing = OnDevice(np.zeros((0, 1, 2), np.float32))
    flat, none = Interface(nothing, strides=(0, 0, 0)), put(np.zeros(0, np.float32))
    numbers = put(np.zeros((2, 0), np.float32))
    made_on(machine).finish(flat, none, none, numbers, put(labels), put(masks), STREAM)
    machine.fetch()
    assert not labels.any()


@shared
@given(st.integers(0, 6), st.tuples(side, side), st.tuples(side, side), st.integers(0, 63),
       st.integers(0, 2**32 - 1))  # fmt: skip
def test_finish(
    machine: Machine, kernels: Any, n: int, grid: tuple[int, int], shape: tuple[int, int],
    absent: int, seed: int,
) -> None:  # fmt: skip
    logits = np.random.default_rng(seed).normal(size=(n, *grid)).astype(np.float32)
    present = [not absent >> i & 1 for i in range(n)]
    expected, expected_masks = np.zeros(shape, np.uint8), np.zeros((n, *shape), np.bool_)
    NativePixels(kernels).finish(logits, present, expected, expected_masks)
    labels = np.full((shape[1], shape[0]), 7, np.uint8).T
    masks = np.ones((*shape, n), np.bool_).transpose(2, 0, 1)[:, ::-1]
    scores = np.where(present, 0.5, 0).astype(np.float32)
    iou, numbers = np.linspace(0, 1, n, dtype=np.float32), np.full((2, n), np.nan, np.float32)
    pixels, put = made_on(machine), machine.put
    arrays = (logits, scores, iou, numbers, labels, masks)
    pixels.finish(*map(put, arrays), STREAM)
    machine.fetch()
    assert np.array_equal(numbers, [iou, scores])
    assert np.array_equal(labels, expected)
    assert np.array_equal(masks, expected_masks)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gather(machine: Machine, kernels: Any, dtype: type) -> None:
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(9, 5, 64 + 4)).astype(np.float16).reshape(9, -1)[:, :320]
    bank = bank.reshape(9, 5, 64) if bank.flags.c_contiguous else np.lib.stride_tricks.as_strided(
        bank, (9, 5, 64), (bank.strides[0], 128, 2)
    )  # fmt: skip
    small = rng.integers(-128, 128, (9, 5, 64), np.int8)
    scales = rng.uniform(0.001, 1, (9, 5)).astype(np.float32)
    places = np.array([8, 0, 3, 8], np.int64)
    expected, found = np.zeros((2, 4, 5, 64), dtype)
    native = NativePixels(kernels)
    native.gather([np.ascontiguousarray(bank[i]) for i in places], expected)
    pixels, put = made_on(machine), machine.put
    pixels.gather(put(bank), put(places), put(found), STREAM)
    machine.fetch()
    assert np.array_equal(found, expected)
    native.gather([small[i] for i in places], expected, [scales[i] for i in places])
    pixels = made_on(machine)
    pixels.gather(put(small), put(places), put(found), STREAM, scales=put(scales))
    machine.fetch()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_what_has_no_place_is_left_as_it_is(machine: Machine, dtype: type) -> None:
    """Where memories of frames go."""
    bank = np.arange(9 * 5 * 8).reshape(9, 5, 8).astype(dtype)
    scales = np.full((9, 5), 2, np.float32) if dtype is np.int8 else None
    places, found = np.array([8, -1, 3, -1], np.int64), np.full((4, 5, 8), 7, np.float32)
    pixels, put = made_on(machine), machine.put
    pixels.gather(
        put(bank), put(places), put(found), STREAM, None if scales is None else put(scales)
    )
    machine.fetch()
    factor = 1 if scales is None else 2
    assert np.array_equal(found[::2], factor * bank[[8, 3]].astype(np.float32))
    assert (found[1::2] == 7).all()


def test_every_target_pixel_has_a_thread_on_the_callers_stream(
    pixels: DevicePixels, gpu: EmulatedKernels
) -> None:
    out = np.zeros((1, 3, 100, 100), np.float32)
    pixels.prepare(OnDevice(np.zeros((30, 40), np.uint8)), (0, 1), OnDevice(out), IMAGENET, STREAM)
    names = [name for name, *_ in gpu.launches]
    assert names == ["recallseg_spans", "recallseg_spans", "recallseg_prepare"]
    assert gpu.launches[2][1:3] == ((4, 13, 1), (32, 8, 1))
    assert all(stream is STREAM for *_, stream in gpu.launches)


def test_weights_of_a_resize_are_made_once(pixels: DevicePixels, gpu: EmulatedKernels) -> None:
    image = random_image((30, 40), "u2", 0)

    def prepare(side: int, image: Any = image) -> Any:
        out = np.zeros((1, 3, side, side), np.float32)
        pixels.prepare(OnDevice(image), (0, 250), OnDevice(out), IMAGENET, STREAM)
        return out

    first, other, again = prepare(60), prepare(50), prepare(60)
    assert np.array_equal(first, again)
    assert not np.array_equal(other, prepare(50, image.T.copy()))
    gpu.launches.clear()
    prepare(50, image.T.copy())
    assert [name for name, *_ in gpu.launches] == ["recallseg_prepare"]


def test_what_does_not_fit_is_refused_before_a_launch(
    pixels: DevicePixels, gpu: EmulatedKernels
) -> None:
    image, out = np.zeros((8, 8), np.uint8), np.zeros((1, 3, 16, 16), np.float32)
    large = np.zeros((1, 3, 600, 600), np.float32)
    logits, scores = np.zeros((2, 4, 4), np.float32), np.zeros(2, np.float32)
    labels, masks = np.zeros((8, 8), np.uint8), np.zeros((2, 8, 8), np.bool_)
    bank, places = np.zeros((3, 5, 64), np.float16), np.zeros(2, np.int64)
    memories = np.zeros((2, 5, 64), np.float32)
    odd = np.zeros(2 * 3 * 5 * 64 + 2, np.uint8)[2:].view(np.float16).reshape(3, 5, 64)

    def prepare(image: Any, out: Any, window: tuple[float, float] = (0.0, 1.0)) -> None:
        pixels.prepare(OnDevice(image), window, OnDevice(out), IMAGENET, STREAM)

    room, floats = (np.zeros(DevicePixels.window_bytes(kind), np.uint8) for kind in ("u1", "f4"))
    iou, numbers = np.zeros(2, np.float32), np.zeros((2, 2), np.float32)

    def window(image: Any, room: Any) -> None:
        pixels.percentile_window(OnDevice(image), 1, 99, OnDevice(room), STREAM)

    def finish(*arrays: Any) -> None:
        pixels.finish(*(OnDevice(array) for array in arrays), STREAM)

    def gather(*arrays: Any) -> None:
        pixels.gather(
            *(OnDevice(array) for array in arrays[:3]), STREAM, *map(OnDevice, arrays[3:])
        )

    for call, arguments in (
        (prepare, (image.astype("f8"), out)),
        (prepare, (image[:0], out)),
        (prepare, (image[None, None], out)),
        (prepare, (image, out[..., ::2])),
        (prepare, (image, out[..., :8])),
        (prepare, (image, out, (2.0, 1.0))),
        (prepare, (image, large)),
        (prepare, (np.zeros(65, np.uint8)[1:].view(np.uint16).reshape(4, 8), out)),
        (window, (image.astype("f8"), floats)),
        (window, (image.astype("f4"), room)),
        (window, (image[None, None], room)),
        (window, (image, room[:-1])),
        (window, (image, np.zeros(len(room) + 8, np.uint8)[1:])),
        (finish, (logits.astype("f8"), scores, iou, numbers, labels, masks)),
        (finish, (logits[:, ::2], scores, iou, numbers, labels, masks)),
        (finish, (logits, scores[:1], iou, numbers, labels, masks)),
        (finish, (logits, scores, iou[:1], numbers, labels, masks)),
        (finish, (logits, scores, iou, numbers[:1], labels, masks)),
        (finish, (logits, scores, iou, numbers.astype("f8"), labels, masks)),
        (finish, (logits, scores, iou, numbers, labels[0], masks)),
        (finish, (logits, scores, iou, numbers, labels, masks[:, 1:])),
        (finish, (logits, scores, iou, numbers, labels[:0], masks[:, :0])),
        (gather, (bank, places[:1], memories)),
        (gather, (bank.astype("f8"), places, memories)),
        (gather, (bank.astype("f4"), places, memories.astype("f2"))),
        (gather, (bank[:, :, ::2], places, memories[:, :, ::2].copy())),
        (gather, (bank[:, :, :63], places, memories[:, :, :63].copy())),
        (gather, (odd, places, memories)),
        (gather, (bank, places, np.zeros(641, np.float32)[1:].reshape(2, 5, 64))),
        (gather, (bank, places.astype("i4"), memories)),
        (gather, (bank.astype("i1"), places, memories, np.zeros((3, 4), np.float32))),
    ):
        with pytest.raises(InputError):
            call(*arguments)
    with pytest.raises(InputError, match="__cuda_array_interface__"):
        pixels.prepare(image, (0.0, 1.0), OnDevice(out), IMAGENET, STREAM)
    assert gpu.launches == []


def test_kernels_that_were_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(device, "files", lambda package: tmp_path)
    with pytest.raises(EngineUnavailableError, match="nvcc"):
        device.kernel_image()
    (tmp_path / "pixels.fatbin").write_bytes(b"fatbin")
    assert device.kernel_image() == b"fatbin"
