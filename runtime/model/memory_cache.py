"""Memories of exemplars on the GPU: what queries recall again is not copied again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import Device, DeviceTensor, PinnedBuffer, Stream
from recallseg.engines.errors import EngineRunError
from recallseg.engines.specs import Geometry
from recallseg.runtime.library.exemplar import StoredMemory

__all__ = ["MemoryCache"]

Gather = Callable[[Sequence[StoredMemory], NDArray[Any], NDArray[np.float32]], None]


class MemoryCache:
    """A bank of memories on the device, filled on demand; the least recently used one goes first.

    Memories are told apart by their digests, so that whatever recalls the same one finds it.
    Where CPU and GPU share their memory (Jetson), the bank is pinned memory that both see, and a
    memory goes there straight from its file. Elsewhere it takes one copy from pinned memory.

    Parameters
    ----------
    device, geometry : where, and of what sizes.
    dtype : float16 as libraries store them, or float32.

    Attributes
    ----------
    slots : how many memories it holds; all that one question recalls must fit.
    slot_bytes : of each.
    tokens, pointers : the bank: slots x T x 64 of ``dtype``, slots x C float32.
    hits, misses : how many memories were there, and were not, since it was made.
    """

    tokens: DeviceTensor
    pointers: DeviceTensor

    def __init__(self, device: Device, geometry: Geometry, dtype: Any) -> None:
        g = geometry
        self._device = device
        self._shared = device.facts.integrated
        self._kinds: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...] = (
            ((g.tokens, g.memory_dim), np.dtype(dtype)),
            ((g.channels,), np.dtype(np.float32)),
        )
        self.slot_bytes = sum(int(np.prod(shape)) * kind.itemsize for shape, kind in self._kinds)
        self.hits, self.misses = 0, 0
        self.clear()

    def clear(self) -> None:
        """Give everything back. Nothing may be queued on it any more."""
        self.slots = self._staged = 0
        self._places: OrderedDict[bytes, int] = OrderedDict()  # slots by the memories' digests
        self._pinned: set[int] = set()  # slots that work queued for the present question reads
        self._row = 0
        self._host: list[NDArray[Any]] = []
        self._owners: list[PinnedBuffer] = []
        if hasattr(self, "tokens"):
            del self.tokens, self.pointers

    @property
    def nbytes(self) -> int:
        """Bytes that it holds where the GPU reads them."""
        return self.slots * self.slot_bytes

    def growth_bytes(self, slots: int) -> int:
        """Return the bytes that :meth:`grow` will take; what is there goes only afterwards."""
        return slots * self.slot_bytes if slots > self.slots else 0

    def grow(self, slots: int, staged: int, stream: Stream) -> None:
        """Make room for ``slots`` memories, of which one question takes up to ``staged``.

        What is there stays; if this fails, everything is as it was.
        """
        if slots <= self.slots and staged <= self._staged:
            return
        slots, staged = max(slots, self.slots), max(staged, self._staged)
        rows = slots if self._shared else staged
        owners, host = [], []
        for shape, kind in self._kinds:
            owner = self._device.allocate_pinned(rows * int(np.prod(shape)) * kind.itemsize)
            owners.append(owner)
            host.append(owner.array.view(kind).reshape(rows, *shape))
        banks = []
        for owner, (shape, kind) in zip(owners, self._kinds, strict=True):
            if self._shared:
                banks.append(DeviceTensor(owner.device_address, (slots, *shape), kind, owner))
            else:
                banks.append(self._device.tensor((slots, *shape), kind))
        if self.slots and self._shared:
            self._device.synchronize()
            for new, old in zip(host, self._host, strict=True):
                new[: self.slots] = old
        elif self.slots:
            for bank, there in zip(banks, (self.tokens, self.pointers), strict=True):
                stream.copy(bank.rows(self.slots), there)
            self._device.synchronize()
        self._owners, self._host, (self.tokens, self.pointers) = owners, host, banks
        self.slots, self._staged, self._row = slots, staged, 0

    def begin(self) -> None:
        """Begin a question: what the last one recalled may go now."""
        self._pinned.clear()
        self._row = 0

    def fetch(self, gather: Gather, memories: Sequence[StoredMemory], stream: Stream) -> list[int]:
        """Return the slots of exemplars' memories; copies of those that were not there are queued.

        Raises
        ------
        EngineRunError
            If the present question recalls more than the cache holds.
        """
        found = []
        for memory in memories:
            slot = self._places.get(memory.digest)
            if slot is None:
                self.misses += 1
                slot = self._load(gather, memory, stream)
                self._places[memory.digest] = slot
            else:
                self.hits += 1
                self._places.move_to_end(memory.digest)
            self._pinned.add(slot)
            found.append(slot)
        return found

    def _load(self, gather: Gather, memory: StoredMemory, stream: Stream) -> int:
        evicted, slot = self._free_slot()
        row = slot if self._shared else self._row
        tokens, pointers = (part[row : row + 1] for part in self._host)
        if evicted is not None:
            del self._places[evicted]
        gather([memory], tokens, pointers)
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
            f"one question recalls more memories than the {self.slots} that the cache on the GPU "
            "holds. Reserve as many: model.reserve(n, k, graphs=...)."
        )
