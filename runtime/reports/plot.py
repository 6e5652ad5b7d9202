"""Dice by k as one inline SVG: every image a dot, median and quartiles drawn over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from recallseg.runtime.reports.pictures import colour

__all__ = ["dice_plot"]

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 250, 44, 12, 12, 44
LANE, WIDEST_LANE = 46, 100
LEAST_WIDTH = 520
MOST_DOTS = 200


def dice_plot(values: Mapping[tuple[int, str], Sequence[float]]) -> str:
    """Return a plot of Dice values by (k, structure), groups in the order given."""
    ks = list(dict.fromkeys(k for k, _ in values))
    structures = list(dict.fromkeys(name for _, name in values))
    group = LANE * len(structures) + 28
    width = max(LEAST_WIDTH, LEFT + RIGHT + group * len(ks))
    group = (width - LEFT - RIGHT) // len(ks)
    step = min(WIDEST_LANE, (group - 28) / len(structures))
    parts = [_axis(width)]
    medians: dict[str, list[tuple[float, float]]] = {}
    for column, k in enumerate(ks):
        start = LEFT + group * column
        middle = start + group / 2
        parts.append(f'<text class="tick" x="{middle:.0f}" y="{HEIGHT - 24}">k = {k}</text>')
        for lane, name in enumerate(structures):
            found = sorted(values.get((k, name), ()))
            if not found:
                continue
            x = middle + step * (lane - (len(structures) - 1) / 2)
            index = structures.index(name)
            parts.append(_lane(x, found, colour(index), f"{name}, k = {k}"))
            medians.setdefault(name, []).append((x, _y(float(np.median(found)))))
    if len(ks) > 1:
        parts[1:1] = [
            f'<polyline class="trend" style="--c:{colour(structures.index(name))}" points="'
            + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            + '"/>'
            for name, points in medians.items()
        ]
    return (
        f'<svg class="plot" viewBox="0 0 {width} {HEIGHT}" style="max-width:{width}px" role="img" '
        f'aria-label="Dice by k and structure">{"".join(parts)}</svg>'
    )


def _y(dice: float) -> float:
    return TOP + (1.0 - dice) * (HEIGHT - TOP - BOTTOM)


def _axis(width: int) -> str:
    lines = []
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        y = _y(tick)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick end" x="{LEFT - 8}" y="{y + 4:.1f}">{tick:.1f}</text>'
        )
    centre = (TOP + HEIGHT - BOTTOM) / 2
    return "".join(lines) + (
        f'<text class="tick" transform="translate(11 {centre:.0f}) rotate(-90)">Dice</text>'
        f'<text class="tick small" x="{(LEFT + width - RIGHT) / 2:.0f}" y="{HEIGHT - 6}">'
        "dots: images · box: quartiles · line: median</text>"
    )


def _lane(x: float, values: Sequence[float], fill: str, label: str) -> str:
    q1, median, q3 = (float(q) for q in np.percentile(values, [25, 50, 75]))
    step = max(1, len(values) // MOST_DOTS)
    dots = "".join(
        f'<circle cx="{x + _spread(i):.1f}" cy="{_y(value):.1f}" r="2.2"/>'
        for i, value in enumerate(values[::step])
    )
    return (
        f'<g style="--c:{fill}"><title>{escape(label)}: median {median:.3f} [{q1:.3f}, {q3:.3f}], '
        f"{len(values)} images</title>"
        f'<rect class="box" x="{x - 14:.1f}" width="28" y="{_y(q3):.1f}" '
        f'height="{max(1.0, _y(q1) - _y(q3)):.1f}" rx="3"/>{dots}'
        f'<line class="median" x1="{x - 14:.1f}" x2="{x + 14:.1f}" y1="{_y(median):.1f}" '
        f'y2="{_y(median):.1f}"/></g>'
    )


def _spread(i: int) -> float:
    """Offset of dot ``i`` across its lane: the golden ratio's multiples never line up."""
    return ((i * 0.618034) % 1.0 - 0.5) * 22
