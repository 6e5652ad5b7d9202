"""What the last frames of one sequence showed: memories made on the way and soon forgotten.

The paper recalls annotated exemplars only. In a cine or a volume the frame just segmented is often
the best exemplar of all, and SAM 2 was made to use it: its mask and features become a memory that
is attended to beside the recalled ones. It enters as one more exemplar, with the bundle's one time
code, so it asks for no other graph (SAM 2, arXiv 2408.00714, section 4, gives such memories a
temporal position of their own).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["FrameMemories"]

Copy = Callable[[Any, Any], None]
"""Copies one tensor to another: target, source."""


class FrameMemories:
    """A ring of the newest memories of each structure, where the model runs, allocated once.

    Belongs to one sequence and is used by one thread at a time;
    :meth:`recallseg.Segmenter.frame_memories` makes it.

    Parameters
    ----------
    memories, pointers : n structures x size x T x 64, n x size x C float32; numpy's or a device's.
    """

    def __init__(self, memories: Any, pointers: Any) -> None:
        self._memories, self._pointers = memories, pointers
        self.structures, self.size = memories.shape[:2]
        self._made = [0] * self.structures  # memories made so far, by structure

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return int(self._memories.nbytes + self._pointers.nbytes)

    def count(self, structure: int) -> int:
        """Return how many memories the structure at this position has, 0 to ``size``."""
        return min(self._made[structure], int(self.size))

    def clear(self) -> None:
        """Forget everything: the next frame begins a new sequence."""
        self._made = [0] * self.structures

    def gather(self, structure: int, memories: Any, pointers: Any, copy: Copy) -> None:
        """Copy a structure's memories, newest first, into as many rows of TxD and C as there are.

        Parameters
        ----------
        memories, pointers : at most ``count`` rows to fill: mxTx64 and mxC.
        """
        for row in range(memories.shape[0]):
            slot = (self._made[structure] - 1 - row) % self.size
            copy(memories[row], self._memories[structure][slot])
            copy(pointers[row], self._pointers[structure][slot])

    def add(self, structure: int, memory: Any, pointer: Any, copy: Copy) -> None:
        """Add a memory, TxD and C, in the place of the oldest."""
        slot = self._made[structure] % self.size
        copy(self._memories[structure][slot], memory)
        copy(self._pointers[structure][slot], pointer)
        self._made[structure] += 1

    def __repr__(self) -> str:
        counts = [self.count(i) for i in range(self.structures)]
        return f"FrameMemories(size {self.size}, {counts}, {self.nbytes / 2**20:.0f} MiB)"
