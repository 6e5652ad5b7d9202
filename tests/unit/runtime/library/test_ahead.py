"""Several images are encoded at once, and what comes of it is what one at a time would give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Barrier
from threading import enumerate as threads_now
from typing import Any

import numpy as np
import pytest

from recallseg import Bundle, Intensity, Library, Model
from recallseg.engines.errors import EngineRunError
from recallseg.runtime.library.ahead import encode_ahead
from recallseg.runtime.library.binding import _ModelEncoder, lanes_of
from recallseg.runtime.library.encoding import Encoded
from recallseg.runtime.model import host
from recallseg.runtime.model.model import Model as AnyModel

COUNT = 4


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setattr(host, "LANE_IMAGES", 2)
    with Model.open("demo", threads=2) as opened:
        yield opened


def items(*numbers: int) -> list[Any]:
    rng = np.random.default_rng(0)
    made = []
    for number in numbers:
        image = rng.integers(0, 256, (48, 64), np.uint8)
        masks = {"one": image > 100 + number}
        if number % 2:
            masks["other"] = image < 40
        made.append({"image": image, "masks": masks, "key": f"case {number}"})
    return made


def test_many_at_once_are_stored_as_one_by_one(tmp_path: Path, model: Model) -> None:
    with (
        Library.create(tmp_path / "one", "demo", model=model) as one,
        Library.create(tmp_path / "many", "demo", model=model) as many,
    ):
        for item in items(*range(COUNT)):
            one.add(**item)
        graphs = set(model.graphs)
        threads = {*threads_now()}
        assert many.add_many(items(*range(COUNT))) == [f"case {n}" for n in range(COUNT)]
        assert set(model.graphs) == graphs
        assert {*threads_now()} <= threads
        assert many.digest == one.digest
        assert [e.key for e in many] == [e.key for e in one]
        assert many.origins == one.origins
        for shard in sorted((tmp_path / "one" / "memories").iterdir()):
            assert shard.read_bytes() == (tmp_path / "many" / "memories" / shard.name).read_bytes()
        many.rebuild()
        assert many.digest == one.digest
        assert many.verify().ok
        assert many.embeddings("one")[0] == one.embeddings("one")[0]
        np.testing.assert_array_equal(many.embeddings("one")[1], one.embeddings("one")[1])


def test_images_are_encoded_at_the_same_time_and_come_in_their_order(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    both = Barrier(2, timeout=300)  # two at a time, or it breaks
    done: list[int] = []
    memorize = AnyModel.memorize

    def slow(self: AnyModel, image: Any, masks: Any, intensity: Any) -> Encoded:
        both.wait()
        assert self is not model
        assert self.threads == 1
        return memorize(self, image, masks, intensity)

    monkeypatch.setattr(AnyModel, "memorize", slow)
    with Library.create(tmp_path / "library", "demo", model=model) as library:
        keys = library.add_many(items(3, 1, 2, 0), progress=lambda now, of: done.append(now))
        assert keys == ["case 3", "case 1", "case 2", "case 0"]
        assert [e.key for e in library] == keys
    assert done == [1, 2, 3, 4]


def test_one_that_fails_beside_others_leaves_none(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memorize = AnyModel.memorize

    def fail(self: AnyModel, image: Any, masks: Any, intensity: Any) -> Encoded:
        if len(masks) == 2:
            raise EngineRunError("out of memory")
        return memorize(self, image, masks, intensity)

    with Library.create(tmp_path / "library", "demo", model=model) as library:
        threads = {*threads_now()}
        with monkeypatch.context() as patch:
            patch.setattr(AnyModel, "memorize", fail)
            with pytest.raises(EngineRunError, match="out of memory"):
                library.add_many(items(*range(COUNT)))
        assert {*threads_now()} <= threads
        assert len(library) == 0
        assert not [*library.path.rglob("*.npz*")]
        assert len(library.add_many(items(*range(COUNT)))) == COUNT
        assert library.verify().ok


def test_no_more_images_are_in_memory_than_are_encoded_and_one(model: Model) -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(8):
            taken.append(number)
            yield number

    picture = np.zeros((32, 32), np.uint8)
    encoder = _ModelEncoder(model, Intensity())
    found = encode_ahead(encoder, numbers(), 8, lambda number: (picture, {}))
    for number, _ in found:
        assert len(taken) <= number + 3
    assert taken == [*range(8)]


@pytest.mark.parametrize(
    ("threads", "images", "free", "lanes"),
    [
        (1, 100, None, 1),
        (2, 100, None, 2),
        (16, 1000, None, 4),
        (16, 3, None, 1),
        (4, 1000, 100 << 20, 1),
        (4, 1000, 600 << 20, 2),
    ],
)
def test_lanes_need_threads_images_and_memory(
    monkeypatch: pytest.MonkeyPatch, threads: int, images: int, free: int | None, lanes: int
) -> None:
    monkeypatch.setattr(host, "available_memory", lambda: free)
    monkeypatch.setattr(host, "encoding_bytes", lambda *_: 150 << 20)
    with Model.open("demo", threads=threads) as model:
        found = model.lanes(images)
        assert len(found) == lanes
        for lane in found:
            assert (lane.bundle, lane.engine, lane.precision) == (
                model.bundle,
                model.engine,
                model.precision,
            )
            assert lane is model if lanes == 1 else lane.threads == threads // lanes


def test_another_encoder_works_alone() -> None:
    class Other:
        def encode(self, image: Any, masks: Any) -> Encoded:
            raise NotImplementedError

        def embed(self, image: Any) -> Any:
            raise NotImplementedError

    other = Other()
    with lanes_of(other, 1000) as lanes:
        assert lanes == [other]


def test_the_shipped_bundle_leaves_room_for_lanes_on_a_small_machine() -> None:
    assert host.encoding_bytes(Bundle.open("demo"), "onnxruntime-cpu", "fp32") < 256 << 20
