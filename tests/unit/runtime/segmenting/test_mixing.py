"""What a correction leaves of the mask before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from recallseg import Bundle
from recallseg.runtime.segmenting.mixing import KEPT, mix
from recallseg.runtime.segmenting.prompts import FIRST_CORNER, INSIDE, OUTSIDE, Grid, Point

SIDE = 32


@pytest.fixture
def grid(fake_bundle: Bundle) -> Grid:
    """An image of 64 x 128 pixels, whose logits are 32 x 32."""
    return Grid((64, 128), replace(fake_bundle.geometry, image_size=4 * SIDE))


def plane(*boxes: tuple[int, int, int, int], value: float = 5.0) -> Any:
    """Logits that are positive in boxes of rows and columns."""
    logits = np.full((SIDE, SIDE), -value, np.float32)
    for top, bottom, left, right in boxes:
        logits[top:bottom, left:right] = value
    return logits


def at(row: int, column: int, label: int = INSIDE) -> Point:
    """A click into the middle of a cell."""
    return Point(4 * column + 1.5, 2 * row + 0.5, label)


ORGAN, LOBE, FAR, LEAK = (4, 12, 4, 12), (6, 10, 12, 16), (24, 30, 24, 30), (20, 22, 2, 4)


def test_what_was_asked_for_is_taken_and_what_was_right_stays(grid: Grid) -> None:
    before = plane(ORGAN, FAR)
    after = plane(ORGAN, LOBE, LEAK, value=3.0)  # it adds the lobe, but forgets one and finds more
    click = at(8, 14)
    mixed = mix(before, after, [click], [click], grid)
    assert ((mixed > 0) == (plane(ORGAN, LOBE, FAR) > 0)).all()
    assert (mixed[6:10, 12:16] == 3.0).all()
    assert mixed[26, 26] == KEPT * 5 - (1 - KEPT) * 3


def test_what_was_taken_away_is_taken_away_there_alone(grid: Grid) -> None:
    before, after = plane(ORGAN, LOBE, FAR), plane(ORGAN, value=3.0)
    click = at(8, 14, OUTSIDE)
    mixed = mix(before, after, [click], [click], grid)
    assert ((mixed > 0) == (plane(ORGAN, FAR) > 0)).all()


def test_a_change_that_runs_on_far_from_the_click_is_not_all_taken(grid: Grid) -> None:
    rim = (2, 4, 0, 32)  # along the organ and on to the other end of the image
    before, after = plane(ORGAN), plane(ORGAN, rim, value=3.0)
    click = at(3, 6)
    mixed = mix(before, after, [click], [click], grid)
    assert mixed[3, 6] > 0
    assert mixed[3, 30] < 0


def test_who_confirms_what_is_there_loses_nothing(grid: Grid) -> None:
    before, after = plane(ORGAN, FAR), plane(LEAK, value=3.0)
    click = at(6, 6)
    assert ((mix(before, after, [click], [click], grid) > 0) == (before > 0)).all()


def test_the_new_answer_stands_where_there_is_nothing_to_keep(grid: Grid) -> None:
    before, after = plane(ORGAN), plane(FAR)
    click, corner = at(26, 26), Point(1, 1, FIRST_CORNER)
    assert mix(None, after, [click], [click], grid) is after
    assert mix(plane(), after, [click], [click], grid) is after
    assert mix(before, after, [corner], [corner], grid) is after
    missed = at(20, 3)  # the decoder does not do what was said
    assert mix(before, after, [missed], [missed], grid) is after


def test_a_mixed_mask_that_contradicts_more_clicks_is_not_taken(grid: Grid) -> None:
    before, after = plane(ORGAN, FAR), plane(ORGAN, LOBE, value=3.0)
    earlier, click = at(26, 26, OUTSIDE), at(8, 14)
    assert mix(before, after, [earlier, click], [click], grid) is after


def test_cells_are_those_that_pixels_lie_in(grid: Grid) -> None:
    assert grid.cell(Point(-0.5, -0.5, INSIDE)) == (0, 0)
    assert grid.cell(Point(127.5, 63.5, INSIDE)) == (SIDE - 1, SIDE - 1)
    assert grid.cell(at(8, 14)) == (8, 14)
