from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from recallseg import Bundle, Library, Segmenter, __version__
from recallseg.engines.errors import (
    DeadlineError,
    HostMemoryError,
    InputError,
    LibraryCorruptError,
    LibraryWriteError,
)
from recallseg.engines.precisions import find_precision
from recallseg.runtime.model.model import Model
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.model.view import View
from recallseg.runtime.segmenting import batches
from recallseg.runtime.segmenting.calibration import Thresholds
from recallseg.runtime.segmenting.question import Question
from recallseg.runtime.segmenting.recipe import Provenance, Recipe

SIZE = 64


def picture(position: int, colour: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A bright square at ``position`` (0 to 3), and its mask."""
    image = np.full((SIZE, SIZE), 20, np.uint8)
    mask = np.zeros((SIZE, SIZE), bool)
    top, left = divmod(position, 2)
    mask[32 * top : 32 * top + 32, 32 * left : 32 * left + 32] = True
    image[mask] = 200 + position
    return (np.repeat(image[..., None], 3, axis=2) if colour else image), mask


def assert_alike(found: np.ndarray, expected: np.ndarray) -> None:
    """Interpolation rounds the corners of a square by a pixel."""
    assert (found != expected).mean() < 0.002


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Library:
    """Exemplars of four positions; the last says that there is no "stain"."""
    made = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    for position in range(4):
        image, mask = picture(position)
        masks = {"square": mask} if position == 3 else {"square": mask, "stain": mask}
        made.add(image, masks, absent=("stain",) if position == 3 else ())
    return made


def make(library: Library, **settings: object) -> Segmenter:
    return Segmenter(library, **{"k": 1, "engine": "fake", **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("position", range(3))
def test_the_nearest_exemplar_decides(library: Library, position: int) -> None:
    image, mask = picture(position)
    result = make(library).segment(image)
    assert_alike(result.masks["square"], mask)
    assert result.recalled["square"][0].distance < 1e-3


def test_exemplars_out_of_reach_are_not_recalled(library: Library) -> None:
    image, _ = picture(1)
    everything = make(library, k=4, structures=["square"], reach=math.inf).segment(image)
    assert len(everything.recalled["square"]) == 4
    near = make(library, k=4, structures=["square"]).segment(image)
    assert near.recalled["square"] == everything.recalled["square"][:1]
    assert near.provenance.recipe.k == 4


def test_warming_up_recalls_k_whatever_is_within_reach(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = make(library, k=4, structures=["square"])
    counts: list[int] = []
    attend = View.recall

    def recall(view: View, gather: Any, wanted: Any, k: int, frames: Any) -> None:
        counts.append(k)
        attend(view, gather, wanted, k, frames)

    monkeypatch.setattr(View, "recall", recall)
    segmenter.warm_up(runs=2)
    assert counts == [4, 4]


@pytest.mark.parametrize("reach", [0.0, 0.99, -1.0, math.nan])
def test_a_reach_below_one_would_leave_nothing(library: Library, reach: float) -> None:
    with pytest.raises(InputError, match="reach must be a number of at least 1"):
        make(library, reach=reach)


@pytest.fixture
def small(tmp_path: Path, fake_bundle: Bundle) -> Library:
    """One exemplar of a rare structure, on the first of four pictures; all show a common one."""
    made = Library.create(tmp_path / "small", fake_bundle, engine="fake")
    for position in range(4):
        image, mask = picture(position)
        masks = {"common": mask} if position else {"common": mask, "rare": mask}
        made.add(image, masks, key=str(position), tags={"scanner": "AB"[position % 2]})
    return made


def test_k_is_at_most(small: Library) -> None:
    image, mask = picture(0)
    result = make(small, k=8, reach=math.inf).segment(image)
    assert [match.key for match in result.recalled["rare"]] == ["0"]
    assert len(result.recalled["common"]) == 4
    assert_alike(result.masks["rare"], mask)
    assert result.provenance.recipe.k == 8
    assert result.to_json()["exemplars"] == {
        "common": {"recalled": 4, "available": 4},
        "rare": {"recalled": 1, "available": 1},
    }
    near = make(small, k=8).segment(image)  # three are out of reach
    assert near.to_json()["exemplars"]["common"] == {"recalled": 1, "available": 4}


def test_one_exemplar_is_enough_for_the_defaults(tmp_path: Path, fake_bundle: Bundle) -> None:
    image, mask = picture(2)
    with Library.create(tmp_path / "one", fake_bundle, engine="fake") as library:
        library.add(image, {"square": mask})
        segmenter = Segmenter(library, engine="fake")
        segmenter.warm_up()
        assert_alike(segmenter.segment(image).masks["square"], mask)


def test_tags_choose_exemplars_and_with_them_structures(small: Library) -> None:
    image, _ = picture(0)
    result = make(small, k=4, tags={"scanner": "B"}, reach=math.inf).segment(image)
    assert {match.key for match in result.recalled["common"]} == {"1", "3"}
    assert dict(result.available) == {"common": 2}  # no exemplar of this scanner shows a rare one
    with pytest.raises(InputError, match="shows 'rare' carries the tags"):
        make(small, structures=["common", "rare"], tags={"scanner": "B"})
    small.add(picture(1)[0][::-1], {"common": picture(1)[1]}, tags={"view": "axial"})
    with pytest.raises(InputError, match="carries all of the tags"):
        make(small, tags={"view": "axial", "scanner": "A"})
    with pytest.raises(InputError, match="carries the tag scanner=C"):
        make(small, tags={"view": "axial", "scanner": "C"})


def test_an_exemplar_may_show_nothing_at_all(small: Library) -> None:
    blank = np.full((SIZE, SIZE), 90, np.uint8)
    small.add(blank, {}, absent=("common", "rare"))
    result = make(small, k=4).segment(blank)
    assert not result.label_map.any()


def test_a_structure_that_loses_its_last_exemplar_is_suspect(small: Library) -> None:
    segmenter = make(small, k=4)
    small.remove("0")
    result = segmenter.segment(picture(0)[0])
    assert not result.masks["rare"].any()
    assert result.quality.flag == "suspect"
    assert "no exemplar that shows it is left" in result.quality.reasons["rare"][0]
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written["scores"]["rare"]["distance"] is None
    small.add(*[picture(0)[0], {"rare": picture(0)[1]}])
    assert segmenter.segment(picture(0)[0]).masks["rare"].any()


def test_warming_up_covers_exemplars_that_are_yet_to_come(
    small: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = make(small, k=6, structures=["rare"])
    counts: list[int] = []
    recall = View.recall

    def watched(view: View, gather: Any, wanted: Any, k: int, frames: Any) -> None:
        counts.append(k)
        recall(view, gather, wanted, k, frames)

    monkeypatch.setattr(View, "recall", watched)
    segmenter.warm_up(runs=1)
    assert counts == [6]


REMOVER = """
import sys
from pathlib import Path
from time import sleep
import numpy as np
from recallseg import Library
folder, ready = map(Path, sys.argv[1:])
pixels, mask = np.full((64, 64), 90, np.uint8), np.zeros((64, 64), bool)
pixels[:32, :32], mask[:32, :32] = 200, True
with Library.open(folder, mode="write", engine="fake") as library:
    for turn in range(100000):
        library.add(pixels + turn % 40, {"square": mask, "stain": mask}, key="comes and goes")
        ready.touch()
        sleep(turn % 3 / 50)
        library.remove("comes and goes")
        if turn % 5 == 0:
            library.compact()
"""


def test_an_exemplar_removed_by_another_process_stops_no_query(
    library: Library, tmp_path: Path
) -> None:
    library.close()
    ready = tmp_path / "ready"
    command = [sys.executable, "-c", REMOVER, str(library.path), str(ready)]
    other = subprocess.Popen(command)
    try:
        reader = Library.open(library.path)
        segmenter = make(reader, k=8, reach=math.inf)
        while not ready.exists():
            assert other.poll() is None
            sleep(0.01)
        seen: set[tuple[str, int]] = set()
        start = monotonic()
        while (waited := monotonic() - start) < 3 or (
            len({n for _, n in seen}) < 2 and waited < 300
        ):
            result = segmenter.segment(picture(0)[0])
            for name, found in result.recalled.items():
                comes = any(match.key == "comes and goes" for match in found)
                # one state: the digest, what there is and what was recalled belong together
                assert result.available[name] == {"square": 4, "stain": 3}[name] + comes
            keys = {m.key for m in result.recalled["square"]} & {"comes and goes"}
            seen.add((result.provenance.library_digest, len(keys)))
        assert other.poll() is None
        assert {count for _, count in seen} == {0, 1}  # otherwise this shows nothing
        with_it = {digest for digest, count in seen if count}
        assert with_it.isdisjoint(digest for digest, count in seen if not count)
    finally:
        other.kill()
        other.wait()


def test_label_values_follow_the_order_asked_for(library: Library) -> None:
    image, mask = picture(0)
    result = make(library, structures=["stain", "square"]).segment(image)
    assert dict(result.labels) == {"stain": 1, "square": 2}
    assert set(np.unique(result.label_map)) <= {0, 1, 2}
    assert_alike(result.label_map > 0, mask)


def test_a_structure_that_the_nearest_exemplars_lack_is_absent(library: Library) -> None:
    result = make(library).segment(picture(3)[0])
    assert result.masks["square"].any()
    assert not result.masks["stain"].any()
    assert not result.scores["stain"].present
    assert result.recalled["stain"][0].absent
    assert "stain" not in result.quality.reasons  # the library's own evidence is no surprise


@pytest.mark.parametrize("shape", [(64, 64), (50, 120), (301, 17)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
def test_masks_are_on_the_querys_own_grid(
    library: Library, shape: tuple[int, int], dtype: type
) -> None:
    image = np.random.default_rng(0).uniform(0, 250, shape).astype(dtype)
    result = make(library).segment(image)
    assert result.label_map.shape == shape
    assert all(mask.shape == shape and mask.dtype == bool for mask in result.masks.values())


def test_colour_and_grey_images_mix(library: Library) -> None:
    image, mask = picture(1, colour=True)
    assert_alike(make(library).segment(image).masks["square"], mask)


def test_a_result_belongs_to_the_caller(library: Library) -> None:
    segmenter = make(library)
    first = segmenter.segment(picture(0)[0])
    before = first.label_map.copy(), first.masks["square"].copy()
    segmenter.segment(picture(2)[0])
    np.testing.assert_array_equal(first.label_map, before[0])
    np.testing.assert_array_equal(first.masks["square"], before[1])


def test_a_result_says_where_it_came_from(library: Library, fake_bundle: Bundle) -> None:
    result = make(library).segment(picture(0)[0])
    made = result.provenance
    assert made.recipe.bundle_identity == fake_bundle.identity
    assert made.library_digest == library.digest
    assert made.structures == ("square", "stain")
    assert made.version == __version__
    assert set(made.graphs) == {"embed", "encode", "attend", "decode"}
    assert made.graphs["embed"] == fake_bundle.graph_digest("embed", "portable", "fp32")
    [(origin, exemplars)] = made.memories
    assert origin is not None
    assert (origin.engine, origin.precision, exemplars) == ("fake", "fp32", 4)
    assert "RANDOM" in result.notice
    assert result.timings["total"] >= result.timings["embed"] > 0
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written["labels"] == {"square": 1, "stain": 2}
    assert written["format_version"] == 2
    assert written["provenance"]["recipe"]["digest"] == made.recipe.digest
    assert len(written["recalled"]["square"][0]["memory"]) == 64
    assert "quality" in repr(result)


def test_everything_that_can_change_a_result_changes_its_provenance(
    library: Library, tmp_path: Path, fake_bundle: Bundle
) -> None:
    """One setting or content at a time; each must show."""
    image = picture(0)[0]

    def made(library: Library, **settings: object) -> Provenance:
        return make(library, **settings).segment(image).provenance

    first = made(library)
    assert made(library) == first
    assert made(library).digest == first.digest
    recipes = [first.recipe]
    for settings in ({"k": 2}, {"reach": 2.5}, {"reach": math.inf}):
        recipes.append(made(library, **settings).recipe)
    library.add(picture(1)[0][::-1], {"square": picture(1)[1]}, tags={"scanner": "A"})
    grown = made(library)
    assert grown.recipe == first.recipe  # what the library holds is not of the recipe
    assert grown.library_digest != first.library_digest
    recipes.append(made(library, tags={"scanner": "A"}).recipe)
    for name, options in {
        "int8": {"memory_format": "int8"},
        "window": {"intensity": Intensity("window", 0, 255)},
    }.items():
        with Library.create(tmp_path / name, fake_bundle, engine="fake", **options) as other:  # type: ignore[arg-type]
            other.add(picture(0)[0], {"square": picture(0)[1]})
            recipes.append(made(other).recipe)
    for name in ("bundle_identity", "engine", "precision"):
        recipes.append(replace(first.recipe, **{name: "another"}))
    recipes.append(replace(first.recipe, head=True))
    assert len({recipe.digest for recipe in recipes}) == len(set(recipes)) == len(recipes)
    more = made(library, frames=3)
    assert (more.recipe, more.frame_memories) == (grown.recipe, 3)
    assert len({more.digest, grown.digest, made(library, structures=["square"]).digest}) == 3


def test_libraries_of_two_precisions_give_results_that_differ(tmp_path: Path) -> None:
    """The same annotations, asked in one precision: their memories are not the same."""
    digests, results = set(), []
    y, x = np.mgrid[:64, :64]
    mask = np.hypot(y - 30, x - 34) < 14
    image = (60 + 120 * mask).astype(np.uint8)
    for precision in ("fp32", "int8"):
        with Library.create(tmp_path / precision, "demo", precision=precision) as made:
            made.add(image, {"disc": mask}, key="one")
            digests.add(made.digest)
        result = Segmenter(tmp_path / precision, k=1, precision="fp32").segment(image)
        results.append(result)
    one, other = (result.provenance for result in results)
    assert len(digests) == 1  # what was annotated; old records cite it
    assert one.recipe == other.recipe
    assert one.digest != other.digest
    assert one.to_texts()["memories"] == "onnxruntime-cpu fp32: 1"
    assert other.to_texts()["memories"] == "onnxruntime-cpu int8: 1"
    assert results[0].recalled["disc"][0].memory != results[1].recalled["disc"][0].memory
    bundle, variants = Bundle.open("demo"), {"decode": "portable"}
    assert one.graphs == {
        name: bundle.graph_digest(name, variants.get(name, "ort-cpu"), "fp32")
        for name in ("embed", "encode", "attend", "decode")
    }


def test_a_result_can_be_pickled_copied_and_compared(library: Library) -> None:
    segmenter = make(library)
    result = segmenter.segment(picture(0)[0])
    for other in (
        pickle.loads(pickle.dumps(result)),
        copy.deepcopy(result),
        copy.copy(result),
        segmenter.segment(picture(0)[0]),
    ):
        assert other == result
        assert other.to_json()["provenance"] == result.to_json()["provenance"]
        np.testing.assert_array_equal(other.masks["square"], result.masks["square"])
    assert segmenter.segment(picture(1)[0]) != result
    assert result != "a result"
    with pytest.raises(TypeError, match="unhashable"):
        hash(result)
    recipe = result.provenance.recipe
    for one in (
        recipe,
        replace(recipe, reach=math.inf, tags={"a": "b"}, approximations=("pooled",)),
    ):
        assert Recipe.from_json(json.loads(json.dumps(one.to_json()))) == one
    for wrong in ({}, [], {"k": True}, {"tags": [1]}, {"head": 1}, {"reach": "far"}, {"new": 1}):
        data = {**recipe.to_json(), **wrong} if isinstance(wrong, dict) and wrong else wrong
        with pytest.raises(LibraryCorruptError, match="the record of a recipe is damaged"):
            Recipe.from_json(data)
    for value in (result.quality, result.provenance, result.scores, result.provenance.recipe):
        assert pickle.loads(pickle.dumps(value)) == value


def flag_of(library: Library, **settings: object) -> str:
    return make(library, structures=["square"], **settings).segment(picture(0)[0]).quality.flag


def test_calibration_is_for_a_recipe(library: Library) -> None:
    segmenter = make(library, structures=["square"])
    before = segmenter.segment(picture(0)[0]).quality
    assert before.flag == "uncalibrated"
    assert f"recallseg library calibrate {library.path} --k 1 --reach 3" in before.mend
    assert "--structures square" in before.mend
    seen: list[tuple[int, int]] = []
    thresholds = segmenter.calibrate(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)
    assert thresholds["square"].exemplars == 4
    after = segmenter.segment(picture(0)[0]).quality
    assert (after.flag, after.mend) == ("ok", "")
    assert after.to_json()["calibration"] == {"square": {"made_with": 4, "of": 4}}
    assert flag_of(library) == "ok"
    for other in ({"k": 2}, {"reach": 2.0}, {"reach": math.inf}):
        assert flag_of(library, **other) == "uncalibrated"
    asked = make(library, structures=["square"], k=8).segment(picture(0)[0]).quality
    assert "calibrated for other settings" in asked.mend
    assert "--k 8" in asked.mend
    make(library, structures=["square"], k=2).calibrate()
    assert flag_of(library) == flag_of(library, k=2) == "ok"  # one beside the other


def test_calibrating_one_structure_keeps_the_others(library: Library) -> None:
    image, mask = picture(3)
    library.add(image[::-1], {"stain": mask[::-1]})
    make(library, structures=["square"]).calibrate()
    make(library, structures=["stain"]).calibrate()
    stored = {(one.structure, one.recipe) for one in library.calibrations}
    assert stored == {(name, make(library).recipe.digest) for name in ("square", "stain")}
    made = library.calibrations[0].data["provenance"]
    assert made["recipe"]["digest"] == library.calibrations[0].recipe
    assert made["library_digest"] == library.digest
    assert flag_of(library) == "ok"


def alike(library: Library, count: int, seed: int = 0, first: int = 0) -> None:
    rng = np.random.default_rng(seed)
    image, mask = picture(first)
    for _ in range(count):
        library.add(image + rng.normal(0, 3, image.shape), {"square": mask})


def test_a_calibration_survives_exemplars_that_are_like_its_own(
    tmp_path: Path, fake_bundle: Bundle
) -> None:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        query = picture(0)[0] + np.random.default_rng(9).normal(0, 3, (SIZE, SIZE))
        alike(library, 20)
        segmenter = make(library)
        segmenter.calibrate()
        alike(library, 5, seed=1)
        quality = segmenter.segment(query).quality
        assert quality.flag == "ok"
        assert quality.calibrated == {"square": (20, 25)}
        for exemplar in [*library][:3]:
            library.remove(exemplar.key)
        assert segmenter.segment(query).quality.calibrated == {"square": (17, 22)}
        alike(library, 10, seed=2, first=3)  # squares in another corner
        strange = segmenter.segment(query).quality
        assert strange.flag == "uncalibrated"
        assert "of 15 exemplars added since are unlike those" in strange.mend
        segmenter.calibrate()
        assert segmenter.segment(query).quality.calibrated == {"square": (32, 32)}


def test_a_calibration_by_another_process_is_seen(library: Library) -> None:
    library.close()
    reader = Library.open(library.path)
    segmenter = make(reader, structures=["square"])
    assert segmenter.segment(picture(0)[0]).quality.flag == "uncalibrated"
    with Library.open(library.path, mode="write") as writer:
        make(writer, structures=["square"]).calibrate()
    assert segmenter.segment(picture(0)[0]).quality.flag == "ok"


def test_a_rebuilt_library_is_calibrated_anew(library: Library) -> None:
    segmenter = make(library, structures=["square"])
    segmenter.calibrate()
    library.rebuild()
    quality = make(library, structures=["square"]).segment(picture(0)[0]).quality
    assert quality.flag == "uncalibrated"
    assert "encoded anew" in quality.mend
    assert len(library.calibrations) == 1


def test_what_an_older_program_stored_is_kept_and_told(library: Library) -> None:
    old = {"k": 1, "precision": "fp32", "thresholds": {"square": Thresholds(0.1, 0.5, 4).to_json()}}
    text = json.dumps({"digest": library.digest, "data": old})
    library._store.catalog.set_note("calibration", text)
    quality = make(library, structures=["square"]).segment(picture(0)[0]).quality
    assert quality.flag == "uncalibrated"
    assert "an older RecallSeg stored does not say for which settings" in quality.mend
    make(library, structures=["square"]).calibrate()
    assert flag_of(library) == "ok"
    assert library._store.catalog.note("calibration") == text


def test_a_damaged_calibration_is_told(library: Library) -> None:
    segmenter = make(library, structures=["square"])
    segmenter.calibrate()
    [(name, text)] = library._store.catalog.notes("calibration ")
    for damaged in (
        "no JSON",
        "{}",
        text.replace('"iou"', '"dice"'),
        text.replace(": 1,", ": 99,"),
    ):
        library._store.catalog.set_note(name, damaged)
        quality = segmenter.segment(picture(0)[0]).quality
        assert quality.flag == "uncalibrated"
        assert "damaged" in quality.mend
        assert flag_of(library, k=2) == "uncalibrated"  # and others are not stopped by it
    with pytest.raises(LibraryCorruptError, match="recallseg library calibrate"):
        _ = library.calibrations
    segmenter.calibrate()
    assert len(library.calibrations) == 1
    assert flag_of(library) == "ok"


def test_what_calibrating_needs_is_checked_before_the_work(
    library: Library, tmp_path: Path, fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Question, *_: object, **__: object) -> None:
        raise AssertionError("a query was run")

    image, mask = picture(0)
    bare = Library.create(tmp_path / "bare", fake_bundle, engine="fake", keep_sources=False)
    bare.add(image, {"square": mask})
    one = Library.create(tmp_path / "one", fake_bundle, engine="fake")
    one.add(image, {"square": mask})
    library.close()
    reader = Library.open(library.path)
    monkeypatch.setattr(Question, "ask", refuse)
    with pytest.raises(LibraryWriteError, match=r"cannot calibrate: .* open for reading"):
        make(reader).calibrate()
    with pytest.raises(InputError, match="did not keep its images"):
        make(bare).calibrate()
    with pytest.raises(InputError, match="there is 1 of square"):
        make(one).calibrate()


def test_few_exemplars_leave_a_structure_uncalibrated(tmp_path: Path, fake_bundle: Bundle) -> None:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        alike(library, 3)
        thresholds = make(library).calibrate()
        assert thresholds["square"].iou is None
        quality = make(library).segment(picture(0)[0]).quality
        assert quality.flag == "uncalibrated"
        assert "3 exemplars could be left out in turn, 4 are needed" in quality.mend


def test_a_query_unlike_the_library_is_flagged(tmp_path: Path, fake_bundle: Bundle) -> None:
    library = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    rng = np.random.default_rng(0)
    image, mask = picture(0)
    images = [image + rng.normal(0, 3, image.shape) for _ in range(21)]
    for exemplar in images[:-1]:
        library.add(exemplar, {"square": mask})
    segmenter = make(library)
    segmenter.calibrate()
    alike, unlike = images[-1], picture(3)[0]
    assert segmenter.segment(alike).quality.flag == "ok"
    quality = segmenter.segment(unlike).quality
    assert quality.flag == "suspect"
    assert "unlike the library" in quality.reasons["square"][0]


def test_leaving_one_out_never_recalls_the_exemplar_itself(library: Library) -> None:
    segmenter = make(library, structures=["square"], k=4)
    thresholds = segmenter.calibrate()
    dice = thresholds["square"].dice
    assert dice is not None
    assert dice < 0.1  # four squares in four places: the others cannot tell


def of_four_patients(library: Library, *, told: bool) -> None:
    """Three images of each, nearly alike: squares in four places."""
    rng = np.random.default_rng(0)
    for position in range(4):
        image, mask = picture(position)
        for _ in range(3):
            noisy = image + rng.normal(0, 3, image.shape)
            group = f"patient {position}" if told else None
            library.add(noisy, {"square": mask}, group=group)


def test_a_calibration_leaves_out_the_whole_group(tmp_path: Path, fake_bundle: Bundle) -> None:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        of_four_patients(library, told=True)
        segmenter = make(library)
        found = segmenter.calibrate()["square"]
        assert (found.exemplars, found.left_out) == (12, "groups")
        assert found.dice is not None
        assert found.dice < 0.1  # what the same patient's other images know is not asked
        assert found.distance is not None
        near = picture(0)[0] + np.random.default_rng(9).normal(0, 3, (SIZE, SIZE))
        assert found.distance > 10 * segmenter.distance(near)
        quality = segmenter.segment(picture(0)[0]).quality
        assert quality.flag == "ok"
        assert quality.calibrated == {"square": (12, 12)}


def test_a_calibration_by_exemplars_ends_when_groups_are_told(
    tmp_path: Path, fake_bundle: Bundle
) -> None:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        of_four_patients(library, told=False)
        segmenter = make(library)
        found = segmenter.calibrate()["square"]
        assert (found.left_out, found.dice) == ("exemplars", pytest.approx(1.0, abs=0.01))
        query, _ = library.source(next(iter(library)).key)
        assert segmenter.segment(query).quality.flag == "ok"
        # As an older program stored it: without a word on what was left out.
        [(name, text)] = library._store.catalog.notes("calibration ")
        library._store.catalog.set_note(name, text.replace(', "left_out": "exemplars"', ""))
        assert segmenter.segment(query).quality.flag == "ok"
        for i, exemplar in enumerate([*library]):
            library.set_group(exemplar.key, f"patient {i // 3}")
        asked = segmenter.segment(query).quality
        assert asked.flag == "uncalibrated"
        assert "which belong together" in asked.mend
        assert segmenter.calibrate()["square"].left_out == "groups"
        assert segmenter.segment(query).quality.flag == "ok"


def test_one_patient_is_calibrated_by_blocks(tmp_path: Path, fake_bundle: Bundle) -> None:
    with Library.create(tmp_path / "library", fake_bundle, engine="fake") as library:
        image, mask = picture(0)
        rng = np.random.default_rng(0)
        for _ in range(12):
            noisy = image + rng.normal(0, 3, image.shape)
            library.add(noisy, {"square": mask}, group="one")
        assert make(library).calibrate()["square"].left_out == "blocks"
        known, _ = library.source(next(iter(library)).key)
        assert make(library).segment(known).quality.flag == "ok"


def test_more_structures_than_one_call_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.fake_bundle import make_fake_bundle

    bundle = make_fake_bundle(tmp_path / "bundle", max_n=2)
    library = Library.create(tmp_path / "library", bundle, engine="fake")
    image, mask = picture(0)
    names = [f"structure {i}" for i in range(5)]
    library.add(image, dict.fromkeys(names, mask))
    calls: list[int] = []
    attend = View.attend
    monkeypatch.setattr(View, "attend", lambda v: (calls.append(len(v._members)), attend(v)))
    result = make(library).segment(image)
    assert calls == [2, 2, 1]
    for name in names:
        assert_alike(result.masks[name], mask)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 0}, "k must be a whole number from 1 to 32, got 0"),
        ({"k": -1}, "k must be"),
        ({"k": 33}, "from 1 to 32, got 33"),
        ({"k": True}, r"k must be a whole number from 1 to 32, got True \(bool\)"),
        ({"k": "4"}, r"got '4' \(str\)"),
        ({"k": 4.0}, r"got 4.0 \(float\)"),
        ({"frames": 33}, "memories of earlier frames beside k = 1 must be .* from 0 to 31"),
        ({"frames": -1}, "from 0 to 31, got -1"),
        ({"frames": True}, "got True"),
        ({"reach": "3"}, r"reach must be a number of at least 1 .*got '3' \(str\)"),
        ({"tags": {"scanner": "A"}}, "no exemplar of square, stain carries the tag scanner=A"),
        ({"tags": "scanner"}, "tags must map"),
        ({"structures": ["liver"]}, "square, stain"),
        ({"structures": []}, "structures is empty: .* square, stain"),
        ({"structures": "square"}, "list of names"),
        ({"structures": ["square", "square"]}, "distinct"),
        ({"engine": "cuda"}, "no engine 'cuda'"),
        ({"precision": "fp64"}, "no precision"),
        ({"threads": 0}, "threads must be a whole number from 1 to 4096, got 0"),
        ({"threads": "4"}, r"threads must be .* got '4' \(str\)"),
        ({"threads": True}, r"got True \(bool\)"),
        ({"structures": 7}, r"list or tuple of names.* got 7 \(int\)"),
        ({"structures": {"square"}}, r"list or tuple of names.* \(set\)"),
    ],
)
def test_wrong_settings_are_refused(
    library: Library, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        make(library, **settings)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 4)),
        np.zeros((4,)),
        np.zeros((4, 4, 4)),
        np.full((4, 4), np.nan),
        np.full((4, 4), np.inf, np.float32),
        np.zeros((4, 4), complex),
        np.zeros((4, 4), "U1"),
        "image.png",
    ],
)
def test_wrong_images_are_refused(library: Library, image: np.ndarray) -> None:
    with pytest.raises(InputError):
        make(library).segment(image)


def test_an_empty_library_cannot_segment(tmp_path: Path, fake_bundle: Bundle) -> None:
    library = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    with pytest.raises(InputError, match="empty"):
        make(library)


def test_native_kernels_change_no_result(
    library: Library, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "recallseg.engines.pixels._native", kernels)
    segmenters = []
    for choice in ("opencv", "native"):
        monkeypatch.setenv("RECALLSEG_PIXELS", choice)
        model = Model.open(library.bundle, engine="fake")
        segmenters.append(make(library, model=model))
    assert [s.model.pixels.name for s in segmenters] == ["opencv", "native"]
    image = np.random.default_rng(0).integers(0, 4000, (90, 51)).astype(np.uint16)
    expected, found = (segmenter.segment(image) for segmenter in segmenters)
    assert np.array_equal(found.label_map, expected.label_map)
    assert [r.key for r in found.recalled["square"]] == [r.key for r in expected.recalled["square"]]
    first, second = (segmenter.model._buffers for segmenter in segmenters)
    np.testing.assert_allclose(first["embedding"], second["embedding"], atol=1e-6)
    np.testing.assert_array_equal(first["memories"], second["memories"])


def test_a_missed_deadline_is_an_error_and_the_next_query_works(library: Library) -> None:
    segmenter = make(library)
    image, mask = picture(1)
    with pytest.raises(DeadlineError, match="not done in 0 ms"):
        segmenter.segment(image, deadline_ms=0.0)
    for wrong in (-1, math.nan, True, "5"):
        with pytest.raises(InputError, match="deadline_ms must be a number of at least 0 ms"):
            segmenter.segment(image, deadline_ms=wrong)  # type: ignore[arg-type]
    assert_alike(segmenter.segment(image, deadline_ms=60_000.0).masks["square"], mask)


def test_waiting_for_another_call_ends_at_the_deadline(library: Library) -> None:
    segmenter = make(library)
    with ThreadPoolExecutor(1) as other, segmenter.model.turns:
        waiting = other.submit(segmenter.segment, picture(0)[0], deadline_ms=5.0)
        with pytest.raises(DeadlineError, match="waiting for another call"):
            waiting.result()
    segmenter.segment(picture(0)[0], deadline_ms=60_000.0)


def test_results_are_written_where_the_caller_wants_them(library: Library) -> None:
    segmenter = make(library, structures=["square", "stain"])
    image, _ = picture(0)
    expected = segmenter.segment(image)
    label_map = np.full((SIZE, 2 * SIZE), 9, np.uint8)[:, ::2]
    planes = np.ones((2, SIZE, SIZE), np.bool_)
    result = segmenter.segment(image, out=(label_map, planes))
    assert result.label_map is label_map
    np.testing.assert_array_equal(label_map, expected.label_map)
    for plane, mask in zip(planes, expected.masks.values(), strict=True):
        np.testing.assert_array_equal(plane, mask)
    with pytest.raises(InputError, match="out must have shape"):
        segmenter.segment(image, out=(np.zeros((3, 3), np.uint8), None))


def test_what_cannot_be_written_to_is_refused_before_the_work(library: Library) -> None:
    segmenter = make(library, structures=["square", "stain"])
    image, _ = picture(0)
    sealed = np.zeros((2, SIZE, SIZE), np.bool_)
    sealed.flags.writeable = False
    ran: list[str] = []
    run = segmenter.model._run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenter.model, "_run", lambda *of: (ran.append(of[0]), run(*of)))
        for out, words in (
            ((None, sealed), "read-only"),
            ((np.zeros((3, 3), np.uint8), None), "must have shape"),
            ((None, None, None), "must be a pair"),
            (np.zeros((2, SIZE), np.uint8), "must be a pair"),
        ):
            with pytest.raises(InputError, match=words):
                segmenter.segment(image, out=out)
    assert ran == []
    assert segmenter.segment(image).masks["square"].any()


def test_native_operators_are_part_of_what_made_a_result(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(0)[0]
    segmenter = make(library)
    plain = segmenter.segment(image).provenance
    assert plain.operators is None
    built = tmp_path / "_operators.so"
    monkeypatch.setattr("recallseg.engines.operators._LIBRARY", built)
    native = replace(find_precision("fp32"), native=True)
    monkeypatch.setattr("recallseg.runtime.segmenting.question.find_precision", lambda _: native)
    digests = set()
    for content in (b"one build", b"another one"):
        built.write_bytes(content)
        made = segmenter.segment(image).provenance
        assert made.operators == hashlib.sha256(content).hexdigest()
        assert made.to_json()["operators"] == made.operators
        digests.add(made.digest)
    assert len(digests | {plain.digest}) == 3


def test_a_list_of_images_gives_what_each_gives(library: Library, tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", picture(2)[0])
    images = [picture(0)[0], tmp_path / "image.npy", picture(1, colour=True)[0]]
    segmenter, seen = make(library), []
    results = segmenter.segment_many(iter(images), progress=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for image, result in zip(images, results, strict=True):
        np.testing.assert_array_equal(result.label_map, segmenter.segment(image).label_map)
    assert segmenter.segment_many([]) == []


@pytest.mark.parametrize("bad", [np.zeros((3, 4, 4)), "nowhere.png", np.full((4, 4), np.nan)])
def test_a_bad_image_of_a_list_is_named_before_any_is_done(library: Library, bad: Any) -> None:
    done: list[int] = []
    with pytest.raises(InputError, match=r"^images\[1\]: "):
        make(library).segment_many(
            [picture(0)[0], bad, picture(1)[0]], progress=lambda count, _: done.append(count)
        )
    assert not done


@pytest.mark.parametrize("keep_logits", [False, True])
def test_more_results_than_memory_are_told_before_any_is_done(
    library: Library, keep_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = make(library, structures=["square"])
    images = [picture(i % 4)[0] for i in range(6)]
    results = segmenter.segment_many(images, keep_logits=keep_logits)
    taken = sum(
        r.label_map.nbytes
        + r.masks["square"].nbytes
        + (r.logits["square"].nbytes if keep_logits else 0)
        for r in results
    )
    done: list[int] = []
    monkeypatch.setattr(batches, "available_memory", lambda: taken - 1)
    with pytest.raises(HostMemoryError, match=r"results of 6 images .* none was segmented") as told:
        segmenter.segment_many(images, keep_logits=keep_logits, progress=lambda *n: done.append(1))
    assert "MiB" in str(told.value)
    assert not done
    monkeypatch.setattr(batches, "available_memory", lambda: taken)
    assert len(segmenter.segment_many(images, keep_logits=keep_logits)) == 6


@pytest.mark.parametrize("one", ["image.png", Path("image.png"), np.zeros((3, 8, 8), np.uint8)])
def test_one_image_is_no_list(library: Library, one: Any) -> None:
    with pytest.raises(InputError, match="list of images, got one"):
        make(library).segment_many(one)
