"""Evaluation with the fake engine: rows, leaks, failures, absent structures, summary, shortlist."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.pictures import LABELS, disc, write_pairs

from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.annotations import find_annotations
from recallseg.runtime.formats.pairs import Annotated, parse_labels
from recallseg.runtime.library import Library
from recallseg.runtime.reports.annotated_sources import Source, sources_of
from recallseg.runtime.reports.cases import Arm, Case, Evaluation, Illustration
from recallseg.runtime.reports.evaluation import _Shortlist, evaluate
from recallseg.runtime.reports.page import Settings, render_report
from recallseg.runtime.reports.summary import (
    latency,
    summarise,
    to_csv,
    to_json,
    write_evaluation,
)
from recallseg.runtime.segmenting.segmenter import Segmenter

STRUCTURES = ("disc", "core")
EXEMPLARS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@pytest.fixture
def library(fake_bundle: Bundle, tmp_path: Path) -> Iterator[Library]:
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as made:
        for position in EXEMPLARS:
            annotated = disc(position)
            made.add(annotated.image, annotated.masks, key=annotated.name)
        yield made


def maker(library: Library) -> Callable[[int], Segmenter]:
    return lambda k: Segmenter(library, k=k, structures=STRUCTURES, reach=math.inf, engine="fake")


def run(library: Library, images: list[Annotated], ks: tuple[int, ...] = (1, 3)) -> Evaluation:
    return evaluate(library, images, STRUCTURES, ks, maker(library))


def test_one_row_per_image_structure_and_k(library: Library) -> None:
    steps: list[str] = []
    images = [disc(0.1), disc(0.5)]
    found = evaluate(
        library,
        images,
        STRUCTURES,
        (1, 3),
        maker(library),
        progress=lambda name, part: steps.append(name),
    )
    assert [(row.case, row.structure, row.k) for row in found.cases] == [
        (image.name, structure, k) for k in (1, 3) for image in images for structure in STRUCTURES
    ]
    assert steps == [image.name for image in images for _ in range(2)]
    assert all(len(row.recalled) == row.k for row in found.cases)
    assert not found.failures
    assert {timing.k for timing in found.timings} == {1, 3}
    assert [shown.result.provenance.recipe.k for shown in found.illustrations] == [3, 3]
    assert found.workspace_bytes[3] > found.workspace_bytes[1] > 0
    # The fake engine gives the recalled mask back: near an exemplar it must agree well.
    assert max(row.dice for row in found.cases if row.structure == "disc") > 0.5


def test_an_exemplar_as_query_is_an_error_before_the_work(library: Library) -> None:
    images = [disc(0.1), disc(0.4, name="the same pixels")]

    def make(k: int) -> Segmenter:
        segmenter = maker(library)(k)
        segmenter.segment = None  # type: ignore[method-assign,assignment]
        return segmenter

    with pytest.raises(InputError, match=r"1 images are.*the same pixels is exemplar 'disc-0\.40'"):
        evaluate(library, images, STRUCTURES, (1,), make)


def test_a_near_copy_is_no_leak(library: Library) -> None:
    other = disc(0.4, name="one pixel differs")
    other.image[0, 0] += 1
    assert len(run(library, [other], (1,)).cases) == 2


def test_without_sources_an_embedding_at_distance_zero_is_a_leak(
    fake_bundle: Bundle, tmp_path: Path
) -> None:
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake", keep_sources=False) as made:
        for position in EXEMPLARS:
            made.add(disc(position).image, disc(position).masks)
        with pytest.raises(InputError, match=r"disc-0\.40 is exemplar"):
            run(made, [disc(0.4), disc(0.5)], (1,))
        page = _page(run(made, [disc(0.5)], (1,)), made)
        assert "source image not kept" in page


def test_absent_and_unknown_structures(library: Library) -> None:
    image = disc(0.1)
    absent = replace(image, name="absent", masks={"disc": image.masks["disc"]}, absent=("core",))
    unknown = replace(absent, name="unknown", absent=())
    found = run(library, [absent, unknown], (1,))
    assert [(row.case, row.structure) for row in found.cases] == [
        ("absent", "disc"),
        ("absent", "core"),
        ("unknown", "disc"),
    ]
    core = summarise(found)[1]
    assert (core.present, core.absent) == (0, 1)
    assert core.false_positives == int(found.cases[1].predicted_volume > 0)
    assert math.isnan(core.dice["median"])


def test_a_broken_file_is_reported_and_the_rest_evaluated(library: Library, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [0.1, 0.3, 0.5])
    (tmp_path / "pairs" / "disc-0.30.png").write_bytes(b"no image")
    pairs = sources_of(find_annotations(tmp_path / "pairs"), parse_labels(LABELS))
    found = evaluate(library, pairs, STRUCTURES, (2,), maker(library))
    assert list(found.failures) == ["disc-0.30"]
    assert {row.case for row in found.cases} == {"disc-0.10", "disc-0.50"}


def test_nothing_to_evaluate(library: Library, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to evaluate"):
        run(library, [])
    with pytest.raises(InputError, match="no exemplar of 'liver'"):
        evaluate(library, [disc(0.1)], ["liver"], (1,), maker(library))
    write_pairs(tmp_path / "pairs", [0.1])
    (tmp_path / "pairs" / "disc-0.10.mask.png").write_bytes(b"no image")
    pairs = sources_of(find_annotations(tmp_path / "pairs"), parse_labels(LABELS))
    with pytest.raises(InputError, match=r"no image could be evaluated.*disc-0\.10\.mask\.png"):
        evaluate(library, pairs, STRUCTURES, (1,), maker(library))


def case(name: str, dice: float, **changes: object) -> Case:
    row = Case(name, "disc", 4, dice, dice / 2, 3.0, 10.0, 10.0, 5.0, "ok", 0.1, 0.9, 5.0, ("a",))
    return replace(row, **changes)  # type: ignore[arg-type]


def summary_of(*cases: Case) -> Evaluation:
    return Evaluation(
        ("disc",), (4,), (Arm(k=4),), cases, (), (), {}, (), {4: 1}, False, 2.0, 9, False, {}
    )


def test_summary_numbers() -> None:
    rows = [case(f"c{i}", dice) for i, dice in enumerate((0.9, 0.5, 0.7, 0.6))]
    rows.append(case("missed", 0.0, predicted_volume=0.0, hd95=math.nan, quality="suspect"))
    rows.append(case("empty", 1.0, reference_volume=0.0, predicted_volume=0.0))
    rows.append(case("false", 0.0, reference_volume=0.0))
    found = summarise(summary_of(*rows))[0]
    assert (found.present, found.absent, found.missed, found.false_positives) == (5, 2, 1, 1)
    assert found.flagged == 1
    assert found.dice["median"] == 0.6
    assert (found.dice["q1"], found.dice["q3"], found.dice["worst"]) == (0.5, 0.7, 0.0)
    assert found.dice["mean"] == pytest.approx(0.54)
    assert found.hd95["median"] == 3.0
    assert [name for name, _ in found.worst] == ["missed", "c1", "c3", "c2", "c0"]


def test_csv_has_the_promised_columns_and_survives_odd_names() -> None:
    name = 'a,"b"\nc'
    text = to_csv([case(name, 0.5, hd95=math.nan), case("plain", 0.25)])
    rows = list(csv.DictReader(io.StringIO(text)))
    promised = "case,structure,k,dice,iou,hd95,reference_volume,predicted_volume,latency_ms,quality"
    assert text.startswith(promised)
    assert rows[0]["case"] == name
    assert rows[0]["hd95"] == ""
    assert (rows[1]["dice"], rows[1]["method"]) == ("0.25", "recalled")


@pytest.mark.parametrize("name", ["=1+1", "+49", "-2", "@SUM(A1)", "\t=1"])
def test_csv_holds_no_formula(name: str) -> None:
    text = to_csv([case(name, 0.5, recalled=(name, "b"), k=-1)])
    (row,) = csv.DictReader(io.StringIO(text, newline=""))
    assert row["case"] == f"'{name}"
    assert row["recalled"] == f"'{name} b"
    assert row["k"] == "-1"


def _page(evaluation: Evaluation, library: Library) -> str:
    settings = Settings.of(library, "Test <page>", "fake", "fp32", 1)

    def source(key: str) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
        return library.source(key) if library.get(key).has_source else None

    return render_report(evaluation, settings, source)


def test_files(library: Library, tmp_path: Path) -> None:
    found = run(library, [disc(0.1), disc(0.5)])
    settings = Settings.of(library, "Test", "fake", "fp32", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "volumes.csv").write_text("of an earlier evaluation, of volumes")
    write_evaluation(found, settings, _page(found, library), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cases.csv",
        "report.html",
        "summary.json",
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(to_json(found, settings)))
    assert summary["notice"].startswith("RANDOM WEIGHTS")
    assert summary["settings"]["library_digest"] == library.digest
    for k in (1, 3):
        made = summary["provenance"][str(k)]
        assert (made["recipe"]["k"], made["library_digest"]) == (k, library.digest)
    assert set(summary["latency_ms"]) == {"1", "3"}
    assert summary["latency_ms"]["1"]["total"]["p50"] > 0
    assert latency(found)[1]["total"]["p99"] >= latency(found)[1]["total"]["p50"]


def test_shortlist_keeps_both_ends() -> None:
    shortlist = _Shortlist(6)
    values = np.random.default_rng(0).permutation(50) / 50
    for value in values:
        shortlist.offer(Illustration(None, None, {}, float(value)))  # type: ignore[arg-type]
    kept = [shown.dice for shown in shortlist.sorted()]
    assert kept == pytest.approx([0.0, 0.02, 0.04, 0.94, 0.96, 0.98])
    few = _Shortlist(6)
    for value in (0.3, 0.1, 0.2, 0.4):
        few.offer(Illustration(None, None, {}, value))  # type: ignore[arg-type]
    assert [shown.dice for shown in few.sorted()] == [0.1, 0.2, 0.3, 0.4]


def test_a_folder_and_options_are_enough(library: Library, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [0.15, 0.45])
    labels = parse_labels(LABELS)
    found = evaluate(library, tmp_path / "pairs", ks=(1, 2), labels=labels, reach=math.inf)
    sources = sources_of(find_annotations(tmp_path / "pairs"), labels)
    expected = evaluate(
        library,
        sources,
        tuple(labels.values()),
        (1, 2),
        lambda k: Segmenter(library, k=k, structures=tuple(labels.values()), reach=math.inf),
    )
    assert found.structures == tuple(labels.values())
    # As text: what is not a number equals itself there, on every Python.
    untimed = [
        [repr(replace(case, latency_ms=0, group="")) for case in one.cases]
        for one in (found, expected)
    ]
    assert untimed[0] == untimed[1]
    assert found.provenance == expected.provenance
    with pytest.raises(InputError, match="no file or folder"):
        evaluate(library, tmp_path / "nowhere")
    with pytest.raises(InputError, match="go with a file or folder"):
        evaluate(library, sources, STRUCTURES, voi=True)
    with pytest.raises(InputError, match="or make_segmenter"):
        evaluate(library, sources, STRUCTURES, (1,), maker(library), refine=False)
    with pytest.raises(InputError, match="go with a file or folder"):
        evaluate(library, find_annotations(tmp_path / "pairs"), mask=tmp_path, labels=labels)


def test_what_measures_distances_is_there_before_the_work(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    source = Source("a", lambda: pytest.fail("read for nothing"))
    with pytest.raises(ModuleNotFoundError):
        evaluate(library, [source], STRUCTURES, (1,), maker(library))
