"""Splits, budgets, baselines and paired differences: on made pictures whose truth is known."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.dicom_series import write_series
from support.pictures import LABELS, disc, write_pairs
from typer.testing import CliRunner

from recallseg.cli import app
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import InputError
from recallseg.runtime.formats.finding import find_inputs
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.formats.reading import read_volume
from recallseg.runtime.library import Library
from recallseg.runtime.library.importing import patient_group
from recallseg.runtime.reports.annotated_sources import GroupRule, Images, Source
from recallseg.runtime.reports.baselines import filter_image, make_baselines
from recallseg.runtime.reports.cases import RECALLED, Arm
from recallseg.runtime.reports.evaluation import evaluate
from recallseg.runtime.reports.paired import bootstrap, budgets, by_group, differences
from recallseg.runtime.reports.splitting import Split, fill_pool
from recallseg.runtime.segmenting.segmenter import Segmenter

STRUCTURES = ("disc", "core")
POSITIONS = {"ann": (0.0, 0.1, 0.2), "bob": (0.4, 0.5), "eve": (0.8, 0.9, 1.0)}


def pool() -> list[Source]:
    """Pictures of three patients."""

    def source(patient: str, position: float) -> Source:
        image = replace(disc(position), name=f"{patient}/{position}")
        return Source(image.name, lambda: Images((image,)), group=patient)

    return [source(name, at) for name, places in POSITIONS.items() for at in places]


@pytest.fixture
def library(fake_bundle: Bundle, tmp_path: Path) -> Iterator[Library]:
    with Library.create(tmp_path / "lib", fake_bundle, engine="fake") as made:
        yield made


def run(library: Library, sources: list[Source], groups: dict[str, str] | None, **how: object):
    def make(k: int) -> Segmenter:
        return Segmenter(library, k=k, structures=STRUCTURES, reach=math.inf, engine="fake")

    return evaluate(library, sources, STRUCTURES, (1, 3), make, groups=groups, **how)


def test_no_patient_is_on_both_sides(library: Library) -> None:
    groups = fill_pool(library, pool(), STRUCTURES)
    found = run(library, pool(), groups, budgets=(1, 2), draws=2)
    assert found.split
    assert len(found.cases) == 8 * 2 * (2 + 2 * 2)
    for row in found.cases:
        assert row.recalled
        assert all(groups[key] != row.case.split("/")[0] for key in row.recalled)
        assert len(row.recalled) <= (row.annotated or row.k)
    assert fill_pool(library, pool(), STRUCTURES) == groups  # nothing is added twice
    assert len(library) == 8
    assert fill_pool(library, pool(), ()) == groups


def test_groups_in_a_report_do_not_identify(library: Library) -> None:
    groups = fill_pool(library, pool(), STRUCTURES)
    found = run(library, pool(), groups)
    again = run(library, pool(), groups)
    hashes = {row.group for row in found.cases}
    assert len(hashes) == 3
    assert all(re.fullmatch("[0-9a-f]{12}", one) for one in hashes)
    assert hashes.isdisjoint(row.group for row in again.cases)


def test_a_patient_of_the_library_is_a_leak_where_it_knows_whose_exemplars_are(
    library: Library,
) -> None:
    fill_pool(library, pool(), STRUCTURES)
    new = replace(disc(0.33), name="new")
    for group, wrong in (("bob", True), ("zoe", False), ("", False)):
        query = Source("new", lambda: Images((new,)), group=group)
        if wrong:
            with pytest.raises(InputError, match="new is of the same group as exemplar"):
                run(library, [query], None)
        else:
            assert run(library, [query], None).cases


def test_groups_of_any_bytes(library: Library) -> None:
    odd = [replace(one, group=f"{one.group}\udcff\n" + "x" * 300) for one in pool()]
    groups = fill_pool(library, odd, STRUCTURES)
    assert len({row.group for row in run(library, odd, groups).cases}) == 3
    with pytest.raises(InputError, match="same group as exemplar"):
        run(library, odd[:1], None)


def test_folds_leave_out_more_than_the_own_group(library: Library) -> None:
    groups = fill_pool(library, pool(), STRUCTURES)
    alone = Split(library, groups)
    assert {len(alone.own(name)) for name in POSITIONS} == {2, 3}
    two = Split(library, groups, folds=2)
    assert sorted(len(two.own(name)) for name in POSITIONS)[-1] >= 5
    for folds in (1, 4):
        with pytest.raises(InputError, match="folds"):
            Split(library, groups, folds=folds)


def test_one_image_in_two_groups_is_an_error(library: Library) -> None:
    image = replace(disc(0.2), name="eve/copy")
    twin = Source("eve/copy", lambda: Images((image,)), group="eve")
    with pytest.raises(InputError, match=r"eve/copy is the same image as ann/0\.2, of"):
        fill_pool(library, [*pool(), twin], STRUCTURES)


def test_a_copy_with_another_mask_in_another_group_is_a_leak(library: Library) -> None:
    masks = {"disc": np.roll(disc(0.2).masks["disc"], 2)}
    image = Annotated("eve/redrawn", disc(0.2).image, masks)
    twin = Source(image.name, lambda: Images((image,)), group="eve")
    groups = fill_pool(library, [*pool(), twin], STRUCTURES)
    with pytest.raises(InputError, match=r"2 images are exemplars.*ann/0\.2 is exemplar '"):
        run(library, [*pool(), twin], groups)


def test_exemplars_of_elsewhere_and_single_groups_cannot_be_split(library: Library) -> None:
    groups = fill_pool(library, pool(), STRUCTURES)
    library.add(disc(0.33).image, disc(0.33).masks, key="other")
    with pytest.raises(InputError, match="not of the data that is split: other"):
        Split(library, groups)
    new = replace(disc(0.66), name="new")
    more = Source("new", lambda: Images((new,)), group="zoe")
    with pytest.raises(InputError, match="not of the data that is split: other"):
        fill_pool(library, [*pool(), more], STRUCTURES)
    assert len(library) == 9  # what was there is as it was
    library.remove("other")
    with pytest.raises(InputError, match="two groups"):
        Split(library, dict.fromkeys(groups, "ann"))


def test_budgets_are_nested_and_below_the_whole(library: Library) -> None:
    groups = fill_pool(library, pool(), STRUCTURES)
    split = Split(library, groups, draws=2)
    every = {exemplar.key for exemplar in library}
    for draw in range(2):
        few = every - split.without("ann", 2, draw)
        more = every - split.without("ann", 4, draw)
        assert len(few) == 2
        assert few < more
        assert not any(groups[key] == "ann" for key in more)
    for wrong in ((0,), (8,)):
        with pytest.raises(InputError, match="budgets must be below the 8 exemplars"):
            run(library, pool(), groups, budgets=wrong)


def test_baselines_on_the_same_split(library: Library) -> None:
    pytest.importorskip("sklearn")
    groups = fill_pool(library, pool(), STRUCTURES)
    found = run(library, pool(), groups, baselines=("copy", "forest"), budgets=(2,), draws=2)
    assert [arm for arm in found.arms if not arm.annotated] == [
        Arm(RECALLED, 1), Arm(RECALLED, 3), Arm("copy", 1), Arm("forest", 0)
    ]  # fmt: skip
    dice = {g.arm.method: g.mean for g in by_group(found) if g.structure == "core"}
    assert dice["forest"] > 0.9  # brightness decides here
    assert dice["copy"] < dice["forest"]
    (core,) = [d for d in differences(found) if (d.structure, d.other.method) == ("core", "forest")]
    assert core.groups == 3
    assert core.low <= core.mean <= core.high
    curve = [(b.annotated, b.draws) for b in budgets(found) if b.structure == "disc"]
    assert curve == [(2, 2), (8, 1)] * 3


def test_copy_is_the_mask_of_the_nearest_that_is_not_passed_over(library: Library) -> None:
    fill_pool(library, pool(), STRUCTURES)
    (copy,) = make_baselines(["copy"], library, STRUCTURES, 3, 1)
    query = disc(0.19)
    embedding = library.embed(query.image)
    nearest = library.search(embedding, "disc", 2)
    for passed in (0, 1):
        masks = copy.segment(query.image, embedding, [m.key for m in nearest[:passed]])
        expected = library.source(nearest[passed].key)[1]["disc"]
        np.testing.assert_array_equal(masks["disc"], expected)
    nothing = copy.segment(query.image, embedding, [exemplar.key for exemplar in library])
    assert not nothing["disc"].any()


def test_match_finds_a_disc_by_its_patches(tmp_path: Path) -> None:
    with Library.create(tmp_path / "lib", "demo") as library:
        for position in (0.0, 0.4, 0.8):
            shown = disc(position, 128)
            library.add(shown.image, {"disc": shown.masks["disc"] | shown.masks["core"]})
        (match,) = make_baselines(["match"], library, ["disc"], 3, 1)
        query = disc(0.6, 128)
        mask = match.segment(query.image, library.embed(query.image), ())["disc"]
    truth = query.masks["disc"] | query.masks["core"]
    assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.6


def test_baselines_need_names_and_sources(fake_bundle: Bundle, tmp_path: Path) -> None:
    with Library.create(tmp_path / "n", fake_bundle, engine="fake", keep_sources=False) as bare:
        with pytest.raises(InputError, match="did not keep them"):
            make_baselines(["copy"], bare, STRUCTURES, 1, None)
        with pytest.raises(InputError, match="no baseline 'unet'"):
            make_baselines(["unet"], bare, STRUCTURES, 1, None)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (20, 30), (20, 30, 3)])
def test_filters_are_finite_and_equal_in_number(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random(shape, np.float32)
    found = filter_image(image)
    assert found.shape == (*shape[:2], 25)
    assert np.isfinite(found).all()


def test_bootstrap_holds_the_mean_and_narrows() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    wide, narrow = bootstrap(values[:8]), bootstrap(values)
    assert narrow[0] < values.mean() < narrow[1]
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.2)
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert all(map(math.isnan, bootstrap([0.5])))


def test_volumes_in_three_dimensions_know_the_gap_between_slices(library: Library) -> None:
    fill_pool(library, pool(), STRUCTURES)
    slices = tuple(replace(disc(0.3 + i / 50), name=f"v-{i}") for i in range(4))
    from recallseg.runtime.segmenting.acquisition import Acquisition

    whole = Source("v", lambda: Images(slices, Acquisition((0.5, 0.5)), (), 4.0), is_volume=True)
    found = run(library, [whole], None)
    rows = {(v.structure, v.k): v for v in found.volumes}
    truth = sum(int(one.masks["disc"].sum()) for one in slices)
    assert rows["disc", 1].reference_volume == pytest.approx(truth * 0.5 * 0.5 * 4.0)
    assert rows["disc", 1].slices == 4
    assert found.in_mm
    assert 0 <= rows["disc", 1].surface_dice <= 1
    assert math.isfinite(rows["disc", 1].hd95)


def test_group_rules() -> None:
    assert GroupRule.parse("folder").of("p1/scan") == "p1"
    assert GroupRule.parse(r"name:(patient\d+)_").of("x/patient07_frame01") == "patient07"
    assert GroupRule.parse("file").of("a/b") == "a/b"
    for text, why in (("folder", "no folder of its own"), ("patient", "no DICOM file")):
        with pytest.raises(InputError, match=why):
            GroupRule.parse(text).of("scan")
    for text in ("name:", "name:(", "study"):
        with pytest.raises(InputError):
            GroupRule.parse(text)


def test_command(fake_bundle: Bundle, tmp_path: Path) -> None:
    for patient, places in POSITIONS.items():
        write_pairs(tmp_path / "in" / patient, list(places))
    out = tmp_path / "out"
    arguments = [
        "evaluate", str(tmp_path / "pool"), str(tmp_path / "in"), "--labels", LABELS, "--output",
        str(out), "--bundle", str(fake_bundle.path), "--engine", "fake", "--k", "1,2",
    ]  # fmt: skip
    more = ["--split-by", "folder", "--budgets", "2", "--draws", "2", "--baselines", "copy"]
    told = CliRunner().invoke(app, [*arguments, *more])
    assert told.exit_code == 0, told.output
    for title in ("By folder", "Paired differences", "By number of annotated images"):
        assert title in told.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["split"]
    assert {d["other"]["method"] for d in summary["differences"]} == {"recalled", "copy"}
    page = (out / "report.html").read_text()
    assert "Against others" in page
    assert "<h2>By folder</h2>" in page
    with open(out / "cases.csv") as file:
        assert {len(row["group"]) for row in csv.DictReader(file)} == {12}
    wrong = CliRunner().invoke(app, [*arguments, *more, "--baselines", "x"])
    assert wrong.exit_code == 2
    assert CliRunner().invoke(app, [*arguments, "--folds", "2"]).exit_code == 2


@pytest.mark.parametrize("issuer", ["", "Clinic B"])
def test_a_patient_of_an_imported_series_is_a_leak(
    library: Library, tmp_path: Path, issuer: str
) -> None:
    array = np.arange(3 * 24 * 20, dtype=np.uint16).reshape(3, 24, 20)
    write_series(tmp_path / "in", array, IssuerOfPatientID=issuer)
    [item] = find_inputs([tmp_path / "in"]).items
    known = disc(0.1)
    library.add(known.image, known.masks, group=patient_group(read_volume(tmp_path / "in")))
    group = GroupRule("patient").of("s", item)
    query = Source("s", lambda: Images((replace(disc(0.7), name="s"),)), group=group)
    with pytest.raises(InputError, match="s is of the same group as exemplar"):
        run(library, [query], None)


def test_of_a_copy_it_is_said_that_nobody_knows_whose_its_exemplars_are(
    library: Library, tmp_path: Path
) -> None:
    fill_pool(library, pool(), STRUCTURES)
    library.backup(tmp_path / "copy")
    query = Source("new", lambda: Images((replace(disc(0.33), name="new"),)), group="bob")
    with Library.open(tmp_path / "copy", engine="fake") as copy:
        assert not copy.tells_groups
        found = run(copy, [query], None)
        assert "not known" in "".join(found.notes["copy"])
        assert run(copy, [replace(query, group="")], None).notes == {}
    with pytest.raises(InputError, match="same group"):
        run(library, [query], None)
