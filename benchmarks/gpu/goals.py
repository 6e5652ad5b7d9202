"""What a GPU is to reach, in the best precision within the Dice allowed, and what it did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from recallseg.benchmarks.gpu.running import Outcome
from recallseg.benchmarks.schema import Report, Run

__all__ = ["GOALS_SCHEMA", "Goal", "judge"]

GOALS_SCHEMA = "recallseg-gpu-goals/1"
DICE_LOSS = 0.005
"""A precision counts only if the golden masks lose no more."""
_P50 = {1024: 6.0, 512: 3.0}
_GROWTH = {1024: 2.5, 512: 2.0}
_TAIL = 1.2
_EAGER, _COMPILED = 3.0, 1.5
_RECORDED = {1024: 1.3, 512: 1.5}


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
    runs: dict[str, list[Run]] = {"queries": [], "baseline": []}
    for outcome in outcomes:
        kind = outcome.piece.partition("-")[0]
        if outcome.state == "measured" and kind in runs:
            runs[kind] += Report.from_json(outcome.found).runs
    own = [run for run in runs["queries"] if run.n == 1 and _is_exact_enough(run)]
    others = [
        run for run in runs["baseline"] if run.n == 1 and run.k == 4 and run.engine == "torch"
    ]
    goals: list[Goal] = []
    for size in (1024, 512):
        goals += _of_size(
            size,
            [run for run in own if run.image_size == size],
            [run for run in others if run.image_size == size],
        )
    return goals


def _is_exact_enough(run: Run) -> bool:
    dice = run.quality.golden_dice
    return dice is not None and dice >= 1.0 - DICE_LOSS


def _of_size(size: int, runs: list[Run], others: list[Run]) -> Iterator[Goal]:
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
    for what, least, names in (
        ("torch-cached", _EAGER, ("torch-cached",)),
        # In whichever precision is its fastest.
        ("torch-compile", _COMPILED, ("torch-compile", "torch-compile-fp16")),
        ("torch-graphs-fp16", _RECORDED[size], ("torch-graphs-fp16",)),
    ):
        known = [run.total.p50 for run in others if run.subject in names]
        times = min(known) / p50 if known and p50 else None
        yield Goal(
            f"{where}, times as fast as {what}{name}",
            f"at least {least:g}",
            times,
            None if times is None else times >= least,
        )


def _at_most(name: str, found: float | None, most: float) -> Goal:
    return Goal(name, f"at most {most:g}", found, None if found is None else found <= most)
