"""Probabilities on an image's own grid, made of logits when they are asked for."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError, StaleViewError
from recallseg.engines.pixels.opencv import resize_plane

if TYPE_CHECKING:
    from recallseg.runtime.model.view import View
    from recallseg.runtime.segmenting.result import Score

__all__ = ["LogitsOnModel", "Probabilities"]

ROUNDING = 1e-3
"""Logits this near to the threshold may have been resized to the other side of it: by vector units
or on a GPU sums are rounded in another order."""
HALF = np.float32(0.5)
BELOW_HALF = np.nextafter(HALF, np.float32(0))

KEEP = "Segment with keep_logits=True to keep them."


class LogitsOnModel(Mapping[str, NDArray[np.float32]]):
    """The logits of the last answer, fetched one by one. It keeps no model alive.

    Parameters
    ----------
    view : of the image, its question answered.
    structures : of the answer, in the order of the question.
    """

    def __init__(self, view: View, structures: Sequence[str]) -> None:
        self._view, self._question = weakref.ref(view), view.question
        self._rows = {name: row for row, name in enumerate(structures)}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        row, view = self._rows[name], self._view()
        why = "the segmenter has seen another image since, or is gone"
        if view is not None:
            try:
                return view.plane(row, self._question)
            except StaleViewError:
                why = "the model has seen another image since"
        raise StaleViewError(f"the logits of this result are gone: {why}. {KEEP}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class Probabilities(Mapping[str, NDArray[np.float32]]):
    """See :attr:`Result.probabilities`."""

    def __init__(
        self,
        logits: Mapping[str, NDArray[np.float32]],
        masks: Mapping[str, Any],
        scores: Mapping[str, Score],
        shape: tuple[int, ...],
    ) -> None:
        self._logits, self._masks, self._scores, self._shape = logits, masks, scores, shape

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        mask, present = self._masks[name], self._scores[name].present
        if name not in self._logits:
            raise InputError(f"this result was pickled or copied without its logits. {KEEP}")
        logits = self._logits[name]
        if np.isnan(logits).all():
            return np.zeros(self._shape, np.float32)
        found = resize_plane(logits, self._shape)
        above = found > 0
        if present and isinstance(mask, np.ndarray):
            np.copyto(above, mask, where=np.abs(found) < ROUNDING)
        with np.errstate(over="ignore"):  # exp of what is next to nothing or to one
            made: NDArray[np.float32] = np.reciprocal(1 + np.exp(-found))
        np.maximum(made, HALF, out=made, where=above)
        np.minimum(made, BELOW_HALF, out=made, where=~above)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        size = "x".join(map(str, self._shape))
        return f"Probabilities({', '.join(self)}; {size} float32, made when asked for)"
