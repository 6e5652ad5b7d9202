"""Pieces of a benchmark's page: cards, tables, and numbers as text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = [
    "DASH",
    "MEBI",
    "TIMES",
    "cards",
    "error",
    "judged",
    "mebibytes",
    "milliseconds",
    "number",
    "structures",
    "table",
]

MEBI = 2**20
DASH, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


def cards(shown: Sequence[tuple[str, str, str, str]]) -> str:
    """Return cards from label, value, note and CSS colour."""
    html = "".join(
        f'<div class="figure" style="--c:{fill}"><span>{escape(label)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for label, value, note, fill in shown
    )
    return f'<section class="figures">{html}</section>'


def table(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[str], str]]) -> str:
    """Return a table from column titles and rows of name, cells (HTML) and CSS class."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(
        f'<tr class="{escape(role)}"><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells, role in rows
    )
    return (
        f'<div class="scroll"><table class="narrow"><thead><tr>{head}</tr></thead><tbody>{body}'
        "</tbody></table></div>"
    )


def structures(n: int) -> str:
    """Return how many structures."""
    return f"{n} structure{'' if n == 1 else 's'}"


def number(value: float) -> str:
    """Return three digits, or all before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def milliseconds(value: float) -> str:
    """Return a duration with its unit."""
    return f"{number(value)} ms"


def mebibytes(value: int | None, unit: str = " MiB", digits: int = 0) -> str:
    """Return bytes as MiB; a dash for None."""
    return DASH if value is None else f"{value / MEBI:,.{digits}f}{unit}"


def error(value: float | None) -> str:
    """Return a relative error; a dash for None."""
    return DASH if value is None else f"{value:.1e}"


def judged(text: str, reached: bool) -> str:
    """Return a figure that has a goal, coloured by whether it was reached."""
    return f'<span class="{"good" if reached else "bad"}">{text}</span>'
