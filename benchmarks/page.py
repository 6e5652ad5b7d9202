"""``bench.html``: one self-contained page, in the style of the evaluation's report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from recallseg.benchmarks.page_latency import latency_body
from recallseg.benchmarks.page_parts import (
    DASH,
    judged,
    mebibytes,
    number,
    table,
)
from recallseg.benchmarks.page_soak import soak_body
from recallseg.benchmarks.plots import Range, range_plot
from recallseg.benchmarks.schema import Report, RetrievalRun
from recallseg.runtime.reports.format import POLICY, STYLE
from recallseg.runtime.reports.pictures import colour

__all__ = ["GOALS", "render_page"]

BENCH_STYLE = Path(__file__).parent / "templates" / "bench.css"

GOALS = {"recall": 0.99, "p99_ms": 3.0, "open_s": 0.5}
"""What search in a million embeddings is to reach."""
GOAL_SIZE = 1_000_000


def render_page(report: Report) -> str:
    """Return the page of any kind of benchmark."""
    body = {"latency": latency_body, "retrieval": _retrieval, "soak": soak_body}[report.kind](
        report
    )
    title = _title(report)
    style = STYLE.read_text(encoding="utf-8") + BENCH_STYLE.read_text(encoding="utf-8")
    body = f"{_head(report, title)}{body}{_remarks(report)}{_provenance(report)}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{POLICY}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"{body}</main></body></html>\n"
    )


def _title(report: Report) -> str:
    if report.kind == "retrieval":
        return "Search in large libraries"
    name = report.bundle.name if report.bundle else ""
    what = "Latency of a query" if report.kind == "latency" else "Soak test"
    return f"{what}, bundle {name}"


def _head(report: Report, title: str) -> str:
    machine = report.machine
    facts = [str(machine.get("processor", "")), f"{machine.get('usable_cores')} cores usable"]
    threads = report.settings.get("threads")
    if threads:
        facts.append(f"{threads} thread{'' if threads == 1 else 's'}")
    notice = ""
    if report.bundle is not None:
        b = report.bundle
        facts = [f"{b.sam2} at {b.image_size} px", f"{b.dinov2} at {b.embed_size} px", *facts]
        notice = f'<p class="notice">{escape(b.notice)}</p>' if b.notice else ""
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<header><p class="brand">RecallSeg</p><h1>{escape(title)}</h1>'
        f'<ul class="facts">{items}</ul>{notice}</header>'
    )


# Retrieval and soak


def _retrieval(report: Report) -> str:
    titles = [
        "embeddings", "method", "recall", "p50 ms", "p90", "p99", "index p50", "index p99",
        "index MiB", "catalog MiB", "fill s", "build s", "open s", "open cold s",
    ]  # fmt: skip
    rows = []
    for r in report.retrieval:
        cells = [
            r.method,
            _goal(f"{r.recall:.4f}", r, r.recall >= GOALS["recall"]),
            number(r.search.p50),
            number(r.search.p90),
            _goal(number(r.search.p99), r, r.search.p99 <= GOALS["p99_ms"]),
            number(r.index.p50),
            number(r.index.p99),
            mebibytes(r.index_bytes, "", 1),
            mebibytes(r.catalog_bytes, "", 1),
            number(r.fill_s),
            number(r.build_s),
            _goal(f"{r.open_s:.3f}", r, r.open_s <= GOALS["open_s"]),
            DASH if r.open_cold_s is None else f"{r.open_cold_s:.3f}",
        ]
        rows.append((f"{r.size:,}", cells, "runtime"))
    k, d = report.retrieval[0].k, report.retrieval[0].dimension
    return (
        f"<section><h2>{k} nearest of embeddings with {d} numbers</h2>{table(titles, rows)}"
        f'<p class="caption">Recall: share of the true {k} nearest that were found. p50 to p99: '
        "Library.search, all that a query pays; index: without keys and places. Open: to the first "
        "result, files in the page cache; cold: after the system was asked to drop them. Goals at "
        f"{GOAL_SIZE:,}: recall {GOALS['recall']}, p99 {GOALS['p99_ms']:g} ms, open "
        f"{GOALS['open_s']:g} s.</p></section>{_retrieval_plot(report.retrieval)}"
    )


def _goal(text: str, run: RetrievalRun, reached: bool) -> str:
    """Return a figure, coloured where there is a goal for this size."""
    return judged(text, reached) if run.size == GOAL_SIZE else text


def _retrieval_plot(runs: Sequence[RetrievalRun]) -> str:
    rows = [
        Range(
            f"{run.size:,} embeddings",
            name,
            spent.p50,
            spent.p50,
            spent.p99,
            f"{number(spent.p50)} to {number(spent.p99)} ms",
            colour(i),
        )
        for run in runs
        for i, (name, spent) in enumerate((("search", run.search), ("index", run.index)))
    ]
    plot = range_plot(rows, title="Milliseconds of a search", one=False)
    return (
        f'<section><h2>From the median to the 99th percentile</h2><div class="card scroll">{plot}'
        '</div><p class="caption">Milliseconds.</p></section>'
    )


def _remarks(report: Report) -> str:
    found = dict.fromkeys([*report.remarks, *_run_remarks(report)])
    inside = "".join(f"<p>{escape(remark)}</p>" for remark in found)
    return f'<section class="remarks">{inside}</section>' if found else ""


def _run_remarks(report: Report) -> Iterator[str]:
    for run in report.runs:
        for remark in run.remarks:
            yield f"{run.subject} (k = {run.k}, n = {run.n}): {remark}"


def _provenance(report: Report) -> str:
    machine, conditions = report.machine, report.conditions
    rows: dict[str, Any] = {}
    if report.bundle is not None:
        b = report.bundle
        rows["Bundle"] = f"{b.name}, weights {b.source}, identity {b.identity}"
    memory = machine.get("memory_bytes") or math.nan
    cores = f"{machine.get('usable_cores')} of {machine.get('cores')} cores"
    rows["Machine"] = f"{machine.get('processor')}, {cores}, {memory / 2**30:.1f} GiB"
    rows["System"] = (
        f"{machine.get('system')}, {machine.get('architecture')}, Python {machine.get('python')}"
    )
    rows |= {
        name.replace("_", " ").capitalize(): _plain(value)
        for name, value in [*conditions.items(), *report.settings.items()]
    }
    rows["Packages"] = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    rows["Finished"] = report.created
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items()
    )
    return f'<section class="provenance"><h2>Where and how</h2><dl>{items}</dl></section>'


def _plain(value: Any) -> str:
    if value is None:
        return "not known here"
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in value) or "none"
    return str(value)
