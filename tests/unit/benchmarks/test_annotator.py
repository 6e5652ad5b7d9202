"""The simulated person clicks where the largest error is, and clicks are counted as they should."""

from __future__ import annotations

import csv
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle

from recallseg.benchmarks.accuracy.annotator import (
    ANNOTATED,
    Clicked,
    clicks_to_reach,
    measure_clicks,
    next_click,
    tabulate,
)
from recallseg.benchmarks.accuracy.click_curves import click_curves
from recallseg.benchmarks.accuracy.dataset import Dataset, annotate
from recallseg.benchmarks.accuracy.rows import write_rows
from recallseg.engines.errors import BundleError


def test_the_next_click_is_in_the_middle_of_the_largest_error() -> None:
    wanted = np.zeros((40, 60), bool)
    wanted[5:16, 10:21] = True
    found = np.zeros_like(wanted)
    assert next_click(wanted, found) == (15, 10, True)
    found[20:39, 30:59] = True
    x, y, inside = next_click(wanted, found) or (0, 0, True)
    assert not inside
    assert 38 <= x <= 50
    assert y == 29
    assert next_click(wanted, wanted) is None


def test_an_image_that_never_gets_there_counts_as_more_than_the_most() -> None:
    curve = {"good": (0.2, 0.86, 0.95), "bad": (0.1, 0.5, 0.6)}
    cases = [
        Clicked("d", case, "s", 1, "clicks", clicks, dice)
        for case, all_dice in curve.items()
        for clicks, dice in enumerate(all_dice)
    ]
    assert clicks_to_reach(cases, 0.85, 2) == (1 + 3) / 2
    assert clicks_to_reach(cases, 0.90, 2) == (2 + 3) / 2


def small(count: int = 16) -> Dataset:
    def disc(name: str, place: int) -> object:
        rows, columns = np.mgrid[:64, :64]
        mask = (rows - 32) ** 2 + (columns - place) ** 2 < 150
        return annotate(name, (mask * 150 + 40).astype(np.uint8), {"disc": mask})

    return Dataset(
        name="discs",
        modality="drawn",
        structures=("disc",),
        exemplars=tuple(disc(f"e{i}", 16 + 2 * i) for i in range(count)),  # type: ignore[misc]
        extra=(),
        queries=tuple(disc(f"q{i}", 21 + 10 * i) for i in range(2)),  # type: ignore[misc]
        reference="drawn",
        human=False,
        licence="CC0",
        source="here",
    )


def test_every_library_and_start_is_measured(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle", correct=True)
    found = measure_clicks(small(), bundle, most_clicks=3, engine="fake")
    ways = [(count, "clicks") for count in ANNOTATED] + [(0, "box")]
    assert {(one.annotated, one.start) for one in found} == set(ways)
    assert len(found) == len(ways) * 2 * 4
    start = {one.annotated: one.dice for one in found if one.clicks == 0 and one.case == "q0"}
    assert start[0] == 0 < start[1] <= start[16]
    header, rows = tabulate(found)
    assert header[3:] == ["Dice 0", "Dice 1", "Dice 3", "clicks to 0.85", "clicks to 0.9"]
    assert len(rows) == len(ways)
    write_rows(tmp_path / "clicks.csv", Clicked, found)
    with (tmp_path / "clicks.csv").open(encoding="utf-8") as file:
        assert len([*csv.DictReader(file)]) == len(found)


def test_a_bundle_that_cannot_correct_is_told(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'correct'"):
        measure_clicks(small(), make_fake_bundle(tmp_path / "bundle"), engine="fake")


def test_curves_are_one_panel_for_each_data_set() -> None:
    found = [
        Clicked(name, "a", "x", annotated, start, clicks, clicks / 10)
        for name in ("one", "two & a half")
        for annotated, start in ((0, "clicks"), (0, "box"), (16, "clicks"))
        for clicks in range(3)
    ]
    root = ElementTree.fromstring(click_curves(found))
    space = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points") for line in root.iter(f"{space}polyline")]
    assert sum(bool(line) for line in lines) == 6
    assert {text.text for text in root.iter(f"{space}text")} >= {
        "one",
        "two & a half",
        "a box first",
    }
