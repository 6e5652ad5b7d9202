"""The result that a person's corrections have come to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recallseg import __version__
from recallseg.engines import defaults
from recallseg.engines.operators import operators_digest
from recallseg.engines.pixels import open_pixels
from recallseg.engines.precisions import find_precision
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.model.model import Model
from recallseg.runtime.model.postprocess import finish_masks
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.presence import ABSENT_SCORE
from recallseg.runtime.segmenting.prompts import SURE, Grid, Point
from recallseg.runtime.segmenting.reach import REACH
from recallseg.runtime.segmenting.recipe import Provenance, Recipe
from recallseg.runtime.segmenting.result import Quality, Result, Score

__all__ = ["CorrectedResults", "State", "corrections_of"]

PROPOSED_BEFORE = "proposed before the library was changed, from which others were corrected"


@dataclass(frozen=True, eq=False)
class State:
    """One structure as it is now.

    ``points`` were set since the mask was last drawn or boxed; ``logits`` (S/4)x(S/4), or None
    where there is no mask yet; ``drawn`` is a mask HxW that a person gave, to the pixel; ``times``
    is how often it was corrected.
    """

    points: tuple[Point, ...] = ()
    logits: NDArray[np.float32] | None = None
    iou: float = 0.0
    object_score: float = ABSENT_SCORE
    present: bool = False
    drawn: NDArray[np.bool_] | None = None
    times: int = 0

    @property
    def prior(self) -> NDArray[np.float32] | None:
        """The mask that a person saw before the next correction; None if there was none."""
        return self.logits if self.present else None


def corrections_of(states: Mapping[str, State]) -> FrozenMap[str, int]:
    """Return how often each structure was corrected; those that never were are left out."""
    return FrozenMap({name: s.times for name, s in states.items() if s.times})


class CorrectedResults:
    """Makes the results of one session.

    Parameters
    ----------
    library, model : of the session.
    grid : of its image.
    proposal : the segmenter's result before any correction; None without a segmenter.
    acquisition : see :meth:`recallseg.Segmenter.segment`.
    """

    def __init__(
        self,
        library: Library,
        model: Model,
        grid: Grid,
        proposal: Result | None,
        acquisition: Acquisition | None,
    ) -> None:
        self._library, self._model, self._grid = library, model, grid
        self._proposal, self._acquisition = proposal, acquisition
        self._latest = proposal
        self._intensity = library.intensity
        self._pixels = open_pixels()

    def looked(self, result: Result) -> None:
        """Note that what is corrected from now on goes by another look at the library."""
        self._latest = result

    def make(self, states: Mapping[str, State]) -> Result:
        """Return what structures have come to, in the order of their label values."""
        names, base, latest = tuple(states), self._proposal, self._latest
        masks, label_map = self._masks(tuple(states.values()))
        corrections = corrections_of(states)
        scores, recalled, available, earlier = (
            {} if base is None else dict(getattr(base, field))
            for field in ("scores", "recalled", "available", "frame_memories")
        )
        for name, state in states.items():
            known: Score | None = scores.get(name)
            if state.times or known is None:
                scores[name] = Score(
                    state.iou,
                    state.object_score,
                    float("nan") if known is None else known.distance,
                    1.0 if known is None else known.presence,
                    state.present,
                )
            if state.times and latest is not None and name in recalled and name in latest.recalled:
                recalled[name] = latest.recalled[name]
                available[name] = latest.available[name]
                earlier[name] = latest.frame_memories[name]
            recalled.setdefault(name, ())
            available.setdefault(name, 0)
            earlier.setdefault(name, 0)
        return Result(
            masks=FrozenMap(dict(zip(names, masks, strict=True))),
            label_map=label_map,
            labels=FrozenMap({name: i + 1 for i, name in enumerate(names)}),
            scores=FrozenMap(scores),
            recalled=FrozenMap(recalled),
            available=FrozenMap(available),
            timings=base.timings if base is not None and not corrections else FrozenMap(),
            quality=self._quality(corrections),
            provenance=self._provenance(names, bool(corrections)),
            frame_memories=FrozenMap(earlier),
            notice=self._model.bundle.notice,
            spacing=None if self._acquisition is None else self._acquisition.spacing,
            corrections=corrections,
            logits=FrozenMap(
                {name: self._plane(state) for name, state in states.items()},
            ),
        )

    def _plane(self, state: State) -> NDArray[np.float32]:
        """Return what a structure's mask was made of; a drawn one lies on the image's grid."""
        if state.drawn is not None:
            plane: NDArray[np.float32] = np.where(state.drawn, SURE, -SURE).astype(np.float32)
            return plane
        if state.logits is None:
            size = self._grid.geometry.logit_size
            return np.full((size, size), np.nan, np.float32)
        return state.logits

    def _masks(self, states: Sequence[State]) -> tuple[list[NDArray[np.bool_]], NDArray[np.uint8]]:
        if not states:
            return [], np.zeros(self._grid.shape, np.uint8)
        size = self._grid.geometry.logit_size
        missing = np.full((size, size), np.nan, np.float32)
        logits = np.stack([missing if s.logits is None else s.logits for s in states])
        # What was drawn is put over the others, to the pixel: its logits are coarser.
        shown = [state.present and state.drawn is None for state in states]
        masks, label_map = finish_masks(logits, shown, self._grid.shape, self._pixels)
        for i, state in enumerate(states):
            if state.drawn is not None:
                masks[i] = state.drawn.copy()
                label_map[state.drawn] = i + 1
        return masks, label_map

    def _quality(self, done: Collection[str]) -> Quality:
        base = self._proposal
        if base is None:
            return Quality("uncalibrated", FrozenMap(), FrozenMap(), "")
        reasons = {n: why for n, why in base.quality.reasons.items() if n not in done}
        if done and self._changed:
            for name in base.labels.keys() - set(done):
                reasons[name] = (*reasons.get(name, ()), PROPOSED_BEFORE)
        whole = all(name in base.quality.calibrated for name in base.labels)
        flag = "suspect" if reasons else "ok" if whole else "uncalibrated"
        return replace(base.quality, flag=flag, reasons=FrozenMap(reasons))

    @property
    def _changed(self) -> bool:
        """Whether corrections go by another state of the library than the proposal."""
        base, latest = self._proposal, self._latest
        if base is None or latest is None:
            return False
        return latest.provenance.library_digest != base.provenance.library_digest

    def _provenance(self, names: tuple[str, ...], corrected: bool) -> Provenance:
        graphs = self._model.graph_digests("correct") if corrected else {}
        if self._proposal is not None and self._latest is not None:
            made = (self._latest if corrected else self._proposal).provenance
            return replace(made, structures=names, graphs={**made.graphs, **graphs})
        model, library = self._model, self._library
        precision = find_precision(model.precision)
        recipe = Recipe(
            model.bundle.identity,
            model.engine,
            model.precision,
            library.memory_format,
            defaults.K,
            REACH,
            {},
            self._intensity.to_json(),
            precision.approximations,
        )
        return Provenance(
            recipe,
            library.digest,
            library.origins,
            names,
            {**model.graph_digests("embed", "encode"), **graphs},
            0,
            None,
            __version__,
            operators_digest() if precision.native else None,
        )
