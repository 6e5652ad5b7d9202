"""Calibration at work: exemplars are segmented from other groups, and what came out is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from recallseg.engines.errors import InputError
from recallseg.engines.verification import mask_dice
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library.exemplar import Exemplar
from recallseg.runtime.segmenting.calibration import Thresholds, conformal_upper
from recallseg.runtime.segmenting.groups import group_numbers
from recallseg.runtime.segmenting.question import Question
from recallseg.runtime.segmenting.timings import Timings

__all__ = ["calibrate"]


def calibrate(
    question: Question, progress: Callable[[int, int], None] | None
) -> Mapping[str, Thresholds]:
    """Do what :meth:`recallseg.Segmenter.calibrate` says; raises what that does."""
    library, recipe = question.library, question.recipe
    library.check_writable("calibrate")
    if not library.keeps_sources:
        raise InputError(
            f"the library {library.path} did not keep its images, so none can be left out "
            "and segmented from the others. Make a new library that keeps them."
        )
    annotated = [
        exemplar
        for exemplar in library
        if recipe.tags.items() <= exemplar.tags.items()
        and any(name in (*exemplar.structures, *exemplar.absent) for name in question.structures)
    ]
    exemplars = [
        exemplar
        for exemplar in annotated
        if any(name in exemplar.structures for name in question.structures)
    ]
    if len(exemplars) < 2:
        raise InputError(
            f"calibrating leaves out one exemplar at a time, and there is {len(exemplars)} of "
            f"{', '.join(question.structures)}. Annotate more; four of a structure are needed to "
            "say what is normal."
        )
    without, left_out = _without(question, annotated)
    iou: dict[str, list[float]] = {name: [] for name in question.structures}
    dice: dict[str, list[float]] = {name: [] for name in question.structures}
    for done, exemplar in enumerate(exemplars):
        image, masks = library.source(exemplar.key)
        result = question.ask(image, Timings(), without=without[exemplar.key])
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
            left_out=left_out,
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


def _without(
    question: Question, annotated: Sequence[Exemplar]
) -> tuple[dict[str, tuple[str, ...]], str]:
    """Return the keys that are left out with each exemplar, and how they belong together.

    With a head these are what its units have not seen either: its groups are those of the fit.
    """
    library, refining = question.library, question.refining
    keys = {library.number(one.key): one.key for one in annotated}
    groups, grouping = group_numbers(sorted(keys), library.heads.groups())
    members: dict[int, list[str]] = {}
    for number, group in groups.items():
        members.setdefault(group, []).append(keys[number])
    without = {keys[number]: tuple(members[group]) for number, group in groups.items()}
    if refining is None:
        return without, grouping
    for number, key in keys.items():
        if number in refining.head.groups or grouping == "blocks":
            without[key] = refining.group(library, key)
    return without, refining.head.grouping
