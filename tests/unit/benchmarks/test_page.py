"""The page: everything drawn, nothing fetched, nothing unescaped."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from support.bench_reports import make_full, make_retrieval, make_soak, make_together

from recallseg.benchmarks.page import render_page
from recallseg.benchmarks.plots import Bar, Range, curve, range_plot, stacked_bars
from recallseg.benchmarks.schema import Report


@pytest.mark.parametrize(
    "report", [make_full(), make_retrieval(), make_soak(), make_together()], ids=lambda r: r.kind
)
def test_page_is_self_contained_and_its_plots_are_well_formed(report: Report) -> None:
    page = render_page(report)
    assert not re.search(r"https?:|<script|@import|url\(", page)
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    assert plots
    for plot in plots:
        ElementTree.fromstring(plot)
    assert not re.search(r"\bnan\b", page, re.I)


def test_names_are_escaped() -> None:
    page = render_page(make_full())
    assert "RANDOM &lt;weights&gt;" in page
    assert "RANDOM <weights>" not in page


def test_latency_page_shows_ratio_remarks_and_quality() -> None:
    page = render_page(make_full())
    for text in ("torch-cached", "2.99", "a remark", "busy", "0.9100", "1.0e-06", "100 MiB"):
        assert text in page


def test_goals_are_judged_at_a_million_only() -> None:
    assert 'class="good">0.9950' in render_page(make_retrieval(recall=0.995))
    assert 'class="bad">0.9800' in render_page(make_retrieval(recall=0.98))
    assert 'class="bad">9.' in render_page(make_retrieval(p99=9.9))


def test_services_together_are_judged() -> None:
    page = render_page(make_together())
    assert "1,005" in page
    assert "900" in page
    assert "var(--bad)" not in page.split("<main>")[1]
    for bad in (make_together(late=1040.0), make_together(errors=("queries: <lost>",))):
        page = render_page(bad)
        assert "var(--bad)" in page.split("<main>")[1]
    assert "&lt;lost&gt;" in page


def test_bars_are_drawn_to_scale_and_cut_visibly() -> None:
    bars = [
        Bar("g", "short", {"encode": 50.0, "attend": 25.0}, 75.0),
        Bar("g", "long", {"encode": 500.0}, 500.0),
    ]
    plot = stacked_bars(bars, {"encode": "red", "attend": "blue"}, longest=100.0)
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', plot)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    assert widths[2] == pytest.approx(2 * widths[0], rel=0.01)
    assert plot.count('class="cut"') == 1
    assert "500 ms" in plot


def test_ranges_are_placed_by_their_logarithm() -> None:
    rows = [Range("g", str(v), v, v, v, "", "red") for v in (1.0, 2.0, 4.0)]
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', range_plot(rows, title="t"))]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert places[0] < places[1]


def test_curve_begins_at_zero() -> None:
    plot = curve([(0, 100.0), (10, 101.0)], title="t", colour="red", unit="MiB")
    heights = [float(y) for y in re.findall(r",([\d.]+)", re.findall(r'points="([^"]*)"', plot)[0])]
    assert abs(heights[0] - heights[1]) < 5  # one per cent looks like one per cent
