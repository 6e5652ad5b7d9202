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
from recallseg.runtime.model.preprocess import Intensity
from recallseg.runtime.volumes.corrections import NEAREST, VolumeCorrections

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
    assert np.allclose(looked_at[6][0][2:4], [1 / 4, 1 / 16])  # slice 7
    assert all(len(one[0]) == 5 for one in looked_at[1:])  # and the slice before


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
    assert found.slices == (4, 5)
    assert found.masks["square"].any(axis=(0, 1)).sum() == 2


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
