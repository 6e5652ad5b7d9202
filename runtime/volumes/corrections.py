"""A person corrects slices of a volume; what was corrected is spread to the others on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.reading import open_volume
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.model.model import Model
from recallseg.runtime.segmenting.corrections import Corrections
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.volumes.slices import acquisition_of
from recallseg.runtime.volumes.spreading import Spreading

__all__ = ["Spread", "VolumeCorrections"]

OPEN = 8
"""Slices that were looked at, and not corrected, that are kept ready."""


@dataclass(frozen=True, eq=False)
class Spread:
    """What was spread through a volume.

    Attributes
    ----------
    label_map : uint8 IxJxK on the volume's own grid, 0 is background; where structures overlap, the
        one with the highest logit has the voxel.
    labels : label value by structure.
    masks : boolean IxJxK by structure.
    slices : indices of those that were done, corrected ones included, in their order.
    complete : whether these are all; False if it was cancelled.
    """

    label_map: NDArray[np.uint8]
    labels: Mapping[str, int]
    masks: Mapping[str, NDArray[np.bool_]]
    slices: tuple[int, ...]
    complete: bool


class VolumeCorrections:
    """A volume that a person corrects, slice by slice.

    Parameters
    ----------
    library : see :class:`recallseg.Corrections`; may be empty.
    volume : to be corrected, or its path.
    segmenter : proposes, and says how many exemplars are recalled; None: nothing is recalled.
    plane : see :meth:`Slicing.of`.
    model : what it runs on where there is no segmenter; the library's own by default.

    Attributes
    ----------
    slicing : how the volume is cut; coordinates are those of its upright slices.

    Raises
    ------
    InputError
        For a plane that the volume does not have.
    """

    def __init__(
        self,
        library: Library,
        volume: Volume | str | Path,
        *,
        segmenter: Segmenter | None = None,
        plane: str | None = None,
        model: Model | None = None,
    ) -> None:
        self._library, self._segmenter = library, segmenter
        self._volume = volume = open_volume(volume)
        self._model = segmenter.model if segmenter is not None else model or library.model()
        self.slicing = Slicing.of(volume, plane)
        self._sessions: dict[int, Corrections] = {}

    @property
    def count(self) -> int:
        """How many slices there are."""
        return self.slicing.count(self._volume)

    @property
    def corrected(self) -> tuple[int, ...]:
        """Indices of the slices that were corrected, in their order."""
        return tuple(sorted(i for i, one in self._sessions.items() if one.corrections))

    def at(self, index: int) -> Corrections:
        """Return one slice to be corrected; the same as long as it is kept ready.

        Raises
        ------
        InputError
            If there is no such slice.
        """
        if not 0 <= index < self.count:
            raise InputError(f"the volume has slices 0 to {self.count - 1}, got {index}.")
        if index not in self._sessions:
            idle = [i for i, one in self._sessions.items() if not one.corrections]
            for stale in idle[: max(0, len(idle) - OPEN + 1)]:
                self._sessions.pop(stale).close()
            self._sessions[index] = Corrections(
                self._library,
                self._picture(index),
                segmenter=self._segmenter,
                acquisition=acquisition_of(self._volume, self.slicing),
                model=self._given,
            )
        return self._sessions[index]

    def propagate(
        self,
        structures: Sequence[str] | None = None,
        *,
        cancel: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> Spread:
        """Segment the other slices from the corrected ones, see :class:`Spreading`.

        From each corrected slice outwards, half way to the next; a structure ends where a slice
        lacks it.

        Parameters
        ----------
        structures : names; None for all that were corrected.
        cancel : asked before each slice; True ends it, and what was done is returned.
        progress : is told how many slices are done, of how many.

        Raises
        ------
        InputError
            If nothing was corrected, or a structure was not.
        EngineRunError, ModelClosedError
        """
        done = self.corrected
        known = [n for i in done for n in self._sessions[i].corrections]
        names = tuple(dict.fromkeys(known)) if structures is None else tuple(structures)
        missing = [name for name in names if name not in known]
        if missing or not names:
            what = f"'{missing[0]}' was corrected on no slice" if missing else "nothing was"
            raise InputError(f"only what was corrected can be spread: {what}.")
        label_map = np.zeros(self._volume.shape, np.uint8)
        masks = {name: np.zeros(self._volume.shape, bool) for name in names}
        spreading = Spreading(
            self._library, names, self._picture, segmenter=self._segmenter, model=self._given
        )
        finished: list[int] = []
        for index in done:
            session = self._sessions[index]
            shown = session.result.masks
            right = {name: shown[name] for name in names if name in session.corrections}
            spreading.know(index, right, session.bring_back)
            self._put_corrected(index, names, label_map, masks)
            finished.append(index)
        slices = spreading.run(self.count)
        while not cancel():
            progress(len(finished), self.count)
            index, found = next(slices, (-1, None))
            if index < 0:
                break
            if found is not None:
                self.slicing.view(label_map, index)[:] = found.label_map
                for name, mask in zip(names, found.masks, strict=True):
                    self.slicing.view(masks[name], index)[:] = mask
            finished.append(index)
        labels = FrozenMap({name: value for value, name in enumerate(names, 1)})
        every = tuple(sorted(finished))
        return Spread(label_map, labels, FrozenMap(masks), every, len(every) == self.count)

    def close(self) -> None:
        """Give back the room of every slice that is kept ready."""
        for session in self._sessions.values():
            session.close()

    @property
    def _given(self) -> Model | None:
        return None if self._segmenter is not None else self._model

    def _picture(self, index: int) -> NDArray[Any]:
        return np.ascontiguousarray(self.slicing.view(self._volume.array, index))

    def _put_corrected(
        self,
        index: int,
        names: Sequence[str],
        label_map: NDArray[np.uint8],
        masks: Mapping[str, NDArray[np.bool_]],
    ) -> None:
        result = self._sessions[index].result
        for value, name in enumerate(names, 1):
            if name in result.masks:
                self.slicing.view(masks[name], index)[:] = result.masks[name]
                visible = result.label_map == result.labels[name]
                self.slicing.view(label_map, index)[visible] = value

    def __repr__(self) -> str:
        done = ", ".join(map(str, self.corrected)) or "none"
        cut = f"{self.count} {self.slicing.plane} slices"
        return f"recallseg.VolumeCorrections({cut}; corrected: {done})"
