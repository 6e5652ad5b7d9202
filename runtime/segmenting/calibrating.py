"""Calibration at work: every exemplar is segmented from the others, and what came out is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from recallseg.engines.errors import InputError
from recallseg.engines.verification import mask_dice
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.segmenting.calibration import Thresholds, conformal_upper
from recallseg.runtime.segmenting.question import Question
from recallseg.runtime.segmenting.timings import Timings

__all__ = ["calibrate"]


def calibrate(
    question: Question, progress: Callable[[int, int], None] | None
) -> Mapping[str, Thresholds]:
    """Do what :meth:`recallseg.Segmenter.calibrate` says; raises what that does."""
    library, recipe, refining = question.library, question.recipe, question.refining
    library.check_writable("calibrate")
    if not library.keeps_sources:
        raise InputError(
            f"the library {library.path} did not keep its images, so none can be left out "
            "and segmented from the others. Make a new library that keeps them."
        )
    exemplars = [
        exemplar
        for exemplar in library
        if recipe.tags.items() <= exemplar.tags.items()
        and any(name in exemplar.structures for name in question.structures)
    ]
    if len(exemplars) < 2:
        raise InputError(
            f"calibrating leaves out one exemplar at a time, and there is {len(exemplars)} of "
            f"{', '.join(question.structures)}. Annotate more; four of a structure are needed to "
            "say what is normal."
        )
    iou: dict[str, list[float]] = {name: [] for name in question.structures}
    dice: dict[str, list[float]] = {name: [] for name in question.structures}
    for done, exemplar in enumerate(exemplars):
        image, masks = library.source(exemplar.key)
        # With a head also those of its group, which it must not see.
        key = exemplar.key
        left_out = (key,) if refining is None else refining.group(library, key)
        result = question.ask(image, Timings(), without=left_out)
        for name in question.structures:
            if name in masks and result.scores[name].present:
                iou[name].append(result.scores[name].iou)
                dice[name].append(mask_dice(result.masks[name], masks[name]))
        if progress is not None:
            progress(done + 1, len(exemplars))
    thresholds = {}
    for name, limits in question.standings.limits().items():
        upper = conformal_upper([-value for value in iou[name]])
        thresholds[name] = Thresholds(
            distance=limits.thresholds.distance,
            iou=None if upper is None else -upper,
            exemplars=len(iou[name]),
            dice=float(np.median(dice[name])) if dice[name] else None,
        )
    made = result.provenance.to_json()
    library.store_calibrations(
        recipe.digest,
        {
            name: {"thresholds": found.to_json(), "provenance": made}
            for name, found in thresholds.items()
        },
        exemplars[-1].key,
    )
    return FrozenMap(thresholds)
