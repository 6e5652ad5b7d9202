"""One opened image that is proposed for and corrected: nobody's exemplar yet.

Nothing of a draft is in a library before it is accepted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.checks import check_name
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.segmenting.acquisition import Acquisition
from recallseg.runtime.segmenting.result import Result
from recallseg.runtime.services.http.cuts import box_of, outline_of
from recallseg.runtime.services.http.limits import Budget, RefusedError
from recallseg.runtime.services.http.prompts import (
    CANNOT,
    CancelledError,
    Change,
    Correcting,
    Place,
    Prompt,
    Proposer,
)
from recallseg.runtime.services.http.sheets import Sheet, Step
from recallseg.runtime.volumes.slices import acquisition_of

__all__ = ["Draft"]

MOST_SLICES = 16
"""Slices of a draft that are kept ready for the next prompt; the least recently used go first."""


class Draft(Sheet):
    """An image and its masks. Not for several threads at once; :meth:`cancel` is.

    Parameters
    ----------
    volume, budget : see :class:`Sheet`.
    proposer : what proposes and corrects.
    name : for people; never stored.
    item : its identity in the worklist, or empty.

    Attributes
    ----------
    proposals : results by index along the axis.
    progress : (slices done, of how many) of what runs now.
    accepted : keys of the exemplars that it became.
    """

    def __init__(
        self, volume: Volume, proposer: Proposer, budget: Budget, name: str = "", item: str = ""
    ) -> None:
        super().__init__(volume, budget)
        self._proposer, self.name, self.item = proposer, name, item
        self.proposals: dict[int, Result] = {}
        self.progress: tuple[int, int] | None = None
        self.accepted: list[str] = []
        self._waiting: list[Prompt] = []
        self._sessions: OrderedDict[Place, Correcting] = OrderedDict()
        self._cancelled = False

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
                result = self._proposed(place)
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

    def _proposed(self, place: Place) -> Result | None:
        """Segment a slice; of a picture, what its first correction needs is kept at once."""
        if not (self.is_picture and self._proposer.corrects and self._proposer.structures):
            return self._proposer.propose(self.picture(place), self._taken(place))
        self._drop(place)
        session = self._sessions[place] = self._begin(place)
        self._drawn = {one for one in self._drawn if one[1] != place}
        return session.result

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
            self._remember(prompt.structure, prompt.place, waiting=True)
            return None
        return self._apply(prompt)

    def run_waiting(self) -> list[Change]:
        """Do what waits; return what that changed."""
        waiting, self._waiting = self._waiting, []
        if waiting:  # as one step each, in place of those that only waited
            self._steps = [step for step in self._steps if not step.waiting]
        return [self._apply(prompt) for prompt in waiting]

    def spread(self, structure: str) -> Change:
        """Carry a structure's corrected slices on to their neighbours, until it ends there.

        Half way from each to the next; slices that a person worked on stay as they are, and where
        none of them shows the structure, so do all. One step, also if it is cancelled.

        Raises
        ------
        RefusedError
            409 if no slice along :attr:`axis` was corrected, or it was cancelled.
        """
        self._cancelled = False
        worked = {one.index for one in self.corrected.get(structure, ()) if one.axis == self.axis}
        if not worked:
            raise RefusedError(
                409, f"no slice of '{structure}' was corrected that could be carried on."
            )
        self._remember(structure, None)
        before, count = self.masks[structure].copy(), self.shape[self.axis]
        right = {at: self.mask(structure, Place(self.axis, at)) for at in sorted(worked)}
        try:
            if any(mask.any() for mask in right.values()):
                self.progress = 0, count - len(right)
                masks = self._proposer.spread(structure, self._picture_at, count, right)
                for done, (index, mask) in enumerate(masks, 1):
                    place = Place(self.axis, index)
                    self.mask_to_change(structure, place)[:] = mask
                    self._drawn.add((structure, place))
                    self.progress = done, count - len(right)
                    self._check_cancelled()
        finally:
            self.progress = None
        self._count(structure, "spread")
        return Change(structure, box_of(before ^ self.masks[structure]))

    def _picture_at(self, index: int) -> NDArray[Any]:
        return self.picture(Place(self.axis, index))

    def refine(self, structure: str) -> Change:
        """Let the networks improve on a mask that was given: in each slice as a lasso round it."""
        self._cancelled = False
        before = self.masks[structure].copy()
        shown = before.any(tuple(axis for axis in range(3) if axis != self.axis))
        for index in np.flatnonzero(shown):
            self._check_cancelled()
            place = Place(self.axis, int(index))
            points = outline_of(self.mask(structure, place))
            if len(points) > 2:
                self.prompt(Prompt("lasso", structure, place, points))
        return Change(structure, box_of(before ^ self.masks[structure]))

    def reset(self, structure: str) -> None:
        self._waiting = [one for one in self._waiting if one.structure != structure]
        for place in self.corrected.get(structure, ()):
            self._drop(place)
        super().reset(structure)

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
        try:
            for place in [*self._sessions]:
                self._drop(place)
            self.proposals.clear()
        finally:
            super().close()  # what it took of the budget comes back whatever happens

    @property
    def waits(self) -> bool:
        """Whether prompts wait to be run."""
        return bool(self._waiting)

    def _apply(self, prompt: Prompt) -> Change:
        name, place = prompt.structure, prompt.place
        if not prompt.inside and prompt.kind == "box":  # SAM knows none: it takes away
            (x0, y0), (x1, y1) = ((round(x), round(y)) for x, y in prompt.points)
            region = np.ones((y1 - y0 + 1, x1 - x0 + 1), bool)
            return self._set(name, place, "box", region, x0, y0, False)
        session = self._session(place, name)
        self._remember(name, place, prompted=True)
        try:
            result = self._ask(session, prompt)
        except BaseException:
            self._steps.pop()
            self._drop(place)
            raise
        self._touched(name, place, drawn=False)
        self._count(name, prompt.kind)
        target = self.mask_to_change(name, place)
        changed = result.masks[name] ^ target
        target[:] = result.masks[name]
        return self._changed(name, place, changed)

    def _ask(self, session: Correcting, prompt: Prompt) -> Result:
        name, points, inside = prompt.structure, prompt.points, prompt.inside
        if prompt.kind == "click":
            return session.click(name, *points[0], inside=inside)
        if prompt.kind == "scribble":
            return session.scribble(name, points, inside=inside)
        if prompt.kind == "lasso":
            return session.lasso(name, points, inside=inside)
        (x0, y0), (x1, y1) = points
        return session.box(name, x0, y0, x1, y1)

    def _session(self, place: Place, structure: str) -> Correcting:
        """Return the slice as it is corrected, beginning from the mask that a person sees."""
        session = self._sessions.get(place)
        if session is None:
            while len(self._sessions) >= MOST_SLICES:
                self._drop(next(iter(self._sessions)))
            session = self._sessions[place] = self._begin(place)
            self._see(place, structure, session)
        self._sessions.move_to_end(place)
        if (structure, place) in self._drawn:
            self._drawn.discard((structure, place))
            session.draw(structure, np.ascontiguousarray(self.mask(structure, place)))
        return session

    def _begin(self, place: Place) -> Correcting:
        return self._proposer.correct(self.picture(place), self._taken(place))

    def _taken(self, place: Place) -> Acquisition:
        return acquisition_of(self.volume, self.cuts[place.axis])

    def _see(self, place: Place, structure: str, session: Correcting) -> None:
        """Note if what was proposed before is shown, and a new session would propose another."""
        seen, made = self.mask(structure, place), session.result.masks.get(structure)
        if place.axis != self.axis or place.index not in self.proposals or not seen.any():
            return
        if made is None or not np.array_equal(made, seen):
            self._drawn.add((structure, place))

    def _drop(self, place: Place) -> None:
        """Let go of a slice that was kept ready; the next prompt begins from its masks."""
        session = self._sessions.pop(place, None)
        if session is not None:
            session.close()
            self._drawn |= {(name, place) for name in self.masks}
            self._steps = [  # another session does not know what this one could take back
                replace(step, prompted=False) if step.place == place else step
                for step in self._steps
            ]

    def _go_back(self, step: Step) -> None:
        at = (step.structure, step.place)
        session = None if step.place is None else self._sessions.get(step.place)
        if session is not None and step.prompted and at not in self._drawn:
            session.undo()  # with its points; the mask is then as it was
            return
        super()._go_back(step)

    def _withdraw(self) -> None:
        self._waiting.pop()

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
        count = len(prompt.points)
        wanted = {"click": count == 1, "box": count == 2, "lasso": count > 2, "scribble": count > 0}
        if not wanted[prompt.kind]:
            raise InputError(f"a {prompt.kind} cannot have {count} points.")

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise CancelledError

    def __repr__(self) -> str:
        return f"Draft({'x'.join(map(str, self.shape))}, {', '.join(self.masks) or 'no masks'})"
