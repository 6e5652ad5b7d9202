"""Queries that are handed in: their order, their errors, what ends them; results as ever."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError as Withdrawn
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.device_segmenters import library_of_discs as fill
from support.device_segmenters import make, on_cpu, picture, same, with_kernels
from support.fake_onnxruntime import FakeSession, install

from recallseg import Bundle, Library, Segmenter
from recallseg.errors import CancelledError, DeadlineError, InputError, ModelClosedError
from recallseg.runtime.segmenting.in_flight import MOST_IN_FLIGHT
from recallseg.runtime.segmenting.result import Result

SIDE = 64


def bar(left: int) -> NDArray[np.uint8]:
    image = np.full((SIDE, SIDE), 20, np.uint8)
    image[:, left : left + 24] = 200 + left
    return image


@pytest.fixture
def segmenter(tmp_path: Path, fake_bundle: Bundle) -> Iterator[Segmenter]:
    library = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    for left in (0, 20, 40):
        library.add(bar(left), {"bar": bar(left) > 100})
    with Segmenter(library, k=2) as made:
        yield made


def of_queries() -> list[threading.Thread]:
    """The threads that run now and are of queries in flight."""
    names = ("recallseg-begins", "recallseg-ends")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def alike(found: Result, expected: Result) -> None:
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    assert (found.scores, found.recalled) == (expected.scores, expected.recalled)
    assert found.provenance == expected.provenance


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_results_are_those_of_segment_in_the_order_of_handing_in(
    segmenter: Segmenter, in_flight: int
) -> None:
    images = [bar(left) for left in range(0, 40, 4)]
    expected = [segmenter.segment(image) for image in images]
    ended: list[int] = []
    handed: list[Future[Result]] = []
    for number, image in enumerate(images):
        mine = image.copy()
        handed.append(segmenter.segment_async(mine))
        handed[-1].add_done_callback(lambda _, number=number: ended.append(number))  # type: ignore[misc]
        mine[:] = 0  # it is the caller's again
        if number >= in_flight - 1:
            handed[number - in_flight + 1].result(60)
    for promise, wanted in zip(handed, expected, strict=True):
        alike(promise.result(60), wanted)
    segmenter.close()
    assert ended == sorted(ended)
    assert len(ended) == len(images)


def blocked(segmenter: Segmenter) -> tuple[Event, Future[Result], Event]:
    """Hand in a query that stays in work until the first event is set; the second is its begin."""
    go_on, begun = Event(), Event()

    def wait() -> bool:
        begun.set()
        assert go_on.wait(60)
        return False

    promise = segmenter.segment_async(bar(0), cancelled=wait)
    assert begun.wait(60)
    return go_on, promise, begun


def test_one_that_waits_is_withdrawn_and_one_in_work_ends_at_a_stage(segmenter: Segmenter) -> None:
    go_on, first, _ = blocked(segmenter)
    waiting = segmenter.segment_async(bar(20))
    stopped = segmenter.segment_async(bar(20), cancelled=lambda: True)
    late = segmenter.segment_async(bar(20), deadline_ms=0.01)
    assert waiting.cancel()
    assert not first.cancel()
    go_on.set()
    assert first.result(60).masks["bar"].any()
    with pytest.raises(Withdrawn):
        waiting.result(60)
    with pytest.raises(CancelledError):
        stopped.result(60)
    with pytest.raises(DeadlineError):
        late.result(60)
    alike(segmenter.segment_async(bar(20)).result(60), segmenter.segment(bar(20)))


def test_errors_are_told_by_their_own_query_in_its_turn(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "bar.png"), bar(20))
    ended: list[int] = []
    handed = [
        segmenter.segment_async(image)
        for image in (
            bar(0),
            np.full((8, 8), np.nan),
            tmp_path / "missing.png",
            tmp_path / "bar.png",
        )
    ]
    for number, promise in enumerate(handed):
        promise.add_done_callback(lambda _, number=number: ended.append(number))  # type: ignore[misc]
    with pytest.raises(InputError, match="64 NaN"):
        handed[1].result(60)
    with pytest.raises(InputError, match="missing"):
        handed[2].result(60)
    alike(handed[3].result(60), segmenter.segment(bar(20)))
    segmenter.close()
    assert ended == [0, 1, 2, 3]
    for wrong in ({"deadline_ms": -1}, {"deadline": 5}):
        with pytest.raises((InputError, TypeError)):
            segmenter.segment_async(bar(0), **wrong)


def test_so_many_may_be_in_flight_and_the_next_waits_for_a_place(segmenter: Segmenter) -> None:
    go_on, *_ = blocked(segmenter)
    handed = [segmenter.segment_async(bar(4)) for _ in range(MOST_IN_FLIGHT - 1)]
    more: list[Future[Result]] = []
    thread = threading.Thread(target=lambda: more.append(segmenter.segment_async(bar(8))))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    go_on.set()
    thread.join(60)
    for promise in (*handed, *more):
        promise.result(60)


def test_whoever_is_called_back_may_hand_in_ask_and_close(segmenter: Segmenter) -> None:
    handed: list[Future[Result]] = []
    closed = Event()

    def ask(promise: Future[Result]) -> None:
        alike(segmenter.segment(bar(0)), promise.result())
        handed.extend(segmenter.segment_async(bar(0)) for _ in range(2 * MOST_IN_FLIGHT))
        segmenter.close()
        closed.set()

    go_on, first, _ = blocked(segmenter)
    first.add_done_callback(ask)
    go_on.set()
    assert closed.wait(60)
    for promise in handed:
        alike(promise.result(60), first.result())
    with pytest.raises(InputError, match="has been closed"):
        segmenter.segment_async(bar(0))


def test_closing_waits_for_what_was_handed_in(segmenter: Segmenter) -> None:
    handed = [segmenter.segment_async(bar(left)) for left in (0, 8, 16)]
    segmenter.close()
    assert all(promise.done() for promise in handed)
    segmenter.close()
    assert not of_queries()


def test_a_model_that_is_closed_is_told_by_every_query(segmenter: Segmenter) -> None:
    segmenter.model.close()
    with pytest.raises(ModelClosedError):
        segmenter.segment_async(bar(0)).result(60)


def test_a_segmenter_that_is_dropped_takes_its_threads_with_it(
    segmenter: Segmenter, tmp_path: Path
) -> None:
    own = Segmenter(segmenter.library, k=1)
    own.segment_async(bar(0)).result(60)
    threads = of_queries()
    assert len(threads) == 2
    gone = weakref.ref(own)
    del own
    for thread in threads:
        while thread.is_alive():  # the one that told the result may still hold it
            gc.collect()
            thread.join(0.1)
    assert gone() is None


def test_frames_of_a_sequence_see_those_before(segmenter: Segmenter) -> None:
    both = [Segmenter(segmenter.library, k=1, frames=2) for _ in "ab"]
    memories = [each.frame_memories() for each in both]
    images = [bar(left) for left in (0, 4, 8, 12)]
    expected = [both[0].segment(image, frame_memories=memories[0]) for image in images]
    handed = [both[1].segment_async(image, frame_memories=memories[1]) for image in images]
    for promise, wanted in zip(handed, expected, strict=True):
        alike(promise.result(60), wanted)
        assert promise.result().frame_memories == wanted.frame_memories


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeSession]:
    return install(monkeypatch, tmp_path)


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_sessions_in_flight_give_the_same_bits(
    tiny_bundle: Bundle,
    session: type[FakeSession],
    emulator: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    where: str,
) -> None:
    library = fill(tmp_path, tiny_bundle)
    segmenters: Callable[[], Segmenter] = lambda: on_cpu(library)  # noqa: E731
    if where == "device":
        device = with_kernels(emulator, monkeypatch, deferred=True)
        segmenters = lambda: make(library, device)  # noqa: E731
    segmenter = segmenters()
    images: list[Any] = [picture(seed, 50 + 10 * (seed % 3))[0] for seed in range(10, 16)]
    expected = [segmenter.segment(image, keep_logits=True) for image in images]
    handed = [
        segmenter.segment_async(image, keep_logits=number % 2 == 0)
        for number, image in enumerate(images)
    ]
    for number, (promise, wanted) in enumerate(zip(handed, expected, strict=True)):
        same(promise.result(120), wanted)
        if number % 2 == 0:
            np.testing.assert_array_equal(promise.result().logits["disc"], wanted.logits["disc"])
    segmenter.close()
