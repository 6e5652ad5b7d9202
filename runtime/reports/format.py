"""Numbers as a report's reader wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["milliseconds", "number", "plural", "quartiles", "spent"]


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
