"""What a query asks of a library: the nearest exemplars, and their memories."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError
from recallseg.engines.pixels import Pixels
from recallseg.runtime.checks import check_count, check_tags
from recallseg.runtime.library.encoding import MemoryLayout
from recallseg.runtime.library.exemplar import Found, Match, Recollection, StoredMemory
from recallseg.runtime.library.records import StructureRow
from recallseg.runtime.library.shards import Place
from recallseg.runtime.library.store import Store

__all__ = ["gather", "memories", "recall"]


def recall(
    store: Store,
    embedding: NDArray[np.float32],
    structures: Sequence[str],
    k: int,
    tags: Mapping[str, str] | None,
    without: Collection[str] = (),
    *,
    hold: bool = True,
) -> Recollection:
    """Search; see :meth:`recallseg.runtime.library.Library.recall`.

    Without ``hold`` no memory is looked at, and none returned.
    """
    with store.lock:
        vector = _unit(embedding, store.settings.embedding_dim)
        wanted, most = check_tags(tags), check_count(k, "k", 1)
        store.refresh()
        rows = [store.structure(name) for name in structures]
        for row in rows:
            store.retrieval.prepare(row.id)
        with store.catalog.database.snapshot():
            store.see_newest()
            left_out = {
                number for key in without if (number := store.catalog.number(key)) is not None
            }
            return Recollection(
                store.digest,
                store.origins(),
                {
                    row.name: _find(store, vector, row, most, wanted, left_out, hold=hold)
                    for row in rows
                },
            )


def memories(store: Store, keys: Sequence[str], structure: str) -> list[StoredMemory]:
    """Return memories by key; see :meth:`recallseg.runtime.library.Library.memories`."""
    with store.lock:
        store.refresh()
        row = store.structure(structure)
        with store.catalog.database.snapshot():
            places = store.catalog.places(keys, row.id)
            for key in keys:
                if key not in places:
                    store.number(key)
                    raise InputError(
                        f"exemplar '{key}' has no mask of '{structure}', so no memory of it."
                    )
            return [_stored(store, key, structure, *places[key]) for key in keys]


def gather(
    store: Store,
    pixels: Pixels,
    memories: Sequence[StoredMemory],
    memories_out: NDArray[Any],
    pointers_out: NDArray[np.float32],
) -> None:
    """Copy memories out; see :meth:`recallseg.runtime.library.Library.gather`."""
    layout = store.settings.layout
    _check_buffers(layout, len(memories), memories_out, pointers_out)
    for shard in {memory.shard for memory in memories}:
        shard.look()
    records = [memory.read() for memory in memories]
    for row, record in enumerate(records):
        pointers_out[row] = record["pointer"]
    scales = [record["scales"] for record in records] if layout.format == "int8" else None
    pixels.gather([record["tokens"] for record in records], memories_out, scales or None)


def _find(
    store: Store,
    vector: NDArray[np.float32],
    row: StructureRow,
    k: int,
    tags: Mapping[str, str],
    left_out: Collection[int],
    *,
    hold: bool,
) -> Found:
    """Search for one structure, within a snapshot; ``left_out`` are exemplars' numbers."""
    retrieval = store.retrieval

    def nearest(present: bool, most: int) -> list[tuple[float, int]]:
        wanted = min(most + len(left_out), retrieval.size(row.id, present, tags))
        numbers, distances = retrieval.search(vector, row.id, present, wanted, tags)
        both = zip(distances.tolist(), numbers.tolist(), strict=True)
        return [pair for pair in both if pair[1] not in left_out][:most]

    shown = nearest(True, k)
    farthest = shown[-1][0] if shown else math.inf
    lacking = nearest(False, len(shown) or k)
    both = shown + [pair for pair in lacking if pair[0] <= farthest]
    found = store.catalog.found([number for _, number in both], row.id)
    matches, held = [], {}
    for distance, number in sorted(both):
        key, place = found[number]
        if hold and place is not None:
            held[key] = _stored(store, key, row.name, *place)
        memory = "" if place is None else place[1].hex()
        matches.append(Match(key, distance, place is None, memory))
    available = retrieval.size(row.id, True, tags)
    if left_out:
        available -= np.isin(store.catalog.numbers(row.id, True, tags), [*left_out]).sum()
    return Found(tuple(matches), held, int(available))


def _stored(store: Store, key: str, structure: str, place: Place, digest: bytes) -> StoredMemory:
    """Return a memory, its file mapped; within a snapshot, which keeps writers from it."""
    return StoredMemory(key, structure, digest, store.reader.shard(place), place.slot)


def _unit(embedding: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    if not isinstance(embedding, np.ndarray) or embedding.shape != (size,):
        shape = getattr(embedding, "shape", type(embedding).__name__)
        raise InputError(
            f"an embedding of this library is an array of {size} numbers, got {shape}."
        )
    vector = embedding.astype(np.float32)
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0.0:
        raise InputError(f"the embedding has length {length}; expected a finite one above 0.")
    unit: NDArray[np.float32] = vector / np.float32(length)
    return unit


def _check_buffers(
    layout: MemoryLayout, k: int, memories: NDArray[Any], pointers: NDArray[Any]
) -> None:
    wanted = (k, layout.tokens, layout.memory_dim)
    if memories.shape != wanted or memories.dtype not in (np.float32, np.float16):
        raise InputError(
            f"memories_out must be float32 or float16 of shape {wanted}, got {memories.dtype} "
            f"of shape {memories.shape}."
        )
    if pointers.shape != (k, layout.pointer_dim) or pointers.dtype != np.float32:
        raise InputError(
            f"pointers_out must be float32 of shape {(k, layout.pointer_dim)}, got "
            f"{pointers.dtype} of shape {pointers.shape}."
        )
    if not memories.flags.c_contiguous:
        raise InputError("memories_out must be C-contiguous.")
