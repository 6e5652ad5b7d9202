"""A cine-like sequence replayed at a display's rate, with the demo model and real arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, sleep

import numpy as np
import pytest
from support.measuring import measures

from recallseg import Frame, Library, Segmenter, Stream
from recallseg.benchmarks.resident import resident_bytes
from recallseg.engines.verification import mask_dice

SIDE = 192
FRAMES = 50


def beat(phase: float) -> tuple[np.ndarray, np.ndarray]:
    """A bright cavity in a grey wall that contracts: frame of a cine, and its cavity."""
    rng = np.random.default_rng(int(phase * 1000))
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    distance = np.hypot(y - 100 - 4 * np.sin(phase), x - 90)
    radius = 34 + 8 * np.cos(phase)
    cavity = distance < radius
    image = np.where(cavity, 190.0, np.where(distance < radius + 14, 90.0, 40.0))
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8), cavity


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    made = Library.create(tmp_path_factory.mktemp("stream") / "library", "demo")
    for phase in (0.0, 1.5, 3.0):
        image, cavity = beat(phase)
        made.add(image, {"cavity": cavity})
    return made


def replay(
    segmenter: Segmenter, rate: float, callback: Callable[[Frame], None], deadline_ms: float
) -> tuple[Stream, list[np.ndarray]]:
    segmenter.warm_up()
    truth: list[np.ndarray] = []
    begin = perf_counter()
    with Stream(segmenter, callback, deadline_ms=deadline_ms) as stream:
        for number in range(FRAMES):
            image, cavity = beat(2 * np.pi * number / 25)
            truth.append(cavity)
            sleep(max(0.0, begin + number / rate - perf_counter()))
            pushed = perf_counter()
            assert stream.push(image) == number
            assert perf_counter() - pushed < 0.1  # a scanner must not be held up
        assert stream.drain(120)
    return stream, truth


@pytest.mark.alone
@pytest.mark.parametrize("rate", [20.0, 30.0])
@measures
def test_a_cine_is_segmented_at_the_displays_rate(library: Library, rate: float) -> None:
    frames: list[Frame] = []
    segmenter = Segmenter(library, k=1, frames=1)
    stream, truth = replay(segmenter, rate, frames.append, deadline_ms=1000)
    found = stream.statistics
    assert found.pushed == FRAMES
    assert found.segmented + found.dropped + found.late == FRAMES
    assert found.segmented >= 3  # how many depends on the machine; benchmarks say more
    numbers = [frame.number for frame in frames]
    assert numbers == sorted(numbers)
    assert numbers[-1] == FRAMES - 1  # the newest frame is never the one that is dropped
    dice = [
        mask_dice(frame.result.masks["cavity"], truth[frame.number])
        for frame in frames
        if frame.result is not None
    ]
    assert np.mean(dice) > 0.85, dice
    assert any(
        frame.result.frame_memories["cavity"] for frame in frames if frame.result is not None
    )


@pytest.mark.alone
@measures
def test_a_slow_display_drops_frames_and_not_the_stream(library: Library) -> None:
    shown: list[int] = []

    def slow(frame: Frame) -> None:
        sleep(0.2)
        shown.append(frame.number)

    stream, _ = replay(Segmenter(library, k=1), 30.0, slow, deadline_ms=2000)
    assert stream.statistics.dropped > FRAMES // 2
    assert shown == sorted(set(shown))


@measures
def test_an_impossible_deadline_is_late_and_says_so(library: Library) -> None:
    frames: list[Frame] = []
    stream, _ = replay(Segmenter(library, k=1), 30.0, frames.append, deadline_ms=0.5)
    assert stream.statistics.segmented == 0
    assert stream.statistics.late == len(frames) > 0


@pytest.mark.alone
@measures
def test_memory_does_not_grow(library: Library) -> None:
    segmenter = Segmenter(library, k=1, frames=2)
    segmenter.warm_up()
    image, _ = beat(0.3)
    sizes = []
    with Stream(segmenter, lambda frame: None) as stream:
        for _ in range(3):
            for _ in range(15):
                stream.push(image)
                assert stream.drain(120)
            sizes.append(resident_bytes())
    assert sizes[0] is not None
    assert sizes[-1] is not None
    assert sizes[-1] - sizes[0] < 2_000_000
