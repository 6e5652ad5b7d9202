"""Masks that are right on some slices of a volume, carried on to the others.

A slice that is known becomes a frame memory (SAM 2, arXiv 2408.00714): slices that are segmented
after it attend to it first, to the slice before them next, and to the library's exemplars with the
room that is left. Without a library's exemplars it is spread all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.specs import GRAPHS
from recallseg.runtime.library import Library
from recallseg.runtime.library.exemplar import StoredMemory
from recallseg.runtime.model.frame_memories import Copy, FrameMemories
from recallseg.runtime.model.model import Model
from recallseg.runtime.model.view import Finished, View, Wanted, groups
from recallseg.runtime.segmenting.reach import within_reach
from recallseg.runtime.segmenting.segmenter import Segmenter

__all__ = ["NEAREST", "Spreading", "half_way"]

NEAREST = 4
"""Known slices that another one attends to at most, the nearest ones."""

Masks = Mapping[str, NDArray[np.bool_]]


class Spreading:
    """Carries structures on from slices whose masks are known.

    Parameters
    ----------
    library : whose exemplars are recalled beside, and whose rule for intensities holds.
    structures : names.
    picture : returns an upright slice HxW(x3) by its index.
    segmenter : says how many exemplars are recalled; None: none.
    model : what it runs on where there is no segmenter; the library's own by default.

    Raises
    ------
    InputError, EngineRunError, ModelClosedError
    HostMemoryError, DeviceMemoryError
    """

    def __init__(
        self,
        library: Library,
        structures: Sequence[str],
        picture: Callable[[int], NDArray[Any]],
        *,
        segmenter: Segmenter | None = None,
        model: Model | None = None,
    ) -> None:
        self._library, self._segmenter, self._picture = library, segmenter, picture
        self._names = tuple(structures)
        self._model = segmenter.model if segmenter is not None else model or library.model()
        known = library.structures
        self._recalled = [n for n in self._names if segmenter is not None and n in known]
        recalled, most = 0 if segmenter is None else segmenter.k, self._model.bundle.geometry.max_k
        self._nearest = min(NEAREST, most - 1)
        self._k = min(most, recalled + self._nearest + 1)
        count = len(self._names)
        self._model.reserve(
            count,
            self._k,
            masks=count,
            memories=len(library),
            memory_format=library.memory_format,
            graphs=GRAPHS,
        )
        self._seen: dict[int, FrameMemories] = {}
        self._right: dict[int, dict[str, bool]] = {}

    def know(self, index: int, masks: Masks, view: Callable[[], View] | None = None) -> None:
        """Take a slice's masks HxW as right; an empty one says that the structure is absent.

        Parameters
        ----------
        view : brings the slice on the model, where it is kept; it is encoded otherwise.
        """
        frames = self._model.frame_memories(len(self._names), 1)
        shown = {
            position: np.ascontiguousarray(masks[name])
            for position, name in enumerate(self._names)
            if name in masks and masks[name].any()
        }
        with self._model.turns:
            (view() if view is not None else self._look(index)).remember(frames, shown)
        self._seen[index] = frames
        self._right[index] = {name: bool(mask.any()) for name, mask in masks.items()}

    def run(self, count: int) -> Iterator[tuple[int, Finished | None]]:
        """Yield the other slices of ``count`` by their index, each when it is done.

        From each known slice outwards, up and then down, half way to the next known one. A
        structure that was carried on from a slice, and is absent in the next, ends there. None
        stands for a slice in which all have ended before: all are absent.
        """
        everything = set(range(len(self._names)))
        for start in sorted(self._seen):
            right = self._right[start]
            gone = {p for p, name in enumerate(self._names) if right.get(name) is False}
            for way in (1, -1):
                # One of which nothing is known here comes from afar, and may begin anywhere.
                left, ends = everything - gone, {self._names.index(name) for name in right}
                before = self._model.frame_memories(len(self._names), 1)
                for index in half_way(start, way, self._seen, count):
                    if not left:
                        yield index, None
                        continue
                    found = self._segment(index, sorted(left), before)
                    left -= ends - _shown(found).keys()
                    yield index, found

    def _look(self, index: int) -> View:
        picture = np.ascontiguousarray(self._picture(index))
        return self._model.look(picture, self._library.intensity)

    def _segment(self, index: int, wanted: Sequence[int], before: FrameMemories) -> Finished:
        """Segment one slice from the line of frame memories, and exemplars behind it."""
        model = self._model
        near = sorted(self._seen, key=lambda other: abs(other - index))[: self._nearest]
        line = _Line([*(self._seen[other] for other in near), before])
        with model.turns:
            view = self._look(index)
            view.begin(len(self._names))
            exemplars = self._exemplars(view)
            by_count: dict[int, list[Wanted]] = {}
            for position in wanted:
                first = line.count(position)
                own = exemplars.get(self._names[position], [])[: self._k - first]
                if first + len(own):
                    by_count.setdefault(first + len(own), []).append(Wanted(position, own))
            for count, every in sorted(by_count.items()):
                for group in groups(every, model.bundle.geometry.max_n):
                    view.recall(self._library.gather, group, count, line)
                    view.attend()
                    view.decode()
            found = view.finish()
            view.remember(before, _shown(found))
            return found

    def _exemplars(self, view: View) -> dict[str, list[StoredMemory]]:
        """Return the memories of exemplars that are like a slice, by structure."""
        segmenter = self._segmenter
        if segmenter is None or not self._recalled:
            return {}
        asked = self._library.recall(
            view.embedding, self._recalled, segmenter.k, tags=segmenter.tags
        )
        return {
            name: [
                one.memories[match.key]
                for match in within_reach(one.matches, segmenter.reach)
                if not match.absent
            ]
            for name, one in asked.found.items()
        }


def half_way(start: int, way: int, known: Mapping[int, object], count: int) -> list[int]:
    """Return the slices from a known one on, up (1) or down (-1): half way to the next known one.

    The middle one of an odd number belongs to the way up.
    """
    ahead = [abs(one - start) for one in known if (one - start) * way > 0]
    if not ahead:
        return [*range(start + way, count if way > 0 else -1, way)]
    gap = min(ahead) - 1
    share = (gap + 1) // 2 if way > 0 else gap // 2
    return [start + way * step for step in range(1, share + 1)]


def _shown(found: Finished) -> dict[int, Any]:
    """Return the masks of those that a slice shows, by position."""
    return {
        position: mask
        for position, mask in enumerate(found.masks)
        if found.object_score[position] > 0 and mask.any()
    }


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
