"""Percentiles and intervals of ratios."""

from __future__ import annotations

import numpy as np
import pytest

from recallseg.benchmarks.statistics import paired_ratio, percentile, unpaired_ratio
from recallseg.engines.errors import InputError


def test_percentile_is_linear_between_samples() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([7.0], 99) == 7.0


def test_no_samples_are_refused() -> None:
    with pytest.raises(InputError, match="no samples"):
        percentile([], 50)
    with pytest.raises(InputError, match="above 0"):
        unpaired_ratio([], [1.0])
    with pytest.raises(InputError, match="above 0"):
        paired_ratio([1.0, 0.0], [1.0, 1.0])


def test_paired_samples_must_have_partners() -> None:
    with pytest.raises(InputError, match="equal lengths, got 2 and 1"):
        paired_ratio([1.0, 2.0], [1.0])


def test_pairing_removes_what_disturbs_both() -> None:
    rng = np.random.default_rng(0)
    weather = rng.lognormal(0, 0.5, 40)  # the machine's, the same for both within a round
    fast, slow = weather, 2 * weather
    paired, unpaired = paired_ratio(slow, fast), unpaired_ratio(slow, fast)
    assert paired.ratio == pytest.approx(2.0)
    assert paired.low == pytest.approx(2.0)
    assert paired.high == pytest.approx(2.0)
    assert unpaired.high - unpaired.low > 0.3


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        a, b = 1.5 * rng.lognormal(0, 0.1, 21), rng.lognormal(0, 0.1, 21)
        estimate = unpaired_ratio(a, b)
        covered += estimate.low <= 1.5 <= estimate.high
    assert 85 <= covered <= 100


def test_interval_is_the_same_every_time() -> None:
    samples = [1.0, 1.2, 0.9, 1.1, 1.3]
    assert paired_ratio(samples, samples[::-1]) == paired_ratio(samples, samples[::-1])
