"""Fits a library's head: on its exemplars, each segmented from those of other groups.

Memory attention knows where things are, pixels know where they end. The head is fitted on both, and
is used for a structure only where exemplars that it had not seen say that this is no worse: of what
could be chosen, that of the highest mean Dice whose 95 % interval, by groups, excludes harm (a loss
of more than :data:`HARM`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import EngineRunError, InputError
from recallseg.engines.heads import REFINE, graph_digest
from recallseg.engines.verification import mask_dice
from recallseg.runtime.library.heads import Choice, Head, Heads, Kept, Units
from recallseg.runtime.model.preprocess import planes_of, scale_intensities
from recallseg.runtime.segmenting.refining import Filters, Refiner
from recallseg.runtime.segmenting.units import fit_units

if TYPE_CHECKING:
    from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["FEWEST", "fit_head", "group_numbers"]

FEWEST = 4
"""Groups that show a structure, below which nothing can be said of a head."""
FOLDS = 5
BLOCKS = 6
"""Contiguous parts of what is one patient's."""
MIXES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the head in the log-odds that are tried; memory attention has the rest."""
HARM = 0.005
"""A loss of mean Dice that the interval of what is chosen excludes: less nobody would notice."""
NEAR = 0.01
"""Of the best in mean Dice: ways that a smaller share may be chosen of."""
LEAST = 0.25
"""Of the smallest annotated share of an image: what is smaller may count as absent."""
SAMPLES, MOST_OF_ONE = 96_000, 4000
"""Pixels that are fitted on, of all and of one exemplar."""
DRAWS = 2000
TINY = 1e-9
ALPHA = 0.05

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _One:
    """An exemplar and its place in the cross-validation."""

    key: str
    number: int
    group: int
    fold: int
    structures: tuple[str, ...]


class Way(NamedTuple):
    """What may be chosen for a structure: see :class:`Choice`."""

    mix: float
    within: bool = False
    small: bool = False

    @property
    def bolder(self) -> tuple[Way, ...]:
        """Ways that count it as absent less often: to choose this one must cost no exemplar."""
        ways = (self._replace(within=False), self._replace(small=False))
        return tuple(way for way in ways if way != self)


ALONE = Way(0.0)
WAYS = (
    ALONE,
    Way(0.0, small=True),
    *(Way(mix, *flags) for mix in MIXES for flags in product((False, True), repeat=2)),
)


def group_numbers(numbers: Sequence[int], told: Mapping[int, str]) -> tuple[dict[int, int], str]:
    """Return a group for each exemplar, by its number, and how they came about.

    Parameters
    ----------
    numbers : of exemplars, ascending.
    told : groups of those that one was told of; others stand each by itself.
    """
    names = [told.get(number, f"exemplar {number}") for number in numbers]
    places = {name: i for i, name in enumerate(dict.fromkeys(names))}
    known = sum(number in told for number in numbers)
    if known and len(places) < 3:
        count = min(BLOCKS, len(numbers))
        return {n: i * count // len(numbers) for i, n in enumerate(numbers)}, "blocks"
    grouping = "groups" if known else "exemplars"
    return {n: places[name] for n, name in zip(numbers, names, strict=True)}, grouping


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

    samples = []
    filters = Filters(segmenter.model.threads)
    for one in ones:
        kept = _logits(segmenter, heads, ones, one)
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
        choices={name: _out("not judged yet") for name in segmenter.structures},
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


def _logits(segmenter: Segmenter, heads: Heads, ones: Sequence[_One], one: _One) -> Kept:
    """Return what memory attention makes of an exemplar; what is kept, as long as it holds.

    It holds while all that were recalled are still there, in other groups, and no more could be
    recalled than were.
    """
    library, recipe = segmenter.library, segmenter.recipe.digest
    generation = library.generation
    group_of = {other.number: other.group for other in ones}
    others = {
        name: sum(other.group != one.group and name in other.structures for other in ones)
        for name in segmenter.structures
    }
    kept = heads.kept(one.number)
    if (
        kept is not None
        and (kept.recipe, kept.generation) == (recipe, generation)
        and set(kept.logits) == set(segmenter.structures)
        and all(
            _holds(kept.recalled[name], group_of, one, segmenter.k, others[name])
            for name in segmenter.structures
        )
    ):
        return kept
    own = [other.key for other in ones if other.group == one.group]
    image, _ = library.source(one.key)
    result, logits = segmenter.logits_of(image, own)
    names = segmenter.structures
    found = Kept(
        recipe,
        generation,
        {
            name: tuple(
                library.number(match.key) for match in result.recalled[name] if not match.absent
            )
            for name in names
        },
        {name: result.scores[name].object_score for name in names},
        {name: plane.astype(np.float16) for name, plane in zip(names, logits, strict=True)},
    )
    heads.keep(one.number, found)
    return found


def _holds(
    recalled: Sequence[int], group_of: Mapping[int, int], one: _One, k: int, shown: int
) -> bool:
    """Whether logits of an exemplar would be much the same now.

    ``shown`` is how many exemplars of other groups show the structure.
    """
    others = all(group_of.get(n, one.group) != one.group for n in recalled)
    # A reach may have left some out: more exemplars than before count only where all were taken.
    enough = bool(recalled) or shown == 0
    return others and enough and len(recalled) <= min(k, shown)


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
        np.ascontiguousarray(planes), np.stack([kept.logits[name] for name in names]), pixels
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
    judged: dict[str, list[tuple[int, list[float], list[float], bool]]]
    judged = {name: [] for name in names}
    for one in ones:
        image, masks = library.source(one.key)
        absent = library.get(one.key).absent
        planes = np.ascontiguousarray(planes_of(scale_intensities(image, library.intensity)))
        kept = heads.kept(one.number)
        assert kept is not None
        logits = np.stack([kept.logits[name] for name in names])
        ends = []
        for mix in (0, 1):
            shares = np.full((1, len(names), 1, 1), mix, np.float32)
            ends.append(refiner.run(planes, logits, refiner.units(one.number), shares).copy())
        for name, alone, own in zip(names, *ends, strict=True):
            if name not in masks and name not in absent:
                continue
            mask = masks.get(name, np.zeros(alone.shape, bool))
            if name in masks:
                smallest[name] = min(smallest[name], float(mask.mean()))
            found = _by_way(alone, own, kept.scores[name] > 0, mask)
            judged[name].append((one.group, *found, bool(mask.any())))
        step()
    choices = {}
    for name in names:
        limit, rows = LEAST * smallest[name], []
        for group, dice, areas, shows in judged[name]:
            values = [
                float(not shows) if way.small and area < limit else value
                for way, value, area in zip(WAYS, dice, areas, strict=True)
            ]
            rows.append((group, values))
        choices[name] = _choice(rows, limit)
    return choices


def _by_way(
    alone: NDArray[np.float32],
    own: NDArray[np.float32],
    present: bool,
    mask: NDArray[np.bool_],
) -> tuple[list[float], list[float]]:
    """Return Dice, and the share of the image that is found, by way; nothing small left out yet.

    Parameters
    ----------
    alone, own : logits HxW of memory attention, and of the head.
    """
    nothing = not (alone > 0).any()
    dice, areas = [], []
    for way in WAYS:
        found = (alone + np.float32(way.mix) * (own - alone) > 0) & present
        if way.within and nothing:
            found[:] = False
        dice.append(_dice(found, mask))
        areas.append(float(found.mean()))
    return dice, areas


def _dice(found: NDArray[np.bool_], mask: NDArray[np.bool_]) -> float:
    return float(mask_dice(found, mask)) if found.any() or mask.any() else 1.0


def _out(why: str, alone: float = 0.0, exemplars: int = 0) -> Choice:
    return Choice(0.0, 0.0, alone, alone, 0.0, 0.0, exemplars, why)


def _choice(rows: Sequence[tuple[int, list[float]]], limit: float) -> Choice:
    """Return what is chosen for a structure.

    Parameters
    ----------
    rows : group, and Dice by way, of each exemplar.
    limit : of what is small.
    """
    if not rows:
        return _out("no exemplar with a stored image is annotated for it")
    groups = np.array([row[0] for row in rows])
    dice = np.array([row[1] for row in rows])
    alone = float(dice[:, 0].mean())
    count = len(np.unique(groups))
    if count < FEWEST:
        return _out(f"{count} of {FEWEST} groups that are needed to judge it", alone, len(rows))
    best, interval = _best(groups, dice)
    if best == 0:
        return _out("no better than memory attention alone, surely", alone, len(rows))
    way = WAYS[best]
    # What is expected was chosen without the exemplars that it is stated for.
    honest = np.empty(len(rows))
    for group in np.unique(groups):
        rest = groups != group
        chosen = _best(groups[rest], dice[rest])[0] if len(np.unique(groups[rest])) > 2 else 0
        honest[~rest] = dice[~rest, chosen]
    return Choice(
        way.mix,
        limit if way.small else 0.0,
        alone,
        float(honest.mean()),
        *interval,
        len(rows),
        within=way.within,
    )


def _best(groups: NDArray[np.int_], dice: NDArray[np.float64]) -> tuple[int, tuple[float, float]]:
    """Return the best way that does no harm, and the interval of its gain; 0 if there is none.

    Of ways near the best and not surely worse than it, or worse by one group alone, that with the
    smallest share of the head: an exemplar that is left out has farther neighbours than a query,
    and memory attention suffers more of that than the head.
    """
    gains = dice - dice[:, :1]
    means = gains.mean(0).round(9)
    found: dict[int, tuple[float, float]] = {}
    for i in map(int, np.argsort(-means, kind="stable")):
        if i == 0 or means[i] <= 0:
            break
        if any((dice[:, i] < dice[:, WAYS.index(way)]).any() for way in WAYS[i].bolder):
            continue
        best = next(iter(found), i)
        if i != best and not _near(groups, dice[:, best] - dice[:, i]):
            continue
        low, high = _interval(groups, gains[:, i])
        if low >= -HARM:
            found[i] = low, high
    if not found:
        return 0, (0.0, 0.0)
    chosen = min(found, key=lambda i: WAYS[i].mix)  # of equal ones the first, which is better
    return chosen, found[chosen]


def _near(groups: NDArray[np.int_], behind: NDArray[np.float64]) -> bool:
    """Whether a way that is behind another by so much, by exemplar, is as good for all we know."""
    sums = np.array([behind[groups == name].sum() for name in np.unique(groups)])
    if sums.sum() - sums.max() <= TINY:
        return True  # one group alone makes the difference
    return bool(behind.mean() <= NEAR and _interval(groups, behind)[0] < 0)


def _interval(groups: NDArray[np.int_], gains: NDArray[np.float64]) -> tuple[float, float]:
    """Return the bootstrap's 95 % interval of a mean, groups being drawn, not exemplars."""
    names = np.unique(groups)
    sums = np.array([gains[groups == name].sum() for name in names])
    counts = np.array([(groups == name).sum() for name in names])
    drawn = np.random.default_rng(0).integers(len(names), size=(DRAWS, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)
