"""A latency histogram of fixed size, for streams that run for days."""

from __future__ import annotations

import math

__all__ = ["LatencyHistogram"]

FIRST_MS = 0.1  # upper edge of the first bucket
GROWTH = 1.05  # a percentile is right to 5 %
BUCKETS = 300  # the last one begins above 200 s


class LatencyHistogram:
    """Counts latencies in buckets that grow by 5 %; percentiles are upper edges of buckets.

    Attributes
    ----------
    count : latencies recorded.
    largest : the largest of them, in milliseconds, exactly.
    """

    def __init__(self) -> None:
        self.count = 0
        self.largest = 0.0
        self._sum = 0.0
        self._buckets = [0] * BUCKETS

    def record(self, milliseconds: float) -> None:
        """Count one latency of 0 ms or more."""
        steps = math.log(max(milliseconds, FIRST_MS) / FIRST_MS) / math.log(GROWTH)
        self._buckets[min(math.ceil(steps - 1e-9), BUCKETS - 1)] += 1
        self.count += 1
        self._sum += milliseconds
        self.largest = max(self.largest, milliseconds)

    def percentile(self, percent: float) -> float:
        """Return the latency (ms) that ``percent`` of all stay within; NaN when there is none."""
        if not self.count:
            return float("nan")
        wanted = max(1, math.ceil(self.count * percent / 100))
        seen = 0
        for index, number in enumerate(self._buckets):
            seen += number
            if seen >= wanted and index < BUCKETS - 1:  # the last one has no upper edge
                return min(FIRST_MS * GROWTH**index, self.largest)
        return self.largest

    def to_json(self) -> dict[str, float | int | None]:
        """Return count, mean, percentiles and maximum in milliseconds; None where there is none."""
        if not self.count:
            return dict.fromkeys(("mean", "p50", "p90", "p99", "max")) | {"count": 0}
        return {
            "count": self.count,
            "mean": round(self._sum / self.count, 3),
            "p50": round(self.percentile(50), 3),
            "p90": round(self.percentile(90), 3),
            "p99": round(self.percentile(99), 3),
            "max": round(self.largest, 3),
        }

    def __repr__(self) -> str:
        return (
            f"LatencyHistogram({self.count}: p50 {self.percentile(50):.1f}, "
            f"p99 {self.percentile(99):.1f}, max {self.largest:.1f} ms)"
        )
