"""Numbers and text as a report's reader wants them; how its pages look, and what they may do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

__all__ = ["POLICY", "STYLE", "csv_text", "milliseconds", "number", "plural", "quartiles", "spent"]

POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'\">"
)
"""What a page of ours may do: show itself. Names in it come from others' files; should one ever get
past the escaping, it can run nothing, load nothing and send nothing (W3C CSP, level 3)."""
STYLE = Path(__file__).parent / "templates" / "report.css"
"""How pages look."""
_FORMULA = (*"=+-@\t\r\n", *"\uff1d\uff0b\uff0d\uff20")  # wide ones count in East Asia


def csv_text(text: str) -> str:
    """Return text that a spreadsheet takes for text, though it begins as a formula does.

    An apostrophe goes before it, as OWASP advises ("CSV Injection").
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def number(value: float, digits: int) -> str:
    """Return a number with ``digits`` decimals; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def quartiles(spread: Mapping[str, float], digits: int) -> str:
    """Return the quartiles of a spread in brackets."""
    if math.isnan(spread["median"]):
        return "no image"
    return f"[{spread['q1']:.{digits}f}, {spread['q3']:.{digits}f}]"


def milliseconds(value: float) -> str:
    """Return a duration, to the digits that mean something."""
    return f"{number(value, 0 if value >= 100 else 1)} ms"


def spent(stage: Mapping[str, float] | None) -> str:
    """Return median and, small, the 90th percentile of a stage."""
    if stage is None:
        return "-"
    digits = 1 if stage["p50"] < 100 else 0
    return f"{stage['p50']:.{digits}f} <small>{stage['p90']:.{digits}f}</small>"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
