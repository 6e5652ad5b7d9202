"""What is normal for this library? Thresholds by leaving one exemplar out at a time.

Each exemplar is treated as a query to the others. A new query whose score is more extreme than the
exemplars' own is flagged. The threshold is the conformal one: with N exemplars, the
ceil((N + 1)(1 - alpha))-th smallest score, so that at most alpha of the images that are like the
library (or 1 / (N + 1), whichever is more) are flagged without cause (Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World", chapter 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALPHA", "MIN_EXEMPLARS", "Thresholds", "conformal_upper", "nearest_other"]

ALPHA = 0.05
"""Share of images like the library's own that may be flagged without cause."""
MIN_EXEMPLARS = 4
"""Fewer scores than this say nothing about what is normal."""
MOST_LEFT_OUT = 1024
"""Exemplars that are compared with all others: a threshold needs no more in the largest library."""
_BLOCK = 256  # rows of the distance matrix at a time, to bound memory for large libraries


@dataclass(frozen=True)
class Thresholds:
    """Limits for one structure; None where nothing could be calibrated.

    Attributes
    ----------
    distance : largest usual cosine distance to the nearest exemplar.
    iou : least usual IoU estimate.
    exemplars : how many were left out in turn.
    dice : median Dice of the left-out exemplars with their own masks, if they were segmented.
    """

    distance: float | None = None
    iou: float | None = None
    exemplars: int = 0
    dice: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields for storage."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Thresholds:
        """Rebuild from storage."""
        return cls(**data)


def conformal_upper(
    scores: NDArray[np.float64] | list[float], alpha: float = ALPHA
) -> float | None:
    """Return what at most ``alpha`` of exchangeable new scores exceed; None if too few."""
    if len(scores) < MIN_EXEMPLARS:
        return None
    ordered = np.sort(np.asarray(scores, np.float64))
    rank = min(len(ordered), math.ceil((len(ordered) + 1) * (1 - alpha)))
    return float(ordered[rank - 1])


def nearest_other(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine distances of embeddings to the nearest of the others.

    Parameters
    ----------
    embeddings : NxD of unit length, N at least 2.

    Returns
    -------
    ndarray
        N distances, or those of ``MOST_LEFT_OUT`` evenly chosen ones if there are more.
    """
    count = min(len(embeddings), MOST_LEFT_OUT)
    chosen = np.linspace(0, len(embeddings) - 1, count).round().astype(int)
    nearest = np.empty(count, np.float64)
    for start in range(0, count, _BLOCK):
        rows = chosen[start : start + _BLOCK]
        similarity = embeddings[rows] @ embeddings.T
        similarity[np.arange(len(rows)), rows] = -np.inf
        nearest[start : start + len(rows)] = 1.0 - similarity.max(axis=1)
    return nearest
