"""The shipped demo model segments real images that it has never seen: Dice, not only shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from recallseg import Bundle, Library, Segmenter
from recallseg.engines.registry import load_engines
from recallseg.engines.verification import mask_dice, verify_engines
from recallseg.runtime.reports.demo import STRUCTURES, fill_library, load_slices

FLOORS = {"brain": 0.90, "grey matter": 0.60, "white matter": 0.60}
"""What the shipped weights reach (see the model card), less a margin for other processors."""


@pytest.mark.parametrize("variant", ["portable", "ort-cpu"])
def test_the_shipped_bundle_reproduces_its_golden_tensors(variant: str) -> None:
    bundle = Bundle.open("demo")
    engines = load_engines(bundle, "onnxruntime-cpu", variants=(variant, "portable"))
    assert verify_engines(bundle, engines, "fp32").passed


def test_tissue_of_a_real_brain(tmp_path: Path) -> None:
    slices = load_slices()
    with Library.create(tmp_path / "library", Bundle.open("demo")) as library:
        fill_library(library, slices, lambda text: None)
        segmenter = Segmenter(library, k=8, structures=STRUCTURES)
        dice: dict[str, list[float]] = {name: [] for name in STRUCTURES}
        for query in slices.queries[2:12:3]:
            result = segmenter.segment(query.image)
            for name in STRUCTURES:
                if name in query.masks:
                    dice[name].append(mask_dice(result.masks[name], query.masks[name]))
    for name, floor in FLOORS.items():
        assert sum(dice[name]) / len(dice[name]) >= floor, (name, dice[name])
