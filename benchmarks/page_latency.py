"""The page of ``bench latency``: where the time goes, what PyTorch takes, all figures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from recallseg.benchmarks.page_parts import (
    DASH,
    TIMES,
    cards,
    error,
    mebibytes,
    milliseconds,
    number,
    structures,
    table,
)
from recallseg.benchmarks.plots import Bar, Range, range_plot, stacked_bars
from recallseg.benchmarks.schema import Ratio, Report, Run
from recallseg.runtime.reports.page import STAGES
from recallseg.runtime.reports.pictures import colour

__all__ = ["latency_body"]

ORDER = ("prepare", "embed", "search", "encode", "memorize", "gather", "attend", "decode", "finish")
LABELS = {**STAGES, "memorize": "encode exemplars anew"}
COMPARED = ("total", "embed", "encode", "attend", "decode")
"""Stages whose ratios are shown; the others take next to no time on either side."""


def latency_body(report: Report) -> str:
    """Return the page's sections."""
    return (
        _latency_figures(report)
        + _stage_section(report)
        + _ratio_section(report)
        + _stage_table(report)
        + _run_table(report)
    )


def _latency_figures(report: Report) -> str:
    first = next(run for run in report.runs if run.role == "runtime")
    own = [run for run in report.runs if run.subject == first.subject]
    run = min(own, key=lambda run: (run.n, abs(run.k - 4)))
    shown = [
        (
            f"Query, {run.subject}",
            milliseconds(run.total.p50),
            f"90 % under {milliseconds(run.total.p90)}",
            colour(1),
        )
    ]
    for ratio in report.ratios:
        if (ratio.subject, ratio.k, ratio.n, ratio.stage) == (run.subject, run.k, run.n, "total"):
            shown.append(
                (
                    f"{ratio.baseline} takes",
                    f"{ratio.ratio:.2f} {TIMES}",
                    f"{ratio.low:.2f} to {ratio.high:.2f}, {ratio.rounds} rounds",
                    colour(0),
                )
            )
    if run.memory and run.memory.resident_peak:
        note = f"workspace {mebibytes(run.memory.workspace)}"
        shown.append(("Peak resident memory", mebibytes(run.memory.resident_peak), note, colour(4)))
    if run.cold_start:
        note = f"ready after {run.cold_start.ready_s:.1f} s"
        first_result = f"{run.cold_start.first_result_s:.1f} s"
        shown.append(("Cold start to first mask", first_result, note, colour(2)))
    return cards(shown) + (
        f'<p class="caption">k = {run.k}, {structures(run.n)}; medians over {len(run.rounds)} '
        "queries, one at a time.</p>"
    )


def _stage_section(report: Report) -> str:
    colours = {stage: colour(i) for i, stage in enumerate(s for s in ORDER if s != "memorize")}
    colours["memorize"] = "#7d8597"
    bars = [
        Bar(
            f"k = {run.k}, {structures(run.n)}",
            run.subject,
            {stage: run.stages[stage].p50 for stage in ORDER if stage in run.stages},
            run.total.p50,
        )
        for run in _grouped(report.runs)
    ]
    # The paper's way takes many times as long; drawn in full it would hide all the others.
    usual = [run.total.p50 for run in report.runs if "memorize" not in run.stages]
    used = [s for s in ORDER if any(s in run.stages for run in report.runs)]
    keys = "".join(
        f'<span class="key"><i style="background:{colours[s]}"></i>{escape(LABELS[s])}</span>'
        for s in used
    )
    plot = stacked_bars(bars, colours, longest=max(usual))
    return (
        f'<section><h2>Where the time goes</h2><div class="legend">{keys}</div>'
        f'<div class="card scroll">{plot}</div><p class="caption">Median of every stage in '
        "milliseconds. Bars that would not fit are cut and say their total.</p></section>"
    )


def _ratio_section(report: Report) -> str:
    baselines = list(dict.fromkeys(ratio.baseline for ratio in report.ratios))
    sections = []
    for subject in dict.fromkeys(ratio.subject for ratio in report.ratios):
        own = sorted(
            (ratio for ratio in report.ratios if ratio.subject == subject),
            key=lambda ratio: (baselines.index(ratio.baseline), ratio.n, ratio.k),
        )
        rows = [
            Range(
                ratio.baseline,
                f"k = {ratio.k}, {structures(ratio.n)}",
                ratio.ratio,
                ratio.low,
                ratio.high,
                f"{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
                colour(baselines.index(ratio.baseline)),
            )
            for ratio in own
            if ratio.stage == "total"
        ]
        plot = range_plot(rows, title="Baseline by runtime, whole queries")
        sections.append(
            f'<h3>{escape(subject)}</h3><div class="card scroll">{plot}</div>{_ratio_table(own)}'
        )
    if not sections:
        return ""
    return (
        f"<section><h2>How many times as long the baselines take</h2>{''.join(sections)}"
        '<p class="caption">Ratio of medians, baseline by runtime: to the right of the dashed line '
        "the runtime is faster. All answered the same queries in turns on the same weights with "
        "the same number of threads; the bar is the 95 % bootstrap interval over rounds.</p>"
        "</section>"
    )


def _ratio_table(own: Sequence[Ratio]) -> str:
    by_place: dict[tuple[str, int, int], dict[str, Ratio]] = {}
    for ratio in own:
        by_place.setdefault((ratio.baseline, ratio.k, ratio.n), {})[ratio.stage] = ratio
    rows = []
    for (baseline, k, n), found in by_place.items():
        cells = [str(k), str(n)]
        for stage in COMPARED:
            shown = found.get(stage)
            cells.append(
                DASH
                if shown is None
                else f"{shown.ratio:.2f} <small>{shown.low:.2f}{DASH}{shown.high:.2f}</small>"
            )
        rows.append((baseline, [*cells, str(max(r.rounds for r in found.values()))], "runtime"))
    return table(["", "k", "n", *(LABELS[stage] for stage in COMPARED), "rounds"], rows)


def _stage_table(report: Report) -> str:
    used = [s for s in ORDER if any(s in run.stages for run in report.runs)]
    titles = ["", "k", "n", *(LABELS[s] for s in used), "total"]
    rows = []
    for run in _grouped(report.runs):
        cells = [str(run.k), str(run.n)]
        for stage in [*used, "total"]:
            spent = run.stages.get(stage)
            cells.append(DASH if spent is None else f"{number(spent.p50)}")
        rows.append((run.subject, cells, run.role))
    return (
        f"<section><h2>Stages</h2>{table(titles, rows)}"
        '<p class="caption">Median in milliseconds.</p></section>'
    )


def _run_table(report: Report) -> str:
    titles = [
        "", "k", "n", "p50 ms", "p90", "p99", "slowest", "rounds", "queries/s", "peak MiB",
        "growth MiB", "workspace MiB", "cold start s", "J/query", "Δ PyTorch", "Δ golden",
        "Δ logits", "Dice",
    ]  # fmt: skip
    rows = []
    for run in _grouped(report.runs):
        m, q, t = run.memory, run.quality, run.total
        cells = [
            str(run.k),
            str(run.n),
            f"<b>{number(t.p50)}</b>",
            number(t.p90),
            number(t.p99),
            number(t.most),
            str(len(run.rounds)),
            f"{run.throughput:.2f}",
            mebibytes(m.resident_peak, "") if m else DASH,
            mebibytes(m.resident_growth, "", 1) if m else DASH,
            mebibytes(m.workspace, "") if m else DASH,
            f"{run.cold_start.first_result_s:.2f}" if run.cold_start else DASH,
            f"{run.energy.joules:.1f}" if run.energy else DASH,
            error(q.parity_error),
            error(q.golden_error),
            error(q.logit_difference),
            DASH if q.dice is None else f"{q.dice:.4f}",
        ]
        rows.append((run.subject, cells, run.role))
    return (
        f"<section><h2>Whole queries, memory, quality</h2>{table(titles, rows)}"
        '<p class="caption">Peak, growth and cold start were measured in a process of its own for '
        "each runtime. Δ PyTorch: largest relative error of the exported graphs, from the bundle's "
        "manifest. Δ golden: the engine's, against the bundle's golden tensors, in this run. "
        "Δ logits: against the first runtime, same query, same exemplars. Dice: as given by the "
        "caller. A dash: not measured, or not readable on this machine.</p></section>"
    )


def _grouped(runs: Sequence[Run]) -> list[Run]:
    """Return runs by n and k, otherwise in the order in which they were measured."""
    return sorted(runs, key=lambda run: (run.n, run.k))
