"""One opened image, and the masks that are proposed for it and corrected: nobody's exemplar yet.

A picture is a volume of one slice here, so that both go the same way. Masks live on the image's own
grid; what a person does is done to one slice, upright as it is seen, and every step can be undone.
Nothing of a draft is in a library before it is accepted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.checks import check_name
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.services.http.cuts import Box, box_of, cuts_of, union_of
from recallseg.runtime.services.http.limits import Budget, RefusedError

__all__ = ["CancelledError", "Change", "Correcting", "Draft", "Place", "Prompt", "Proposer"]

MOST_STEPS = 200
"""That can be undone; older ones are forgotten."""
MOST_SLICES = 16
"""Slices of a draft that are kept ready for the next prompt; the least recently used go first."""
MOST_STRUCTURES = 255

CANNOT = (
    "the bundle of this server's library has no graph that corrects: draw with the brush, or "
    "export a bundle with 'correct'."
)
Kind = Literal["click", "box", "scribble", "lasso"]


class CancelledError(RefusedError):
    """What was being done was ended by whoever asked for it."""

    def __init__(self) -> None:
        super().__init__(409, "this was cancelled; what was done until then stays.")


class Correcting(Protocol):
    """One image that is corrected, as ``segmenter.correct(image)`` gives it."""

    @property
    def result(self) -> Result:
        """Masks by structure as they are now."""

    def click(self, structure: str, x: float, y: float, inside: bool = True) -> Result: ...
    def box(self, structure: str, x0: float, y0: float, x1: float, y1: float) -> Result: ...
    def scribble(
        self, structure: str, points: Sequence[tuple[float, float]], inside: bool = True
    ) -> Result: ...
    def draw(self, structure: str, mask: NDArray[np.bool_]) -> Result: ...


class Proposer(Protocol):
    """What proposes and corrects masks of a slice; see :class:`Desk`."""

    @property
    def structures(self) -> tuple[str, ...]: ...
    @property
    def corrects(self) -> bool: ...
    def propose(self, image: NDArray[Any]) -> Result | None: ...
    def correct(self, image: NDArray[Any]) -> Correcting: ...
    def spread(
        self,
        structure: str,
        image: NDArray[Any],
        mask: NDArray[np.bool_],
        others: Iterable[NDArray[Any]],
    ) -> Iterator[NDArray[np.bool_]]: ...


@dataclass(frozen=True)
class Place:
    """One slice: its axis, and its index along it."""

    axis: int
    index: int


@dataclass(frozen=True)
class Prompt:
    """What a person did to a slice.

    Attributes
    ----------
    points : (x, y) of pixels of the upright slice: one of a click, two corners of a box, those
        along a scribble.
    mask : HxW of the upright slice, of a lasso.
    inside : whether it marks the structure or what is not of it.
    """

    kind: Kind
    structure: str
    place: Place
    points: tuple[tuple[float, float], ...] = ()
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    inside: bool = True


@dataclass(frozen=True)
class Change:
    """What a step changed of a structure's mask: where, or None where not a voxel did."""

    structure: str
    box: Box | None


@dataclass(frozen=True)
class _Step:
    """What is needed to undo: the mask before, as packed bits, of a slice or (None) of all."""

    what: str
    structure: str
    place: Place | None
    before: NDArray[np.uint8]
    waiting: bool = False
    group: int = 0


class Draft:
    """An image and its masks. Not for several threads at once; :meth:`cancel` is.

    Parameters
    ----------
    volume : the image; a picture is one of shape 1xHxW(x3).
    proposer : what proposes and corrects.
    budget : from which the image's and the masks' bytes are taken.
    name : for people; never stored.
    item : its identity in the worklist, or empty.

    Attributes
    ----------
    axis : along which proposals are made and spread.
    proposals : results by index along the axis.
    masks : IxJxK by structure.
    corrected : the slices that a person worked on, by structure.
    counts : how often they did what, by structure.
    progress : (slices done, of how many) of what runs now.
    accepted : keys of the exemplars that it became.
    """

    def __init__(
        self, volume: Volume, proposer: Proposer, budget: Budget, name: str = "", item: str = ""
    ) -> None:
        self._bytes = volume.array.nbytes
        budget.take(self._bytes)
        self._budget, self._proposer = budget, proposer
        self.volume, self.name, self.item = volume, name, item
        self.cuts = cuts_of(volume)
        self.axis = next(iter(self.cuts))
        self.proposals: dict[int, Result] = {}
        self.masks: dict[str, NDArray[np.bool_]] = {}
        self.corrected: dict[str, set[Place]] = {}
        self.counts: dict[str, Counter[str]] = {}
        self._steps: list[_Step] = []
        self._group, self._grouping = 0, False
        self._waiting: list[Prompt] = []
        self._sessions: OrderedDict[Place, Correcting] = OrderedDict()
        self._drawn: set[tuple[str, Place]] = set()
        self._cancelled = False
        self.progress: tuple[int, int] | None = None
        self.accepted: list[str] = []

    # The image

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the image and of each mask."""
        return self.volume.shape

    @property
    def is_picture(self) -> bool:
        """Whether there is one slice only."""
        return len(self.cuts) == 1 and self.shape[self.axis] == 1

    def picture(self, place: Place) -> NDArray[Any]:
        """Return a slice upright, HxW(x3): a view.

        Raises
        ------
        InputError
            For a slice that there is not.
        """
        return self._cut(place).view(self.volume.array, place.index)

    def mask(self, structure: str, place: Place) -> NDArray[np.bool_]:
        """Return a structure's mask of a slice, upright: a view, or zeros where there is none."""
        cut = self._cut(place)
        known = self.masks.get(structure)
        if known is None:
            return np.zeros(self.picture(place).shape[:2], bool)
        return cut.view(known, place.index)

    def place_of(self, voxel: Sequence[int], axis: int | None = None) -> Place:
        """Return the slice that a voxel lies in; raises InputError outside the image."""
        if any(not 0 <= at < extent for at, extent in zip(voxel, self.shape, strict=True)):
            raise InputError(
                f"the prompt at {list(voxel)} lies outside the image, whose shape is "
                f"{list(self.shape)}."
            )
        axis = self.axis if axis is None else axis
        return Place(axis, voxel[axis])

    def point_of(self, voxel: Sequence[int], place: Place) -> tuple[float, float]:
        """Return (x, y) of a voxel on its upright slice."""
        cut = self._cut(place)
        y, x = voxel[cut.rows], voxel[cut.columns]
        return (
            float(self.shape[cut.columns] - 1 - x if cut.flip_columns else x),
            float(self.shape[cut.rows] - 1 - y if cut.flip_rows else y),
        )

    def cut_along(self, axis: int) -> None:
        """Propose and spread along another axis; raises InputError where it cannot be cut so."""
        self._cut(Place(axis, 0))
        self.axis = axis

    def extent(self, structure: str) -> Box | None:
        """Return the ranges of voxels that hold a structure's mask; None if it has no voxel."""
        return box_of(self.masks[structure]) if structure in self.masks else None

    # What is done to it

    def propose(self) -> bool:
        """Propose masks of all structures of the library, for every slice that no one corrected.

        Returns
        -------
        bool
            False if the library has no exemplar to propose from.
        """
        self._cancelled = False
        count = self.shape[self.axis]
        worked = {place for places in self.corrected.values() for place in places}
        try:
            for index in range(count):
                self._check_cancelled()
                self.progress = index, count
                place = Place(self.axis, index)
                if place in worked:
                    continue
                result = self._proposer.propose(self.picture(place))
                if result is None:
                    return False
                self.proposals[index] = result
                for name, mask in result.masks.items():
                    if mask.any() or name in self.masks:
                        self.mask_to_change(name, place)[:] = mask
                    else:
                        self._know(name)
        finally:
            self.progress = None
        self._steps.clear()  # what was before is not what a person did
        return True

    def prompt(self, prompt: Prompt, *, run: bool = True) -> Change | None:
        """Do what a person asked for; with ``run=False`` it waits for :meth:`run_waiting`.

        Raises
        ------
        InputError
            For a prompt outside the image, or a name that cannot be one.
        RefusedError
            409 where the bundle cannot correct.
        """
        self._check(prompt)
        if not run:
            self._waiting.append(prompt)
            self._remember("prompt", prompt.structure, prompt.place, waiting=True)
            return None
        return self._apply(prompt)

    def run_waiting(self) -> list[Change]:
        """Do what waits; return what that changed."""
        waiting, self._waiting = self._waiting, []
        if waiting:  # as one step each, in place of those that only waited
            self._steps = [step for step in self._steps if not step.waiting]
        return [self._apply(prompt) for prompt in waiting]

    def paint(
        self, structure: str, place: Place, patch: NDArray[np.bool_], x: int, y: int, value: bool
    ) -> Change:
        """Set (or erase) the pixels of a slice that ``patch`` marks, its corner at (x, y)."""
        height, width = patch.shape
        rows, columns = self.picture(place).shape[:2]
        if not (0 <= x <= columns - width and 0 <= y <= rows - height):
            raise InputError(
                f"the stroke of {width}x{height} pixels at ({x}, {y}) lies outside the slice of "
                f"{columns}x{rows}."
            )
        return self._set(structure, place, "brush" if value else "eraser", patch, x, y, value)

    def replace(self, structure: str, mask: NDArray[np.bool_]) -> Change:
        """Give a structure another mask, of all slices.

        Raises
        ------
        InputError
            For a mask of another shape.
        """
        if mask.shape != self.shape:
            raise InputError(
                f"the mask's shape is {list(mask.shape)}, the image's {list(self.shape)}."
            )
        self._remember("mask", structure, None)
        before = self._know(structure).copy()
        self.masks[structure][:] = mask
        for index in np.flatnonzero(mask.any(tuple(a for a in range(3) if a != self.axis))):
            self._touched(structure, Place(self.axis, int(index)), drawn=True)
        self._count(structure, "mask")
        return Change(structure, box_of(before ^ mask))

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """Let all that is done in the block be taken back by one :meth:`undo`."""
        self._group += 1
        self._grouping = True
        try:
            yield
        finally:
            self._grouping = False

    def undo(self) -> Change | None:
        """Take back the last step; None if there is none."""
        if not self._steps:
            return None
        last = self._steps[-1]
        boxes = []
        while self._steps and self._steps[-1].group == last.group:
            step = self._steps.pop()
            if step.waiting:
                self._waiting.pop()
            else:
                boxes.append(self._restore(step))
        if not last.waiting:
            self._count(last.structure, "undo")
        return Change(last.structure, union_of(boxes))

    def _restore(self, step: _Step) -> Box | None:
        """Give a structure the mask that it had before a step; return where that changed it."""
        target = self.masks[step.structure]
        if step.place is not None:
            target = self._cut(step.place).view(target, step.place.index)
            self._sessions.pop(step.place, None)
            self._drawn.add((step.structure, step.place))
        else:
            self._sessions.clear()
            self._drawn |= {(step.structure, at) for at in self.corrected.get(step.structure, ())}
        before = np.unpackbits(step.before, count=target.size).reshape(target.shape).astype(bool)
        changed = before ^ target
        target[:] = before
        return self._changed(step.structure, step.place, changed).box

    def reset(self, structure: str) -> None:
        """Forget a structure's mask, and what was done to it."""
        self._waiting = [one for one in self._waiting if one.structure != structure]
        self._steps = [one for one in self._steps if one.structure != structure]
        for place in self.corrected.pop(structure, ()):
            self._sessions.pop(place, None)
        self._drawn = {one for one in self._drawn if one[0] != structure}
        self.counts.pop(structure, None)
        if structure in self.masks:
            self.masks[structure][:] = False

    def spread(self, structure: str) -> Change:
        """Carry a structure's corrected slices on to their neighbours, until it ends there.

        Slices that a person worked on stay as they are. One step, also if it is cancelled.

        Raises
        ------
        RefusedError
            409 if no slice along :attr:`axis` was corrected, or there is nothing to carry on from.
        """
        self._cancelled = False
        worked = {one.index for one in self.corrected.get(structure, ()) if one.axis == self.axis}
        if not worked:
            raise RefusedError(
                409, f"no slice of '{structure}' was corrected that could be carried on."
            )
        self._remember("spread", structure, None)
        before, count = self.masks[structure].copy(), self.shape[self.axis]
        ways = [(start, way) for start in sorted(worked) for way in (1, -1)]
        try:
            for done, (start, way) in enumerate(ways):
                self.progress = done, len(ways)
                seed = Place(self.axis, start)
                if not self.mask(structure, seed).any():
                    continue
                free = self._free(start, way, worked, count)
                self._carry(structure, seed, free)
        finally:
            self.progress = None
        self._count(structure, "spread")
        return Change(structure, box_of(before ^ self.masks[structure]))

    @staticmethod
    def _free(start: int, way: int, worked: set[int], count: int) -> list[int]:
        """Return the slices from one on: half the way to the next that a person worked on."""
        ahead = [one for one in worked if (one - start) * way > 0]
        if not ahead:
            return [*range(start + way, count if way > 0 else -1, way)]
        gap = min(abs(one - start) for one in ahead) - 1
        share = (gap + 1) // 2 if way > 0 else gap // 2
        return [start + way * step for step in range(1, share + 1)]

    def _carry(self, structure: str, seed: Place, indices: Sequence[int]) -> None:
        places = [Place(self.axis, index) for index in indices]
        pictures = (self.picture(place) for place in places)
        masks = self._proposer.spread(
            structure, self.picture(seed), self.mask(structure, seed), pictures
        )
        ended = False
        for place in places:
            self._check_cancelled()
            found = np.False_ if ended else next(masks)
            ended = ended or not np.any(found)
            self.mask_to_change(structure, place)[:] = found
            self._drawn.add((structure, place))

    def refine(self, structure: str) -> Change:
        """Let the networks improve on a mask that was given, in each slice that it marks."""
        if not self._proposer.corrects:
            raise RefusedError(409, CANNOT)
        self._cancelled = False
        self._remember("refine", structure, None)
        before = self.masks[structure].copy()
        for index in np.flatnonzero(before.any(tuple(a for a in range(3) if a != self.axis))):
            self._check_cancelled()
            place = Place(self.axis, int(index))
            self._drawn.add((structure, place))
            self.mask_to_change(structure, place)[:] = self._session(place, structure).result.masks[
                structure
            ]
        return Change(structure, box_of(before ^ self.masks[structure]))

    def proposal_record(self, structures: Sequence[str]) -> dict[str, Any] | None:
        """Return what an audit log says of the proposals; None where there were none."""
        if not self.proposals:
            return None
        results = [result for _, result in sorted(self.proposals.items())]
        return {
            "provenance": results[-1].provenance.to_json(),
            "slices": len(results),
            "flags": dict(Counter(result.quality.flag for result in results)),
            "recalled": {
                name: sorted({m.key for r in results for m in r.recalled.get(name, ())})
                for name in structures
            },
        }

    def cancel(self) -> None:
        """End a proposal or a spread that runs in another thread."""
        self._cancelled = True

    def close(self) -> None:
        """Give everything back."""
        self._sessions.clear()
        self.masks.clear()
        self.proposals.clear()
        self._steps.clear()
        self._budget.give(self._bytes)
        self._bytes = 0

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to take back."""
        return bool(self._steps)

    @property
    def waits(self) -> bool:
        """Whether prompts wait to be run."""
        return bool(self._waiting)

    # Within

    def _apply(self, prompt: Prompt) -> Change:
        name, place = prompt.structure, prompt.place
        if not prompt.inside and prompt.kind in ("box", "lasso"):  # "not in here": no such prompt
            region = _region(prompt, self.picture(place).shape[:2])
            return self._set(name, place, prompt.kind, region, 0, 0, False)
        session = self._session(place, name)
        self._remember(prompt.kind, name, place)
        try:
            result = self._ask(session, prompt)
        except BaseException:
            self._steps.pop()
            self._sessions.pop(place, None)
            raise
        self._touched(name, place, drawn=False)
        self._count(name, prompt.kind)
        target = self.mask_to_change(name, place)
        changed = result.masks[name] ^ target
        target[:] = result.masks[name]
        return self._changed(name, place, changed)

    def _ask(self, session: Correcting, prompt: Prompt) -> Result:
        name = prompt.structure
        if prompt.kind == "click":
            return session.click(name, *prompt.points[0], inside=prompt.inside)
        if prompt.kind == "scribble":
            return session.scribble(name, prompt.points, inside=prompt.inside)
        if prompt.kind == "lasso" and prompt.mask is not None:
            session.draw(name, prompt.mask)
        (x0, y0), (x1, y1) = prompt.points
        return session.box(name, x0, y0, x1, y1)

    def _session(self, place: Place, structure: str) -> Correcting:
        """Return the slice as it is corrected, beginning from the mask that a person sees."""
        session = self._sessions.get(place)
        if session is None:
            while len(self._sessions) >= MOST_SLICES:
                old, _ = self._sessions.popitem(last=False)
                self._drawn |= {(name, old) for name in self.masks}
            session = self._sessions[place] = self._proposer.correct(self.picture(place))
        self._sessions.move_to_end(place)
        if (structure, place) in self._drawn:
            self._drawn.discard((structure, place))
            mask = self.mask(structure, place)
            if mask.any():
                session.draw(structure, np.ascontiguousarray(mask))
        return session

    def _set(
        self,
        structure: str,
        place: Place,
        what: str,
        patch: NDArray[np.bool_],
        x: int,
        y: int,
        value: bool,
    ) -> Change:
        check_name(structure)
        self._know(structure)
        self._remember(what, structure, place)
        target = self.mask_to_change(structure, place)
        before = target.copy()
        target[y : y + patch.shape[0], x : x + patch.shape[1]][patch] = value
        self._touched(structure, place, drawn=True)
        self._count(structure, what)
        return self._changed(structure, place, before ^ target)

    def mask_to_change(self, structure: str, place: Place) -> NDArray[np.bool_]:
        """Return a slice of a structure's mask, to be written."""
        return self._cut(place).view(self._know(structure), place.index)

    def _know(self, structure: str) -> NDArray[np.bool_]:
        """Return a structure's mask, made empty where there is none yet."""
        if structure not in self.masks:
            if len(self.masks) >= MOST_STRUCTURES:
                raise InputError(f"a draft has at most {MOST_STRUCTURES} structures.")
            size = int(np.prod(self.shape))
            self._budget.take(size)
            self._bytes += size
            self.masks[structure] = np.zeros(self.shape, bool)
        return self.masks[structure]

    def _remember(
        self, what: str, structure: str, place: Place | None, *, waiting: bool = False
    ) -> None:
        mask = self._know(structure)
        now = mask if place is None else self._cut(place).view(mask, place.index)
        bits = np.packbits(now) if not waiting else np.zeros(0, np.uint8)
        if not self._grouping:
            self._group += 1
        self._steps.append(_Step(what, structure, place, bits, waiting, self._group))
        del self._steps[:-MOST_STEPS]

    def _touched(self, structure: str, place: Place, *, drawn: bool) -> None:
        self.corrected.setdefault(structure, set()).add(place)
        if drawn:
            self._drawn.add((structure, place))

    def _count(self, structure: str, what: str) -> None:
        self.counts.setdefault(structure, Counter())[what] += 1

    def _changed(self, structure: str, place: Place | None, changed: NDArray[np.bool_]) -> Change:
        if place is None:
            return Change(structure, box_of(changed))
        if not changed.any():
            return Change(structure, None)
        cut = self._cut(place)
        spans: list[tuple[int, int]] = [(place.index, place.index + 1)] * 3
        for axis, along, flip in (
            (cut.rows, 1, cut.flip_rows),
            (cut.columns, 0, cut.flip_columns),
        ):
            hit = np.flatnonzero(changed.any(along))
            low, high = int(hit[0]), int(hit[-1]) + 1
            extent = self.shape[axis]
            spans[axis] = (extent - high, extent - low) if flip else (low, high)
        return Change(structure, (spans[0], spans[1], spans[2]))

    def _check(self, prompt: Prompt) -> None:
        check_name(prompt.structure)
        if not self._proposer.corrects:
            raise RefusedError(409, CANNOT)
        height, width = self.picture(prompt.place).shape[:2]
        for x, y in prompt.points:
            if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
                raise InputError(
                    f"the prompt at ({x:g}, {y:g}) lies outside the slice of {width}x{height} "
                    "pixels."
                )
        if prompt.kind == "lasso" and (
            prompt.mask is None or prompt.mask.shape != (height, width) or not prompt.mask.any()
        ):
            raise InputError("a lasso must mark pixels of the slice, and marks none.")
        wanted = {"click": 1, "box": 2, "lasso": 2}.get(prompt.kind)
        if len(prompt.points) != wanted if wanted else not prompt.points:
            raise InputError(f"a {prompt.kind} cannot have {len(prompt.points)} points.")

    def _cut(self, place: Place) -> Slicing:
        cut = self.cuts.get(place.axis)
        if cut is None:
            raise InputError(
                f"the image cannot be cut along axis {place.axis}; it can along "
                f"{', '.join(map(str, self.cuts))}."
            )
        if not 0 <= place.index < self.shape[place.axis]:
            raise InputError(
                f"there is no slice {place.index} along axis {place.axis}: it has "
                f"{self.shape[place.axis]}, counted from 0."
            )
        return cut

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise CancelledError

    def __repr__(self) -> str:
        return f"Draft({'x'.join(map(str, self.shape))}, {', '.join(self.masks) or 'no masks'})"


def _region(prompt: Prompt, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels that a box or lasso encloses."""
    if prompt.mask is not None:
        return prompt.mask
    region = np.zeros(shape, bool)
    (x0, y0), (x1, y1) = prompt.points
    xs, ys = sorted((round(x0), round(x1))), sorted((round(y0), round(y1)))
    region[ys[0] : ys[1] + 1, xs[0] : xs[1] + 1] = True
    return region
