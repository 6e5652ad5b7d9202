"""What to annotate next: the images that would teach a library most.

Three things speak for an image: it is far from what is annotated (*distance*), the library segments
it with doubt (*doubt*), and many others are like it (*coverage*). Farthest-first alone takes
outliers, doubt alone takes near copies of one hard image; so each choice here is the image that
brings all others nearest to something annotated, doubtful ones counting more: the greedy maximum of
a facility-location function, which is at least 63 % of the best there is (Nemhauser, Wolsey and
Fisher, 1978).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.verification import mask_dice
from recallseg.runtime.checks import check_count
from recallseg.runtime.formats.annotated_volumes import farthest_first
from recallseg.runtime.formats.images import open_image

if TYPE_CHECKING:
    from recallseg.runtime.library import Library
    from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["SAME_IMAGE", "By", "Choice", "choose_next", "doubt_of", "greedy_coverage", "rank"]

By = Literal["all", "distance", "doubt", "coverage"]
Embeddings = NDArray[np.float32]
SAME_IMAGE = 1e-4
"""Cosine distance up to which an image counts as an exemplar: an image embeds to within the
engine's rounding of itself, 1e-6 in fp32 and under 1e-4 in fp16."""
_ROWS = 1024
LEAST_DOUBT = 0.05
"""What an image counts of which the library has no doubt at all: it may be wrong without a word."""


@dataclass(frozen=True)
class Choice:
    """One image to annotate.

    Attributes
    ----------
    name : as it was given.
    distance : cosine distance (0..2) to the nearest exemplar before anything was chosen; NaN where
        there is none.
    doubt : 0 (none) to 1; NaN where nothing was segmented.
    gain : how much nearer it brings the images that are left, weighed as asked, as a share of what
        was to be gained before anything was chosen; for ``distance`` and ``doubt``, those.
    """

    name: str
    distance: float
    doubt: float
    gain: float


def choose_next(
    library: Library,
    images: Iterable[tuple[str, Any]],
    count: int,
    *,
    by: By = "all",
    segmenter: Segmenter | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Choice]:
    """Choose the images whose annotation would teach a library most, best first.

    Parameters
    ----------
    library : may be empty: then the most typical images come first.
    images : names and images as :meth:`Library.add` takes them; each is looked at once, so that a
        generator may read them. Those that are exemplars already are passed over.
    count : how many; all there are, if there are fewer.
    by : ``distance`` (farthest from the library, and from those chosen before), ``doubt``,
        ``coverage`` (nearest to the most images), or all of them.
    segmenter : of the library, where doubt counts and something is annotated; None: one with the
        defaults.
    progress : called with each image's name.

    Raises
    ------
    InputError
        If no image is left to choose from, the count is below 1, or ``by`` is unknown; an image
        that cannot be used is told by its name.
    """
    if by not in get_args(By):
        raise InputError(f"images are chosen by {', '.join(get_args(By))}, not by '{by}'.")
    check_count(count, "count", 1)
    structures = library.structures
    held = [library.embeddings(name)[1] for name in structures]
    held += [library.embeddings(name, absent=True)[1] for name in structures]
    known = np.concatenate(held) if held else None
    if segmenter is None and structures and by in ("all", "doubt"):
        from recallseg.runtime.segmenting.segmenter import Segmenter

        segmenter = Segmenter(library)
    names, embeddings, doubts, seen = [], [], [], 0
    for name, given in images:
        try:
            image = open_image(given)
            embedding = library.embed(image)
            new = known is None or 1.0 - float((known @ embedding).max()) > SAME_IMAGE
            if new:
                asked = segmenter is not None and structures and by in ("all", "doubt")
                doubts.append(doubt_of(segmenter, image) if asked and segmenter else np.nan)
                names.append(name)
                embeddings.append(embedding)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        seen += 1
        if progress is not None:
            progress(name)
    if not names:
        why = f"all {seen} are exemplars of the library already" if seen else "none was given"
        raise InputError(f"there is no image to choose from: {why}.")
    found = rank(np.stack(embeddings), known, np.array(doubts), count, by)
    return [Choice(names[i], distance, float(doubts[i]), gain) for i, distance, gain in found]


def rank(
    embeddings: Embeddings,
    known: Embeddings | None,
    doubts: NDArray[np.float64],
    count: int,
    by: By,
) -> list[tuple[int, float, float]]:
    """Return (index, distance to the library, gain) of the chosen, best first.

    Parameters
    ----------
    embeddings, known : N x D and M x D of unit length: of the images, and of the library; None
        where that is empty.
    doubts : N, 0..1; NaN where they are not known.
    """
    distance = _distances(embeddings, known)
    apart = distance if known is not None and len(known) else np.full(len(embeddings), np.nan)
    if by == "doubt" and not np.isnan(doubts).any():
        order = [int(i) for i in np.argsort(-doubts, kind="stable")[:count]]
        return [(i, float(apart[i]), float(doubts[i])) for i in order]
    if by == "distance":
        order = farthest_first(embeddings, known, count)
        return [(i, float(apart[i]), float(distance[i])) for i in order]
    weights = np.ones(len(embeddings))
    if by == "all" and not np.isnan(doubts).any():
        weights = LEAST_DOUBT + doubts
    chosen = greedy_coverage(embeddings, known, weights, count)
    return [(i, float(apart[i]), gain) for i, gain in chosen]


def greedy_coverage(
    embeddings: Embeddings, known: Embeddings | None, weights: NDArray[np.float64], count: int
) -> list[tuple[int, float]]:
    """Return the indices that bring all images nearest to something annotated, one after the other.

    Parameters
    ----------
    embeddings, known : N x D and M x D of unit length.
    weights : N; what each image counts.

    Returns
    -------
    list
        Indices, and the share of the weighted distance that each took away.
    """
    left = _distances(embeddings, known)
    whole = float(weights @ left) or 1.0
    chosen: list[tuple[int, float]] = []
    free = np.ones(len(embeddings), bool)
    for _ in range(min(count, len(embeddings))):
        best, gain = -1, -1.0
        for start in range(0, len(embeddings), _ROWS):  # N x N does not fit for a large folder
            rows = slice(start, start + _ROWS)
            nearer = np.maximum(0.0, left - (1.0 - embeddings[rows] @ embeddings.T))
            gains = np.where(free[rows], nearer @ weights, -1.0)
            if gains.max() > gain:
                best, gain = start + int(np.argmax(gains)), float(gains.max())
        free[best] = False
        left = np.minimum(left, np.maximum(0.0, 1.0 - embeddings @ embeddings[best]))
        chosen.append((best, gain / whole))
    return chosen


def doubt_of(segmenter: Segmenter, image: Any, without: Collection[str] = ()) -> float:
    """Return how much doubt there is of an image, 0..1, worst structure first.

    Of each structure: what its IoU estimate lacks to 1, or how much the masks recalled from the
    nearer and from the farther half of its exemplars disagree (1 - Dice), whichever is more; a
    structure that a check of its own calls suspect counts at least one half. Costs two queries.
    """
    result = segmenter.segment(image, without=without)
    nearer = {
        match.key
        for found in result.recalled.values()
        for match in [one for one in found if not one.absent][: max(1, len(found) // 2)]
    }
    other = segmenter.segment(image, without=nearer.union(without))
    doubts = []
    for name, score in result.scores.items():
        doubt = 1.0 - min(1.0, max(0.0, score.iou)) if score.present else 0.0
        if other.available[name]:
            doubt = max(doubt, 1.0 - mask_dice(result.masks[name], other.masks[name]))
        if name in result.quality.reasons:
            doubt = max(doubt, 0.5)
        doubts.append(doubt)
    return float(np.mean(sorted(doubts)[-2:]))


def _distances(embeddings: Embeddings, known: Embeddings | None) -> NDArray[np.float64]:
    if known is None or not len(known):
        return np.ones(len(embeddings))
    found: NDArray[np.float64] = np.maximum(0.0, 1.0 - (embeddings @ known.T).max(axis=1))
    return found
