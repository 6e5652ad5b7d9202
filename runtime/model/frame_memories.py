"""What the last frames of one sequence showed: memories made on the way and soon forgotten.

The paper recalls annotated exemplars only. In a cine or a volume the frame just segmented is often
the best exemplar of all, and SAM 2 was made to use it: its mask and features become a memory that
is attended to beside the recalled ones. It enters as one more exemplar, with the bundle's one time
code, so it asks for no other graph (SAM 2, arXiv 2408.00714, section 4, gives such memories a
temporal position of their own).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.specs import Geometry
from recallseg.runtime.model.preprocess import prepare_mask

__all__ = ["TemporalMemories"]

Array = NDArray[np.float32]
Memorize = Callable[[Array, Array, Array], None]


class TemporalMemories:
    """A ring of the newest memories of each structure, all buffers allocated once.

    Belongs to one sequence and is used by one thread at a time;
    :meth:`recallseg.runtime.segmenting.segmenter.Segmenter.temporal_memories` makes it.

    Parameters
    ----------
    geometry : of the bundle.
    structures : n, how many structures there are.
    size : most memories of each; the oldest is forgotten first.
    """

    def __init__(self, geometry: Geometry, structures: int, size: int) -> None:
        g = geometry
        self.size = size
        self._memories = np.zeros((structures, size, g.tokens, g.memory_dim), np.float32)
        self._pointers = np.zeros((structures, size, g.channels), np.float32)
        self._made = [0] * structures  # memories made so far, by structure
        group = min(structures, g.max_n)
        self._masks = np.zeros((group, 1, g.image_size, g.image_size), np.float32)
        self._new_memories = np.zeros((group, g.tokens, g.memory_dim), np.float32)
        self._new_pointers = np.zeros((group, g.channels), np.float32)

    @property
    def structures(self) -> int:
        """n, how many structures there are."""
        return len(self._made)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        buffers = (self._memories, self._pointers, self._masks)
        return sum(b.nbytes for b in (*buffers, self._new_memories, self._new_pointers))

    def count(self, structure: int) -> int:
        """Return how many memories the structure at this position has, 0 to ``size``."""
        return min(self._made[structure], self.size)

    def clear(self) -> None:
        """Forget everything: the next frame begins a new sequence."""
        self._made = [0] * self.structures

    def gather(
        self, structure: int, memories: NDArray[np.float32], pointers: NDArray[np.float32]
    ) -> None:
        """Copy a structure's memories, newest first.

        Parameters
        ----------
        memories, pointers : ``count`` rows to fill, countxTx64 and countxC.
        """
        for row in range(self.count(structure)):
            slot = (self._made[structure] - 1 - row) % self.size
            memories[row] = self._memories[structure, slot]
            pointers[row] = self._pointers[structure, slot]

    def remember(self, memorize: Memorize, masks: Mapping[int, NDArray[np.bool_]]) -> None:
        """Make a memory of each mask, which must be of the image that was encoded last.

        Parameters
        ----------
        memorize : fills memories nxTx64 and pointers nxC from masks nx1xSxS.
        masks : boolean HxW, by position of the structure.
        """
        rows = list(masks)
        group = len(self._masks)
        for start in range(0, len(rows), group):
            members = rows[start : start + group]
            n = len(members)
            for plane, structure in zip(self._masks[:, 0], members, strict=False):
                prepare_mask(masks[structure], plane)
            memorize(self._masks[:n], self._new_memories[:n], self._new_pointers[:n])
            for row, structure in enumerate(members):
                slot = self._made[structure] % self.size
                self._memories[structure, slot] = self._new_memories[row]
                self._pointers[structure, slot] = self._new_pointers[row]
                self._made[structure] += 1

    def __repr__(self) -> str:
        counts = [self.count(i) for i in range(self.structures)]
        return f"TemporalMemories(size {self.size}, {counts}, {self.nbytes / 2**20:.0f} MiB)"
