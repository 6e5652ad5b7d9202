"""What a GPU is to reach, in the best precision within the Dice allowed, and what it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from recallseg.benchmarks.gpu.pieces import Outcome
from recallseg.benchmarks.schema import Ratio, Report, Run

__all__ = ["Goal", "judge"]

DICE_LOSS = 0.005
"""A precision counts only if the golden masks lose no more."""
_P50 = {1024: 8.0, 512: 4.0}
_GROWTH = {1024: 2.5, 512: 2.0}
_TAIL = 1.2
_EAGER, _COMPILED = 3.0, 1.5


@dataclass(frozen=True)
class Goal:
    """``found`` is None where nothing was measured; ``met`` too then."""

    name: str
    wanted: str
    found: float | None
    met: bool | None

    def __str__(self) -> str:
        if self.found is None:
            return f"not measured  {self.name}: {self.wanted}"
        return (
            f"{'met' if self.met else 'MISSED':<12}  {self.name}: {self.found:.2f}, {self.wanted}"
        )


def judge(outcomes: Iterable[Outcome]) -> list[Goal]:
    """Compare the pieces with the goals; k = 4 and one structure where nothing else is said."""
    reports = [
        Report.from_json(outcome.found)
        for outcome in outcomes
        if outcome.state == "measured" and outcome.piece.startswith("queries-")
    ]
    runs = [
        run
        for report in reports
        for run in report.runs
        if run.role == "runtime" and run.n == 1 and _is_exact_enough(run)
    ]
    ratios = [ratio for report in reports for ratio in report.ratios if ratio.stage == "total"]
    sizes = {id(ratio): report for report in reports for ratio in report.ratios}
    goals: list[Goal] = []
    for size in (1024, 512):
        here = [run for run in runs if run.image_size == size]
        own = [
            ratio
            for ratio in ratios
            if (bundle := sizes[id(ratio)].bundle) is not None and bundle.image_size == size
        ]
        goals += _of_size(size, here, own)
    return goals


def _is_exact_enough(run: Run) -> bool:
    dice = run.quality.golden_dice
    return dice is not None and dice >= 1.0 - DICE_LOSS


def _of_size(size: int, runs: list[Run], ratios: list[Ratio]) -> Iterator[Goal]:
    best = min((run for run in runs if run.k == 4), key=lambda run: run.total.p50, default=None)
    where = f"{size} px"
    name = f" ({best.subject})" if best else ""
    p50 = best.total.p50 if best else None
    yield _at_most(f"{where}, p50 in ms{name}", p50, _P50[size])
    tail = best.total.p99 / best.total.p50 if best else None
    yield _at_most(f"{where}, p99 over p50{name}", tail, _TAIL)
    same = {run.k: run for run in runs if best is not None and run.subject == best.subject}
    growth = same[16].total.p50 / same[1].total.p50 if {1, 16} <= same.keys() else None
    yield _at_most(f"{where}, k = 16 over k = 1{name}", growth, _GROWTH[size])
    for baseline, least in (("torch-cached", _EAGER), ("torch-compile", _COMPILED)):
        # In its best precision; the baselines' medians stand beside one subject, measured with it.
        known = [
            ratio.ratio * _p50_of(runs, ratio)
            for ratio in ratios
            if ratio.k == 4
            and ratio.n == 1
            and (
                ratio.baseline == baseline
                or (baseline == "torch-compile" and ratio.baseline.startswith(baseline))
            )
        ]
        times = min(known) / p50 if known and p50 else None
        yield Goal(
            f"{where}, times as fast as {baseline}{name}",
            f"at least {least:g}",
            times,
            None if times is None else times >= least,
        )


def _p50_of(runs: list[Run], ratio: Ratio) -> float:
    for run in runs:
        if (run.subject, run.k, run.n) == (ratio.subject, ratio.k, ratio.n):
            return run.total.p50
    return float("inf")


def _at_most(name: str, found: float | None, most: float) -> Goal:
    return Goal(name, f"at most {most:g}", found, None if found is None else found <= most)
