"""Which of the k nearest exemplars are near enough to help.

The k nearest are not all near. Where exemplars are slices of one body, the second nearest may lie
many times as far away as the nearest, and its mask then speaks of another place: on nuclei of the
brain k = 8 was worse than k = 1 by 0.03 to 0.10 Dice. What is left of the 8 within three times the
nearest distance was as good as k = 1 or better (export/demo_model/MODEL_CARD.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recallseg.runtime.library.exemplar import Match

__all__ = ["REACH", "SAME", "nearest", "within_reach"]

REACH = 3.0
"""Times the distance of the nearest exemplar up to which others are recalled beside it."""
SAME = 1e-6
"""Distance of an image from itself, as rounding leaves it."""


def within_reach(recalled: Sequence[Match], reach: float) -> tuple[Match, ...]:
    """Return those at most ``reach`` times as far as the nearest one that shows the structure.

    Parameters
    ----------
    recalled : in any order; kept as it is. None of them may show the structure: all stay then.
    reach : at least 1, so that the nearest always stays; infinite keeps all.
    """
    shown = [r.distance for r in recalled if not r.absent]
    if not shown:
        return tuple(recalled)
    farthest = reach * max(min(shown), SAME)
    return tuple(r for r in recalled if r.distance <= farthest)


def nearest(recalled: Sequence[Match]) -> float:
    """Return the distance to the nearest exemplar with the structure; to any if none has it.

    NaN where nothing is recalled.
    """
    distances = [r.distance for r in recalled if not r.absent] or [r.distance for r in recalled]
    return min(distances, default=float("nan"))
