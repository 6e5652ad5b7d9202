"""Measuring several subjects in turns (A B C, C B A, ...): a busy machine then hurts all alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.energy import EnergyMeter
from recallseg.benchmarks.schema import Distribution, Ratio
from recallseg.benchmarks.statistics import paired_ratio
from recallseg.benchmarks.subjects import Subject

__all__ = ["LEAST_ROUNDS", "Recording", "measure", "ratios"]

LEAST_ROUNDS = 3
"""Rounds that even the slowest baseline runs in: the fewest that have a median."""
LEAST_STAGE_MS = 0.05
"""Stages shorter than this get no ratio: it would compare clocks."""


@dataclass
class Recording:
    """What one subject did: milliseconds by stage and round, joules by round."""

    rounds: list[int] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    joules: list[float] = field(default_factory=list)
    logits: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def distributions(self) -> dict[str, Distribution]:
        """Summarise every stage."""
        return {stage: Distribution.of(samples) for stage, samples in self.stages.items()}


def measure(
    subjects: Sequence[Subject],
    images: Sequence[NDArray[Any]],
    *,
    rounds: int,
    seconds: float,
    most_seconds: float | None = None,
    meter: EnergyMeter | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> list[Recording]:
    """Let subjects answer the same queries in turns.

    Parameters
    ----------
    subjects : runtimes run in every round. A baseline that would take longer than ``seconds`` runs
        in fewer, evenly spread, at least :data:`LEAST_ROUNDS`.
    images : round i takes image i, from the start again when they are used up.
    rounds : how many.
    most_seconds : fewer, if a runtime would take longer; it says so in its remarks.
    meter : read around every query, if there is one.
    progress : told the subject's name after every query.

    Returns
    -------
    list of Recording
        In the order of the subjects; ``logits`` are those of the first image.
    """
    recordings = [Recording() for _ in subjects]
    times = []
    for subject, recording in zip(subjects, recordings, strict=True):
        times.append(max(_warm_up(subject, images[0]), 1e-6))
        recording.logits = subject.logits.copy()
    if most_seconds is not None:
        slowest = max(
            spent for s, spent in zip(subjects, times, strict=True) if s.role != "baseline"
        )
        fitting = max(LEAST_ROUNDS, int(most_seconds / slowest))
        if fitting < rounds:
            for subject in subjects:
                subject.remarks.append(
                    f"{fitting} of {rounds} queries were asked: no more fit {most_seconds:g} s"
                )
            rounds = fitting
    due = []
    for subject, spent in zip(subjects, times, strict=True):
        wanted = rounds
        if subject.role == "baseline":
            wanted = min(rounds, max(LEAST_ROUNDS, int(seconds / spent)))
        due.append({int(i) for i in np.linspace(0, rounds - 1, wanted).round()})
    gc.collect()
    for number in range(rounds):
        order = range(len(subjects)) if number % 2 == 0 else reversed(range(len(subjects)))
        for i in order:
            if number in due[i]:
                _record(subjects[i], images[number % len(images)], recordings[i], number, meter)
                progress(subjects[i].name)
    return recordings


def _warm_up(subject: Subject, image: NDArray[Any]) -> float:
    """Run as often as the subject needs and return the seconds of the last run."""
    spent = 0.0
    for _ in range(subject.warm_ups):
        start = perf_counter()
        subject.run(image)
        spent = perf_counter() - start
    return spent


def _record(
    subject: Subject,
    image: NDArray[Any],
    recording: Recording,
    number: int,
    meter: EnergyMeter | None,
) -> None:
    subject.take_stock(before=True)
    if meter is not None:
        meter.start()
    start = perf_counter()
    stages = subject.run(image)
    total = (perf_counter() - start) * 1e3
    if meter is not None:
        recording.joules.append(meter.stop())
    subject.take_stock(before=False)
    recording.rounds.append(number)
    for stage, spent in {**stages, "total": total}.items():
        recording.stages.setdefault(stage, []).append(spent)


def ratios(
    subject: str, recording: Recording, baseline: str, other: Recording, *, k: int, n: int
) -> tuple[Ratio, ...]:
    """Return baseline / subject for every stage that both have, over the rounds of both."""
    common = sorted(set(recording.rounds) & set(other.rounds))
    found = []
    for stage in recording.stages:
        if stage not in other.stages:
            continue
        below = _at(recording, stage, common)
        above = _at(other, stage, common)
        if min(*below, *above) < LEAST_STAGE_MS:
            continue
        estimate = paired_ratio(above, below)
        found.append(
            Ratio(
                subject, baseline, k, n, stage,
                round(estimate.ratio, 4), round(estimate.low, 4), round(estimate.high, 4),
                estimate.samples,
            )
        )  # fmt: skip
    return tuple(found)


def _at(recording: Recording, stage: str, rounds: Sequence[int]) -> list[float]:
    by_round: Mapping[int, float] = dict(
        zip(recording.rounds, recording.stages[stage], strict=True)
    )
    return [by_round[number] for number in rounds]
