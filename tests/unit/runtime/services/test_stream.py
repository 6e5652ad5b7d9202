from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Timer
from time import perf_counter, sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.measuring import measures

from recallseg import Bundle, Frame, Library, Segmenter, Stream
from recallseg.engines.errors import DeadlineError, InputError
from recallseg.runtime.services.latency import LatencyHistogram

SIZE = 64


def picture(top: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright band of 16 rows, and its mask."""
    image, mask = np.full((SIZE, SIZE), 20, np.uint8), np.zeros((SIZE, SIZE), bool)
    mask[top : top + 16] = True
    image[mask] = 200
    return image, mask


@pytest.fixture
def library(tmp_path: Path, fake_bundle: Bundle) -> Library:
    made = Library.create(tmp_path / "library", fake_bundle, engine="fake")
    for top in (0, 32):
        image, mask = picture(top)
        made.add(image, {"band": mask})
    return made


@pytest.fixture
def segmenter(library: Library) -> Segmenter:
    return Segmenter(library, k=1, engine="fake", frames=2)


class Held:
    """A callback that holds the stream until it is let go."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.begun, self.go = Event(), Event()

    def __call__(self, frame: Frame) -> None:
        self.frames.append(frame)
        self.begun.set()
        assert self.go.wait(120)


@pytest.fixture
def held() -> Iterator[Held]:
    callback = Held()
    yield callback
    callback.go.set()


def total(stream: Stream) -> int:
    s = stream.statistics
    return s.segmented + s.dropped + s.late + s.failed + s.ignored


@pytest.mark.parametrize("seconds", [None, 1e10, 1e300, math.inf])
def test_any_time_may_be_waited_for(
    segmenter: Segmenter, held: Held, seconds: float | None
) -> None:
    with Stream(segmenter, held) as stream:
        stream.push(picture(0)[0])
        assert held.begun.wait(120)
        assert not stream.drain(0)
        Timer(0.1, held.go.set).start()
        assert stream.drain(seconds)


def test_a_time_that_is_none_is_refused(segmenter: Segmenter) -> None:
    with Stream(segmenter, print) as stream:
        for wrong in (-1, math.nan, "1"):
            with pytest.raises(InputError, match="timeout_s must be a number of at least 0 s"):
                stream.drain(wrong)  # type: ignore[arg-type]


def test_frames_come_back_in_order_with_their_masks(segmenter: Segmenter) -> None:
    frames: list[Frame] = []
    with Stream(segmenter, frames.append, queue=8) as stream:
        for top in (0, 32, 0):
            stream.push(picture(top)[0])
        assert stream.drain(120)
    assert [frame.number for frame in frames] == [0, 1, 2]
    assert all(frame.error is None and frame.latency_ms >= frame.waited_ms for frame in frames)
    assert frames[0].result is not None
    assert np.array_equal(frames[0].result.masks["band"], picture(0)[1])
    assert stream.statistics.latency["count"] == stream.statistics.segmented == 3


def test_a_slow_callback_costs_frames_and_they_are_counted(
    segmenter: Segmenter, held: Held
) -> None:
    with Stream(segmenter, held, queue=2) as stream:
        stream.push(picture(0)[0])
        assert held.begun.wait(120)
        for _ in range(5):
            stream.push(picture(0)[0])
        assert stream.statistics.dropped == 3
        held.go.set()
        assert stream.drain(120)
    assert [frame.number for frame in held.frames] == [0, 4, 5]
    assert total(stream) == stream.statistics.pushed == 6


def test_a_frame_that_waited_too_long_is_late(segmenter: Segmenter, held: Held) -> None:
    frames: list[Frame] = []

    def callback(frame: Frame) -> None:
        frames.append(frame)
        if frame.number == 0:
            held(frame)

    with Stream(segmenter, callback, deadline_ms=200) as stream:
        stream.push(picture(0)[0])
        assert held.begun.wait(120)
        stream.push(picture(0)[0])
        Event().wait(0.3)
        held.go.set()
        assert stream.drain(120)
    assert isinstance(frames[1].error, DeadlineError)
    assert frames[1].waited_ms > 200
    assert stream.statistics.late == 1


def test_a_deadline_counts_from_the_push(segmenter: Segmenter, monkeypatch: Any) -> None:
    left: list[float | None] = []
    real = segmenter.segment

    def spied(image: Any, *, deadline_ms: float | None, **more: Any) -> Any:
        left.append(deadline_ms)
        return real(image, deadline_ms=deadline_ms, **more)

    monkeypatch.setattr(segmenter, "segment", spied)
    frames: list[Frame] = []
    with Stream(segmenter, frames.append, deadline_ms=5000) as stream:
        stream.push(picture(0)[0])
        assert stream.drain(120)
    assert left[0] == pytest.approx(5000 - frames[0].waited_ms, abs=50)


def test_pausing_ignores_frames_and_forgets_the_sequence(segmenter: Segmenter) -> None:
    frames: list[Frame] = []
    with Stream(segmenter, frames.append, queue=4) as stream:
        for _ in range(2):
            stream.push(picture(0)[0])
            assert stream.drain(120)
        stream.pause()
        stream.push(picture(0)[0])
        stream.resume()
        stream.push(picture(0)[0])
        assert stream.drain(120)
    assert stream.statistics.ignored == 1
    used = [frame.result.frame_memories["band"] for frame in frames if frame.result is not None]
    assert used == [0, 1, 0]


def test_the_ring_forgets_the_oldest(segmenter: Segmenter) -> None:
    frames: list[Frame] = []
    with Stream(segmenter, frames.append, queue=8) as stream:
        for _ in range(4):
            stream.push(picture(0)[0])
        assert stream.drain(120)
    assert [f.result.frame_memories["band"] for f in frames if f.result is not None] == [0, 1, 2, 2]


def test_a_wrong_frame_is_reported_and_the_next_one_works(segmenter: Segmenter) -> None:
    frames: list[Frame] = []
    with Stream(segmenter, frames.append, queue=2) as stream:
        stream.push(np.zeros((4, 4, 4, 4), np.uint8))
        stream.push(picture(0)[0])
        assert stream.drain(120)
    assert isinstance(frames[0].error, InputError)
    assert frames[1].error is None
    assert stream.statistics.failed == 1


def test_a_callback_that_raises_ends_the_stream_and_the_caller_is_told(
    segmenter: Segmenter,
) -> None:
    def callback(frame: Frame) -> None:
        raise RuntimeError("display is gone")

    stream = Stream(segmenter, callback)
    stream.push(picture(0)[0])
    with pytest.raises(RuntimeError, match="display is gone"):
        stream.drain(120)
    with pytest.raises(RuntimeError, match="display is gone"):
        stream.push(picture(0)[0])
    with pytest.raises(RuntimeError, match="display is gone"):
        stream.close()


def test_closing_drops_what_waits(segmenter: Segmenter, held: Held) -> None:
    stream = Stream(segmenter, held, queue=3)
    for _ in range(3):
        stream.push(picture(0)[0])
    assert held.begun.wait(120)
    held.go.set()
    stream.close()
    stream.close()
    assert total(stream) == 3
    with pytest.raises(InputError, match="closed"):
        stream.push(picture(0)[0])


def test_a_stream_may_be_closed_from_its_callback(segmenter: Segmenter) -> None:
    done = Event()

    def callback(frame: Frame) -> None:
        stream.close()
        done.set()

    stream = Stream(segmenter, callback)
    stream.push(picture(0)[0])
    assert done.wait(120)
    stream.close()


def test_frames_are_copied_and_dlpack_is_taken(segmenter: Segmenter, held: Held) -> None:
    class Foreign:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__()

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()

    image = picture(0)[0]
    with Stream(segmenter, held, queue=4) as stream:
        stream.push(image)
        assert held.begun.wait(120)
        stream.push(image)
        stream.push(Foreign(image.copy()))
        image[:] = 0
        held.go.set()
        assert stream.drain(120)
    for frame in held.frames:
        assert frame.result is not None
        assert np.array_equal(frame.result.masks["band"], picture(0)[1])


def test_wrong_settings_and_frames_are_refused(segmenter: Segmenter, library: Library) -> None:
    for queue in (0, True, "1", 1.0):
        with pytest.raises(InputError, match="a stream's queue must be a whole number from 1"):
            Stream(segmenter, print, queue=queue)  # type: ignore[arg-type]
    for deadline in (0, -1, float("nan"), True, "5"):
        with pytest.raises(InputError, match="a deadline must be"):
            Stream(segmenter, print, deadline_ms=deadline)  # type: ignore[arg-type]
    with Stream(segmenter, print) as stream, pytest.raises(InputError, match="DLPack"):
        stream.push("frame")
    with pytest.raises(InputError, match="memories"):
        Segmenter(library, k=1, engine="fake").frame_memories()
    with pytest.raises(InputError, match="0 to"):
        Segmenter(library, k=1, engine="fake", frames=32)
    other = Segmenter(library, k=1, engine="fake", frames=1).frame_memories()
    with pytest.raises(InputError, match="its own"):
        segmenter.segment(picture(0)[0], frame_memories=other)


def test_what_is_suspect_or_absent_is_not_remembered(segmenter: Segmenter) -> None:
    frame_memories = segmenter.frame_memories()
    segmenter.segment(np.zeros((SIZE, SIZE), np.uint8), frame_memories=frame_memories)
    remembered = frame_memories.count(0)
    result = segmenter.segment(picture(0)[0], frame_memories=frame_memories)
    assert result.scores["band"].present
    assert frame_memories.count(0) == remembered + 1
    frame_memories.clear()
    assert frame_memories.count(0) == 0


def test_a_histogram_is_right_to_five_percent() -> None:
    rng = np.random.default_rng(1)
    values = rng.lognormal(3, 1, 5000)
    histogram = LatencyHistogram()
    assert histogram.to_json()["p50"] is None
    for value in values:
        histogram.record(float(value))
    for percent in (50, 90, 99):
        assert histogram.percentile(percent) == pytest.approx(
            np.percentile(values, percent), rel=0.06
        )
    histogram.record(1e9)
    assert histogram.percentile(100) == histogram.largest == 1e9


class Slow:
    """A segmenter that takes its time, and looks at the deadline when a stage ends."""

    frames = 0
    model = SimpleNamespace(copy_frame=np.array)

    def __init__(self, stages_ms: tuple[float, ...]) -> None:
        self.stages_ms = stages_ms
        self.begun = 0

    def segment(self, image: Any, *, deadline_ms: float | None, frame_memories: Any) -> Any:
        self.begun += 1
        end = perf_counter() + (deadline_ms or 1e9) / 1e3
        for stage in self.stages_ms:
            sleep(stage / 1e3)
            if perf_counter() > end:
                raise DeadlineError("not done in time")
        return image


@pytest.mark.parametrize("queue", [1, 4])
@measures
def test_an_overloaded_stream_still_segments_as_many_frames_as_there_is_time_for(
    queue: int,
) -> None:
    """A frame each 6 ms, each takes 50 ms, and after 60 ms it is worth nothing."""
    slow, frames = Slow((40.0, 10.0)), list[Frame]()
    with Stream(slow, frames.append, deadline_ms=60, queue=queue) as stream:  # type: ignore[arg-type]
        until = perf_counter() + 2.0
        while perf_counter() < until:
            stream.push(np.zeros((2, 2), np.uint8))
            sleep(0.006)
        assert stream.drain(120)
    counts = stream.statistics
    # One each 56 ms at best (a frame, and the wait for a fresh one): 35. Without skipping: 1 of 51.
    assert counts.segmented >= 10, counts
    assert slow.begun <= 2 * counts.segmented, "time was spent on frames that were late"
    if queue > 1:  # of one, a newer frame pushes out those that waited too long
        assert len([f for f in frames if "was not begun" in str(f.error)]) > 5
    assert total(stream) == counts.pushed


@measures
def test_a_stream_that_was_slow_once_begins_the_next_fresh_frame() -> None:
    slow, frames = Slow((80.0,)), list[Frame]()
    with Stream(slow, frames.append, deadline_ms=50) as stream:  # type: ignore[arg-type]
        for _ in range(3):
            stream.push(np.zeros((2, 2), np.uint8))
            assert stream.drain(120)
            slow.stages_ms = (1.0,)
    assert [frame.error is None for frame in frames] == [False, True, True]


def test_a_process_that_ends_waits_for_the_frame_in_work() -> None:
    program = """
import time, threading, types
import numpy as np
from recallseg import Stream
class Slow:
    frames = 0
    model = types.SimpleNamespace(copy_frame=np.array)
    def segment(self, image, **more):
        begun.set()
        time.sleep(0.5)
        print("segmented", flush=True)
        return image
begun = threading.Event()
stream = Stream(Slow(), lambda frame: print("told", flush=True), queue=4)
for _ in range(4):
    stream.push(np.zeros((2, 2), np.uint8))
begun.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["segmented", "told"]
