"""What to annotate next: what is far, doubtful, and like many others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.pictures import disc, write_pairs
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.segmenting.choosing import choose_next, doubt_of, greedy_coverage, rank
from recallseg.runtime.segmenting.segmenter import Segmenter


def on_a_circle(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


NONE = np.full(5, np.nan)
CROWD = on_a_circle(0, 2, 4, 6, 90)
"""Four images alike, and one by itself."""


def test_coverage_takes_the_middle_of_the_crowd_first_and_then_the_outlier() -> None:
    (first, gain), (second, more) = greedy_coverage(CROWD, None, np.ones(5), 2)
    assert first in (1, 2, 3)
    assert second == 4
    assert 1 > gain > more > 0
    assert gain + more == pytest.approx(1, abs=0.01)


def test_distance_takes_the_farthest_from_the_library() -> None:
    found = rank(CROWD, CROWD[:1], NONE, 2, "distance")
    assert [index for index, _, _ in found] == [4, 3]
    assert found[0][1] == pytest.approx(1.0)


def test_doubt_counts_for_those_who_are_alike() -> None:
    """The library knows neither crowd; one of them it segments without doubt."""
    images = on_a_circle(0, 1, 2, 180, 181, 182)
    doubts = np.array([0.0, 0.0, 0.0, 0.4, 0.4, 0.4])
    known = on_a_circle(90)
    assert rank(images, known, doubts, 1, "all")[0][0] == 4
    assert rank(images, known, 0.4 - doubts, 1, "all")[0][0] == 1
    assert [i for i, _, _ in rank(images, known, doubts[::-1], 3, "doubt")] == [0, 1, 2]


def test_of_large_folders_no_square_of_distances_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    images = on_a_circle(*np.linspace(0, 90, 40))
    expected = greedy_coverage(images, None, np.ones(40), 6)
    monkeypatch.setattr("recallseg.runtime.segmenting.choosing._ROWS", 7)
    assert greedy_coverage(images, None, np.ones(40), 6) == expected


@pytest.fixture
def library(fake_bundle: Bundle, tmp_path: Path) -> Library:
    made = Library.create(tmp_path / "lib", fake_bundle, engine="fake")
    for position in (0.0, 0.1):
        made.add(disc(position).image, disc(position).masks, key=f"{position}")
    return made


def test_images_that_are_annotated_already_are_passed_over(library: Library) -> None:
    images = [(f"{p}", disc(p).image) for p in (0.0, 0.05, 0.1, 0.9)]
    found = choose_next(library, images, 9)
    assert {one.name for one in found} == {"0.05", "0.9"}
    assert all(0 <= one.doubt <= 1 and one.distance > 0 for one in found)
    assert choose_next(library, images, 1, by="distance")[0].name == "0.9"
    with pytest.raises(InputError, match="all 1 are exemplars of the library already"):
        choose_next(library, images[:1], 1)
    with pytest.raises(InputError, match="none was given"):
        choose_next(library, [], 1)


def test_an_empty_library_begins_with_the_typical(fake_bundle: Bundle, tmp_path: Path) -> None:
    with Library.create(tmp_path / "empty", fake_bundle, engine="fake") as empty:
        found = choose_next(empty, [(f"{p}", disc(p).image) for p in (0.0, 0.5, 1.0)], 2)
    assert len(found) == 2
    assert math.isnan(found[0].distance)
    assert math.isnan(found[0].doubt)


def test_what_cannot_be_used_is_named(library: Library) -> None:
    with pytest.raises(InputError, match=r"broken: .*NaN"):
        choose_next(library, [("broken", np.full((8, 8), np.nan))], 1)
    with pytest.raises(InputError, match="not by 'chance'"):
        choose_next(library, [("a", disc(0.5).image)], 1, by="chance")  # type: ignore[arg-type]


def test_doubt_is_of_the_exemplars_that_are_allowed(library: Library) -> None:
    segmenter = Segmenter(library, k=2, engine="fake", reach=math.inf)
    alone = doubt_of(segmenter, disc(0.4).image, without=["0.1"])
    both = doubt_of(segmenter, disc(0.4).image)
    assert 0 <= alone <= 1
    assert 0 <= both <= 1


def test_command(library: Library, tmp_path: Path) -> None:
    library.close()
    write_pairs(tmp_path / "in", [0.1, 0.5, 0.9])
    arguments = ["library", "next", str(tmp_path / "lib"), str(tmp_path / "in"), "--engine", "fake"]
    found = CliRunner().invoke(app, [*arguments, "--count", "2", "--json"])
    assert found.exit_code == 0, found.output
    chosen = json.loads(found.stdout)
    assert {one["name"] for one in chosen} == {"disc-0.50", "disc-0.90"}
    told = CliRunner().invoke(app, [*arguments, "--by", "coverage"])
    assert "annotate next" in told.output
    assert CliRunner().invoke(app, [*arguments, "--by", "chance"]).exit_code == 2
