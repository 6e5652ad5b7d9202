"""A person corrects slices of a volume, and what was corrected is spread to the others on demand.

A corrected slice becomes a frame memory (SAM 2, arXiv 2408.00714): slices that are segmented after
it attend to it first, to the slice before them next, and to the library's exemplars with the room
that is left. Without a library's exemplars it is spread all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.runtime.formats.volume import Slicing, Volume
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library import Library
from recallseg.runtime.library.exemplar import StoredMemory
from recallseg.runtime.model.frame_memories import Copy, FrameMemories
from recallseg.runtime.model.model import Model
from recallseg.runtime.model.view import Finished, Wanted, groups
from recallseg.runtime.segmenting.corrections import Corrections
from recallseg.runtime.segmenting.reach import within_reach
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["NEAREST", "Spread", "VolumeCorrections"]

NEAREST = 4
"""Corrected slices that another one attends to at most, the nearest ones."""
OPEN = 8
"""Slices that were looked at, and not corrected, that are kept ready."""
GRAPHS = ("embed", "encode", "memorize", "attend", "decode")


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
    volume : to be corrected.
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
        volume: Volume,
        *,
        segmenter: Segmenter | None = None,
        plane: str | None = None,
        model: Model | None = None,
    ) -> None:
        self._library, self._volume, self._segmenter = library, volume, segmenter
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
                self._library, self._picture(index), segmenter=self._segmenter, model=self._given
            )
        return self._sessions[index]

    def propagate(
        self,
        structures: Sequence[str] | None = None,
        *,
        cancel: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> Spread:
        """Segment the other slices from the corrected ones, outwards from the first of them.

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
        own = self._library.structures
        recalled = [n for n in names if self._segmenter is not None and n in own]
        k = min(self._model.bundle.geometry.max_k, self._k + NEAREST + 1)
        self._model.reserve(
            len(names), k, masks=len(names), memories=len(self._library), graphs=GRAPHS
        )
        sure = {index: self._remembered(index, names) for index in done}
        finished: list[int] = []
        for way in (range(done[0], self.count), range(done[0] - 1, -1, -1)):
            before = self._model.frame_memories(len(names), 1)
            for index in way:
                if cancel():
                    return self._spread(label_map, names, masks, finished, complete=False)
                if index in sure:
                    self._put_corrected(index, names, label_map, masks)
                    before.clear()
                else:
                    near = sorted(sure, key=lambda other: abs(other - index))[:NEAREST]
                    line = _Line([*(sure[other] for other in near), before])
                    found = self._segment(index, names, recalled, line, before, k)
                    self.slicing.view(label_map, index)[:] = found.label_map
                    for name, mask in zip(names, found.masks, strict=True):
                        self.slicing.view(masks[name], index)[:] = mask
                finished.append(index)
                progress(len(finished), self.count)
        return self._spread(label_map, names, masks, finished, complete=True)

    def close(self) -> None:
        """Give back the room of every slice that is kept ready."""
        for session in self._sessions.values():
            session.close()

    @property
    def _given(self) -> Model | None:
        return None if self._segmenter is not None else self._model

    @property
    def _k(self) -> int:
        return 0 if self._segmenter is None else self._segmenter.k

    def _picture(self, index: int) -> NDArray[Any]:
        return np.ascontiguousarray(self.slicing.view(self._volume.array, index))

    def _remembered(self, index: int, names: Sequence[str]) -> FrameMemories:
        """Return the memories of a corrected slice: of what it shows and was corrected there."""
        session, model = self._sessions[index], self._model
        shown = session.result.masks
        masks = {
            position: shown[name]
            for position, name in enumerate(names)
            if name in session.corrections and shown[name].any()
        }
        frames = model.frame_memories(len(names), 1)
        with model.turns:
            session.bring_back().remember(frames, masks)
        return frames

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

    def _segment(
        self,
        index: int,
        names: Sequence[str],
        recalled: Sequence[str],
        line: _Line,
        before: FrameMemories,
        k: int,
    ) -> Finished:
        """Segment one slice from the line of frame memories, and exemplars behind it."""
        model = self._model
        with model.turns:
            view = model.look(self._picture(index), self._library.intensity)
            view.begin(len(names))
            exemplars: dict[str, list[StoredMemory]] = {}
            if recalled and self._segmenter is not None:
                asked = self._library.recall(
                    view.embedding, recalled, self._segmenter.k, tags=self._segmenter.tags
                )
                for name, one in asked.found.items():
                    near = within_reach(one.matches, self._segmenter.reach)
                    exemplars[name] = [one.memories[m.key] for m in near if not m.absent]
            by_count: dict[int, list[Wanted]] = {}
            for position, name in enumerate(names):
                first = line.count(position)
                own = exemplars.get(name, [])[: k - first]
                if first + len(own):
                    by_count.setdefault(first + len(own), []).append(Wanted(position, own))
            for count, every in sorted(by_count.items()):
                for group in groups(every, model.bundle.geometry.max_n):
                    view.recall(self._library.gather, group, count, line)
                    view.attend()
                    view.decode()
            found = view.finish()
            shown = {
                position: mask
                for position, mask in enumerate(found.masks)
                if found.object_score[position] > 0 and mask.any()
            }
            view.remember(before, shown)
            return found

    def _spread(
        self,
        label_map: NDArray[np.uint8],
        names: Sequence[str],
        masks: Mapping[str, NDArray[np.bool_]],
        finished: Sequence[int],
        *,
        complete: bool,
    ) -> Spread:
        labels = FrozenMap({name: value for value, name in enumerate(names, 1)})
        return Spread(label_map, labels, FrozenMap(masks), tuple(sorted(finished)), complete)

    def __repr__(self) -> str:
        done = ", ".join(map(str, self.corrected)) or "none"
        cut = f"{self.count} {self.slicing.plane} slices"
        return f"recallseg.VolumeCorrections({cut}; corrected: {done})"


class _Line(FrameMemories):
    """Frame memories one behind the other, each with one memory of a structure at most."""

    def __init__(self, frames: Sequence[FrameMemories]) -> None:
        self._frames = frames

    def count(self, structure: int) -> int:
        return sum(frames.count(structure) for frames in self._frames)

    def gather(self, structure: int, memories: Any, pointers: Any, copy: Copy) -> None:
        row = 0
        for frames in self._frames:
            if frames.count(structure) and row < memories.shape[0]:
                frames.gather(structure, memories[row : row + 1], pointers[row : row + 1], copy)
                row += 1
