"""From samples to statements: percentiles, and ratios of medians with an interval.

Latencies are skewed and a busy machine adds outliers on one side, so everything here rests on
medians; how far a median can be trusted is found by resampling (the bootstrap: Efron and
Tibshirani, "An Introduction to the Bootstrap", chapter 13), which assumes no distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError

__all__ = ["CONFIDENCE", "RatioEstimate", "median", "paired_ratio", "percentile", "unpaired_ratio"]

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Enough for the ends of a 95 % interval to be steady to about 1 % of its width."""
_SEED = 20240816  # the interval of a given set of samples is the same every time
_BLOCK = 4_000_000  # elements resampled at a time: 32 MB of indices


@dataclass(frozen=True)
class RatioEstimate:
    """A ratio of two medians, the ends of its interval, and how many samples it rests on."""

    ratio: float
    low: float
    high: float
    samples: int


def percentile(samples: Sequence[float], q: float) -> float:
    """Return the ``q``-th percentile (0..100), linear between neighbours; InputError if empty."""
    if not len(samples):
        raise InputError(
            "there are no samples to take a percentile of; measure at least one query."
        )
    return float(np.percentile(np.asarray(samples, np.float64), q))


def median(samples: Sequence[float]) -> float:
    """Return the median; InputError if there are no samples."""
    return percentile(samples, 50)


def paired_ratio(
    above: Sequence[float], below: Sequence[float], *, confidence: float = CONFIDENCE
) -> RatioEstimate:
    """Return median(above) / median(below) for samples taken side by side.

    Parameters
    ----------
    above, below : one pair per round. Rounds are resampled as pairs: what disturbed a round
        disturbed both, and then widens the interval less than it would alone.
    confidence : share of intervals that hold the true ratio.

    Raises
    ------
    InputError
        If the lengths differ, there is no pair, or a sample is not positive.
    """
    a, b = _checked(above), _checked(below)
    if len(a) != len(b):
        raise InputError(f"paired samples must have equal lengths, got {len(a)} and {len(b)}.")
    rng = np.random.default_rng(_SEED)
    ratios = np.concatenate(
        [
            np.median(a[chosen], axis=1) / np.median(b[chosen], axis=1)
            for chosen in _choices(rng, len(a))
        ]
    )
    return _estimate(a, b, ratios, len(a), confidence)


def unpaired_ratio(
    above: Sequence[float], below: Sequence[float], *, confidence: float = CONFIDENCE
) -> RatioEstimate:
    """Return median(above) / median(below) for samples of two separate runs.

    Raises
    ------
    InputError
        If one has no samples, or a sample is not positive.
    """
    a, b = _checked(above), _checked(below)
    rng = np.random.default_rng(_SEED)
    upper = np.concatenate([np.median(a[chosen], axis=1) for chosen in _choices(rng, len(a))])
    lower = np.concatenate([np.median(b[chosen], axis=1) for chosen in _choices(rng, len(b))])
    return _estimate(a, b, upper / lower, min(len(a), len(b)), confidence)


def _checked(samples: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(samples, np.float64)
    if not values.size or not np.isfinite(values).all() or (values <= 0).any():
        raise InputError(
            f"a ratio needs samples that are finite and above 0, got {values.size} of them"
            f"{f', the least {values.min()}' if values.size else ''}."
        )
    return values


def _choices(rng: np.random.Generator, count: int) -> list[NDArray[np.int64]]:
    """Return RESAMPLES rows of ``count`` positions, in blocks that bound the memory."""
    rows = max(1, min(RESAMPLES, _BLOCK // count))
    sizes = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return [rng.integers(0, count, (size, count)) for size in sizes]


def _estimate(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    ratios: NDArray[np.float64],
    samples: int,
    confidence: float,
) -> RatioEstimate:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return RatioEstimate(float(np.median(a) / np.median(b)), float(low), float(high), samples)
