"""Memories of exemplars on the GPU: what queries recall again is not copied again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from recallseg.engines.device import Device, DeviceTensor, Stream
from recallseg.engines.errors import EngineRunError
from recallseg.engines.specs import Geometry
from recallseg.runtime.library import Library
from recallseg.runtime.library.exemplar import StoredMemory

__all__ = ["MemoryCache"]


class MemoryCache:
    """A bank of memories on the device, filled on demand; the least recently used one goes first.

    Where CPU and GPU share their memory (Jetson), the bank is pinned memory that both see, and a
    memory goes there straight from its file. Elsewhere it takes one copy from pinned memory.

    Parameters
    ----------
    device, geometry : where, and of what sizes.
    slots : how many memories it holds; all that one query recalls must fit.
    staged : most memories that one query recalls.
    dtype : float16 as libraries store them, or float32.

    Attributes
    ----------
    tokens, pointers : the bank: slots x T x 64 of ``dtype``, slots x C float32.
    hits, misses : how many memories were there, and were not, since it was made.
    """

    def __init__(
        self, device: Device, geometry: Geometry, *, slots: int, staged: int, dtype: Any
    ) -> None:
        g = geometry
        self.slots, self.hits, self.misses = slots, 0, 0
        self._places: OrderedDict[bytes, int] = OrderedDict()  # slots by the memories' digests
        self._pinned: set[int] = set()  # slots that work queued for the present query reads
        self._row = 0
        shapes = (g.tokens, g.memory_dim), (g.channels,)
        kinds = np.dtype(dtype), np.dtype(np.float32)
        self._shared = device.facts.integrated
        rows = slots if self._shared else staged
        self._buffers = []
        self._host = []
        banks = []
        for shape, kind in zip(shapes, kinds, strict=True):
            size = rows * int(np.prod(shape)) * kind.itemsize
            buffer = device.allocate_pinned(size)
            self._host.append(buffer.array.view(kind).reshape(rows, *shape))
            if self._shared:
                banks.append(DeviceTensor(buffer.device_address, (slots, *shape), kind, buffer))
            else:
                banks.append(device.tensor((slots, *shape), kind))
            self._buffers.append(buffer)
        self.tokens, self.pointers = banks

    @staticmethod
    def slot_bytes(geometry: Geometry, dtype: Any) -> int:
        """Return the bytes of one slot."""
        g = geometry
        return g.tokens * g.memory_dim * int(np.dtype(dtype).itemsize) + 4 * g.channels

    def begin(self) -> None:
        """Begin a query: whatever the last one queued is done."""
        self._pinned.clear()
        self._row = 0

    def fetch(
        self, library: Library, memories: Sequence[StoredMemory], stream: Stream
    ) -> list[int]:
        """Return the slots of exemplars' memories; copies of those that were not there are queued.

        Raises
        ------
        EngineRunError
            If the present query recalls more than the cache holds.
        """
        found = []
        for memory in memories:
            slot = self._places.get(memory.digest)
            if slot is None:
                self.misses += 1
                slot = self._load(library, memory, stream)
                self._places[memory.digest] = slot
            else:
                self.hits += 1
                self._places.move_to_end(memory.digest)
            self._pinned.add(slot)
            found.append(slot)
        return found

    def _load(self, library: Library, memory: StoredMemory, stream: Stream) -> int:
        evicted, slot = self._free_slot()
        row = slot if self._shared else self._row
        tokens, pointers = (part[row : row + 1] for part in self._host)
        if evicted is not None:
            del self._places[evicted]
        library.gather([memory], tokens, pointers)
        if not self._shared:
            self._row += 1
            stream.copy_in(self.tokens.row(slot), tokens[0])
            stream.copy_in(self.pointers.row(slot), pointers[0])
        return slot

    def _free_slot(self) -> tuple[bytes | None, int]:
        """Return a slot, and the digest of the memory that has to make room for it."""
        used = set(self._places.values()) | self._pinned
        if len(used) < self.slots:
            return None, next(slot for slot in range(self.slots) if slot not in used)
        for digest, slot in self._places.items():
            if slot not in self._pinned:
                return digest, slot
        raise EngineRunError(
            f"one query recalls more memories than the {self.slots} that the cache on the GPU "
            "holds. Make the segmenter with larger cache_bytes."
        )
