"""Fits a library's head: on its exemplars, each segmented from those of other groups.

Memory attention knows where things are, pixels know where they end. The head is fitted on both, and
is used for a structure only where exemplars that it had not seen say that this is no worse, see
:mod:`recallseg.runtime.segmenting.judging`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import EngineRunError, InputError, LibraryError
from recallseg.engines.heads import REFINE, graph_digest
from recallseg.runtime.library.choices import Choice
from recallseg.runtime.library.heads import Head, Heads, Units
from recallseg.runtime.library.kept import Kept, Recall
from recallseg.runtime.model.preprocess import planes_of, scale_intensities
from recallseg.runtime.segmenting.groups import group_numbers
from recallseg.runtime.segmenting.judging import (
    FEWEST,
    LEAST,
    Judged,
    by_way,
    choose,
    out,
)
from recallseg.runtime.segmenting.refining import Filters, Refiner
from recallseg.runtime.segmenting.units import fit_units

if TYPE_CHECKING:
    from recallseg.runtime.segmenting.result import Result
    from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["fit_head"]

FOLDS = 5
SAMPLES, MOST_OF_ONE = 96_000, 4000
"""Pixels that are fitted on, of all and of one exemplar."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _One:
    """An exemplar and its place in the cross-validation."""

    key: str
    number: int
    group: int
    fold: int
    structures: tuple[str, ...]


def fit_head(
    segmenter: Segmenter, progress: Progress | None = None, *, by: str | None = None
) -> Head:
    """Fit a head for a segmenter's settings and structures, store it in the library, return it.

    See :meth:`recallseg.Library.fit`.
    """
    library = segmenter.library
    library.check_writable("fit a head")
    if not library.keeps_sources:
        raise InputError(
            f"the library {library.path} did not keep its images, and a head is fitted on them. "
            "Make a new library that keeps them."
        )
    heads = library.heads
    ones, grouping = _ones(segmenter, heads, by)
    tell = progress or (lambda done, total: None)
    folds = 1 + max(one.fold for one in ones)
    total, done = 2 * len(ones) + folds + 1, 0

    def step() -> None:
        nonlocal done
        done += 1
        tell(done, total)

    embeddings = _embeddings(segmenter, ones)
    samples = []
    filters = Filters(segmenter.model.threads)
    for one in ones:
        kept = _logits(segmenter, heads, ones, one, embeddings)
        samples.append(_sample(segmenter, filters, one, kept, len(ones)))
        step()
    by_fold = []
    for fold in range(folds):
        parts = [s for one, s in zip(ones, samples, strict=True) if one.fold != fold]
        by_fold.append(_fit(parts))
        step()
    units = _fit(samples)
    step()
    recipe = {"digest": segmenter.recipe.digest, **segmenter.recipe.to_json()}
    head = Head(
        structures=segmenter.structures,
        choices={name: out("not judged yet") for name in segmenter.structures},
        units=units,
        folds=tuple(by_fold),
        fold_of={one.number: one.fold for one in ones},
        groups={one.number: one.group for one in ones},
        grouping=grouping,
        recipe=recipe,
        generation=library.generation,
        graph=graph_digest(REFINE),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        last=library.newest,
        of=len(library),
    )
    choices = _choose(segmenter, heads, head, ones, step)
    heads.store(Head(**{**vars(head), "choices": choices}))
    stored = heads.head()
    assert stored is not None
    return stored


def _ones(segmenter: Segmenter, heads: Heads, by: str | None) -> tuple[list[_One], str]:
    library = segmenter.library
    exemplars = [
        one
        for one in library
        if one.has_source
        and segmenter.tags.items() <= one.tags.items()
        and any(name in (*one.structures, *one.absent) for name in segmenter.structures)
    ]
    if len(exemplars) < 2:
        raise InputError(
            f"a head is fitted by leaving out each exemplar in turn, and there is "
            f"{len(exemplars)} with a stored image of {', '.join(segmenter.structures)}. Annotate "
            f"more: {FEWEST} of different groups are needed before a head is used."
        )
    numbers = [library.number(one.key) for one in exemplars]
    told = heads.groups()
    if by is not None:
        pairs = zip(numbers, exemplars, strict=True)
        told = {number: one.tags[by] for number, one in pairs if by in one.tags}
        if not told:
            raise InputError(
                f"no exemplar has the tag '{by}' that groups were to be made by; 'recallseg "
                "library list' shows the tags of each."
            )
    groups, grouping = group_numbers(numbers, told)
    sizes: dict[int, int] = {}
    for group in groups.values():
        sizes[group] = sizes.get(group, 0) + 1
    count = min(FOLDS, len(sizes))
    if count < 2:
        raise InputError(
            "all exemplars with a stored image belong to one group, so none can be left out. "
            "Annotate another patient, or more slices."
        )
    held = [0] * count
    fold_of: dict[int, int] = {}
    for group in sorted(sizes, key=lambda one: (-sizes[one], one)):
        fold_of[group] = held.index(min(held))
        held[fold_of[group]] += sizes[group]
    return [
        _One(one.key, number, groups[number], fold_of[groups[number]], one.structures)
        for one, number in zip(exemplars, numbers, strict=True)
    ], grouping


def _embeddings(segmenter: Segmenter, ones: Sequence[_One]) -> dict[str, NDArray[np.float32]]:
    """Return the embeddings of exemplars by key."""
    found: dict[str, NDArray[np.float32]] = {}
    for name in segmenter.structures:
        for absent in (False, True):
            found.update(zip(*segmenter.library.embeddings(name, absent=absent), strict=True))
    return {one.key: found[one.key] for one in ones}


def _logits(
    segmenter: Segmenter,
    heads: Heads,
    ones: Sequence[_One],
    one: _One,
    embeddings: Mapping[str, NDArray[np.float32]],
) -> Kept:
    """Return what memory attention makes of an exemplar; what is kept, as long as it holds.

    It holds while all that were recalled are still there, in other groups where they should be, and
    no more could be recalled than were.
    """
    library, recipe = segmenter.library, segmenter.recipe.digest
    generation, names = library.generation, segmenter.structures
    group_of = {other.number: other.group for other in ones}
    kept = heads.kept(one.number)
    if (
        kept is not None
        and (kept.recipe, kept.generation) == (recipe, generation)
        and set(kept.apart.logits) == set(names)
        and all(_holds(kept, name, ones, one, group_of, segmenter.k) for name in names)
    ):
        return kept
    own = [other.key for other in ones if other.group == one.group]
    others = [other.key for other in ones if other.group != one.group]
    nearest = sorted(others, key=lambda key: -float(embeddings[key] @ embeddings[one.key]))
    image, _ = library.source(one.key)
    without = (own, (), own + nearest[: len(nearest) // 2])
    found = Kept(
        recipe,
        generation,
        *(_recall(segmenter, *each) for each in segmenter.logits_of(image, without)),
    )
    heads.keep(one.number, found)
    return found


def _recall(segmenter: Segmenter, result: Result, logits: NDArray[np.float32]) -> Recall:
    names = segmenter.structures
    shown = {name: [m for m in result.recalled[name] if not m.absent] for name in names}
    number = segmenter.library.number
    return Recall(
        {name: tuple(number(match.key) for match in found) for name, found in shown.items()},
        {name: result.scores[name].object_score for name in names},
        {name: result.scores[name].iou for name in names},
        {name: min((m.distance for m in shown[name]), default=math.nan) for name in names},
        {name: plane.astype(np.float16) for name, plane in zip(names, logits, strict=True)},
    )


def _holds(
    kept: Kept, name: str, ones: Sequence[_One], one: _One, group_of: Mapping[int, int], k: int
) -> bool:
    """Whether logits of an exemplar would be much the same now."""
    apart, same, far = (recall.recalled[name] for recall in kept.recalls)
    others = all(group_of.get(n, one.group) != one.group for n in (*apart, *far))
    shown = sum(other.group != one.group and name in other.structures for other in ones)
    # A reach may have left some out: more exemplars than before count only where all were taken.
    enough = bool(apart) or shown == 0
    there = all(n in group_of for n in same)
    return others and there and enough and len(apart) <= min(k, shown)


def _sample(
    segmenter: Segmenter, filters: Filters, one: _One, kept: Kept, count: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return features NxF, what shows Nxn, and weights Nxn of some pixels.

    Half are drawn of all pixels and half where a structure is; weights give the classes their own
    shares again.
    """
    library, names = segmenter.library, segmenter.structures
    image, masks = library.source(one.key)
    known = {*masks, *library.get(one.key).absent}
    planes = planes_of(scale_intensities(image, library.intensity))
    size = planes.shape[2] * planes.shape[3]
    most = min(size, MOST_OF_ONE, max(64, SAMPLES // count))
    draw = np.random.default_rng([one.number, size])
    shown = np.zeros((len(names), size), bool)
    for i, name in enumerate(names):
        if name in masks:
            shown[i] = masks[name].ravel()
    near = np.flatnonzero(shown.any(0))
    pixels = draw.choice(size, most, replace=False)
    chance = np.full(size, 1.0 / size)
    if 0 < len(near) < size:
        half = most // 2
        pixels = np.concatenate([pixels[:half], draw.choice(near, most - half)])
        chance *= 0.5
        chance[near] += 0.5 / len(near)
    features = filters.sample(
        np.ascontiguousarray(planes), np.stack([kept.apart.logits[name] for name in names]), pixels
    )
    if not np.isfinite(features).all():
        raise EngineRunError(
            f"the filters of exemplar '{one.key}' gave numbers that are not finite. Look at its "
            "image and the library's intensity rule; nothing was stored."
        )
    weights = np.zeros((len(pixels), len(names)), np.float32)
    likely = (1.0 / size / chance[pixels]).astype(np.float32)
    for i, name in enumerate(names):
        if name in known:
            weights[:, i] = likely
    return features, shown[:, pixels].T.astype(np.float32), weights


def _fit(
    parts: Sequence[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]],
) -> Units:
    features, shown, weights = (np.concatenate(each) for each in zip(*parts, strict=True))
    return fit_units(features, shown, weights)


def _choose(
    segmenter: Segmenter,
    heads: Heads,
    head: Head,
    ones: Sequence[_One],
    step: Callable[[], None],
) -> dict[str, Choice]:
    """Judge every way of mixing on exemplars that the units had not seen."""
    library, names = segmenter.library, head.structures
    smallest = dict.fromkeys(names, 1.0)
    refiner = Refiner(head, segmenter.model.threads)
    judged: dict[str, list[Judged]] = {name: [] for name in names}
    for one in ones:
        image, masks = library.source(one.key)
        absent = library.get(one.key).absent
        planes = np.ascontiguousarray(planes_of(scale_intensities(image, library.intensity)))
        kept = heads.kept(one.number)
        if kept is None:
            raise LibraryError(
                f"what was made of exemplar '{one.key}' a moment ago cannot be read again from "
                f"{library.path}. See to the disk, and fit again; no head was stored."
            )
        rows = {name: Judged(one.group, name in masks, []) for name in (*masks, *absent)}
        for recall in kept.recalls:
            logits = np.stack([recall.logits[name] for name in names])
            ends = []
            for mix in (0, 1):
                shares = np.full((1, len(names), 1, 1), mix, np.float32)
                units = refiner.units(one.number)
                ends.append(refiner.run(planes, logits, units, shares).copy())
            for name, alone, own in zip(names, *ends, strict=True):
                if name in rows:
                    mask = masks.get(name, np.zeros(alone.shape, bool))
                    present = recall.scores[name] > 0
                    evidence = recall.distances[name], recall.sure[name]
                    rows[name].found.append(by_way(*evidence, alone, own, present, mask))
        for name in names:
            if name in rows:
                judged[name].append(rows[name])
            if name in masks:
                smallest[name] = min(smallest[name], float(masks[name].mean()))
        step()
    return {name: choose(judged[name], LEAST * smallest[name]) for name in names}
