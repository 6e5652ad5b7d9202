from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from recallseg.benchmarks.accuracy.dataset import annotate
from recallseg.benchmarks.accuracy.unet import UNetSettings, train_unet
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.reports.metrics import compare_masks


def square(name: str, top: int, left: int):
    image = np.full((40, 48), 30, np.uint8)
    mask = np.zeros((40, 48), bool)
    mask[top : top + 14, left : left + 14] = True
    image[mask] = 200
    return annotate(name, image, {"square": mask})


def train(steps: int):
    exemplars = [square(f"e{i}", 4 + 3 * i, 30 - 5 * i) for i in range(4)]
    settings = UNetSettings(size=48, width=8, steps=steps, batch=2, mirror=True, threads=1)
    return train_unet(exemplars, ("square",), Intensity("range"), settings)


def test_a_unet_learns_what_is_bright():
    pytest.importorskip("torch")
    query = square("q", 10, 17)
    mask = train(60).predict(query.image)["square"]
    assert mask.shape == query.image.shape
    assert compare_masks(mask, query.masks["square"]).dice > 0.8


def test_training_is_repeatable():
    pytest.importorskip("torch")
    noise = np.random.default_rng(0).integers(256, size=(40, 48)).astype(np.uint8)
    first, second = (train(3).predict(noise)["square"] for _ in range(2))
    assert np.array_equal(first, second)


def test_torch_is_not_imported_until_the_baseline_is_asked_for():
    code = (
        "import sys, recallseg.benchmarks.accuracy.run, recallseg.benchmarks.accuracy.commands\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
