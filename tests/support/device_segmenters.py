"""Segmenters on a stand-in for a GPU, and what they are compared with."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from recallseg import Bundle, Library, Segmenter
from recallseg.engines.device import Device
from recallseg.runtime.model import device as device_model
from recallseg.runtime.model.device import DeviceModel
from recallseg.runtime.model.memory_cache import MemoryCache
from recallseg.runtime.model.model import GpuOptions, Model
from support.emulated_gpu import KERNELS, emulated_kernels
from support.fake_driver import FakeDriver
from support.fake_tensorrt import HostGpu

__all__ = [
    "STRUCTURES",
    "cache_of",
    "calls_of",
    "library_of_discs",
    "make",
    "on_cpu",
    "picture",
    "same",
    "with_kernels",
    "without_kernels",
]

STRUCTURES = ("disc", "core")


def picture(seed: int, side: int = 60) -> tuple[NDArray[np.uint16], dict[str, NDArray[np.bool_]]]:
    """A noisy disc with a bright core, and the masks of both."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, : side + 7]
    centre = rng.uniform(0.4, 0.6, 2) * side
    distance = np.hypot(y - centre[0], x - centre[1])
    masks = {"disc": distance < side / 4, "core": distance < side / 9}
    image = 200 + 900 * masks["disc"] + 900 * masks["core"] + rng.normal(0, 60, x.shape)
    return image.clip(0).astype(np.uint16), masks


def library_of_discs(folder: Path, bundle: Bundle) -> Library:
    """Six pictures with both structures."""
    made = Library.create(folder / "library", bundle, threads=1)
    for seed in range(6):
        image, masks = picture(seed)
        made.add(image, masks)
    return made


def without_kernels(**facts: Any) -> Device:
    HostGpu.driver = FakeDriver(**facts)  # where sessions queue their work
    return Device(HostGpu.driver)


def with_kernels(emulator: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> Device:
    """A device that runs the CUDA source of the pixel kernels."""
    monkeypatch.setattr(device_model, "kernel_image", lambda: " ".join(KERNELS).encode())
    return without_kernels(kernels=emulated_kernels(emulator), **facts)


SETTINGS: Mapping[str, Any] = {"k": 3, "structures": STRUCTURES, "reach": math.inf}
"""Three memories a structure in every query, so that copies can be counted."""


def make(library: Library, device: Device, **settings: Any) -> Segmenter:
    gpu = {name: settings.pop(name) for name in ("cache_bytes", "cuda_graphs") if name in settings}
    return Segmenter(
        library,
        **{**SETTINGS, "engine": "onnxruntime-cuda", **settings},
        gpu=GpuOptions(device=device, **gpu),
    )


def on_cpu(library: Library, **settings: Any) -> Segmenter:
    """On a model of its own, whose pixels are what the environment says now."""
    model = Model.open(library.bundle, threads=1)
    return Segmenter(library, **{**SETTINGS, "model": model, **settings})


def same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    for name in STRUCTURES:
        np.testing.assert_array_equal(found.masks[name], expected.masks[name])
        assert found.scores[name] == expected.scores[name]
    assert found.recalled == expected.recalled


def cache_of(segmenter: Segmenter) -> MemoryCache:
    assert isinstance(segmenter.model, DeviceModel)
    [cache] = segmenter.model.caches.values()
    return cache


def calls_of(device: Device) -> list[str]:
    """What the driver was asked for, in order."""
    calls: list[str] = device.driver.calls  # type: ignore[attr-defined]
    return calls
