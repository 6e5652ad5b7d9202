"""A library's head at work: memory attention's logits, mixed with what the head makes of pixels.

The head sees the image at its own resolution, so that boundaries are where the image has them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from recallseg.engines.engine import EngineOptions
from recallseg.engines.heads import (
    FILTERS,
    HEADS,
    PER_STRUCTURE,
    REFINE,
    REFINE_NATIVE,
    SCALES,
    feature_count,
    filters,
    graph_digest,
    is_for,
    refine,
)
from recallseg.engines.onnxruntime_cpu import OnnxRuntimeCpu
from recallseg.engines.operators import operators_digest, operators_library
from recallseg.runtime.frozen import FrozenMap
from recallseg.runtime.library.heads import Head, Units
from recallseg.runtime.segmenting.result import STAYS_OUT, HeadUse

if TYPE_CHECKING:
    from recallseg.runtime.library import Library
    from recallseg.runtime.model.view import Refine

__all__ = ["Filters", "Refiner", "describe_head", "find_head", "mend_head"]

COARSEST = 2 ** (SCALES - 1)
TILE = 512
"""Pixels along a side of what one run makes; larger images take several."""
HALO = 64
"""Pixels around a tile that its filters see: whole coarsest ones, and more than they reach."""
LIMIT = 10.0
"""Logits beyond it say no more; where memory attention made none, they are at its end."""
SMOOTHINGS = (5, 13)
"""Sides of the squares of logits that are averaged, on the logits' own grid."""


class _Stage:
    """Evidence of one image on its own grid, and the tiles to cut it into."""

    def __init__(self) -> None:
        self._flat: dict[str, NDArray[np.float32]] = {}

    def room(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return a buffer that is kept from image to image; it grows with the largest."""
        size = int(np.prod(shape))
        held = self._flat.get(name)
        if held is None or held.size < size:
            held = self._flat[name] = np.empty(size, np.float32)
        part: NDArray[np.float32] = held[:size].reshape(shape)
        return part

    def cut(
        self, name: str, array: NDArray[np.float32], seen: tuple[slice, slice]
    ) -> NDArray[np.float32]:
        """Return a tile of planes 1xcxHxW as the engine takes it, copied only if need be."""
        part = array[:, :, seen[0], seen[1]]
        if not part.flags.c_contiguous:
            held = self.room(f"{name} cut", part.shape)
            np.copyto(held, part)
            return held
        return part

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(array.nbytes for array in self._flat.values())

    def evidence(
        self, logits: NDArray[Any], shape: tuple[int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return logits nxqxq, and their means around, on a grid: 1xnxHxW and 1xmxHxW."""
        n, size = len(logits), (shape[1], shape[0])
        limited = np.nan_to_num(logits.astype(np.float32), nan=-LIMIT, posinf=LIMIT, neginf=-LIMIT)
        np.clip(limited, -LIMIT, LIMIT, out=limited)
        own = self.room("logits", (1, n, *shape))
        around = self.room("around", (1, (PER_STRUCTURE - 1) * n, *shape))
        for i, plane in enumerate(limited):
            cv2.resize(plane, size, dst=own[0, i], interpolation=cv2.INTER_LINEAR)
            for j, side in enumerate(SMOOTHINGS):
                mean = cv2.blur(plane, (side, side), borderType=cv2.BORDER_REPLICATE)
                cv2.resize(mean, size, dst=around[0, j * n + i], interpolation=cv2.INTER_LINEAR)
        return own, around


def _tiles(height: int, width: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Return (what a run sees, what of it is used), so that the edges of tiles leave no trace."""
    found = []
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            ends = [(top, height), (left, width)]
            seen = tuple(slice(max(0, at - HALO), min(most, at + TILE + HALO)) for at, most in ends)
            used = tuple(
                slice(at - s.start, min(at + TILE, most) - s.start)
                for (at, most), s in zip(ends, seen, strict=True)
            )
            found.append(((seen[0], seen[1]), (used[0], used[1])))
    return found


class Filters:
    """Makes of an image, and memory attention's logits, the numbers that a head is fitted on."""

    def __init__(self, threads: int | None = None) -> None:
        self._engine = OnnxRuntimeCpu(filters(), HEADS / FILTERS, EngineOptions(threads))
        self._stage = _Stage()

    def sample(
        self,
        planes: NDArray[np.float32],
        logits: NDArray[Any],
        pixels: NDArray[np.intp],
    ) -> NDArray[np.float32]:
        """Return the features NxF of N pixels, by their places in the flattened image.

        Parameters
        ----------
        planes : 1x3xHxW in 0..1.
        logits : nxqxq; NaN where memory attention made none.
        """
        height, width = planes.shape[2:]
        own, around = self._stage.evidence(logits, (height, width))
        rows, columns = np.divmod(pixels, width)
        found = np.empty((len(pixels), feature_count(len(logits))), np.float32)
        for seen, used in _tiles(height, width):
            top, left = seen[0].start + used[0].start, seen[1].start + used[1].start
            inside = (rows >= top) & (rows < seen[0].start + used[0].stop)
            inside &= (columns >= left) & (columns < seen[1].start + used[1].stop)
            if not inside.any():
                continue
            cut = {
                name: self._stage.cut(name, array, seen)
                for name, array in (("image", planes), ("logits", own), ("around", around))
            }
            h, w = (-(-size // COARSEST) * COARSEST for size in cut["image"].shape[2:])
            features = self._stage.room("features", (1, found.shape[1], h, w))
            self._engine.run(cut, {"features": features})
            at = rows[inside] - seen[0].start, columns[inside] - seen[1].start
            found[inside] = features[0][:, at[0], at[1]].T
        return found


class Refiner:
    """Runs a head. Its buffers grow with the largest image; one thread at a time.

    Parameters
    ----------
    head : whose units and choices.
    threads : of the CPU; None for all cores.
    """

    def __init__(self, head: Head, threads: int | None = None) -> None:
        self.head = head
        self._graph = REFINE if operators_library() is None else REFINE_NATIVE
        self._engine = OnnxRuntimeCpu(refine(), HEADS / self._graph, EngineOptions(threads))
        self._stage = _Stage()
        self._choices = [head.choices[name] for name in head.structures]
        self._mix = _mix([choice.mix for choice in self._choices])

    def group(self, library: Library, key: str) -> tuple[str, ...]:
        """Return the keys of an exemplar's group, as it was when the head was fitted."""
        groups = self.head.groups
        own = groups.get(library.number(key))
        members = [number for number, group in groups.items() if group == own]
        return tuple(dict.fromkeys((key, *library.keys_of(members))))

    def refining(
        self, library: Library, order: Sequence[str], without: Collection[str]
    ) -> Refine | None:
        """Return what refines logits of structures in an order.

        By units that have not seen the exemplars that are passed over. Where there are none, since
        they are of several folds, None: memory attention then stands alone.
        """
        seen = {library.number(key) for key in without if key in library}
        folds = {self.head.fold_of[number] for number in seen if number in self.head.fold_of}
        if len(folds) > 1:
            return None
        units = self.head.folds[folds.pop()] if folds else self.head.units
        rows = [order.index(name) for name in self.head.structures]

        def refine(
            planes: NDArray[np.float32], logits: NDArray[np.float32]
        ) -> tuple[NDArray[np.float32], list[bool]]:
            return self._refine(planes, logits, units, rows)

        return refine

    def _refine(
        self,
        planes: NDArray[np.float32],
        logits: NDArray[np.float32],
        units: Units,
        rows: Sequence[int],
    ) -> tuple[NDArray[np.float32], list[bool]]:
        """Return logits of all structures in the caller's order; others than the head's as grown.

        ``rows`` are the places of the head's structures.
        """
        refined = self.run(planes, logits[list(rows)], units, self._mix)
        size = refined[0].size
        shape = planes.shape[2:]
        made = self._stage.room("ordered", (len(logits), *shape))
        small = [False] * len(logits)
        own = self._stage.room("logits", (len(rows), *shape))  # as run() grew them
        for i, (row, choice) in enumerate(zip(rows, self._choices, strict=True)):
            made[row] = refined[i]
            few = choice.least > 0 and np.count_nonzero(refined[i] > 0) < choice.least * size
            small[row] = bool(few or (choice.within and own[i].max() <= 0))
        for row in range(len(logits)):
            if row not in rows:
                plane = np.nan_to_num(logits[row], nan=-LIMIT)
                cv2.resize(plane, shape[::-1], dst=made[row], interpolation=cv2.INTER_LINEAR)
        return made, small

    @property
    def graph(self) -> str:
        """Digest of the graph that runs."""
        return graph_digest(self._graph)

    @property
    def operators(self) -> str | None:
        """Digest of the native operators that it runs with; None without them."""
        return None if self._graph == REFINE else operators_digest()

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self._stage.nbytes

    def units(self, number: int | None) -> Units:
        """Return the units that have not seen an exemplar, by its number; those of all if None."""
        fold = None if number is None else self.head.fold_of.get(number)
        return self.head.units if fold is None or not self.head.folds else self.head.folds[fold]

    def run(
        self,
        planes: NDArray[np.float32],
        logits: NDArray[Any],
        units: Units,
        mix: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return logits nxHxW by these units, mixed; the next call writes over them."""
        height, width = planes.shape[2:]
        n = len(logits)
        own, around = self._stage.evidence(logits, (height, width))
        weights = {"mix": mix}
        for layer in range(3):
            matrix, biases = units[2 * layer], units[2 * layer + 1]
            weights[f"weights{layer + 1}"] = np.ascontiguousarray(matrix)[:, :, None, None]
            weights[f"biases{layer + 1}"] = np.ascontiguousarray(biases)
        result = self._stage.room("refined", (1, n, height, width))
        tiles = _tiles(height, width)
        for seen, used in tiles:
            inputs = {
                name: self._stage.cut(name, array, seen)
                for name, array in (("image", planes), ("logits", own), ("around", around))
            }
            if len(tiles) == 1:
                self._engine.run({**inputs, **weights}, {"refined": result})
                break
            made = self._stage.room("made", (1, n, *inputs["image"].shape[2:]))
            self._engine.run({**inputs, **weights}, {"refined": made})
            top, left = seen[0].start + used[0].start, seen[1].start + used[1].start
            inner = made[:, :, used[0], used[1]]
            result[:, :, top : top + inner.shape[2], left : left + inner.shape[3]] = inner
        whole: NDArray[np.float32] = result[0]
        return whole


def find_head(
    library: Library, structures: Sequence[str], threads: int | None
) -> tuple[Refiner | None, HeadUse | None]:
    """Return a library's head, ready to run, or None; and what it has to do with results.

    Raises
    ------
    LibraryCorruptError
        If there is one that is damaged, or another library's.
    """
    head = library.head
    if head is None:
        return None, None
    use = describe_head(library, head, structures)
    return (Refiner(head, threads) if use.used else None), use


def describe_head(library: Library, head: Head, structures: Sequence[str]) -> HeadUse:
    """Return whether a head is used for these structures, and how old it is now."""
    choices = {name: head.choices[name] for name in structures if name in head.choices}
    why = ""
    if not is_for(head.graph):
        why = "the library's head was fitted for other filters and is left out"
    elif head.generation != library.generation:
        why = "the library was encoded anew since its head was fitted"
    elif not any(choice.used for choice in choices.values()):
        why = STAYS_OUT
    return HeadUse(
        why,
        head.digest,
        head.created,
        len(head.fold_of),
        head.of,
        len(library),
        library.head_older(head),
        head.grouping,
        FrozenMap(choices),
    )


def mend_head(library: Library, use: HeadUse | None) -> str:
    """Say what is wrong with a head, and the command that mends it; empty if nothing is."""
    if use is None or use.why == STAYS_OUT:  # that it stays out was judged by exemplars
        return ""
    found = use.why or use.older
    return f"{found}: fit it anew with 'recallseg library fit {library.path}'" if found else ""


def _mix(shares: Sequence[float]) -> NDArray[np.float32]:
    mix: NDArray[np.float32] = np.array(shares, np.float32).reshape(1, -1, 1, 1)
    return mix
