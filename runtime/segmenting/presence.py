"""Does an image show a structure at all? What the annotated images most like it say.

SAM 2's memory attention carries a mask over even where there is nothing to carry it to, so this is
asked first. The recalled exemplars vote, weighted by the inverse square of their distance (Dudani,
The distance-weighted k-nearest-neighbor rule, IEEE Trans. SMC 1976; Shepard 1968).
"""

from __future__ import annotations

from collections.abc import Sequence

from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.segmenting.reach import SAME

__all__ = ["ABSENT_SCORE", "DOUBTFUL_SHARE", "LEAST_SHARE", "presence_share"]

ABSENT_SCORE = -10.0
"""Object score when the recalled exemplars say absent: SAM 2's logit of an unset pixel."""

LEAST_SHARE = 1 / 3
"""Of the votes, below which a structure is taken to be absent. A third and not a half: finding
nothing where there is something is the worse mistake."""
DOUBTFUL_SHARE = 1 / 2
"""Of the votes, below which a structure that is segmented nevertheless is suspect."""


def presence_share(recalled: Sequence[Match]) -> float:
    """Return the share (0..1) of the votes of those exemplars that show the structure.

    Parameters
    ----------
    recalled : the k nearest exemplars that show it, and nearer ones that lack it; none gives 0.
    """
    votes = [(r.absent, max(r.distance, SAME) ** -2) for r in recalled]
    shown = sum(weight for absent, weight in votes if not absent)
    return shown / sum(weight for _, weight in votes) if votes else 0.0
