from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle

from recallseg.benchmarks.accuracy import datasets as registry
from recallseg.benchmarks.accuracy import run as running
from recallseg.benchmarks.accuracy.baselines import copy_nearest_by_position
from recallseg.benchmarks.accuracy.choosing import BUDGETS, measure_choosing, tabulate
from recallseg.benchmarks.accuracy.dataset import Dataset, annotate, spread, tiles
from recallseg.benchmarks.accuracy.heads import Headed, measure_head, steps, write_sheet
from recallseg.benchmarks.accuracy.heads import tabulate as head_table
from recallseg.benchmarks.accuracy.measure import (
    COPY_EMBEDDING,
    COPY_POSITION,
    NO_POINTERS,
    RANDOM,
    RECALLED,
    Case,
    Outcome,
    Plan,
    count_steps,
    measure,
)
from recallseg.benchmarks.accuracy.recall import RandomLibrary, fill, member_tag
from recallseg.benchmarks.accuracy.rows import write_rows
from recallseg.benchmarks.accuracy.tables import (
    compare,
    false_positives,
    summarise,
    targets,
)
from recallseg.benchmarks.accuracy.tables import (
    tabulate as tabulate_outcome,
)
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.reports.baselines import copy_mask

SIDE = 32


def disc(name: str, place: float, *, shown: bool = True):
    rows, columns = np.mgrid[:SIDE, :SIDE]
    mask = (rows - 16) ** 2 + (columns - place) ** 2 < 36
    image = (mask * 150 + 40 + (rows * 3) % 17).astype(np.uint8)
    masks = {"disc": mask if shown else np.zeros_like(mask), "stripe": rows < 6}
    return annotate(name, image, masks)


def make_dataset(count: int = 16, queries: int = 3, **other) -> Dataset:
    exemplars = tuple(disc(f"e{i:02d}", 8 + i, shown=i != 3) for i in range(count))
    asked = tuple(disc(f"q{i}", 8.5 + 3 * i, shown=i != 1) for i in range(queries))
    settings = {
        "name": "discs",
        "modality": "drawn",
        "structures": ("disc", "stripe"),
        "exemplars": exemplars,
        "extra": tuple(disc(f"x{i}", 9 + i) for i in range(2)),
        "queries": asked,
        "reference": "drawn",
        "human": False,
        "licence": "CC0",
        "source": "here",
        "positions": {
            **{e.name: float(i) for i, e in enumerate(exemplars)},
            **{q.name: 3.0 * i + 0.4 for i, q in enumerate(asked)},
        },
        "targets": {"disc": 0.9},
        **other,
    }
    return Dataset(**settings)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A fake bundle with object pointers, and one of the same weights without."""
    root = tmp_path_factory.mktemp("pair")
    return (
        make_fake_bundle(root / "with"),
        make_fake_bundle(root / "without", name="without", object_pointers=False),
    )


@pytest.fixture(scope="module")
def outcome(pair: tuple[Bundle, Bundle]) -> Outcome:
    plan = Plan(*pair, ks=(1, 8), counts=(4, 16, 32), draws=2, engine="fake")
    return measure(make_dataset(), plan, [disc("stranger", 12)])


def test_evenly_spread_takes_the_middle_of_each_part():
    assert spread(range(16), 4) == [2, 6, 10, 14]
    assert spread(range(3), 8) == [0, 1, 2]
    assert spread(range(9), 1) == [4]


def test_annotated_images_beyond_sixteen_come_from_the_extra_ones():
    dataset = make_dataset()
    assert [e.name for e in dataset.annotated(2)] == ["e04", "e12"]
    names = [e.name for e in dataset.annotated(32)]
    assert names[:16] == [e.name for e in dataset.exemplars]
    assert names[16:] == ["x0", "x1"]


def test_an_empty_mask_means_absent():
    shown = disc("a", 10, shown=False)
    assert set(shown.masks) == {"stripe"}
    assert shown.absent == ("disc",)


def test_tiles_cover_without_overlap():
    image = np.arange(70 * 70).reshape(70, 70)
    cut = tiles("t", image, {"all": image >= 0}, 3)
    assert len(cut) == 9
    values = np.concatenate([tile.image.ravel() for tile in cut])
    assert len(values) == len(set(values.tolist())) == 69 * 69
    assert cut[1].name == "t-r0c1"
    assert cut[1].image[0, 0] == 23


def test_copying_by_position_takes_the_nearest_slice_and_its_absence():
    dataset = make_dataset()
    at_three = dataset.queries[1]  # 3.4 mm: nearest is e03, which does not show the disc
    assert not copy_nearest_by_position(dataset, at_three, "disc").any()
    mask = copy_nearest_by_position(dataset, dataset.queries[0], "disc")
    assert np.array_equal(mask, dataset.exemplars[0].masks["disc"])
    assert copy_nearest_by_position(make_dataset(positions={}), at_three, "disc") is None


def test_a_copied_mask_lands_on_the_query_grid():
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    assert copy_mask(mask, (8, 6))[:4].all()
    assert not copy_mask(mask, (8, 6))[4:].any()
    assert copy_mask(mask, (4, 4)) is mask


def test_random_recall_is_repeatable_distinct_and_within_the_set(
    tmp_path: Path, pair: tuple[Bundle, Bundle]
):
    dataset = make_dataset()
    fill(
        tmp_path / "lib",
        pair[0],
        dataset,
        engine="fake",
        precision="fp32",
        threads=None,
        counts=(4, 16),
    )
    query = np.random.default_rng(0).normal(size=48).astype(np.float32)
    with Library.open(tmp_path / "lib", pair[0]) as library:
        nearest = [m.key for m in library.search(query, "disc", 6) if not m.absent]
    library = RandomLibrary.open_drawing(tmp_path / "lib", pair[0])
    with library:

        def keys(k: int, **tags):
            found = library.recall(query, ["disc"], k, **tags).found["disc"]
            assert set(found.memories) >= {match.key for match in found.matches}
            return [match.key for match in found.matches]

        first = keys(6)
        assert first == keys(6)
        assert len(set(first)) == 6
        assert "e03" not in first
        draws = []
        for seed in range(6):
            library.seed = seed
            draws.append(tuple(keys(6)))
        assert len(set(draws)) > 1
        assert any(set(draw) != set(nearest) for draw in draws)
        members = {e.name for e in dataset.annotated(4)}
        assert set(keys(4, tags=member_tag(4))) == members


def test_every_question_is_measured(outcome: Outcome):
    methods = {(c.method, c.k, c.annotated) for c in outcome.cases}
    assert methods == {
        (RECALLED, 1, 16),
        (RECALLED, 8, 16),
        (RECALLED, 4, 4),
        (RECALLED, 8, 32),
        (RANDOM, 1, 16),
        (RANDOM, 8, 16),
        (NO_POINTERS, 1, 16),
        (NO_POINTERS, 8, 16),
        (COPY_EMBEDDING, 0, 16),
        (COPY_POSITION, 0, 16),
    }
    assert {c.case for c in outcome.cases if c.foreign} == {"stranger"}
    assert {c.draw for c in outcome.cases if c.method == RANDOM} == {0, 1}
    assert set(outcome.masks) == {"q0", "q1", "q2"}


def test_a_structure_shown_less_often_is_recalled_less_often(pair: tuple[Bundle, Bundle]):
    few = make_dataset(count=6, extra=())  # the disc in five of them
    plan = Plan(pair[0], None, ks=(8,), counts=(16,), draws=1, engine="fake")
    cases = measure(few, plan, []).cases
    used = {(c.structure, c.used) for c in cases if c.method == RECALLED}
    assert used == {("disc", 5), ("stripe", 6)}
    assert not [c for c in cases if c.method == RANDOM]  # all are used: nothing to draw


def test_the_progress_bar_counts_every_step(pair: tuple[Bundle, Bundle]):
    dataset = make_dataset()
    plan = Plan(*pair, ks=(1, 8), counts=(16,), draws=1, engine="fake")
    steps: list[str] = []
    measure(dataset, plan, [disc("stranger", 12)], steps.append)
    assert len(steps) <= count_steps(dataset, plan, 1)


def case(name: str, method: str, k: int, dice: float, **other) -> Case:
    values = {
        "dataset": "d",
        "case": name,
        "structure": "disc",
        "method": method,
        "k": k,
        "used": k,
        "annotated": 16,
        "draw": 0,
        "dice": dice,
        "reference": 50,
        "predicted": 40,
        "pixels": 100,
        "object_score": 1.0,
        "nearest": 0.1,
        "foreign": False,
    }
    return Case(**{**values, **other})


def table(*cases: Case) -> Outcome:
    return Outcome(make_dataset(), cases, {}, None)


def test_means_leave_out_absent_and_foreign_images():
    found = table(
        case("a", RECALLED, 8, 0.8),
        case("b", RECALLED, 8, 0.6, predicted=0),
        case("c", RECALLED, 8, 0.0, reference=0),
        case("d", RECALLED, 8, 1.0, reference=0, predicted=0, foreign=True),
    )
    (row,) = summarise(found)
    assert (row.images, row.dice, row.worst, row.missed) == (2, pytest.approx(0.7), 0.6, 1)
    assert row.pooled == pytest.approx((0.8 * 90 + 0.6 * 50) / 140)
    (target,) = targets(found)
    assert target.reached == pytest.approx(0.7)
    assert not target.met
    absent = {row.foreign: row for row in false_positives(found)}
    assert (absent[False].positive, absent[False].share) == (1, 0.4)
    assert (absent[True].positive, absent[True].share) == (0, 0.0)


def test_differences_are_paired_by_image():
    found = table(
        case("a", RECALLED, 8, 0.9),
        case("b", RECALLED, 8, 0.5),
        case("a", RANDOM, 8, 0.6),
        case("a", RANDOM, 8, 0.8, draw=1),
        case("a", COPY_EMBEDDING, 0, 0.4),
        case("b", COPY_EMBEDDING, 0, 0.3),
    )
    rows = {row.against: row for row in compare(found)}
    assert rows["random exemplars"].images == 1
    assert rows["random exemplars"].mean == pytest.approx(0.2)
    copied = rows[COPY_EMBEDDING]
    assert copied.mean == pytest.approx(0.35)
    assert copied.low <= copied.mean <= copied.high
    assert set(rows) == {"random exemplars", COPY_EMBEDDING}


def test_a_target_that_no_query_shows_is_told_and_loses_no_report(outcome: Outcome):
    wanted = replace(outcome, dataset=replace(outcome.dataset, targets={"never there": 0.9}))
    (target,) = targets(wanted)
    assert (target.reached, target.pooled, target.met) == (None, None, False)
    json.dumps(asdict(tabulate_outcome(wanted)), allow_nan=False)


def test_the_tables_are_plain_json(outcome: Outcome):
    text = json.dumps(asdict(tabulate_outcome(outcome)), allow_nan=False)
    assert json.loads(text)["targets_reached"][0]["structure"] == "disc"


def test_a_run_leaves_its_files(
    tmp_path: Path, pair: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(registry, "DATASETS", {"discs": lambda data: make_dataset()})
    done = running.run_accuracy(
        tmp_path / "out",
        bundle=pair[0],
        without_pointers=pair[1],
        datasets=["discs"],
        unet=False,
        quick=True,
        engine="fake",
    )
    stored = json.loads((tmp_path / "out" / "accuracy.json").read_text(encoding="utf-8"))
    assert stored["schema"] == "recallseg-bench-accuracy/2"  # and is held to it
    assert stored["bundle"]["identity"] == pair[0].identity
    assert stored["bundle"]["notice"] == pair[0].notice != ""
    assert stored["datasets"][0]["licence"] == "CC0"
    with (tmp_path / "out" / "cases.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(done.outcomes[0].cases)
    page = (tmp_path / "out" / "accuracy.html").read_text(encoding="utf-8")
    assert pair[0].notice in page
    assert "discs" in page
    assert "<script" not in page
    assert "://" not in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(pictures) > 3
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_bundles_that_do_not_belong_together_are_refused(
    tmp_path: Path, pair: tuple[Bundle, Bundle]
):
    other = make_fake_bundle(tmp_path / "b", object_pointers=False, weights_digest="1" * 64)
    for bundle, without, message in (
        (pair[0], pair[0], "has object pointers"),
        (pair[0], other, "different weights"),
        (pair[1], pair[1], "without object pointers"),
    ):
        with pytest.raises(InputError, match=message):
            running.run_accuracy(tmp_path / "out", bundle=bundle, without_pointers=without)


def test_datasets_that_are_not_here_are_named_with_the_way_to_get_them(tmp_path: Path):
    with pytest.raises(InputError, match="there is no dataset 'moon'"):
        registry.load_datasets(["moon"], None)
    with pytest.raises(InputError, match=r"pip download --no-deps.*pyradiomics==3\.0\.1"):
        registry.load_datasets(["lungs"], tmp_path)


def test_chosen_images_are_measured_beside_random_ones(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle")
    found = measure_choosing(make_dataset(), bundle, draws=2, engine="fake")
    methods = {method: [o for o in found if o.method == method] for method in ("random", "all")}
    assert [(o.annotated, o.draw) for o in methods["random"]] == [
        (count, draw) for draw in range(2) for count in BUDGETS
    ]
    assert [o.annotated for o in methods["all"]] == list(BUDGETS)
    assert all(0 < o.dice <= 1 for o in found)
    header, rows = tabulate(found)
    assert header[1:3] == ["random 12", "random 16"]
    assert [row[0] for row in rows] == ["discs", "mean"]


def test_a_head_is_measured_beside_what_it_expected(tmp_path: Path) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle")
    done: list[str] = []
    dataset = make_dataset()
    rows, shown = measure_head(dataset, bundle, forest=False, engine="fake", step=done.append)
    assert len(done) == steps(dataset)
    assert {row.structure for row in rows} <= {"disc", "stripe"}
    disc_row = next(row for row in rows if row.structure == "disc")
    assert disc_row.queries == 3
    assert 0 < disc_row.alone <= 1
    assert 0 < disc_row.head <= 1
    assert disc_row.low <= disc_row.head - disc_row.alone <= disc_row.high
    assert math.isnan(disc_row.forest)
    header, table = head_table([disc_row, replace(disc_row, dataset="other", alone=0.5, head=0.6)])
    assert header[:4] == ["data set", "structure", "alone", "with head"]
    assert [line[0] for line in table] == [
        *("discs", "other"),
        *("mean over structures", "mean over data sets"),
        *("expected less found, data sets", "how far off, data sets"),
    ]
    write_rows(tmp_path / "head.csv", Headed, rows)
    assert len((tmp_path / "head.csv").read_text().splitlines()) == 1 + len(rows)
    write_sheet(tmp_path / "head.png", shown)
    sheet = cv2.imread(str(tmp_path / "head.png"))
    assert sheet is not None
    assert sheet.shape == (2 * 360, 4 * 320, 3)
