"""``bench compare A B``: what got slower from A to B, beyond noise?

Medians are compared by their bootstrap interval at 99 % (a report holds dozens of stages, and at
95 % one in forty would seem slower by chance), and a change must exceed a margin: two runs of the
same code differ by a few per cent, because processes differ in where their memory lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from recallseg.benchmarks.schema import Distribution, Report
from recallseg.benchmarks.statistics import unpaired_ratio
from recallseg.engines.errors import InputError

__all__ = ["MARGIN", "Change", "Comparison", "compare"]

MARGIN = 0.05
"""Relative change below which nothing is named."""
CONFIDENCE = 0.99
LEAST_MS = 0.05
"""Milliseconds by which a median must change: below, clocks and page tables are compared."""
LEAST_RECALL = 0.002
"""Loss of recall that is named."""
MEMORY_MARGIN = 0.05
"""Relative growth of memory that is named; it is measured once and repeats to about 1 %."""


@dataclass(frozen=True)
class Change:
    """One figure in both reports.

    ``ratio`` is after / before, with the ends of its interval (which are the ratio itself where
    there is only one measurement). ``unit`` is ``ms``, ``bytes`` or ``recall``.
    """

    what: str
    figure: str
    unit: str
    before: float
    after: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What changed from A to B.

    Attributes
    ----------
    worse, better : beyond noise and margin, the largest change first.
    same : how many figures did not change beyond noise.
    missing : what only one of the reports has.
    remarks : what makes the comparison doubtful.
    """

    worse: tuple[Change, ...]
    better: tuple[Change, ...]
    same: int
    missing: tuple[str, ...]
    remarks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Figure:
    unit: str
    value: float
    samples: Distribution | None = None


def compare(before: Report, after: Report, *, margin: float = MARGIN) -> Comparison:
    """Compare two reports of one kind.

    Raises
    ------
    InputError
        If their kinds differ, or they have no figure in common.
    """
    if before.kind != after.kind:
        raise InputError(
            f"a benchmark of kind '{before.kind}' cannot be compared with one of kind "
            f"'{after.kind}'."
        )
    first, second = dict(_figures(before)), dict(_figures(after))
    common = [key for key in first if key in second]
    if not common:
        raise InputError(
            "the two benchmarks have nothing in common: no run with the same engine, precision, k, "
            "number of structures and image size. Measure with the same options."
        )
    worse, better = [], []
    for key in common:
        change = _change(key, first[key], second[key])
        if _beyond(change, margin, worse=True):
            worse.append(change)
        elif _beyond(change, margin, worse=False):
            better.append(change)
    missing = [
        f"{what}, {figure}: only in A" for what, figure in first if (what, figure) not in second
    ]
    missing += [
        f"{what}, {figure}: only in B" for what, figure in second if (what, figure) not in first
    ]
    return Comparison(
        tuple(sorted(worse, key=lambda change: -_severity(change))),
        tuple(sorted(better, key=lambda change: -_severity(change))),
        len(common) - len(worse) - len(better),
        tuple(missing),
        tuple(_doubts(before, after)),
    )


def _figures(report: Report) -> Iterator[tuple[tuple[str, str], _Figure]]:
    for run in report.runs:
        if run.role != "runtime":
            continue
        what = f"{run.subject} at {run.image_size} px, k = {run.k}, n = {run.n}, {run.device}"
        for stage, spent in run.stages.items():
            yield (what, stage), _Figure("ms", spent.p50, spent)
        memory = asdict(run.memory) if run.memory else {}
        for name in ("resident_peak", "workspace", "device_peak"):
            if memory.get(name):
                yield (what, name.replace("_", " ")), _Figure("bytes", float(memory[name]))
    for found in report.retrieval:
        what = f"search among {found.size:,} x {found.dimension}, k = {found.k}"
        yield (what, "search"), _Figure("ms", found.search.p50, found.search)
        yield (what, "recall"), _Figure("recall", found.recall)
        yield (what, "index bytes"), _Figure("bytes", float(max(1, found.index_bytes)))
    for soak in report.soak:
        what = f"soak, {soak.subject} at {soak.image_size} px, k = {soak.k}, n = {soak.n}"
        yield (what, "total"), _Figure("ms", soak.total.p50, soak.total)
        yield (what, "memory"), _Figure("bytes", float(soak.memory_end))
    for together in report.together:
        for one in together.latency:
            yield ("services together", one.name), _Figure("ms", one.late)


def _change(key: tuple[str, str], before: _Figure, after: _Figure) -> Change:
    what, figure = key
    ratio = after.value / before.value if before.value else float("inf")
    low = high = ratio
    if before.samples is not None and after.samples is not None and before.value and after.value:
        tiny = 1e-6  # a stage can take less than the clock resolves; ratios need more than 0
        estimate = unpaired_ratio(
            [max(sample, tiny) for sample in after.samples.samples],
            [max(sample, tiny) for sample in before.samples.samples],
            confidence=CONFIDENCE,
        )
        ratio, low, high = estimate.ratio, estimate.low, estimate.high
    return Change(what, figure, before.unit, before.value, after.value, ratio, low, high)


def _beyond(change: Change, margin: float, *, worse: bool) -> bool:
    difference = change.after - change.before
    if change.unit == "recall":
        return -difference > LEAST_RECALL if worse else difference > LEAST_RECALL
    limit = MEMORY_MARGIN if change.unit == "bytes" else margin
    if change.unit == "ms" and abs(difference) < LEAST_MS:
        return False
    return change.low > 1 + limit if worse else change.high < 1 / (1 + limit)


def _severity(change: Change) -> float:
    return max(change.ratio, 1 / change.ratio) if change.ratio > 0 else float("inf")


def _doubts(before: Report, after: Report) -> Iterator[str]:
    for name in ("processor", "usable_cores", "memory_bytes"):
        if before.machine.get(name) != after.machine.get(name):
            yield (
                f"the machines differ in {name}: {before.machine.get(name)} and "
                f"{after.machine.get(name)}"
            )
    if before.bundle and after.bundle and before.bundle.identity != after.bundle.identity:
        yield f"the bundles differ: {before.bundle.name} and {after.bundle.name}"
    for name in ("threads", "query_size", "queries_are", "embeddings_are"):
        if before.settings.get(name) != after.settings.get(name):
            yield (
                f"the settings differ in {name}: {before.settings.get(name)} and "
                f"{after.settings.get(name)}"
            )
    for letter, report in (("A", before), ("B", after)):
        for remark in report.remarks:
            yield f"{letter}: {remark}"
    baselines = {
        (run.subject, run.image_size, run.k, run.n): run.total
        for run in before.runs
        if run.role == "baseline"
    }
    for run in after.runs:
        known = baselines.get((run.subject, run.image_size, run.k, run.n))
        if run.role == "baseline" and known is not None:
            estimate = unpaired_ratio(run.total.samples, known.samples, confidence=CONFIDENCE)
            if estimate.low > 1 + MARGIN or estimate.high < 1 / (1 + MARGIN):
                yield (
                    f"the machine itself changed: {run.subject} at k = {run.k}, n = {run.n} takes "
                    f"{estimate.ratio:.2f} times as long in B as in A"
                )
