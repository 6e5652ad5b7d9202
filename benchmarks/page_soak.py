"""The page of ``bench soak``: many queries, or services together."""

from __future__ import annotations

from html import escape

from recallseg.benchmarks.page_parts import (
    MEBI,
    TIMES,
    cards,
    judged,
    mebibytes,
    milliseconds,
    number,
    structures,
    table,
)
from recallseg.benchmarks.plots import curve
from recallseg.benchmarks.schema import Report, SoakRun, SoakSeries, TogetherRun
from recallseg.runtime.reports.pictures import colour

__all__ = ["soak_body"]

SOAK_GROWTH, SOAK_SLOWEST = 0.01, 2.0
"""Growth of memory over a soak, and slowest query by median, that are to be kept."""


def soak_body(report: Report) -> str:
    """Return what is between the head of the page and its remarks."""
    return "".join([*map(_soak_run, report.soak), *map(_together, report.together)])


def _together(run: TogetherRun) -> str:
    good, bad = "var(--good)", "var(--bad)"
    shown = [
        ("Together", f"{run.minutes:.0f} min", f"{sum(run.counts.values()):,} done", colour(1)),
        ("Failed", f"{len(run.errors)}", "of all that was done", bad if run.errors else good),
    ]
    for one in run.process:
        fill = good if one.flat else bad
        shown.append((one.name, number(one.late), f"{number(one.early)} {one.unit} before", fill))
    rows = [
        (
            one.name,
            [
                f"{run.counts.get(one.name, 0):,}",
                number(one.early),
                judged(number(one.late), one.flat),
            ],
            "runtime",
        )
        for one in run.latency
    ]
    errors = "".join(f"<p>{escape(text)}</p>" for text in run.errors)
    failed = f'<section class="remarks">{errors}</section>' if errors else ""
    plots = "".join(map(_plot, (*run.process, *run.latency)))
    return (
        f"{cards(shown)}<p class='caption'>Means of the second quarter of the run and of the last. "
        f"Memory may be 3 % more, files and threads two.</p>{failed}<section><h2>What was done</h2>"
        f"{table(['what', 'how often', 'median ms, second quarter', 'last'], rows)}"
        "<p class='caption'>Each waits for the others: all share one process. Coloured by whether "
        "the last quarter took at most half as long again.</p></section>"
        f"{plots}"
    )


def _plot(one: SoakSeries) -> str:
    points = list(zip(one.seconds, one.values, strict=True))
    if len(points) < 2:
        return ""
    drawn = curve(points, title=one.name, colour=colour(1), unit=one.unit, along="seconds")
    return f'<section><h2>{escape(one.name)}</h2><div class="card scroll">{drawn}</div></section>'


def _soak_run(run: SoakRun) -> str:
    good, bad = "var(--good)", "var(--bad)"
    kept = run.slowest_over_median <= SOAK_SLOWEST
    shown = [
        ("Queries", f"{run.queries:,}", f"{run.warm_up} to warm up", "var(--faint)"),
        (
            "Memory grew",
            f"{run.growth:+.2%}",
            f"{mebibytes(run.memory_start)} to {mebibytes(run.memory_end)}",
            good if run.growth < SOAK_GROWTH else bad,
        ),
        (
            "Slowest by median",
            f"{run.slowest_over_median:.2f} {TIMES}",
            f"{milliseconds(run.total.most)} by {milliseconds(run.total.p50)}",
            good if kept else bad,
        ),
        (
            "99 % under",
            milliseconds(run.total.p99),
            f"median {milliseconds(run.total.p50)}",
            colour(1),
        ),
    ]
    series = [(float(point.query), point.memory / MEBI) for point in run.series]
    plot = curve(series, title="Memory over queries", colour=colour(1), unit="MiB")
    return (
        f"{cards(shown)}<p class='caption'>{escape(run.subject)}, k = {run.k}, "
        f"{structures(run.n)}, {run.image_size} px. Goals: growth below {SOAK_GROWTH:.0%}, no "
        f"query slower than {SOAK_SLOWEST:g} times the median on an idle machine.</p>"
        f'<section><h2>Memory</h2><div class="card scroll">{plot}</div></section>'
    )
