"""Drafts: what prompts come to on a volume's grid, and that every step can be taken back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle

from recallseg import Library, Segmenter
from recallseg.engines.errors import InputError, LibraryWriteError
from recallseg.engines.verification import mask_dice
from recallseg.runtime.formats.volume import SPACING_TAG, Volume
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.http.cuts import outline_of, scribble_points, stack
from recallseg.runtime.services.http.desk import Desk
from recallseg.runtime.services.http.drafts import MOST_SLICES, Draft
from recallseg.runtime.services.http.export import export
from recallseg.runtime.services.http.limits import Budget, RefusedError
from recallseg.runtime.services.http.messages import ImageMeta, read_meta
from recallseg.runtime.services.http.prompts import CancelledError, Place, Prompt
from recallseg.runtime.volumes.corrections import VolumeCorrections

HEIGHT, WIDTH = 96, 160


def picture(left: int) -> tuple[Any, Any]:
    """A bright bar from column ``left`` on, and its mask."""
    image = np.full((HEIGHT, WIDTH), 20, np.uint8)
    image[:, left : left + 40] = 220
    return image, image > 100


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    bundle = make_fake_bundle(tmp_path / "bundle", correct=True)
    rule = Intensity("range")
    with Library.create(tmp_path / "library", bundle, engine="fake", intensity=rule) as library:
        for left in (0, 40, 80):
            image, mask = picture(left)
            library.add(image, {"bar": mask}, key=str(left))
        yield Desk(
            library, AuditLog(tmp_path / "audit.jsonl"), lambda *a, **k: Segmenter(*a, k=1, **k)
        )


@pytest.fixture
def budget() -> Budget:
    return Budget(10_000_000)


@pytest.fixture
def draft(desk: Desk, budget: Budget) -> Iterator[Draft]:
    volume = np.stack([picture(20 + index)[0] for index in range(5)])
    made = Draft(stack(volume), desk, budget)
    yield made
    made.close()
    assert budget.taken == 0


def click(draft: Draft, x: float, y: float, index: int = 2, name: str = "bar") -> Any:
    return draft.prompt(Prompt("click", name, Place(0, index), ((x, y),)))


def test_each_step_is_taken_back_by_one_undo(draft: Draft) -> None:
    states = [draft.mask("bar", Place(0, 2)).copy()]
    click(draft, 130, 50)
    states.append(draft.mask("bar", Place(0, 2)).copy())
    draft.paint("bar", Place(0, 2), np.ones((4, 5), bool), 100, 10, True)
    states.append(draft.mask("bar", Place(0, 2)).copy())
    assert states[-1][10:14, 100:105].all()
    click(draft, 10, 10)
    assert draft.counts["bar"] == {"click": 2, "brush": 1}
    for state in reversed(states):
        change = draft.undo()
        assert change is not None
        assert (draft.mask("bar", Place(0, 2)) == state).all()
    assert draft.undo() is None
    assert draft.counts["bar"]["undo"] == 3


def test_a_click_goes_on_from_what_was_painted(draft: Draft, desk: Desk) -> None:
    draft.paint("bar", Place(0, 2), np.ones((60, 30), bool), 100, 20, True)
    painted = draft.mask("bar", Place(0, 2)).copy()
    click(draft, 5, 5)
    alone = desk.correct(draft.picture(Place(0, 2)))
    alone.draw("bar", painted)
    assert (draft.mask("bar", Place(0, 2)) == alone.click("bar", 5, 5).masks["bar"]).all()


def test_steps_of_a_slice_that_is_not_kept_ready_any_more_are_taken_back(
    desk: Desk, budget: Budget
) -> None:
    array = np.stack([picture(20 + index)[0] for index in range(MOST_SLICES + 4)])
    draft = Draft(stack(array), desk, budget)
    states = []
    for x, index in [(130, 2), (10, 2), *((130, i) for i in range(3, len(array))), (150, 2)]:
        states.append(draft.masks["bar"].copy() if draft.masks else np.zeros(array.shape, bool))
        click(draft, x, 50, index)
    for state in reversed(states):
        draft.undo()
        assert (draft.masks["bar"] == state).all()
    draft.close()


def test_a_click_corrects_the_proposal_that_is_seen(draft: Draft, desk: Desk) -> None:
    """Also if the library has changed since, and would propose another mask."""
    assert draft.propose()
    seen = draft.mask("bar", Place(0, 2)).copy()
    library = desk.library
    for key in [one.key for one in library]:
        image, masks = library.source(key)
        library.add(image, {"bar": ~masks["bar"]}, key=f"other {key}")
        library.retire([key])
    alone = desk.correct(draft.picture(Place(0, 2)))
    assert not (alone.result.masks["bar"] == seen).all()
    alone.draw("bar", seen)
    click(draft, 5, 5)
    assert (draft.mask("bar", Place(0, 2)) == alone.click("bar", 5, 5).masks["bar"]).all()


def test_a_volume_of_another_scale_is_told_as_segmenting_does(desk: Desk, budget: Budget) -> None:
    for one in desk.library:
        desk.library.retag(one.key, {SPACING_TAG: "1x1"})
    volume = Volume(np.stack([picture(20)[0]] * 2), np.diag([9.0, 4.0, 4.0, 1.0]), "LPS")
    draft = Draft(volume, desk, budget)
    assert draft.propose()
    assert "another scale" in draft.proposals[0].quality.reasons["bar"][0]
    draft.close()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("patient", [False, True])
def test_a_picture_is_exported_with_its_rows_and_columns(
    desk: Desk, budget: Budget, axis: int, patient: bool
) -> None:
    array = np.expand_dims(picture(20)[0], axis)
    volume = Volume(array, np.diag([-1.0, -1, 1, 1]), "RAS") if patient else stack(array)
    draft = Draft(volume, desk, budget)
    seen = draft.picture(Place(axis, 0))
    draft.paint("bar", Place(axis, 0), seen > 100, 0, 0, True)
    name, data = export(draft)
    assert name == "mask.png"
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(found > 0, (array[0] if axis == 0 else seen) > 100)
    draft.close()


def test_prompts_that_wait_are_run_together_or_taken_back(draft: Draft) -> None:
    for index in (1, 3):
        prompt = Prompt("click", "bar", Place(0, index), ((30.0, 40.0),))
        assert draft.prompt(prompt, run=False) is None
    assert draft.waits
    assert not draft.masks["bar"].any()
    draft.undo()
    with draft.one_step():
        (change,) = draft.run_waiting()
    assert change.box is not None
    assert change.box[0] == (1, 2)
    assert not draft.waits
    draft.undo()
    assert not draft.masks["bar"].any()


def test_what_is_spread_stops_half_way_to_the_next_that_was_corrected(draft: Draft) -> None:
    for index in (0, 4):
        click(draft, 130, 50, index)
    kept = [draft.mask("bar", Place(0, index)).copy() for index in (0, 4)]
    draft.spread("bar")
    for index, mask in zip((0, 4), kept, strict=True):
        assert (draft.mask("bar", Place(0, index)) == mask).all()
    assert all(draft.mask("bar", Place(0, index)).any() for index in (1, 2, 3))
    draft.undo()
    assert [bool(draft.mask("bar", Place(0, i)).any()) for i in (1, 2, 3)] == [False] * 3


def test_what_is_new_is_spread_as_well(draft: Draft, desk: Desk) -> None:
    assert "lesion" not in desk.structures
    draft.paint("lesion", Place(0, 2), np.ones((60, 80), bool), 60, 20, True)
    draft.spread("lesion")
    given = draft.mask("lesion", Place(0, 2))
    for index in range(5):
        assert mask_dice(draft.mask("lesion", Place(0, index)), given) > 0.5


def test_spreading_is_what_a_corrected_volume_does(draft: Draft, desk: Desk) -> None:
    draft.paint("bar", Place(0, 1), np.ones((60, 80), bool), 60, 20, True)
    draft.paint("bar", Place(0, 4), np.ones((40, 40), bool), 20, 30, True)
    session = VolumeCorrections(desk.library, draft.volume, segmenter=desk.segmenter())
    for index in (1, 4):
        session.at(index).draw("bar", draft.mask("bar", Place(0, index)))
    draft.spread("bar")
    assert np.array_equal(session.propagate().masks["bar"], draft.masks["bar"])


def test_a_spread_that_is_cancelled_keeps_what_it_did(draft: Draft) -> None:
    draft.paint("bar", Place(0, 2), np.ones((60, 80), bool), 60, 20, True)
    told: list[Any] = []
    check = draft._check_cancelled

    def checked() -> None:
        told.append(draft.progress)
        if len(told) == 2:
            draft.cancel()
        check()

    draft._check_cancelled = checked  # type: ignore[method-assign]
    with pytest.raises(CancelledError):
        draft.spread("bar")
    assert told == [(1, 4), (2, 4)]
    assert draft.progress is None
    assert [bool(draft.mask("bar", Place(0, i)).any()) for i in range(5)] == [
        *(False, False, True, True, True)
    ]
    draft.undo()
    assert not draft.mask("bar", Place(0, 3)).any()


def test_where_no_corrected_slice_shows_it_nothing_is_carried_on(draft: Draft) -> None:
    assert draft.propose()
    before = draft.masks["bar"].copy()
    draft.paint("bar", Place(0, 2), np.ones((HEIGHT, WIDTH), bool), 0, 0, False)
    assert draft.spread("bar").box is None
    assert (draft.masks["bar"][[0, 1, 3, 4]] == before[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_a_voxel_and_its_place_on_the_screen_are_the_same(
    desk: Desk, budget: Budget, flips: tuple[int, int, int]
) -> None:
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    volume = Volume(array, np.diag([*flips, 1.0]), "RAS")
    draft = Draft(volume, desk, budget)
    assert sorted(draft.cuts) == [0, 1, 2]
    for axis in draft.cuts:
        for voxel in ((0, 0, 0), (4, 5, 6), (1, 2, 3)):
            place = draft.place_of(voxel, axis)
            x, y = draft.point_of(voxel, place)
            assert draft.picture(place)[int(y), int(x)] == array[voxel]
            change = draft.paint("dot", place, np.ones((1, 1), bool), int(x), int(y), True)
            assert change.box == tuple((at, at + 1) for at in voxel)
            assert np.argwhere(draft.masks["dot"]).tolist() == [list(voxel)]
            draft.undo()
    draft.close()


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt("click", "bar", Place(0, 2), ((160.0, 3.0),)),
        Prompt("click", "bar", Place(0, 2), ((3.0, -1.0),)),
        Prompt("click", "bar", Place(0, 5), ((3.0, 3.0),)),
        Prompt("click", "bar", Place(3, 0), ((3.0, 3.0),)),
        Prompt("click", "", Place(0, 0), ((3.0, 3.0),)),
        Prompt("click", "bar", Place(0, 0), ()),
        Prompt("box", "bar", Place(0, 0), ((3.0, 3.0),)),
        Prompt("lasso", "bar", Place(0, 0), ((3.0, 3.0), (4.0, 4.0))),
    ],
)
def test_what_is_no_prompt_changes_nothing(draft: Draft, prompt: Prompt) -> None:
    with pytest.raises(InputError):
        draft.prompt(prompt)
    assert not draft.can_undo
    assert not any(mask.any() for mask in draft.masks.values())
    click(draft, 30, 40)


def test_what_it_takes_comes_from_the_budget(desk: Desk) -> None:
    budget = Budget(HEIGHT * WIDTH * 2)
    draft = Draft(stack(picture(5)[0][None]), desk, budget)
    click(draft, 10, 10, 0)
    with pytest.raises(RefusedError, match="clients hold"):
        click(draft, 10, 10, 0, name="another")
    draft.close()
    draft.close()
    assert budget.taken == 0


def test_who_accepts_and_after_how_many_corrections(draft: Draft, desk: Desk) -> None:
    assert draft.propose()
    click(draft, 130, 50, 1)
    click(draft, 131, 50, 1)
    draft.undo()
    keys = desk.accept(draft, "ada", ["bar"], absent=["cyst"])
    assert len(keys) == 1, "only the slice that was corrected"
    assert desk.library[keys[0]].absent == ("cyst",)
    assert (desk.library.source(keys[0])[0] == draft.picture(Place(0, 1))).all()
    (line,) = desk.audit.path.read_text().splitlines()
    entry = json.loads(line)
    assert (entry["who"], entry["exemplars"]) == ("ada", keys)
    assert entry["corrections"]["bar"] == {"click": 2, "undo": 1}
    assert entry["proposal"]["slices"] == 5
    assert entry["proposal"]["recalled"]["bar"]
    assert entry["proposal"]["provenance"]
    with pytest.raises(RefusedError, match="no pixel of cyst"):
        desk.accept(draft, "ada", [], absent=["cyst"])


def test_slices_of_one_volume_belong_together(draft: Draft, desk: Desk, budget: Budget) -> None:
    def groups() -> list[str]:
        return [*desk.library.heads.groups().values()]

    click(draft, 130, 50, 1)
    click(draft, 130, 50, 3)
    assert len(desk.accept(draft, "ada", ["bar"])) == 2
    assert len(groups()) == 2
    again = Draft(draft.volume, desk, budget)
    click(again, 130, 50, 2)
    desk.accept(again, "ada", ["bar"])
    again.close()
    assert len(groups()) == 3
    assert len({*groups()}) == 1, "as often as it is opened"
    single = Draft(stack(picture(5)[0][None]), desk, budget)
    click(single, 130, 50, 0)
    desk.accept(single, "ada", ["bar"])
    single.close()
    assert len(groups()) == 3, "of a picture nobody is known"


def test_a_bundle_that_cannot_correct_says_so(tmp_path: Path, budget: Budget) -> None:
    bundle = make_fake_bundle(tmp_path / "bundle")
    with Library.create(tmp_path / "library", bundle, engine="fake") as library:
        desk = Desk(library, AuditLog(tmp_path / "audit.jsonl"))
        draft = Draft(stack(picture(5)[0][None]), desk, budget)
        with pytest.raises(RefusedError, match="has no graph that corrects"):
            click(draft, 10, 10, 0)
        assert not draft.propose(), "of an empty library there is nothing to propose"
        draft.close()


def test_what_was_drawn_becomes_points() -> None:
    ring = np.zeros((50, 60), bool)
    ring[10, 10:40] = ring[30, 10:40] = ring[10:31, 10] = ring[10:31, 39] = True
    outline = np.array(outline_of(ring))
    assert (outline.min(0).tolist(), outline.max(0).tolist()) == ([10, 10], [39, 30])
    points = scribble_points(ring)
    assert len(points) == len({*points}) > 5
    assert all(ring[int(y), int(x)] for x, y in points)
    assert scribble_points(np.zeros((5, 5), bool)) == ()


def test_a_draft_whose_session_cannot_be_closed_gives_its_bytes_back(
    desk: Desk, budget: Budget
) -> None:
    made = Draft(stack(picture(20)[0][None]), desk, budget)
    session = desk.correct(made.picture(Place(0, 0)))

    def broken() -> None:
        raise RuntimeError("the device is lost")

    session.close = broken  # type: ignore[method-assign]
    made._sessions[Place(0, 0)] = session
    assert budget.taken
    with pytest.raises(RuntimeError):
        made.close()
    assert budget.taken == 0


@pytest.mark.parametrize("text", ['{"a": ' + "1" * 5000 + "}", "[" * 100_000, "{"])
def test_a_header_that_is_no_json_is_no_defect(text: str) -> None:
    request: Any = SimpleNamespace(headers={"x-meta": text})
    with pytest.raises(InputError, match="X-Meta is no JSON"):
        read_meta(request, ImageMeta)


def test_exemplars_that_could_not_be_retired_are_at_the_next_accept(
    desk: Desk, budget: Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both would be in use, and nothing would say so."""
    draft = Draft(stack(picture(20)[0][None]), desk, budget)
    draft.paint("bar", Place(0, 0), np.ones((60, 30), bool), 100, 20, True)
    first = desk.accept(draft, "ada", ["bar"])

    def full(*_: object) -> None:
        raise LibraryWriteError("there is no room")

    draft.paint("bar", Place(0, 0), np.ones((9, 9), bool), 10, 20, True)
    with monkeypatch.context() as patched:
        patched.setattr(desk.library, "retire", full)
        with pytest.raises(LibraryWriteError):
            desk.accept(draft, "ada", ["bar"])
    events = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "retire-failed"
    assert events[-1]["exemplars"] == first
    draft.paint("bar", Place(0, 0), np.ones((5, 5), bool), 50, 50, True)
    last = desk.accept(draft, "ada", ["bar"])
    assert {one.key for one in desk.library} == {"0", "40", "80", *last}
    draft.close()
