"""Masks outlined on the picture that they are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.pictures import disc

from recallseg import Bundle, Library, Segmenter
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.reports.outlined import LEGEND, outlined_picture
from recallseg.runtime.segmenting.result import Result

FLAG = 24  # pixels from the top that it is written in


@pytest.fixture
def result(fake_bundle: Bundle, tmp_path: Path) -> Result:
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as library:
        one = disc(0.4)
        library.add(one.image, one.masks)
        return Segmenter(library, k=1, engine="fake").segment(one.image)


def drawn(image: NDArray[np.uint8], result: Result) -> NDArray[np.int64]:
    data = np.frombuffer(outlined_picture(image, result, Intensity("range")), np.uint8)
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.int64)


@pytest.mark.parametrize(
    ("spacing", "shape"), [(None, (512, 384)), ((1.0, 2.0), (341, 512)), ((3.0, 0.5), (512, 64))]
)
def test_outlines_lie_on_the_boundaries_and_nowhere_else(
    result: Result, spacing: tuple[float, float] | None, shape: tuple[int, int]
) -> None:
    image = np.full((64, 48), 9, np.uint8)
    masks = {name: np.zeros(image.shape, bool) for name in result.masks}
    masks["disc"][20:50, 10:40] = True
    masks["disc"][30:35, 20:30] = False  # a hole
    masks["core"][25:45, 30:44] = True  # overlaps
    one = replace(result, masks=FrozenMap(masks), spacing=spacing)
    picture = drawn(image, one)
    assert picture.shape == (shape[0] + LEGEND, 512, 3)
    inside = picture[FLAG : shape[0], : shape[1]]
    assert not np.ptp(picture[: shape[0], shape[1] :], axis=2).any()
    for index, mask in enumerate(masks.values()):
        found = (
            inside[..., 0] > inside[..., 2] + 60 if index else inside[..., 2] > inside[..., 0] + 60
        )
        near = cv2.resize(
            cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3))),
            shape[::-1],
            interpolation=cv2.INTER_NEAREST,
        )[FLAG:]
        assert found.sum() > 100
        assert not (found & (near == 0)).any()


def test_a_large_picture_is_made_small_and_an_empty_mask_leaves_it_as_it_is(result: Result) -> None:
    image = np.random.default_rng(0).integers(0, 255, (1500, 3000, 3), np.uint8)
    nothing = {name: np.zeros(image.shape[:2], bool) for name in result.masks}
    picture = drawn(image, replace(result, masks=FrozenMap(nothing)))
    assert picture.shape == (512 + LEGEND, 1024, 3)
    small = cv2.resize(image[..., ::-1].copy(), (1024, 512), interpolation=cv2.INTER_AREA)
    assert np.abs(picture[FLAG:512] - small[FLAG:]).max() <= 1
