"""An opened image and its masks, each step of which can be taken back.

A picture is a volume of one slice here, so that both go the same way. Masks live on the image's own
grid; what a person does is done to one slice, upright as it is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.pixels.interface import MOST_STRUCTURES
from recallseg.runtime.checks import check_name
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.services.http.cuts import Box, box_of, cuts_of, union_of
from recallseg.runtime.services.http.limits import Budget
from recallseg.runtime.services.http.prompts import Change, Place

__all__ = ["Sheet", "Step"]

MOST_STEPS = 200
"""That can be undone; older ones are forgotten."""


@dataclass(frozen=True)
class Step:
    """What is needed to undo: the mask before, as packed bits, of a slice or (None) of all.

    ``waiting`` is of a prompt that was not run yet, ``prompted`` of one that was; steps of one
    ``group`` are undone together.
    """

    structure: str
    place: Place | None
    before: NDArray[np.uint8]
    group: int
    waiting: bool = False
    prompted: bool = False


class Sheet:
    """An image and masks by structure. Not for several threads at once.

    Parameters
    ----------
    volume : the image; a picture is one of shape 1xHxW(x3).
    budget : from which the image's and the masks' bytes are taken.

    Attributes
    ----------
    cuts : how it is cut, by axis.
    axis : along which proposals are made and spread.
    masks : IxJxK by structure.
    corrected : the slices that a person worked on, by structure.
    counts : how often they did what, by structure.
    """

    def __init__(self, volume: Volume, budget: Budget) -> None:
        self._bytes = volume.array.nbytes
        budget.take(self._bytes)
        self._budget, self.volume = budget, volume
        self.cuts = cuts_of(volume)
        self.axis = next(iter(self.cuts))
        self.masks: dict[str, NDArray[np.bool_]] = {}
        self.corrected: dict[str, set[Place]] = {}
        self.counts: dict[str, Counter[str]] = {}
        self._steps: list[Step] = []
        self._group, self._grouping = 0, False
        self._drawn: set[tuple[str, Place]] = set()

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

    def mask_to_change(self, structure: str, place: Place) -> NDArray[np.bool_]:
        """Return a slice of a structure's mask, to be written."""
        return self._cut(place).view(self._know(structure), place.index)

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
        self._remember(structure, None)
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
                self._withdraw()
            else:
                boxes.append(self._restore(step))
        if not last.waiting:
            self._count(last.structure, "undo")
        return Change(last.structure, union_of(boxes))

    def _restore(self, step: Step) -> Box | None:
        """Give a structure the mask that it had before a step; return where that changed it."""
        self._go_back(step)
        target = self.masks[step.structure]
        if step.place is not None:
            target = self._cut(step.place).view(target, step.place.index)
        before = np.unpackbits(step.before, count=target.size).reshape(target.shape).astype(bool)
        changed = before ^ target
        target[:] = before
        return self._changed(step.structure, step.place, changed).box

    def _go_back(self, step: Step) -> None:
        """Note that the mask of a step is not what networks made any more."""
        places = self.corrected.get(step.structure, ()) if step.place is None else (step.place,)
        self._drawn |= {(step.structure, place) for place in places}

    def _withdraw(self) -> None:
        """Take back the last prompt that waits: of a sheet there is none."""

    def reset(self, structure: str) -> None:
        """Forget a structure's mask, and what was done to it."""
        self._steps = [one for one in self._steps if one.structure != structure]
        self.corrected.pop(structure, None)
        self._drawn = {one for one in self._drawn if one[0] != structure}
        self.counts.pop(structure, None)
        if structure in self.masks:
            self.masks[structure][:] = False

    def close(self) -> None:
        """Give everything back."""
        self.masks.clear()
        self._steps.clear()
        self._budget.give(self._bytes)
        self._bytes = 0

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to take back."""
        return bool(self._steps)

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
        self._remember(structure, place)
        target = self.mask_to_change(structure, place)
        before = target.copy()
        target[y : y + patch.shape[0], x : x + patch.shape[1]][patch] = value
        self._touched(structure, place, drawn=True)
        self._count(structure, what)
        return self._changed(structure, place, before ^ target)

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
        self, structure: str, place: Place | None, *, waiting: bool = False, prompted: bool = False
    ) -> None:
        """Begin a step."""
        mask = self._know(structure)
        now = mask if place is None else self._cut(place).view(mask, place.index)
        bits = np.zeros(0, np.uint8) if waiting else np.packbits(now)
        if not self._grouping:
            self._group += 1
        self._steps.append(Step(structure, place, bits, self._group, waiting, prompted))
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
