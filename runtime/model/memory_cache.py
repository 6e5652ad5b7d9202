"""Memories of exemplars on the GPU: what queries recall again is not copied again.

They lie there as the library stores them, and are decoded where they are gathered: a memory of fp16
takes half of what the network reads, one of int8 a little more than a quarter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.device import Device, DeviceTensor, PinnedBuffer, Stream
from recallseg.engines.errors import EngineRunError
from recallseg.engines.specs import Geometry
from recallseg.runtime.library.exemplar import StoredMemory

__all__ = ["MemoryCache", "copy_stored", "part_kinds"]

Fill = Callable[[Sequence[StoredMemory], Mapping[str, NDArray[Any]]], None]
"""Writes memories into rows of their parts."""

_Kinds = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]


def part_kinds(geometry: Geometry, memory_format: str) -> _Kinds:
    """Return shape and dtype of each part of a memory: ``tokens``, ``pointers``, int8's ``scales``.

    Parameters
    ----------
    geometry : of the bundle.
    memory_format : ``fp16`` or ``int8``, as libraries store them, or ``fp32``.
    """
    number = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}[memory_format]
    kinds: _Kinds = {
        "tokens": ((geometry.tokens, geometry.memory_dim), np.dtype(number)),
        "pointers": ((geometry.channels,), np.dtype(np.float32)),
    }
    if memory_format == "int8":
        kinds["scales"] = ((geometry.tokens,), np.dtype(np.float32))
    return kinds


def copy_stored(memories: Sequence[StoredMemory], parts: Mapping[str, NDArray[Any]]) -> None:
    """Copy memories as they are stored, see :data:`Fill`; LibraryCorruptError if they are not."""
    for row, memory in enumerate(memories):
        memory.shard.look()
        record = memory.read()
        for part, array in parts.items():
            array[row] = record["pointer" if part == "pointers" else part]


class MemoryCache:
    """A bank of memories on the device, filled on demand; the least recently used one goes first.

    Memories are told apart by their digests, so that whatever recalls the same one finds it.
    Where CPU and GPU share their memory (Jetson), the bank is pinned memory that both see, and a
    memory goes there straight from its file. Elsewhere it takes one copy from pinned memory.

    Parameters
    ----------
    device, geometry : where, and of what sizes.
    memory_format : of what is stored there, see :func:`part_kinds`.

    Attributes
    ----------
    slots : how many memories it holds; all that one question recalls must fit.
    slot_bytes : of each.
    banks : of each part of a memory, slots x its shape.
    hits, misses : how many memories were there, and were not, since it was made.
    """

    banks: dict[str, DeviceTensor]

    def __init__(self, device: Device, geometry: Geometry, memory_format: str) -> None:
        self._device = device
        self._shared = device.facts.integrated
        self._kinds = part_kinds(geometry, memory_format)
        self.slot_bytes = sum(prod(shape) * kind.itemsize for shape, kind in self._kinds.values())
        self.hits, self.misses = 0, 0
        self.clear()

    def clear(self) -> None:
        """Give everything back. Nothing may be queued on it any more."""
        self.slots = self._staged = 0
        self._places: OrderedDict[bytes, int] = OrderedDict()  # slots by the memories' digests
        self._pinned: set[int] = set()  # slots that work queued for the present question reads
        self._row = 0
        self._host: dict[str, NDArray[Any]] = {}
        self._owners: list[PinnedBuffer] = []
        self.banks = {}

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
        owners: list[PinnedBuffer] = []
        host: dict[str, NDArray[Any]] = {}
        for part, (shape, kind) in self._kinds.items():
            owner = self._device.allocate_pinned(rows * prod(shape) * kind.itemsize)
            owners.append(owner)
            host[part] = owner.array.view(kind).reshape(rows, *shape)
        banks = {}
        for owner, (part, (shape, kind)) in zip(owners, self._kinds.items(), strict=True):
            if self._shared:
                banks[part] = DeviceTensor(owner.device_address, (slots, *shape), kind, owner)
            else:
                banks[part] = self._device.tensor((slots, *shape), kind)
        if self.slots and self._shared:
            self._device.synchronize()
            for part, new in host.items():
                new[: self.slots] = self._host[part]
        elif self.slots:
            for part, bank in banks.items():
                stream.copy(bank.rows(self.slots), self.banks[part])
            self._device.synchronize()
        self._owners, self._host, self.banks = owners, host, banks
        self.slots, self._staged, self._row = slots, staged, 0

    def begin(self) -> None:
        """Begin a question: what the last one recalled may go now."""
        self._pinned.clear()
        self._row = 0

    def fetch(self, fill: Fill, memories: Sequence[StoredMemory], stream: Stream) -> list[int]:
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
                slot = self._load(fill, memory, stream)
                self._places[memory.digest] = slot
            else:
                self.hits += 1
                self._places.move_to_end(memory.digest)
            self._pinned.add(slot)
            found.append(slot)
        return found

    def _load(self, fill: Fill, memory: StoredMemory, stream: Stream) -> int:
        evicted, slot = self._free_slot()
        row = slot if self._shared else self._row
        if evicted is not None:
            del self._places[evicted]
        here = {part: array[row : row + 1] for part, array in self._host.items()}
        fill([memory], here)
        if not self._shared:
            self._row += 1
            for part, array in here.items():
                stream.copy_in(self.banks[part].row(slot), array[0])
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
