"""Line plots of mean Dice as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from recallseg.runtime.reports.pictures import colour

__all__ = ["Line", "line_plot"]

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 10, 40
TICKS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

Line = Mapping[int, float]
"""Mean Dice by k, or by number of annotated images."""


def line_plot(lines: Sequence[tuple[str, int, str, Line]], label: str, xs: Sequence[int]) -> str:
    """Return an SVG with one line each; x places are evenly spaced, as k doubles.

    Parameters
    ----------
    lines : name, index of the structure's colour, dash pattern (empty: solid), values by x.
    label : of the x axis.
    xs : all x values, ascending.
    """
    width = WIDTH - LEFT - RIGHT
    place = {x: LEFT + width * (i + 0.5) / len(xs) for i, x in enumerate(xs)}
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(t):.1f}" y2="{_y(t):.1f}"/>'
        f'<text class="tick end" x="{LEFT - 7}" y="{_y(t) + 4:.1f}">{t:.1f}</text>'
        for t in TICKS
    ]
    parts += [
        f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 22}">{x}</text>' for x, at in place.items()
    ]
    parts.append(
        f'<text class="tick small" x="{LEFT + width / 2:.0f}" y="{HEIGHT - 6}">'
        f"{escape(label)}</text>"
    )
    for name, index, dash, values in lines:
        points = [(place[x], _y(values[x]), x) for x in xs if x in values]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        pattern = f' stroke-dasharray="{dash}"' if dash else ""
        dots = "".join(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{escape(name)}, {x}: '
            f"{values[x]:.3f}</title></circle>"
            for px, py, x in points
        )
        parts.append(
            f'<g style="--c:{colour(index)}"><polyline class="trend" stroke-width="2"{pattern} '
            f'points="{path}"/>{dots}</g>'
        )
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:{WIDTH}px" role="img" '
        f'aria-label="Mean Dice by {escape(label)}">{"".join(parts)}</svg>'
    )


def _y(dice: float) -> float:
    return TOP + (1.0 - dice) * (HEIGHT - TOP - BOTTOM)
