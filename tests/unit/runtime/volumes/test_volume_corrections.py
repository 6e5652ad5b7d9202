"""Slices that a person corrected are spread through a volume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_bundle import make_fake_bundle

from recallseg import Bundle, Library, Segmenter, Volume
from recallseg.engines.errors import InputError
from recallseg.engines.fake import FakeEngine
from recallseg.engines.verification import mask_dice
from recallseg.runtime.formats.volume import SPACING_TAG
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.volumes.corrections import VolumeCorrections
from recallseg.runtime.volumes.slices import segment_volume
from recallseg.runtime.volumes.spreading import NEAREST, Spreading, half_way

SIDE, DEPTH = 64, 9


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake", correct=True)


@pytest.fixture
def library(tmp_path: Path, bundle: Bundle) -> Iterator[Library]:
    with Library.create(
        tmp_path / "library", bundle, engine="fake", intensity=Intensity("range")
    ) as made:
        yield made


@pytest.fixture
def volume() -> Volume:
    array = np.full((SIDE, SIDE, DEPTH), 20, np.uint8)
    array[16:48, 16:48] = 200
    return Volume(array, np.diag([1.0, 1.0, 3.0, 1.0]), "patient")


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The memories of every call of ``attend``, by structure and memory: mean coverage."""
    seen: list[Any] = []
    execute = FakeEngine._attend

    def noted(self: FakeEngine, inputs: Any, outputs: Any) -> None:
        seen.append(inputs["memories"].mean(axis=(2, 3)).tolist())
        execute(self, inputs, outputs)

    monkeypatch.setattr(FakeEngine, "_attend", noted)
    return seen


def square() -> Any:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[16:48, 16:48] = True
    return mask


def test_one_corrected_slice_is_spread_without_any_library(
    library: Library, volume: Volume
) -> None:
    session = VolumeCorrections(library, volume)
    session.at(4).draw("square", square())
    told = []
    found = session.propagate(progress=lambda done, of: told.append((done, of)))
    assert found.complete
    assert found.slices == tuple(range(DEPTH))
    assert told[-1] == (DEPTH, DEPTH)
    for index in range(DEPTH):
        mask = session.slicing.view(found.masks["square"], index)
        assert mask_dice(mask, square()) > 0.97  # corners are cut where logits are enlarged
        assert np.array_equal(session.slicing.view(found.label_map, index) == 1, mask)
    assert len(library) == 0


def test_corrected_slices_stay_as_they_are_and_come_first_in_line(
    library: Library, volume: Volume, looked_at: list[Any]
) -> None:
    for value in range(3):
        image = np.full((SIDE, SIDE), 60 + value, np.uint8)
        library.add(image, {"square": np.ones((SIDE, SIDE), bool)}, key=str(value))
    segmenter = Segmenter(library, k=2)
    session = VolumeCorrections(library, volume, segmenter=segmenter)
    small = np.zeros((SIDE, SIDE), bool)
    small[:16, :16] = True
    session.at(0).draw("square", small)
    session.at(8).draw("square", square())
    del looked_at[:]
    found = session.propagate()
    assert np.array_equal(session.slicing.view(found.masks["square"], 0), small)
    assert np.array_equal(session.slicing.view(found.masks["square"], 8), square())
    first = looked_at[0][0]  # slice 1: two exemplars, then the corrected ones, nearest first
    assert np.allclose(first, [1.0, 1.0, 1 / 16, 1 / 4])
    assert np.allclose(looked_at[4][0][2:4], [1 / 4, 1 / 16])  # slice 7, the first below 8
    lengths = [len(one[0]) for one in looked_at]  # with the slice before, from the second on
    assert lengths == [4, 5, 5, 5, 4, 5, 5]


def test_exemplars_get_the_room_that_is_left(
    tmp_path: Path, volume: Volume, looked_at: list[Any]
) -> None:
    bundle = make_fake_bundle(tmp_path / "few", correct=True, max_k=5)
    with Library.create(tmp_path / "l", bundle, engine="fake") as library:
        for value in range(5):
            image = np.full((SIDE, SIDE), 60 + value, np.uint8)
            image[0, 0] = 0
            library.add(image, {"square": np.ones((SIDE, SIDE), bool)}, key=str(value))
        session = VolumeCorrections(library, volume, segmenter=Segmenter(library, k=5))
        for index in range(0, 9, 2):
            session.at(index).draw("square", square())
        del looked_at[:]
        session.propagate()
        for one in looked_at:
            assert len(one[0]) == 5
            assert sum(np.isclose(value, 1 / 4) for value in one[0]) >= NEAREST


def test_cancelling_keeps_what_was_done(library: Library, volume: Volume) -> None:
    session = VolumeCorrections(library, volume)
    session.at(4).draw("square", square())
    asked = iter([False, False, True])
    found = session.propagate(cancel=lambda: next(asked))
    assert not found.complete
    assert found.slices == (4, 5, 6)
    assert found.masks["square"].any(axis=(0, 1)).sum() == 3


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], set[tuple[int, int]]]:
    """What is asked of which slice, and (slice, structure) that are found to be absent."""
    seen: list[Any] = []
    absent: set[tuple[int, int]] = set()
    segment = Spreading._segment

    def noted(self: Spreading, index: int, wanted: Any, before: Any) -> Any:
        seen.append((index, [*wanted]))
        found = segment(self, index, wanted, before)
        for position in range(len(found.masks)):
            if (index, position) in absent:
                found.masks[position][:] = False
                found.label_map[found.label_map == position + 1] = 0
        return found

    monkeypatch.setattr(Spreading, "_segment", noted)
    return seen, absent


def test_a_structure_ends_where_a_slice_lacks_it(
    library: Library, volume: Volume, asked: tuple[list[Any], set[tuple[int, int]]]
) -> None:
    seen, absent = asked
    absent.add((6, 0))
    session = VolumeCorrections(library, volume)
    session.at(4).draw("square", square())
    found = session.propagate()
    assert [index for index, _ in seen] == [5, 6, 3, 2, 1, 0]
    assert found.complete
    shown = [bool(session.slicing.view(found.masks["square"], i).any()) for i in range(DEPTH)]
    assert shown == [True] * 6 + [False] * 3
    assert np.array_equal(found.label_map > 0, found.masks["square"])


def test_what_a_person_took_away_is_not_found_again(
    library: Library, volume: Volume, asked: tuple[list[Any], set[tuple[int, int]]]
) -> None:
    session = VolumeCorrections(library, volume)
    session.at(2).draw("square", square())
    session.at(6).draw("square", np.zeros((SIDE, SIDE), bool))
    found = session.propagate()
    assert [index for index, _ in asked[0]] == [3, 4, 1, 0]
    shown = [bool(session.slicing.view(found.masks["square"], i).any()) for i in range(DEPTH)]
    assert shown == [True] * 5 + [False] * 4


def test_one_that_is_known_elsewhere_may_begin_anywhere(
    library: Library, volume: Volume, asked: tuple[list[Any], set[tuple[int, int]]]
) -> None:
    seen, absent = asked
    absent |= {(1, 0), (1, 1)}
    session = VolumeCorrections(library, volume)
    session.at(0).draw("a", square())
    session.at(8).draw("b", square())
    found = session.propagate()
    assert seen[:3] == [(1, [0, 1]), (2, [1]), (3, [1])]
    assert session.slicing.view(found.masks["b"], 2).any()
    assert not session.slicing.view(found.masks["a"], 2).any()


def test_half_way_to_the_next_known_slice() -> None:
    known = {2: None, 5: None, 9: None}
    assert half_way(2, -1, known, 12) == [1, 0]
    assert half_way(2, 1, known, 12) == [3]
    assert half_way(5, -1, known, 12) == [4]
    assert half_way(5, 1, known, 12) == [6, 7]
    assert half_way(9, -1, known, 12) == [8]
    assert half_way(9, 1, known, 12) == [10, 11]
    for count in range(1, 9):
        for first in range(count):
            for second in range(first, count):
                pair = dict.fromkeys({first, second})
                ways = [i for s in pair for way in (1, -1) for i in half_way(s, way, pair, count)]
                assert sorted([*pair, *ways]) == [*range(count)]


def test_few_memories_at_once_are_enough(tmp_path: Path, volume: Volume) -> None:
    bundle = make_fake_bundle(tmp_path / "few", correct=True, max_k=2)
    with Library.create(tmp_path / "l", bundle, engine="fake") as library:
        session = VolumeCorrections(library, volume)
        for index in (0, 4, 8):
            session.at(index).draw("square", square())
        assert session.propagate().complete


def test_mistakes(library: Library, volume: Volume) -> None:
    session = VolumeCorrections(library, volume)
    with pytest.raises(InputError, match="nothing was"):
        session.propagate()
    with pytest.raises(InputError, match="slices 0 to 8, got 9"):
        session.at(9)
    session.at(1).draw("square", square())
    with pytest.raises(InputError, match="'liver' was corrected on no slice"):
        session.propagate(["liver"])


def test_slices_that_were_only_looked_at_are_let_go(library: Library, volume: Volume) -> None:
    session = VolumeCorrections(library, volume)
    session.at(4).draw("square", square())
    for index in range(DEPTH):
        session.at(index)
    assert session.corrected == (4,)
    assert len(session._sessions) <= 9


def test_a_slice_of_another_scale_is_told_as_segmenting_does(library: Library) -> None:
    array = np.full((3, SIDE, SIDE), 20, np.uint8)
    array[:, 16:48, 16:48] = 200
    library.add(array[0], {"square": square()}, tags={SPACING_TAG: "1x1"})
    far = Volume(array, np.diag([9.0, 4.0, 4.0, 1.0]), "LPS")
    segmenter = Segmenter(library, k=1)
    told = segment_volume(segmenter, far).slices[1].reasons["square"]
    assert "another scale" in told[0]
    session = VolumeCorrections(library, far, segmenter=segmenter)
    assert session.at(1).result.quality.reasons["square"] == told
