"""Curves of mean Dice by corrections, a panel for each data set, as one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from recallseg.benchmarks.accuracy.annotator import BOX, CLICKS, Clicked

__all__ = ["click_curves"]

WIDTH, HEIGHT, LEFT, TOP, COLUMNS = 250, 190, 34, 24, 4
WAYS = {
    (0, CLICKS): ("no library", "#555555"),
    (0, BOX): ("a box first", "#c05a00"),
    (1, CLICKS): ("1 annotated", "#7fb2d9"),
    (4, CLICKS): ("4 annotated", "#2f7fbf"),
    (16, CLICKS): ("16 annotated", "#0b3c6b"),
}
"""Name and colour of a curve, by annotated images and how a person starts."""


def click_curves(found: Sequence[Clicked]) -> str:
    """Return an SVG of its own: Dice 0 to 1 over corrections, a curve for each way."""
    most = max(one.clicks for one in found)
    datasets = list(dict.fromkeys(one.dataset for one in found))
    rows = -(-(len(datasets) + 1) // COLUMNS)
    parts = []
    for i, dataset in enumerate(datasets):
        own = [one for one in found if one.dataset == dataset]
        parts.append(_at(i, _panel(dataset, own, most)))
    legend = "".join(
        f'<line x1="{LEFT}" x2="{LEFT + 24}" y1="{TOP + 22 * j}" y2="{TOP + 22 * j}" '
        f'stroke="{colour}" stroke-width="2"/>'
        f'<text x="{LEFT + 32}" y="{TOP + 22 * j + 4}">{name}</text>'
        for j, (name, colour) in enumerate(WAYS.values())
    )
    parts.append(_at(len(datasets), legend))
    width, height = COLUMNS * WIDTH, rows * HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="sans-serif" font-size="11"><title>Mean Dice by corrections</title>'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _at(number: int, inside: str) -> str:
    row, column = divmod(number, COLUMNS)
    return f'<g transform="translate({column * WIDTH} {row * HEIGHT})">{inside}</g>'


def _panel(title: str, own: Sequence[Clicked], most: int) -> str:
    right, bottom = WIDTH - 12, HEIGHT - 26

    def place(clicks: int, dice: float) -> tuple[float, float]:
        return LEFT + clicks / most * (right - LEFT), bottom - dice * (bottom - TOP)

    parts = [f'<text x="{LEFT}" y="15" font-weight="bold">{escape(title)}</text>']
    for dice in (0.0, 0.5, 0.85, 1.0):
        y = place(0, dice)[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>'
            f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end" fill="#555555">{dice:g}</text>'
        )
    for clicks in (0, most // 2, most):
        x = place(clicks, 0)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle" fill="#555555">{clicks}'
            "</text>"
        )
    for (annotated, start), (_, colour) in WAYS.items():
        these = [one for one in own if (one.annotated, one.start) == (annotated, start)]
        line = [
            place(c, float(np.mean([one.dice for one in these if one.clicks == c])))
            for c in range(most + 1)
            if any(one.clicks == c for one in these)
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
    return "".join(parts)
