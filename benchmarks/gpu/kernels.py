"""The pixel kernels on the device, against what its memory can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from recallseg.benchmarks.schema import Distribution
from recallseg.engines.bundle import Normalisation
from recallseg.engines.device import Device, DeviceTensor, open_device
from recallseg.engines.pixels.device import DevicePixels, kernel_image

__all__ = ["measure_kernels"]

ROUNDS = 200
COPY_BYTES = 256 << 20
"""Larger than any cache of a GPU."""


def measure_kernels(step: Callable[[str], None]) -> dict[str, Any]:
    """Return milliseconds and bytes per second of each kernel, and of a copy within the device.

    Raises
    ------
    EngineUnavailableError
        If there is no GPU, or the kernels were not built.
    """
    device = open_device()
    kernels = device.load_kernels(kernel_image())
    scratch = device.tensor((DevicePixels.scratch_bytes(2048, 2048),), np.uint8)
    pixels = DevicePixels(kernels, scratch)
    size = min(COPY_BYTES, device.free_memory() // 4)
    source, target = (device.tensor((size,), np.uint8) for _ in range(2))
    copied = _time(device, lambda: device.stream.copy(target, source))
    limit = 2 * size / copied.p50 / 1e6
    found = {}
    for name, (moved, work) in _cases(device, pixels).items():
        step(name)
        spent = _time(device, work)
        speed = moved / spent.p50 / 1e6
        found[name] = {
            "bytes": moved,
            "device_ms": asdict(spent),
            "gigabytes_per_second": round(speed, 2),
            "share_of_copy": round(speed / limit, 4),
        }
    return {
        "device": str(device.facts),
        "copy_gigabytes_per_second": round(limit, 2),
        "bytes_are": "read once and written once, of inputs and outputs; they fit the cache of "
        "large GPUs, which may then beat the copy",
        "kernels": found,
    }


def _time(device: Device, work: Callable[[], object]) -> Distribution:
    first, last = device.new_event(), device.new_event()
    spent = []
    for number in range(ROUNDS + 5):
        first.record(device.stream)
        work()
        last.record(device.stream)
        last.synchronize()
        if number >= 5:
            spent.append(last.since(first))
    return Distribution.of(spent)


def _cases(device: Device, pixels: DevicePixels) -> Mapping[str, tuple[int, Callable[[], object]]]:
    rng = np.random.default_rng(0)
    stream = device.stream

    def put(array: np.ndarray[Any, Any]) -> DeviceTensor:
        tensor = device.tensor(array.shape, array.dtype)
        stream.copy_in(tensor, array)
        stream.synchronize()
        return tensor

    grey = put(rng.integers(0, 4000, (256, 256)).astype(np.uint16))
    noise = rng.integers(0, 4000, (512, 512))
    many, floats = put(noise.astype(np.uint16)), put((noise / 4000).astype(np.float32))
    room = device.tensor((DevicePixels.window_bytes(np.float32),), np.uint8)
    single, half = (device.tensor((1, 3, 1024, 1024), kind) for kind in (np.float32, np.float16))
    normal = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    logits, scores = put(rng.normal(size=(8, 256, 256)).astype(np.float32)), put(np.ones(8, "f4"))
    iou, numbers = put(np.ones(8, "f4")), device.tensor((2, 8))
    labels = device.tensor((512, 512), np.uint8)
    masks = device.tensor((8, 512, 512), np.bool_)
    bank = put(rng.normal(size=(64, 4096, 64)).astype(np.float16))
    places = put(rng.permutation(64)[:16].astype(np.int64))
    memories = device.tensor((16, 4096, 64))
    halves = device.tensor((16, 4096, 64), np.float16)
    coded = put(rng.integers(-127, 128, (64, 4096, 64), np.int8))
    scales = put(rng.uniform(0.01, 0.1, (64, 4096)).astype(np.float32))
    window = (0.0, 4000.0)
    return {
        "percentiles of 512x512 uint16": (
            many.nbytes,
            lambda: pixels.percentile_window(many, 1.0, 99.0, room, stream),
        ),
        "percentiles of 512x512 float32": (
            2 * floats.nbytes,
            lambda: pixels.percentile_window(floats, 1.0, 99.0, room, stream),
        ),
        "prepare 256x256 uint16 to 3x1024x1024 float32": (
            grey.nbytes + single.nbytes,
            lambda: pixels.prepare(grey, window, single, normal, stream),
        ),
        "prepare 256x256 uint16 to 3x1024x1024 float16": (
            grey.nbytes + half.nbytes,
            lambda: pixels.prepare(grey, window, half, normal, stream),
        ),
        "finish 8x256x256 to 512x512": (
            logits.nbytes + labels.nbytes + masks.nbytes,
            lambda: pixels.finish(logits, scores, iou, numbers, labels, masks, stream),
        ),
        "gather 16 memories of 4096x64, fp16 to fp32": (
            memories.nbytes + memories.nbytes // 2,
            lambda: pixels.gather(bank, places, memories, stream),
        ),
        "gather 16 memories of 4096x64, int8 to fp16": (
            halves.nbytes + halves.nbytes // 2 + 4 * 16 * 4096,
            lambda: pixels.gather(coded, places, halves, stream, scales),
        ),
    }
