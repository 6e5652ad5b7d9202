"""Inline SVG of a benchmark's page: stacked bars, ranges, one curve. No scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "Range", "curve", "range_plot", "stacked_bars"]

WIDTH, LEFT, RIGHT = 1120, 230, 120
ROW, GAP, HEAD = 22, 12, 26
TICKS = 6


@dataclass(frozen=True)
class Bar:
    """One bar: ``parts`` are lengths by stage, ``total`` may exceed their sum."""

    group: str
    name: str
    parts: Mapping[str, float]
    total: float


@dataclass(frozen=True)
class Range:
    """One point with an interval; ``colour`` is a CSS colour."""

    group: str
    name: str
    value: float
    low: float
    high: float
    label: str
    colour: str


def stacked_bars(bars: Sequence[Bar], colours: Mapping[str, str], *, longest: float) -> str:
    """Return horizontal bars in milliseconds, in groups.

    Parameters
    ----------
    bars : those of a group must follow each other.
    colours : CSS colour by stage.
    longest : end of the axis; longer bars are cut, visibly, and say their total.
    """
    step = _nice(longest / TICKS)
    end = math.ceil(longest / step) * step
    scale = (WIDTH - LEFT - RIGHT) / end
    parts, y, group = [], 0.0, None
    for bar in bars:
        if bar.group != group:
            y += GAP if group is not None else 0
            parts.append(f'<text class="group" x="0" y="{y + 16:.0f}">{escape(bar.group)}</text>')
            y, group = y + HEAD, bar.group
        parts.append(_bar(bar, y, scale, end, colours))
        y += ROW
    ticks = "".join(
        f'<line class="grid" x1="{LEFT + value * scale:.1f}" '
        f'x2="{LEFT + value * scale:.1f}" y1="{HEAD}" y2="{y + 2:.0f}"/>'
        f'<text class="tick" x="{LEFT + value * scale:.1f}" y="{y + 18:.0f}">'
        f"{_short(value)}{' ms' if value == 0 else ''}</text>"
        for value in (step * i for i in range(round(end / step) + 1))
    )
    return _svg("bars", y + 24, "Milliseconds by stage", ticks + "".join(parts))


def _bar(bar: Bar, y: float, scale: float, end: float, colours: Mapping[str, str]) -> str:
    x, drawn = float(LEFT), 0.0
    parts = [f'<text class="name" x="{LEFT - 10}" y="{y + 15:.0f}">{escape(bar.name)}</text>']
    rest = max(0.0, bar.total - sum(bar.parts.values()))
    for stage, length in [*bar.parts.items(), ("other", rest)]:
        shown = min(length, end - drawn)
        if shown * scale < 0.3:
            drawn += max(0.0, shown)
            x += max(0.0, shown) * scale
            continue
        style = f'style="--c:{colours[stage]}"' if stage in colours else 'class="other"'
        parts.append(
            f'<rect {style} x="{x:.1f}" y="{y + 2:.0f}" width="{shown * scale:.1f}" '
            f'height="{ROW - 5}"><title>{escape(stage)} {length:.1f} ms</title></rect>'
        )
        drawn, x = drawn + shown, x + shown * scale
    if bar.total > end * 1.001:
        parts.append(f'<path class="cut" d="M{x - 16:.1f} {y + ROW:.0f}l7 -{ROW}h5l-7 {ROW}z"/>')
    parts.append(
        f'<text class="value" x="{x + 8:.1f}" y="{y + 15:.0f}">{_short(bar.total)} ms</text>'
    )
    return "".join(parts)


def range_plot(rows: Sequence[Range], *, title: str, one: bool = True) -> str:
    """Return points with intervals on a logarithmic axis; ``one`` marks 1, where two are equal."""
    values = [value for row in rows for value in (row.low, row.high)] + ([1.0] if one else [])
    low, high = math.log2(min(values)) - 0.15, math.log2(max(values)) + 0.15
    scale = (WIDTH - LEFT - RIGHT) / (high - low)

    def place(value: float) -> float:
        return LEFT + (math.log2(value) - low) * scale

    parts, y, group = [], 0.0, None
    for row in rows:
        if row.group != group:
            y += GAP if group is not None else 0
            parts.append(f'<text class="group" x="0" y="{y + 16:.0f}">{escape(row.group)}</text>')
            y, group = y + HEAD, row.group
        middle = y + ROW / 2
        parts.append(
            f'<g style="--c:{row.colour}"><title>{escape(row.name)}: {escape(row.label)}</title>'
            f'<text class="name" x="{LEFT - 10}" y="{y + 15:.0f}">{escape(row.name)}</text>'
            f'<line class="span" x1="{place(row.low):.1f}" x2="{place(row.high):.1f}" '
            f'y1="{middle:.1f}" y2="{middle:.1f}"/>'
            f'<circle cx="{place(row.value):.1f}" cy="{middle:.1f}" r="4.5"/>'
            f'<text class="value" x="{place(row.high) + 12:.1f}" y="{y + 15:.0f}">'
            f"{escape(row.label)}</text></g>"
        )
        y += ROW
    ticks = "".join(
        f'<line class="{"one" if one and value == 1 else "grid"}" x1="{place(value):.1f}" '
        f'x2="{place(value):.1f}" y1="{HEAD}" y2="{y + 2:.0f}"/>'
        f'<text class="tick" x="{place(value):.1f}" y="{y + 18:.0f}">{value:g}</text>'
        for value in _log_ticks(low, high)
    )
    return _svg("ranges", y + 24, title, ticks + "".join(parts))


def curve(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    colour: str,
    unit: str,
    along: str = "queries",
) -> str:
    """Return one curve; the vertical axis starts at 0, so that growth is seen for what it is."""
    height, left = 240, 70
    right = max(x for x, _ in points) or 1.0
    step = _nice(max(y for _, y in points) / 4)
    top = math.ceil(max(y for _, y in points) / step) * step
    start = min(x for x, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - start) / ((right - start) or 1.0)
        return left + share * (WIDTH - left - 20), 10 + (1 - y / top) * (height - 50)

    lines = []
    for i in range(round(top / step) + 1):
        y = place(start, i * step)[1]
        lines.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{left - 8}" y="{y + 4:.1f}">{_short(i * step)}</text>'
        )
    shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    lines.append(f'<polyline style="--c:{colour}" points="{shown}"/>')
    lines.append(
        f'<text x="{left}" y="{height - 8}">{start:,.0f}</text>'
        f'<text class="end" x="{WIDTH - 20}" y="{height - 8}">{right:,.0f} {escape(along)}</text>'
        f'<text class="tick" transform="translate(14 {height / 2:.0f}) rotate(-90)">'
        f"{escape(unit)}</text>"
    )
    return _svg("curve", height, title, "".join(lines))


def _svg(kind: str, height: float, title: str, inside: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:.0f}" style="display:block;width:100%" '
        f'role="img" aria-label="{escape(title)}">{inside}</svg>'
    )


def _nice(step: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    base = 10.0 ** math.floor(math.log10(max(step, 1e-9)))
    return next(factor * base for factor in (1, 2, 5, 10) if factor * base >= step * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    ticks = [2.0**i for i in range(math.ceil(low), math.floor(high) + 1)]
    every = max(1, math.ceil(len(ticks) / 12))
    return [tick for tick in ticks if round(math.log2(tick)) % every == 0]


def _short(value: float) -> str:
    if value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"
