"""Turns, budgets and ratios."""

from __future__ import annotations

from collections.abc import Mapping
from time import sleep
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from recallseg.benchmarks.energy import EnergyMeter
from recallseg.benchmarks.interleave import LEAST_ROUNDS, Recording, measure, ratios

IMAGES = [np.full((2, 2), i, np.uint8) for i in range(3)]


class Scripted:
    warm_ups = 2

    def __init__(
        self, name: str, log: list[tuple[str, int]], role: str = "runtime", ms: float = 0
    ) -> None:
        self.name, self.role, self.remarks = name, role, []  # type: ignore[var-annotated]
        self.log, self.ms, self.last = log, ms, 0
        self.stock: list[tuple[int, bool]] = []

    def run(self, image: NDArray[Any]) -> Mapping[str, float]:
        self.last = int(image[0, 0])
        self.log.append((self.name, self.last))
        sleep(self.ms / 1e3)
        return {"encode": 1.0}

    def take_stock(self, *, before: bool) -> None:
        self.stock.append((len(self.log), before))

    @property
    def logits(self) -> NDArray[np.float32]:
        return np.full(1, self.last, np.float32)


class Meter(EnergyMeter):
    source = "test"

    def start(self) -> None:
        self.running = True

    def stop(self) -> float:
        assert self.running
        self.running = False
        return 2.0


def test_stock_is_taken_around_each_query_that_counts() -> None:
    """So that what another subject takes between two of its queries is not laid to its charge."""
    log: list[tuple[str, int]] = []
    subjects = [Scripted("a", log), Scripted("b", log)]
    measure(subjects, IMAGES, rounds=2, seconds=1)
    assert subjects[0].stock == [(4, True), (5, False), (7, True), (8, False)]
    assert subjects[1].stock == [(5, True), (6, False), (6, True), (7, False)]


def test_turns_alternate_and_images_are_shared() -> None:
    log: list[tuple[str, int]] = []
    a, b = measure([Scripted("a", log), Scripted("b", log)], IMAGES, rounds=4, seconds=1)
    assert log[:4] == [("a", 0), ("a", 0), ("b", 0), ("b", 0)]  # warm-up
    assert log[4:] == [
        ("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 0), ("a", 0),
    ]  # fmt: skip
    assert a.rounds == b.rounds == [0, 1, 2, 3]
    assert set(a.stages) == {"encode", "total"}
    assert a.stages["encode"] == [1.0] * 4
    assert a.logits[0] == 0


def test_slow_baselines_run_in_fewer_rounds_spread_evenly() -> None:
    log: list[tuple[str, int]] = []
    subjects = [Scripted("a", log), Scripted("slow", log, "baseline", ms=20)]
    a, slow = measure(subjects, IMAGES, rounds=9, seconds=0.001)
    assert len(a.rounds) == 9
    assert slow.rounds == [0, 4, 8]
    assert len(slow.rounds) == LEAST_ROUNDS
    assert min(slow.stages["total"]) >= 20


def test_energy_is_read_around_every_query() -> None:
    (a,) = measure([Scripted("a", [])], IMAGES, rounds=3, seconds=1, meter=Meter())
    assert a.joules == [2.0] * 3


def test_ratios_use_common_rounds_and_stages_only() -> None:
    own = Recording(
        [0, 1, 2, 3], {"encode": [1.0, 9.0, 1.0, 1.0], "search": [0.01] * 4, "x": [1.0] * 4}
    )
    other = Recording([0, 2, 3], {"encode": [3.0, 3.0, 3.0], "search": [5.0] * 3, "y": [1.0] * 3})
    (ratio,) = ratios("own", own, "other", other, k=4, n=1)
    assert (ratio.stage, ratio.ratio, ratio.rounds) == ("encode", 3.0, 3)
    assert ratio.low == pytest.approx(3.0)


def test_a_slow_runtime_answers_fewer_queries_and_says_so() -> None:
    log: list[tuple[str, int]] = []
    slow, fast = Scripted("slow", log, ms=20), Scripted("fast", log)
    recordings = measure([slow, fast], IMAGES, rounds=1000, seconds=1.0, most_seconds=0.1)
    assert LEAST_ROUNDS <= len(recordings[0].rounds) <= 5
    assert len(recordings[1].rounds) == len(recordings[0].rounds)
    assert "of 1000 queries were asked" in slow.remarks[0]
    measure([fast], IMAGES, rounds=3, seconds=1.0, most_seconds=60.0)
    assert len(fast.remarks) == 1
