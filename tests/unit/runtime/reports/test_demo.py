"""The demo's slices: real, even, and never the same ones annotated and asked for."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("nibabel")
pytest.importorskip("nilearn")

from recallseg.runtime.reports.demo import STRUCTURES, load_slices


def test_slices() -> None:
    slices = load_slices()
    assert len(slices.exemplars) == 16
    assert len(slices.queries) == 15
    assert 8.5 < slices.gap < 10.5
    annotated = [int(exemplar.name.split("-")[1]) for exemplar in slices.exemplars]
    asked = [int(query.name.split("-")[1]) for query in slices.queries]
    assert set(np.diff(annotated)) <= {9, 10}
    for number in asked:
        assert min(abs(number - other) for other in annotated) >= 4
    shapes = {image.image.shape for image in slices.exemplars + slices.queries}
    assert len(shapes) == 1
    for image in slices.exemplars + slices.queries:
        assert set(image.masks) | set(image.absent) == set(STRUCTURES)
        assert not (image.masks["grey matter"] & image.masks["white matter"]).any()
        brain = image.masks["brain"]
        assert (image.masks["white matter"] & brain).sum() > 0.9 * image.masks["white matter"].sum()
        assert image.image[brain].mean() > 5 * image.image[~brain].mean()


def test_front_is_up_and_the_brain_is_inside_the_frame() -> None:
    middle = load_slices().queries[5]
    brain = middle.masks["brain"]
    rows, columns = np.flatnonzero(brain.any(axis=1)), np.flatnonzero(brain.any(axis=0))
    assert rows[0] >= 8
    assert columns[0] >= 8
    assert len(rows) > len(columns)  # a brain is longer than it is wide
