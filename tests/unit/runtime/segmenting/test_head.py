"""A head is fitted on exemplars, used where it is surely no worse, and never flatters itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import cv2
import numpy as np
import pytest
from support.records import check_head, check_record_part

from recallseg import Frame, Stream, Volume, segment_volume
from recallseg.engines.bundle import Bundle
from recallseg.engines.errors import EngineRunError, InputError, LibraryCorruptError, LibraryError
from recallseg.engines.heads import (
    EARLIER,
    FILTERS,
    REFINE,
    REFINE_NATIVE,
    feature_count,
    graph_digest,
)
from recallseg.export import refining as making
from recallseg.runtime.formats.pairs import Annotated
from recallseg.runtime.library import Library
from recallseg.runtime.library import heads as heads_file
from recallseg.runtime.library.choices import choice_values, parse_choice
from recallseg.runtime.library.heads import Heads
from recallseg.runtime.reports.evaluation import evaluate
from recallseg.runtime.reports.page import Settings, render_report
from recallseg.runtime.segmenting import fitting, refining, units
from recallseg.runtime.segmenting.groups import group_numbers
from recallseg.runtime.segmenting.judging import WAYS, Found, Judged, choose, falling
from recallseg.runtime.segmenting.refining import Filters, Refiner
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.segmenting.units import fit_units
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http.desk import Desk
from recallseg.runtime.services.questions import Questions
from recallseg.runtime.services.rules import Rule
from recallseg.runtime.services.watching import Watcher


def picture(seed: int, size: int = 192, *, colour: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return spokes of a few pixels, thinner than memory attention's logits can draw."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle, radius = np.arctan2(y + 0.1 * draw.normal(), x + 0.1 * draw.normal()), np.hypot(y, x)
    mask = (radius < 0.35) & (np.sin(24 * angle + seed) > 0.6)
    image = 60 + 90 * mask + draw.normal(0, 6, mask.shape)
    image = image.clip(0, 255).astype(np.uint8)
    return (np.stack([image, image // 2, 255 - image], -1) if colour else image), mask


def fill(library: Library, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        image, mask = picture(i)
        library.add(image, {"star": mask}, key=f"e{i}")


@pytest.fixture
def library(
    tmp_path: Path, tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Library]:
    """Of tiny networks, and units that are fitted briefly: for what is kept, told and refused."""
    monkeypatch.setattr(units, "EPOCHS", 4)
    with Library.create(tmp_path / "library", tiny_bundle) as made:
        yield made


@pytest.fixture(scope="module")
def fitted_at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "library"
    with Library.create(path, "demo") as made:
        fill(made, 6)
        made.fit()
    return path


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def test_a_head_is_better_where_it_says_so(fitted_at: Path) -> None:
    with Library.open(fitted_at) as library:
        head = library.head
        assert head is not None
        choice = head.choices["star"]
        assert choice.mix > 0
        assert choice.low >= 0
        alone, both = Segmenter(library, refine=False), Segmenter(library)
        assert not alone.recipe.head
        assert both.recipe.head
        image, mask = picture(50)
        before, after = alone.segment(image), both.segment(image)
        assert dice(after.masks["star"], mask) > dice(before.masks["star"], mask) + 0.01
        assert after.provenance.head == head.digest
        assert before.provenance.head is None
        assert after.provenance.graphs["refine"] == head.graph
        assert before.provenance.digest != after.provenance.digest
        assert both.segment(image) == after


def test_queries_without_an_exemplar_use_units_that_have_not_seen_it(fitted_at: Path) -> None:
    with Library.open(fitted_at) as library:
        segmenter = Segmenter(library)
        refiner, head = segmenter.refining, library.head
        assert refiner is not None and head is not None  # noqa: PT018
        seen: list[object] = []
        refiner._refine = lambda planes, logits, units, rows: (  # type: ignore[method-assign]
            seen.append(units),
            Refiner._refine(refiner, planes, logits, units, rows),
        )[1]
        image, _ = library.source("e2")
        segmenter.segment(image, without=["e2"])
        segmenter.segment(image)
        fold = head.fold_of[library.number("e2")]
        assert seen[0] is refiner.head.folds[fold]
        assert seen[1] is refiner.head.units
        every = [f"e{i}" for i in range(6)]
        assert segmenter._question._refine(every) is None  # all folds have seen some


def test_a_fit_again_uses_what_was_kept_and_gives_the_same(
    fitted_at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Library.open(fitted_at, mode="write") as library:
        before = library.head
        monkeypatch.setattr(Segmenter, "logits_of", lambda *_, **__: pytest.fail("made anew"))
        after = library.fit()
    assert before is not None
    for one, other in zip(before.units, after.units, strict=True):
        np.testing.assert_array_equal(one, other)
    assert before.choices == after.choices


def test_services_take_up_a_head_that_is_fitted_or_removed_between_two_questions(
    fitted_at: Path, tmp_path: Path
) -> None:
    path = tmp_path / "library"
    shutil.copytree(fitted_at, path)
    rule = Rule.model_validate({"name": "a", "library": path, "recipe": {"k": 4}})
    questions = Questions()

    def refined() -> bool:
        with questions.ask(rule) as segmenter:
            return segmenter.segment(picture(80)[0]).provenance.recipe.head

    assert refined()
    with Library.open(path, mode="write") as library:
        library.remove_head()
        assert not refined()
        library.fit()
        assert refined()
    questions.close()


def test_a_desk_and_a_watch_take_up_a_head_with_the_next_item(
    fitted_at: Path, tmp_path: Path
) -> None:
    path = tmp_path / "library"
    shutil.copytree(fitted_at, path)
    (tmp_path / "in").mkdir()
    heads, refined = [], []
    with Library.open(path) as library, Library.open(path, mode="write") as writer:
        digest = writer.head.digest if writer.head else None
        desk = Desk(writer, AuditLog(tmp_path / "audit.jsonl"))
        first = desk.segmenter()

        def renewed(same: Library | None) -> Segmenter:
            assert same is library
            return Segmenter(library)

        with Watcher(
            Segmenter(library), tmp_path / "in", tmp_path / "out", settle_s=0.0, renewed=renewed
        ) as watcher:
            arrivals = watcher.run(Event(), poll_s=0.01)
            for number in range(3):
                image = picture(80 + number)[0]
                cv2.imwrite(str(tmp_path / "in" / f"{number}.png"), image)
                record = next(arrivals).record
                assert record is not None
                heads.append(record["provenance"]["head"])
                result = desk.propose(image)
                assert result is not None
                refined.append(result.provenance.head)
                if number == 0:
                    assert desk.segmenter() is first, "nothing has changed"
                    writer.remove_head()
                elif number == 1:
                    writer.fit()
        now = writer.head
    assert heads == refined == [digest, None, now.digest if now else None]
    assert digest is not None
    assert heads[2] is not None


def test_added_exemplars_make_it_older_which_is_said(library: Library) -> None:
    fill(library, 5)
    library.fit()
    segmenter = Segmenter(library)
    assert segmenter.head is not None
    assert segmenter.head.older == ""
    fill(library, 1, first=5)
    for one in (segmenter, Segmenter(library)):  # the one that is open says so too
        quality = one.segment(picture(70)[0]).quality
        assert quality.head is not None
        assert (quality.head.exemplars, quality.head.of, quality.head.now) == (5, 5, 6)
        assert "there are 6 now" in quality.head.older
        assert "library fit" in quality.mend
    library.fit()
    quality = Segmenter(library).segment(picture(70)[0]).quality
    assert quality.head is not None
    assert quality.head.older == ""
    assert "library fit" not in quality.mend


@pytest.mark.parametrize("count", [2, 3])
def test_with_few_exemplars_it_stays_out_and_says_so(library: Library, count: int) -> None:
    fill(library, count)
    head = library.fit()
    assert not head.used
    assert f"{count} of 4 groups" in head.choices["star"].why
    segmenter = Segmenter(library)
    assert segmenter.refining is None
    assert segmenter.segment(picture(9)[0]).provenance.head is None


def test_one_exemplar_is_too_few(library: Library) -> None:
    fill(library, 1)
    with pytest.raises(InputError, match="there is 1 "):
        library.fit()
    assert library.head is None


def test_a_structure_in_one_exemplar_stays_out(library: Library) -> None:
    fill(library, 4)
    image, mask = picture(11)
    library.add(image, {"star": mask, "rare": ~mask}, key="rare")
    head = library.fit()
    assert not head.choices["rare"].used
    assert "1 of 4 groups" in head.choices["rare"].why
    result = Segmenter(library).segment(image)
    assert set(result.masks) == {"star", "rare"}
    only = Segmenter(library, structures=["rare"])
    assert only.refining is None
    one = Segmenter(library, structures=["star"]).segment(image)
    np.testing.assert_array_equal(one.masks["star"], result.masks["star"])


def test_sizes_and_colours_may_be_mixed_and_images_constant(library: Library) -> None:
    for i, (size, colour) in enumerate([(40, False), (64, True), (97, False), (33, True)]):
        image, mask = picture(i, size, colour=colour)
        library.add(image, {"star": mask}, key=f"e{i}")
    library.add(np.full((30, 50), 7, np.uint8), {}, absent=("star",), key="flat")
    head = library.fit()
    assert all(np.isfinite(array).all() for array in head.units)
    flat = Segmenter(library).segment(np.full((30, 50), 7, np.uint8))
    assert flat.label_map.shape == (30, 50)


def test_a_library_without_images_says_so(tmp_path: Path) -> None:
    with Library.create(tmp_path / "bare", "demo", keep_sources=False) as bare:
        fill(bare, 2)
        with pytest.raises(InputError, match="did not keep its images"):
            bare.fit()


def test_numbers_that_are_not_finite_stop_the_fit(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(library, 4)
    real = Filters.sample

    def broken(self: Filters, *given: object) -> np.ndarray:
        found = real(self, *given)  # type: ignore[arg-type]
        found[3, 2] = np.nan
        return found

    monkeypatch.setattr(Filters, "sample", broken)
    with pytest.raises(EngineRunError, match="'e0' gave numbers that are not finite"):
        library.fit()
    assert library.head is None
    assert Segmenter(library).segment(picture(8)[0]).provenance.head is None


def test_a_fit_that_was_killed_goes_on(library: Library) -> None:
    fill(library, 5)
    path = library.path
    library.close()
    script = (
        "import os, signal, sys\n"
        "from recallseg.runtime.library import Library\n"
        "def step(done, total):\n"
        "    if done == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Library.open(sys.argv[1], mode='write').fit(progress=step)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=dict(os.environ), check=False
    )
    assert done.returncode == -signal.SIGKILL
    with Library.open(path, mode="write") as opened:
        assert opened.head is None
        assert sum(opened.heads.kept(i) is not None for i in range(1, 6)) == 3
        assert opened.verify().ok
        assert set(opened.fit().fold_of) == {1, 2, 3, 4, 5}


def test_what_cannot_be_read_again_while_it_is_fitted_is_told(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(library, 3)
    kept, asked = Heads.kept, []

    def once(heads: Heads, number: int) -> object:
        asked.append(number)
        return None if asked.count(number) > 1 else kept(heads, number)

    monkeypatch.setattr(Heads, "kept", once)
    with pytest.raises(LibraryError, match=f"cannot be read again from {library.path}"):
        library.fit()
    assert library.head is None


def test_what_could_not_be_read_again_is_not_kept(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(library, 4)
    monkeypatch.setattr(heads_file, "MOST_BYTES_OF_VALUE", 100)
    with pytest.raises(InputError, match=r"at most 100 are read again.*--structures"):
        library.fit()
    assert library.head is None


def test_a_damaged_head_is_told_and_can_be_left_out(library: Library) -> None:
    fill(library, 4)
    library.fit()
    library._store.catalog.database.execute("UPDATE heads SET data = zeroblob(8)")
    with pytest.raises(LibraryCorruptError, match="--no-refine"):
        Segmenter(library)
    assert Segmenter(library, refine=False).segment(picture(5)[0]).provenance.head is None


def test_a_calibration_leaves_out_what_the_units_have_seen(
    fitted_at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Library.open(fitted_at, mode="write") as library:
        both, alone = Segmenter(library), Segmenter(library, refine=False)
        assert both.recipe.digest != alone.recipe.digest
        left: list[tuple[str, ...]] = []
        real = Refiner.refining

        def watched(self: Refiner, of: Library, order: tuple[str, ...], without: object) -> object:
            left.append(tuple(without))  # type: ignore[call-overload]
            return real(self, of, order, without)  # type: ignore[arg-type]

        monkeypatch.setattr(Refiner, "refining", watched)
        assert both.calibrate()["star"].dice is not None
        assert left == [(f"e{i}",) for i in range(6)]
        assert both.segment(picture(60)[0]).quality.flag != "uncalibrated"
        assert alone.segment(picture(60)[0]).quality.flag == "uncalibrated"


# Where it is used


def test_volumes_and_streams_use_it_slice_by_slice(fitted_at: Path) -> None:
    images = [picture(80 + i)[0] for i in range(3)]
    with Library.open(fitted_at) as library:
        head = library.head
        assert head is not None
        segmenter = Segmenter(library)
        single = [segmenter.segment(image) for image in images]
        volume = Volume(np.stack(images), np.eye(4), "image")  # so no slice is turned upright
        whole = segment_volume(segmenter, volume)
        for i, one in enumerate(single):
            np.testing.assert_array_equal(whole.label_map[i], one.label_map)
        assert whole.provenance.head == head.digest
        assert whole.head == single[0].quality.head
        record = whole.to_json(volume)
        check_head(json.loads(json.dumps(record["quality"]["head"])))
        assert record["quality"]["head"]["structures"]["star"]["mix"] == head.choices["star"].mix
        plain = segment_volume(Segmenter(library, refine=False), volume)
        assert plain.head is None
        assert plain.provenance.head is None
        assert not np.array_equal(plain.label_map, whole.label_map)
        frames: list[Frame] = []
        with Stream(segmenter, frames.append, queue=len(images)) as stream:
            for image in images:
                stream.push(image)
            assert stream.drain(60)
        for frame, one in zip(frames, single, strict=True):
            np.testing.assert_array_equal(frame.result.label_map, one.label_map)
            assert frame.result.provenance.head == head.digest


def test_slices_that_remember_others_use_it(fitted_at: Path) -> None:
    images = np.stack([picture(90)[0]] * 3)
    volume = Volume(images, np.diag([4.0, 1.0, 1.0, 1.0]), "LPS")
    with Library.open(fitted_at) as library:
        made = segment_volume(Segmenter(library, frames=2), volume)
        plain = segment_volume(Segmenter(library, frames=2, refine=False), volume)
    assert made.propagated == 2
    assert made.head is not None
    mask = picture(90)[1]
    assert dice(made.mask("star")[1], mask) > dice(plain.mask("star")[1], mask)


def test_records_say_what_it_did_and_what_was_expected(fitted_at: Path) -> None:
    with Library.open(fitted_at) as library:
        head = library.head
        assert head is not None
        record = Segmenter(library).segment(picture(70)[0]).to_json()
        said = json.loads(json.dumps(record["quality"]["head"]))
        check_head(said)
        assert (said["used"], said["why"], said["older"]) == (True, "", "")
        assert (said["exemplars"], said["of"], said["now"]) == (6, 6, 6)
        assert (said["digest"], said["grouping"]) == (head.digest, "exemplars")
        assert said["structures"]["star"]["expected"] == head.choices["star"].expected
        check_record_part("expected", record["expected"])
        score = record["scores"]["star"]
        expected = head.choices["star"].at(score["distance"], score["iou"], given=score["present"])
        assert expected is not None
        assert record["expected"]["star"] == expected.to_json()
        assert 0 < expected.low <= expected.dice <= expected.high <= 1
        plain = Segmenter(library, refine=False).segment(picture(70)[0])
        assert plain.to_json()["quality"]["head"] is None
        assert plain.to_json()["expected"] == {}


def test_an_evaluation_shows_what_was_expected_beside_what_it_found(
    fitted_at: Path, tmp_path: Path
) -> None:
    sources = []
    for i in range(3):
        image, mask = picture(60 + i)
        sources.append(Annotated(f"q{i}", image, {"star": mask}, ()))
    sources.append(Annotated("flat", np.full((192, 192), 90, np.uint8), {}, ("star",)))
    shutil.copytree(fitted_at, tmp_path / "library")
    with Library.open(tmp_path / "library", mode="write") as library:
        for i in range(3):  # so that something is known of images without it
            library.add(np.full((192, 192), 80 + i, np.uint8), {}, absent=("star",))
        library.fit()
        found = evaluate(library, sources, ["star"], (4,), lambda k: Segmenter(library, k=k))
        settings = Settings.of(library, "With a head", "onnxruntime-cpu", "fp32", 1)
        page = render_report(found, settings, library.source)
        head = library.head
    assert head is not None
    choice = head.choices["star"]
    assert found.heads[4].digest == head.digest
    assert "The library&#x27;s head" in page
    assert f"head {head.digest[:12]}, fitted" in page
    assert "judged by exemplars that it had not seen" in page
    assert f"<td>{choice.mix:.0%}</td>" in page
    assert len(found.cases) == 4
    mean = np.mean([case.dice for case in found.cases])
    assert f"<td>{choice.expected:.3f} (" in page
    assert [c.present for c in found.cases if c.case == "flat"] == [False]
    here = choice.over([(c.nearest_distance, c.iou_estimate, c.present) for c in found.cases])
    assert here is not None
    assert f"<td>{here.dice:.3f} ({here.low:.3f} to {here.high:.3f})" in page
    assert f"<td>{mean:.3f}</td></tr>" in page


@pytest.mark.parametrize(
    ("table", "message"), [("heads", "head cannot be used"), ("kept_logits", "of exemplar number")]
)
def test_verify_finds_what_is_damaged(library: Library, table: str, message: str) -> None:
    fill(library, 4)
    library.fit()
    report = library.verify()
    assert (report.ok, report.heads) == (True, 5)
    library._store.catalog.database.execute(f"UPDATE {table} SET data = zeroblob(length(data))")
    report = library.verify()
    assert not report.ok
    assert message in report.problems[0]
    library.fit()  # what is damaged is made anew
    assert library.verify().ok


# Groups


def test_groups_and_blocks() -> None:
    told = {1: "a", 2: "a", 3: "b", 4: "c"}
    assert group_numbers([1, 2, 3, 4, 5], told) == ({1: 0, 2: 0, 3: 1, 4: 2, 5: 3}, "groups")
    assert group_numbers([1, 2, 3], {}) == ({1: 0, 2: 1, 3: 2}, "exemplars")
    numbers = list(range(1, 13))
    blocks, how = group_numbers(numbers, dict.fromkeys(numbers, "one"))
    assert how == "blocks"
    assert [blocks[n] for n in numbers] == sorted(i // 2 for i in range(12))


def test_the_whole_group_is_left_out(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(8):
        image, mask = picture(i)
        library.add(image, {"star": mask}, key=f"e{i}", group=f"patient {i // 2}")
    left: list[tuple[str, ...]] = []
    real = Segmenter.logits_of

    def watched(self: Segmenter, image: np.ndarray, without: list[tuple[str, ...]]) -> object:
        left.append(tuple(without[0]))
        assert not without[1]
        assert {*without[0]} < {*without[2]}
        assert len(without[2]) == 2 + 3  # half of the six of other groups
        return real(self, image, without)

    monkeypatch.setattr(Segmenter, "logits_of", watched)
    head = library.fit()
    assert head.grouping == "groups"
    assert left == [(f"e{i // 2 * 2}", f"e{i // 2 * 2 + 1}") for i in range(8)]
    for i in range(0, 8, 2):
        assert head.fold_of[i + 1] == head.fold_of[i + 2]
    with pytest.raises(InputError, match="tag 'site'"):
        library.fit(by="site")


# The choice


def row(group: int, alone: float, **by_way: float) -> Judged:
    """Return Dice by way: ``alone``, or what is said of a mix, by its letter and flags.

    As if the same were found whatever it is segmented from; what is smallest is smaller than 0.01.
    """
    letters = {0.0: "alone", 0.25: "a", 0.5: "b", 0.75: "c", 1.0: "d"}
    values = []
    for way in WAYS:
        letter = letters[way.mix]
        flags = [letter, letter + "_within" * way.within, letter + "_small" * way.small]
        values.append(next((by_way[f] for f in reversed(flags) if f in by_way), alone))
    return Judged(group, True, [made(0.1, values)] * 3)


def made(distance: float, values: list[float], sure: float = 0.8, *, given: bool = True) -> Found:
    count = len(values)
    return Found(distance, sure, values, [1.0] * count, [given] * count)


def test_what_might_harm_is_not_chosen() -> None:
    rows = [row(i, 0.5, b=0.5 + gain) for i, gain in enumerate(GAINS)]
    chosen = choose(rows, 0.01)
    assert not chosen.used
    assert chosen.alone == chosen.expected == 0.5
    chosen = choose([row(i, 0.5, a=0.55, b=0.6, d=0.4) for i in range(8)], 0.01)
    assert (chosen.mix, chosen.least, chosen.within) == (0.5, 0.0, False)
    assert chosen.expected == pytest.approx(0.6)


GAINS = [0.3, -0.1, -0.05, 0.02, -0.1, 0.2, -0.1, 0.1]
"""Better on average by 0.03; the interval includes harm."""


@pytest.mark.parametrize(("loss", "used"), [(0.002, True), (0.04, False)])
def test_harm_is_what_somebody_would_notice(loss: float, used: bool) -> None:
    rows = [row(i, 0.5, a=0.5 + (0.06 if i == 0 else -loss / 4)) for i in range(8)]
    assert choose(rows, 0.01).used is used


def test_a_larger_share_is_chosen_only_if_it_is_surely_better() -> None:
    unsure = [row(i, 0.5, a=0.55, b=0.6 + (i % 2) / 50, c=0.612 - (i % 2) / 250) for i in range(8)]
    assert choose(unsure, 0.01).mix == 0.5
    sure = [row(i, 0.5, a=0.55, b=0.6, c=0.604) for i in range(8)]
    assert choose(sure, 0.01).mix == 0.75
    far = [row(i, 0.5, b=0.6, c=0.6 + (0.1 if i < 2 else -0.005)) for i in range(8)]
    assert choose(far, 0.01).mix == 0.75  # on average by more than 0.01
    one = [row(i, 0.5, b=0.6, c=0.6 + (0.2 if i == 0 else -0.005)) for i in range(8)]
    assert choose(one, 0.01).mix == 0.5  # by one exemplar alone


def test_small_finds_are_dropped_only_if_that_costs_no_exemplar() -> None:
    rows = [row(i, 0.8) for i in range(6)]
    rows += [row(i, 0.0, alone_small=1.0) for i in (6, 7)]
    assert choose(rows, 0.01).least == 0.01
    rows.append(row(8, 0.8, alone_small=0.7))
    assert choose(rows, 0.01).least == 0.0


def test_where_memory_attention_finds_nothing_a_head_may_not_either() -> None:
    rows = [row(i, 0.8, b=0.85) for i in range(7)]
    rows.append(row(7, 1.0, b=0.0, b_within=1.0))  # absent, and a head that sees it
    chosen = choose(rows, 0.01)
    assert (chosen.mix, chosen.within) == (0.5, True)
    rows.append(row(8, 0.0, b=0.7, b_within=0.0))  # there, and only the head sees it
    assert not choose(rows, 0.01).within


def test_within_is_kept_to_in_a_query(fitted_at: Path) -> None:
    with Library.open(fitted_at) as library:
        head = library.head
        assert head is not None
        planes = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
        nothing = np.full((1, 24, 24), -3.0, np.float32)
        something = nothing.copy()
        something[0, 4:12, 4:12] = 5.0
        for within in (False, True):
            choice = replace(head.choices["star"], mix=0.25, least=0.0, within=within)
            refiner = Refiner(replace(head, choices={"star": choice}), 1)
            refine = refiner.refining(library, ["star"], ())
            assert refine is not None
            assert refine(planes, nothing)[1] == [within]
            assert refine(planes, something)[1] == [False]


def test_a_result_names_the_rule_that_counts_a_structure_as_absent(
    fitted_at: Path, tmp_path: Path
) -> None:
    path = tmp_path / "library"
    shutil.copytree(fitted_at, path)
    with Library.open(path, mode="write") as library:
        head = library.head
        assert head is not None
        choice = replace(head.choices["star"], least=0.5)
        library.heads.store(replace(head, choices={"star": choice}))
        result = Segmenter(library).segment(picture(50)[0])
        assert not result.scores["star"].present
        assert not result.masks["star"].any()
        assert result.scores["star"].object_score > 0
        [reason] = result.quality.reasons["star"]
        assert "library's head: less than 50.00% of the image is found" in reason
        assert result.to_json()["quality"]["head"]["structures"]["star"]["least"] == 0.5
        for i in range(6):  # absent by the exemplars most like it: that is no news of the head's
            flat = np.full((192, 192), 200 + i, np.uint8)
            library.add(flat, {}, absent=("star",), key=f"flat{i}")
        absent = Segmenter(library).segment(np.full((192, 192), 203, np.uint8))
        assert not absent.scores["star"].present
        assert "star" not in absent.quality.reasons


def test_a_mask_without_a_pixel_of_what_should_be_there_is_suspect(
    fitted_at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fitted_at, tmp_path / "library")
    with Library.open(tmp_path / "library", mode="write") as library:
        segmenter = Segmenter(library)
        segmenter.calibrate()
        assert "star" not in segmenter.segment(picture(50)[0]).quality.reasons
        monkeypatch.setattr(
            Refiner,
            "_refine",
            lambda self, planes, *_: (np.full((1, *planes.shape[2:]), -1, np.float32), [False]),
        )
        result = segmenter.segment(picture(50)[0])
    assert result.scores["star"].present
    assert not result.masks["star"].any()
    assert result.quality.flag == "suspect"
    assert "no pixel is drawn, though by its object score" in result.quality.reasons["star"][0]


# What is expected


def found(distance: float, dice: float, sure: float = 0.8, *, given: bool = True) -> Found:
    return made(distance, [dice] * len(WAYS), sure, given=given)


def test_what_is_expected_depends_on_the_distance_and_never_rises_with_it() -> None:
    draw = np.random.default_rng(3)
    rows = []
    for i in range(40):
        near, far = draw.uniform(0.01, 0.09), draw.uniform(0.16, 0.36)
        dice = [1 - chord + draw.normal(0, 0.02) for chord in np.sqrt([near, 0, far])]
        rows.append(Judged(i, True, [*map(found, (near, 0.0, far), dice)]))
    choice = choose(rows, 0.01)
    told = [choice.at(d, 0.8, given=True) for d in (0.0, 0.01, 0.0225, 0.06, 0.2, 0.3)]
    dice = [one.dice for one in told if one is not None]
    assert dice == sorted(dice, reverse=True)
    for chord, one in zip(np.sqrt([0.0, 0.01, 0.0225, 0.06, 0.2, 0.3]), told, strict=True):
        assert one is not None
        assert one.dice == pytest.approx(1 - chord, abs=0.04)
        assert one.low <= one.dice <= one.high
        assert one.high - one.low < 0.1
        assert not one.beyond
    # Of images half as far from the library as exemplars from each other more is expected.
    apart = float(np.mean([row.found[0].distance for row in rows]))
    nearer = choice.at(apart / 4, 0.8, given=True)
    assert nearer is not None
    assert nearer.dice > choice.expected + 0.05
    beyond = choice.at(0.9, 0.8, given=True)
    assert beyond is not None
    assert beyond.beyond
    assert choice.at(float("nan"), 0.8, given=True) is None


def test_few_groups_widen_the_interval_and_fewer_than_four_say_nothing() -> None:
    dice = [0.9, 0.8, 0.7, 0.6] * 8

    def judged(count: int) -> list[Judged]:
        return [Judged(i, True, [found(0.04, d)] * 3) for i, d in enumerate(dice[:count])]

    few, many = choose(judged(4), 0.01), choose(judged(32), 0.01)
    for choice in (few, many):
        assert choice.expected == pytest.approx(0.75)
        at = choice.at(0.04, 0.8, given=True)
        assert at is not None
        assert at.dice == pytest.approx(0.75)
    # Student's interval of the mean of four would be 0.54 to 0.96; beyond 0.6 to 0.9 none drew.
    assert few.interval[0] < 0.63
    assert few.interval[1] > 0.87
    assert many.interval[1] - many.interval[0] == pytest.approx(0.08, abs=0.015)
    at = many.at(0.04, 0.8, given=True)
    assert at is not None
    assert at[1:3] == pytest.approx(many.interval, abs=0.01)
    three = choose(judged(3), 0.01)
    assert three.at(0.04, 0.8, given=True) is None
    assert three.curve == ()


def test_what_is_expected_rises_with_the_iou_estimate_at_one_distance() -> None:
    draw = np.random.default_rng(4)
    rows = []
    for i in range(24):
        recalls = []
        for distance in (0.09, 0.0, 0.25):
            sure = draw.uniform(0.2, 0.9)
            dice = 0.2 + 0.7 * sure - 0.4 * distance + draw.normal(0, 0.02)
            recalls.append(found(distance, dice, sure))
        rows.append(Judged(i, True, recalls))
    choice = choose(rows, 0.01)
    for distance, sure in ((0.09, 0.3), (0.09, 0.8), (0.02, 0.5), (0.25, 0.6)):
        one = choice.at(distance, sure, given=True)
        assert one is not None
        assert one.dice == pytest.approx(0.2 + 0.7 * sure - 0.4 * distance, abs=0.06)
        assert one.low <= one.dice <= one.high
        assert not one.beyond
    unsure = choice.at(0.09, 0.05, given=True)  # less sure than of any exemplar
    assert unsure is not None
    assert unsure.beyond


def test_results_without_a_mask_are_judged_apart() -> None:
    rows = [Judged(i, True, [found(0.04, 0.8)] * 3) for i in range(6)]
    right, wrong = found(0.5, 1.0, 0.0, given=False), found(0.5, 0.0, 0.3)
    rows += [Judged(6 + i, False, [right, right, wrong]) for i in range(2)]
    rows.append(Judged(8, True, [found(0.5, 0.0, 0.0, given=False), found(0.0, 0.8), wrong]))
    choice = choose(rows, 0.0)
    assert choice.empty == (2, 3)
    rejects = choice.rejects
    assert rejects is not None
    assert rejects.dice == pytest.approx(2.5 / 4)
    assert rejects.low < 0.3 < 0.9 < rejects.high
    assert choice.at(float("nan"), 0.0, given=False) == rejects
    over = choice.over([(0.04, 0.8, True), (0.04, 0.8, True), (0.5, 0.0, False)])
    assert over is not None
    assert over.dice == pytest.approx((1.6 + 2.5 / 4) / 3)
    shown_only = choose(rows[:6], 0.0)
    assert shown_only.rejects is None
    told = [(0.04, 0.8, True), (0.5, 0.0, False)]
    assert shown_only.over(told) is None  # nothing is known of the second


def test_what_was_chosen_is_not_what_its_estimate_rests_on() -> None:
    draw = np.random.default_rng(0)
    rows = []
    for i in range(16):  # ways that differ by chance alone: the best of them promises too much
        values = [0.5, *np.clip(draw.normal(0.55, 0.2, len(WAYS) - 1), 0, 1)]
        rows.append(Judged(i, True, [made(0.1, values)] * 3))
    choice = choose(rows, 0.0)
    best = max(np.mean([row.found[0].dice[w] for row in rows]) for w in range(len(WAYS)))
    assert choice.used
    assert choice.expected < best


def test_a_falling_fit_is_that_of_scikit_learn() -> None:
    isotonic = pytest.importorskip("sklearn.isotonic").IsotonicRegression(increasing=False)
    draw = np.random.default_rng(5)
    chords = np.sort(draw.uniform(0, 1, 60))
    values = 1 - chords + draw.normal(0, 0.2, 60)
    weights = draw.integers(1, 4, 60)
    fitted = isotonic.fit(chords, values, weights).predict(chords)
    line = falling(chords, values, weights)
    levels = line(chords)
    for level in np.unique(fitted):  # in the middle of a step both are its mean
        inside = fitted == level
        middle = np.average(chords[inside], weights=weights[inside])
        assert line(np.array([middle]))[0] == pytest.approx(level)
    assert (np.diff(levels) <= 1e-12).all()


# The graph


def test_the_graphs_are_those_that_the_recipe_makes() -> None:
    made = {FILTERS: making.build(False), REFINE: making.build(True)}
    for name, graph in {**made, REFINE_NATIVE: making.build_native()}.items():
        assert (refining.HEADS / name).read_bytes() == graph.SerializeToString(deterministic=True)


def test_the_graph_does_what_numpy_does_and_tiles_leave_no_trace(
    monkeypatch: pytest.MonkeyPatch, fitted_at: Path
) -> None:
    draw = np.random.default_rng(0)
    planes = draw.random((1, 3, 203, 171), np.float32)
    logits = draw.normal(0, 4, (1, 96, 96)).astype(np.float32)
    with Library.open(fitted_at) as library:
        head = library.head
    assert head is not None
    refiner = Refiner(head, 1)
    mix = np.full((1, 1, 1, 1), 0.25, np.float32)
    whole = refiner.run(planes, logits, head.units, mix).copy()
    features = Filters(1).sample(planes, logits, np.arange(203 * 171))
    assert features.shape == (203 * 171, feature_count(1))
    w1, b1, w2, b2, w3, b3 = head.units
    hidden = np.maximum(np.maximum(features @ w1.T + b1, 0) @ w2.T + b2, 0)
    own = (hidden @ w3.T + b3).reshape(203, 171)
    mixed = 0.75 * features[:, -3].reshape(203, 171) + 0.25 * own
    np.testing.assert_allclose(whole[0], mixed, atol=2e-3)
    monkeypatch.setattr(refining, "TILE", 64)
    tiled = refiner.run(planes, logits, head.units, mix)
    np.testing.assert_allclose(tiled, whole, atol=2e-3)
    some = draw.integers(0, 203 * 171, 500)
    np.testing.assert_allclose(Filters(1).sample(planes, logits, some), features[some], atol=1e-4)


def test_the_native_operator_runs_it_where_there_is_one(
    native_operators: Path, fitted_at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, _ = picture(50)
    with Library.open(fitted_at) as library:
        found = Segmenter(library).segment(image)
        monkeypatch.setattr("recallseg.engines.operators._LIBRARY", native_operators.with_name("-"))
        expected = Segmenter(library).segment(image)
    assert found.provenance.head == expected.provenance.head
    assert found.provenance.graphs["refine"] == graph_digest(REFINE_NATIVE)
    assert expected.provenance.graphs["refine"] == graph_digest(REFINE)
    assert found.provenance.operators is not None
    assert expected.provenance.operators is None
    assert np.mean(found.masks["star"] != expected.masks["star"]) < 1e-4


def test_heads_of_the_graph_before_stay_good_and_others_are_left_out(fitted_at: Path) -> None:
    with Library.open(fitted_at) as library:
        head = library.head
        assert head is not None
        for earlier in EARLIER:
            assert refining.describe_head(library, replace(head, graph=earlier), ["star"]).used
        other = refining.describe_head(library, replace(head, graph="0" * 64), ["star"])
    assert not other.used
    assert "fitted for other filters" in other.why


def test_filters_answer_a_step_and_a_flat_image_as_they_should() -> None:
    flat = Filters(1).sample(
        np.full((1, 3, 32, 48), 0.5, np.float32), np.zeros((1, 8, 8), np.float32), np.arange(1536)
    )
    np.testing.assert_allclose(flat[:, :2], 0.5, atol=1e-6)
    np.testing.assert_allclose(flat[:, 2:5], 0.0, atol=2e-4)
    ramp = np.broadcast_to(np.arange(48, dtype=np.float32) / 48, (1, 3, 32, 48))
    middle = Filters(1).sample(
        np.ascontiguousarray(ramp), np.zeros((1, 8, 8), np.float32), np.array([16 * 48 + 24])
    )[0]
    np.testing.assert_allclose(middle[2], 1 / 48, rtol=1e-2)  # the slope, by pixel


def test_units_learn_what_one_layer_cannot_and_are_the_same_again() -> None:
    draw = np.random.default_rng(1)
    x = draw.normal(size=(6000, 5)).astype(np.float32)
    shown = (x[:, :1] * x[:, 1:2] > 0).astype(np.float32)
    units = fit_units(x, shown, np.ones_like(shown))
    w1, b1, w2, b2, w3, b3 = units
    hidden = np.maximum(np.maximum(x @ w1.T + b1, 0) @ w2.T + b2, 0)
    assert (((hidden @ w3.T + b3) > 0) == (shown > 0)).mean() > 0.93
    again = fit_units(x, shown, np.ones_like(shown))
    for one, other in zip(units, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_nothing_of_a_head_needs_more_than_the_core() -> None:
    names = {name.partition(".")[0] for name in vars(fitting)}
    assert not names & {"torch", "sklearn", "scipy"}


def test_what_is_expected_by_many_exemplars_can_be_read_again() -> None:
    draw, rows = np.random.default_rng(0), []
    for group in range(300):
        found = []
        for nearer in (1.0, 0.0, 1.5):
            far = nearer * float(draw.uniform(0.02, 0.3))
            dice = float(np.clip(0.95 - 1.5 * far + draw.normal(0, 0.02), 0, 1))
            sure = float(np.clip(0.95 - far + draw.normal(0, 0.05), 0, 1))
            same = [dice] * len(WAYS)
            found.append(Found(far, sure, same, [0.1] * len(WAYS), [True] * len(WAYS)))
        rows.append(Judged(group, True, found))
    choice = choose(rows, 0.001)
    assert parse_choice(choice_values(choice)) == choice
    for far in (0.05, 0.15, 0.25, 0.4):
        told = choice.at(far, 0.95 - far, given=True)
        assert told is not None
        assert told.dice == pytest.approx(0.95 - 1.5 * far, abs=0.02)


@pytest.mark.parametrize("refine", [False, True])
def test_logits_that_are_no_numbers_are_no_evidence(
    fitted_at: Path, monkeypatch: pytest.MonkeyPatch, refine: bool
) -> None:
    """To a head, those that were not made are NaN: an engine's own must not pass for them."""
    with Library.open(fitted_at) as library:
        segmenter = Segmenter(library, refine=refine)
        assert (segmenter.refining is not None) is refine
        model = segmenter.model
        run = model._composition.run

        def spoilt(graph: str, tensors: dict[str, np.ndarray]) -> None:
            run(graph, tensors)
            if graph == "decode":
                tensors["logits"][0, 5:9] = np.nan

        image = picture(50)[0]
        before = segmenter.segment(image)
        assert before.masks["star"].any()
        with monkeypatch.context() as patch:
            patch.setattr(model._composition, "run", spoilt)
            with pytest.raises(EngineRunError, match=r"logits .*not finite|NaN or infinite"):
                segmenter.segment(image)
        assert segmenter.segment(image) == before
