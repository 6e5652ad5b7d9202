"""A person corrects: what is said is where it was said, runs little, and becomes an exemplar."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.fake_bundle import make_fake_bundle

from recallseg import Bundle, Library, Model, Segmenter
from recallseg.engines.errors import BundleError, InputError, LibraryWriteError
from recallseg.engines.fake import FakeEngine
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.segmenting.corrections import Corrections

HEIGHT, WIDTH = 96, 160


def picture(left: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> tuple[Any, Any]:
    """A bright bar from column ``left`` on, and its mask."""
    image = np.full(size, 20, np.uint8)
    mask = np.zeros(size, bool)
    mask[:, left : left + 40] = True
    image[mask] = 220
    return image, mask


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake", correct=True)


@pytest.fixture
def library(tmp_path: Path, bundle: Bundle) -> Iterator[Library]:
    with Library.create(
        tmp_path / "library", bundle, engine="fake", intensity=Intensity("range")
    ) as made:
        for left in (0, 40, 80):
            image, mask = picture(left)
            made.add(image, {"bar": mask}, key=str(left))
        yield made


@pytest.fixture
def segmenter(library: Library) -> Segmenter:
    return Segmenter(library, k=1)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graph of every run from now on."""
    names: list[str] = []
    execute = FakeEngine._execute

    def counted(self: FakeEngine, *tensors: Any) -> None:
        names.append(self.spec.name)
        execute(self, *tensors)

    monkeypatch.setattr(FakeEngine, "_execute", counted)
    return names


def centre(mask: NDArray[np.bool_]) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.mean()), float(rows.mean())


# What a correction does


def test_a_session_begins_with_what_the_segmenter_proposes(segmenter: Segmenter) -> None:
    image, _ = picture(40)
    session = segmenter.correct(image)
    assert session.proposal == segmenter.segment(image)
    assert session.result == session.proposal
    assert session.result.corrections == {}


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("place", [(10.0, 80.0), (140.0, 10.0), (60.0, 48.0)])
def test_a_click_changes_the_mask_where_it_was_made(
    segmenter: Segmenter, place: tuple[float, float], inside: bool
) -> None:
    image, _ = picture(40)
    session = segmenter.correct(image)
    before = session.result.masks["bar"]
    after = session.click("bar", *place, inside=inside).masks["bar"]
    x, y = (int(value) for value in place)
    assert after[y, x] == inside
    changed = after ^ before
    if changed.any():  # near the click, of which the stand-in speaks for a quarter of the side
        far = np.hypot(*(np.array(centre(changed)) - place) / (WIDTH, HEIGHT))
        assert far < 0.15


def test_points_add_up_and_the_mask_before_is_given_too(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    execute = FakeEngine._correct

    def looked_at(self: FakeEngine, inputs: Any, outputs: Any) -> None:
        given.append({name: np.copy(array) for name, array in inputs.items()})
        execute(self, inputs, outputs)

    monkeypatch.setattr(FakeEngine, "_correct", looked_at)
    image, _ = picture(40)
    session = segmenter.correct(image)
    proposed = segmenter.logits()[0]
    session.click("bar", 0, 0)
    session.click("bar", WIDTH - 1, HEIGHT - 1, inside=False)
    first, second = given
    # Centres of the first and last pixel, in the network's 64 x 64 pixels.
    corner = (0.5 * 64 / WIDTH - 0.5, 0.5 * 64 / HEIGHT - 0.5)
    other = (63 - corner[0], 63 - corner[1])
    assert np.allclose(first["points"], [[corner]])
    assert np.allclose(second["points"], [[corner, other]])
    assert second["point_labels"].tolist() == [[1, 0]]
    assert first["has_prior"][0]
    assert np.array_equal(first["prior"][0, 0], proposed)
    assert second["has_prior"][0]
    assert not np.array_equal(second["prior"], first["prior"])
    assert np.array_equal(first["conditioned"], second["conditioned"])


def test_a_click_wears_down_what_was_proposed_no_more_than_by_half(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder answers with the other half of the image; the click asked for one place."""
    answer = np.full((16, 16), -1.0, np.float32)
    answer[:, :2] = 1.0

    def other(self: FakeEngine, inputs: Any, outputs: Any) -> None:
        self._decode(inputs, outputs)
        outputs["logits"][0] = answer

    monkeypatch.setattr(FakeEngine, "_correct", other)
    image, _ = picture(40)
    session = segmenter.correct(image)
    proposed = segmenter.logits()[0]
    session.click("bar", 2, HEIGHT / 2)
    mixed = session.result.logits["bar"]
    row = np.flatnonzero(mixed[:, 0] == 1.0)
    assert 0 < len(row) < 16, "round the click the answer holds, and not far from it"
    assert np.array_equal(mixed[:, 8:], (proposed[:, 8:] + answer[:, 8:]) / 2)
    session.click("new", 2, HEIGHT / 2)  # of which nothing is recalled
    assert np.array_equal(session.result.logits["new"], answer)
    session.click("new", 3, HEIGHT / 2)
    assert np.array_equal(session.result.logits["new"], answer)


def test_a_correction_is_one_decode_and_accepting_one_memorize(
    segmenter: Segmenter, ran: list[str]
) -> None:
    image, _ = picture(40)
    session = segmenter.correct(image)
    assert ran.count("encode") == ran.count("embed") == 1
    for act in (
        lambda: session.click("bar", 5, 5),
        lambda: session.box("bar", 0, 0, 50, 50),
        lambda: session.scribble("bar", [(3, 3), (60, 60)], inside=False),
        lambda: session.lasso("bar", [(10, 10), (90, 10), (50, 80)]),
        lambda: session.lasso("bar", [(10, 10), (40, 10), (20, 40)], inside=False),
        lambda: session.click("new", 9, 9),
    ):
        del ran[:]
        act()
        assert ran == ["correct"]
    del ran[:]
    session.draw("bar", np.ones((HEIGHT, WIDTH), bool))
    session.undo()
    assert session.result.masks
    assert ran == []
    session.accept(key="corrected")
    assert ran == ["memorize"]


def test_another_clients_image_in_between_costs_no_graph(
    segmenter: Segmenter, ran: list[str]
) -> None:
    sessions = [segmenter.correct(picture(left)[0]) for left in (0, 80)]
    alone = segmenter.correct(picture(0)[0]).click("bar", 100, 50)
    for _ in range(2):
        del ran[:]
        results = [session.click("bar", 100, 50) for session in sessions]
        assert ran == ["correct", "correct"]
        [session.undo() for session in sessions]
    assert results[0] == alone
    assert results[1] != alone


def test_an_image_that_was_dropped_is_encoded_anew_and_gives_the_same(
    tmp_path: Path, bundle: Bundle, ran: list[str]
) -> None:
    with (
        Model.open(bundle, engine="fake", keep_bytes=20_000) as model,
        Library.create(tmp_path / "one", bundle, model=model) as library,
    ):
        image, mask = picture(40)
        library.add(image, {"bar": mask})
        segmenter = Segmenter(library, k=1, model=model)
        first = segmenter.correct(image)
        expected = first.click("bar", 3, 3)
        first.undo()
        others = [segmenter.correct(picture(0)[0]) for _ in range(4)]
        del ran[:]
        assert first.click("bar", 3, 3) == expected
        assert ran.count("encode") == 1
        assert model.nbytes < 10**6
        del others


def test_a_library_that_changed_before_an_image_is_encoded_anew_is_told(
    tmp_path: Path, bundle: Bundle
) -> None:
    """A click goes by the library as it is then, and what was proposed stays what it was."""
    with (
        Model.open(bundle, engine="fake", keep_bytes=20_000) as model,
        Library.create(tmp_path / "one", bundle, model=model) as library,
    ):
        image, mask = picture(40)
        library.add(image, {"bar": mask, "edge": ~mask}, key="first")
        segmenter = Segmenter(library, k=1, model=model)
        session = segmenter.correct(image)
        proposal = session.proposal
        assert proposal is not None
        library.add(image, {"bar": ~mask, "edge": mask, "a third": mask}, key="second")
        library.retire(["first"])
        [segmenter.correct(picture(0)[0]) for _ in range(4)]
        result = session.click("bar", 3, 3)
        assert result.provenance.library_digest == library.digest
        assert result.recalled["bar"][0].key == "second"
        assert result.recalled["edge"] == proposal.recalled["edge"]
        assert result.quality.flag == "suspect"
        assert "before the library was changed" in result.quality.reasons["edge"][0]
        assert np.array_equal(result.masks["edge"], proposal.masks["edge"])
        assert session.click("a third", 3, 3).recalled["a third"] == ()
        assert session.reset() == proposal


def test_undo_goes_back_one_by_one_and_reset_to_the_proposal(segmenter: Segmenter) -> None:
    session = segmenter.correct(picture(40)[0])
    seen = [session.result]
    seen.append(session.click("bar", 5, 5))
    seen.append(session.box("new", 10, 10, 50, 50))
    seen.append(session.draw("bar", np.eye(HEIGHT, WIDTH, dtype=bool)))
    seen.append(session.lasso("bar", [(0, 0), (60, 0), (60, 60)]))
    for expected in seen[-2::-1]:
        assert session.undo() == expected
    with pytest.raises(InputError, match="no correction"):
        session.undo()
    session.click("bar", 5, 5)
    session.click("new", 5, 5)
    session.reset("new")
    assert session.structures == ("bar",)
    assert session.corrections == {"bar": 1}
    assert session.reset() == session.proposal


def test_a_box_begins_anew_whatever_was_there(segmenter: Segmenter) -> None:
    session = segmenter.correct(picture(40)[0])
    session.click("bar", 150, 90)
    found = session.box("bar", 20, 70, 80, 30).masks["bar"]  # corners in any order
    rows, columns = np.nonzero(found)
    assert abs(columns.min() - 20) < 10
    assert abs(columns.max() - 80) < 10
    assert abs(rows.min() - 30) < 7
    assert abs(rows.max() - 70) < 7


def test_what_is_drawn_is_kept_to_the_pixel_and_wins(segmenter: Segmenter) -> None:
    session = segmenter.correct(picture(40)[0])
    drawn = np.zeros((HEIGHT, WIDTH), bool)
    drawn[13:17, 45:111] = True
    result = session.draw("thread", drawn)
    assert np.array_equal(result.masks["thread"], drawn)
    assert (result.label_map[drawn] == result.labels["thread"]).all()
    assert not (result.label_map[~drawn] == result.labels["thread"]).any()
    empty = session.draw("thread", np.zeros((HEIGHT, WIDTH), np.uint8))
    assert not empty.masks["thread"].any()
    assert not empty.scores["thread"].present


def test_what_is_drawn_leaves_no_hole_among_the_others(segmenter: Segmenter) -> None:
    """A pixel that some mask covers has a label, also round what was drawn."""
    session = segmenter.correct(picture(40)[0])
    session.box("other", 0, 0, WIDTH - 1, HEIGHT - 1)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    result = session.draw("disc", np.hypot(rows - 40, columns - 75) < 18.5)
    covered = np.logical_or.reduce(list(result.masks.values()))
    assert np.array_equal(result.label_map > 0, covered)


def test_one_structure_too_many_is_told_and_changes_nothing(segmenter: Segmenter) -> None:
    session = segmenter.correct(picture(40)[0])
    nothing = np.zeros((HEIGHT, WIDTH), bool)
    for index in range(254):
        session._states[f"s{index}"] = session._states["bar"]
    before = session.result
    with pytest.raises(InputError, match="255 structures already"):
        session.draw("one more", nothing)
    assert session.result is before
    with pytest.raises(InputError, match="no correction"):
        session.undo()
    session.draw("bar", nothing)


def test_a_scribble_stands_for_a_few_points_along_it(segmenter: Segmenter) -> None:
    session = segmenter.correct(picture(0)[0])
    stroke = [(x, 50.0) for x in np.linspace(60, 150, 500)]
    found = session.scribble("bar", stroke).masks["bar"]
    assert found[50, 65:145].all()
    gone = session.scribble("bar", stroke, inside=False).masks["bar"]
    assert not gone[50, 65:145].any()


def test_more_points_than_one_call_takes_are_left_to_the_mask_before(
    segmenter: Segmenter,
) -> None:
    session = segmenter.correct(picture(40)[0])
    for index in range(40):
        result = session.click("bar", 4 * index, 50)
    assert result.corrections == {"bar": 40}
    assert result.masks["bar"][50, 1]


# What is unknown


def test_an_empty_library_learns_from_what_is_corrected(tmp_path: Path, bundle: Bundle) -> None:
    with Library.create(tmp_path / "empty", bundle, engine="fake") as library:
        image, _mask = picture(40)
        session = Corrections(library, image)
        assert session.proposal is None
        assert session.result.masks == {}
        assert session.result.label_map.shape == image.shape
        session.lasso("bar", [(40, 0), (79, 0), (79, 95), (40, 95)])
        result = session.result
        assert result.recalled == {"bar": ()}
        assert result.available == {"bar": 0}
        assert result.provenance.graphs.keys() == {"embed", "encode", "correct"}
        assert result.to_json()["corrections"] == {"bar": 1}
        key = session.accept()
        assert library.structures == ("bar",)
        stored, masks = library.source(key)
        assert np.array_equal(stored, image)
        assert np.array_equal(masks["bar"], result.masks["bar"])
        proposal = Segmenter(library, k=1).correct(image).proposal
        assert proposal is not None
        assert proposal.recalled["bar"][0].key == key


def test_a_new_structure_joins_the_proposed_ones(segmenter: Segmenter) -> None:
    session = segmenter.correct(picture(40)[0])
    result = session.box("other", 100, 10, 150, 50)
    assert dict(result.labels) == {"bar": 1, "other": 2}
    assert result.scores["bar"] == session.proposal.scores["bar"]  # type: ignore[union-attr]
    assert result.recalled["other"] == ()
    assert result.provenance.structures == ("bar", "other")
    assert pickle.loads(pickle.dumps(result)) == result


def test_where_nothing_is_recalled_features_are_offset_by_what_the_manifest_says(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    execute = FakeEngine._correct

    def looked_at(self: FakeEngine, inputs: Any, outputs: Any) -> None:
        seen.append(np.copy(inputs["conditioned"]))
        execute(self, inputs, outputs)

    monkeypatch.setattr(FakeEngine, "_correct", looked_at)
    session = segmenter.correct(picture(40)[0])
    session.click("new", 5, 5)
    features = segmenter.model._fetch(segmenter.model._buffers["features"])
    assert np.array_equal(seen[0], features + np.float32(0.5))  # no_memory of the stand-in


# Accepting


def test_the_accepted_memory_is_the_one_that_adding_would_make(
    tmp_path: Path, library: Library, segmenter: Segmenter, bundle: Bundle
) -> None:
    image, _ = picture(60)
    session = segmenter.correct(image)
    session.click("bar", 150, 50)
    key = session.accept(tags={"by": "hand"})
    with Library.create(
        tmp_path / "other", bundle, engine="fake", intensity=library.intensity
    ) as other:
        added = other.add(image, {"bar": session.result.masks["bar"]})
        for one, two in zip(
            (library.embeddings("bar")[1][-1],), (other.embeddings("bar")[1][0],), strict=True
        ):
            assert np.array_equal(one, two)
        g = bundle.geometry
        found = []
        for each, name in ((library, key), (other, added)):
            tokens = np.empty((1, g.tokens, g.memory_dim), np.float32)
            pointers = np.empty((1, g.channels), np.float32)
            each.gather(each.memories([name], "bar"), tokens, pointers)
            found.append((tokens, pointers))
        assert np.array_equal(found[0][0], found[1][0])
        assert np.array_equal(found[0][1], found[1][1])
    assert library.get(key).tags == {"by": "hand"}


def test_another_rule_for_intensities_is_encoded_by_that_rule(
    tmp_path: Path, segmenter: Segmenter, bundle: Bundle, ran: list[str]
) -> None:
    session = segmenter.correct(picture(40)[0])
    other = Intensity("window", -100, 400)
    with Library.create(tmp_path / "ct", bundle, engine="fake", intensity=other) as target:
        del ran[:]
        key = session.accept(target)
        assert ran.count("encode") == 1
        assert key in target


def test_absent_structures_are_recorded_as_absent(library: Library, segmenter: Segmenter) -> None:
    session = segmenter.correct(picture(40)[0])
    session.draw("bar", np.zeros((HEIGHT, WIDTH), bool))
    key = session.accept()
    assert library.get(key).absent == ("bar",)


def test_what_cannot_be_accepted_is_told_and_nothing_is_stored(
    library: Library, segmenter: Segmenter, bundle: Bundle, tmp_path: Path
) -> None:
    session = segmenter.correct(picture(40)[0])
    before = len(library)
    with pytest.raises(InputError, match="'liver' is none of them"):
        session.accept(structures=["liver"])
    with pytest.raises(InputError, match="none was named"):
        session.accept(structures=[])
    with Library.open(library.path) as reading, pytest.raises(LibraryWriteError):
        session.accept(reading)
    assert len(library) == before


# Mistakes


@pytest.mark.parametrize(
    "place",
    [(-0.6, 5), (WIDTH, 5), (5, HEIGHT - 0.4), (np.nan, 5), (5, np.inf), ("left", 1), (True, 1)],
)
def test_a_place_outside_of_the_image_is_told_with_its_limits(
    segmenter: Segmenter, place: tuple[Any, Any]
) -> None:
    session = segmenter.correct(picture(40)[0])
    for act in (
        lambda: session.click("bar", *place),
        lambda: session.box("bar", 1, 1, *place),
        lambda: session.scribble("bar", [(1, 1), place]),
        lambda: session.lasso("bar", [(1, 1), (9, 9), place]),
    ):
        with pytest.raises(InputError, match=r"x -0.5 to 159.5 and y -0.5 to 95.5"):
            act()
    assert session.result == session.proposal


def test_other_mistakes(segmenter: Segmenter) -> None:
    session = segmenter.correct(picture(40)[0])
    with pytest.raises(InputError, match="has an area"):
        session.box("bar", 5, 5, 5, 9)
    with pytest.raises(InputError, match="takes 3 places"):
        session.lasso("bar", [(1, 1), (2, 2)])
    with pytest.raises(InputError, match="holds no pixel"):
        session.lasso("bar", [(159.5, 95.5)] * 3)  # the last corner
    with pytest.raises(InputError, match="takes 1 places"):
        session.scribble("bar", [])
    with pytest.raises(InputError, match="list of"):
        session.scribble("bar", [1, 2, 3])  # type: ignore[list-item]
    with pytest.raises(InputError, match="own grid"):
        session.draw("bar", np.zeros((5, 5), bool))
    with pytest.raises(InputError, match="name"):
        session.click("", 5, 5)
    with pytest.raises(InputError, match="no structure 'liver'"):
        session.reset("liver")
    assert session.result == session.proposal


def test_a_bundle_without_the_graph_is_told_before_the_work(
    tmp_path: Path, fake_bundle: Bundle, ran: list[str]
) -> None:
    with (
        Library.create(tmp_path / "library", fake_bundle, engine="fake") as library,
        pytest.raises(BundleError, match="without the graph 'correct'"),
    ):
        Corrections(library, picture(0)[0])
    assert ran == []


def test_threads_that_correct_do_not_disturb_each_other(segmenter: Segmenter) -> None:
    places = [(10 * i % WIDTH, 7 * i % HEIGHT) for i in range(12)]
    expected = [segmenter.correct(picture(40)[0]).click("bar", *place) for place in places]
    sessions = [segmenter.correct(picture(40)[0]) for _ in places]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda s, p: s.click("bar", *p), sessions, places)
        assert [*found] == expected
