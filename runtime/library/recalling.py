"""What a query asks of a library: the nearest exemplars, and their memories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recallseg.engines.errors import InputError, LibraryCorruptError
from recallseg.engines.pixels import Pixels
from recallseg.runtime.checks import check_tags
from recallseg.runtime.library.encoding import MemoryLayout
from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.library.shards import Place
from recallseg.runtime.library.store import Store

__all__ = ["gather", "search"]


def search(
    store: Store,
    embedding: NDArray[np.float32],
    structure: str,
    k: int,
    tags: Mapping[str, str] | None,
) -> list[Match]:
    """Return the k nearest exemplars; see :meth:`recallseg.runtime.library.Library.search`."""
    with store.lock:
        vector = _unit(embedding, store.settings.embedding_dim)
        wanted = check_tags(tags)
        store.refresh()
        row = store.structure(structure)
        retrieval = store.retrieval
        retrieval.prepare(row.id)
        with store.catalog.database.snapshot():
            store.see_newest()
            available = retrieval.size(row.id, True, wanted)
            if (
                isinstance(k, bool)
                or not isinstance(k, (int, np.integer))
                or not 1 <= k <= available
            ):
                tagged = f" with tags {wanted}" if wanted else ""
                raise InputError(
                    f"k = {k}, but {available} exemplars show '{structure}'{tagged}. Choose k "
                    "from 1 to that number, or annotate more images."
                )
            numbers, distances = retrieval.search(vector, row.id, True, int(k), wanted)
            without, farther = retrieval.search(vector, row.id, False, int(k), wanted)
            nearer = farther <= distances[-1]
            both = [*zip(distances.tolist(), numbers.tolist(), strict=True)]
            both += zip(farther[nearer].tolist(), without[nearer].tolist(), strict=True)
            found = store.catalog.found([number for _, number in both], row.id)
        places = store.places.setdefault(structure, {})
        matches = []
        for distance, number in sorted(both):
            key, place = found[number]
            if place is not None:
                places[key] = place
            matches.append(Match(key, distance, place is None))
        return matches


def gather(
    store: Store,
    pixels: Pixels,
    keys: Sequence[str],
    structure: str,
    memories_out: NDArray[Any],
    pointers_out: NDArray[np.float32],
) -> None:
    """Copy memories out; see :meth:`recallseg.runtime.library.Library.gather`."""
    layout = store.settings.layout
    _check_buffers(layout, len(keys), memories_out, pointers_out)
    tokens, scales = [], []
    for row, key in enumerate(keys):
        try:
            record = store.reader.record(_place(store, key, structure, keys))
        except LibraryCorruptError:
            if not store.refresh():
                raise
            # Compacted by another process since the search: the memory has moved.
            record = store.reader.record(_place(store, key, structure, keys))
        tokens.append(record["tokens"])
        pointers_out[row] = record["pointer"]
        if layout.format == "int8":
            scales.append(record["scales"])
    pixels.gather(tokens, memories_out, scales or None)


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


def _place(store: Store, key: str, structure: str, keys: Sequence[str]) -> Place:
    place = store.places.get(structure, {}).get(key)
    if place is not None:
        return place
    with store.lock:
        store.refresh()
        row = store.structure(structure)
        places = store.places.setdefault(structure, {})
        places.update(store.catalog.places(keys, row.id))
        if key not in places:
            store.number(key)
            raise InputError(f"exemplar '{key}' has no mask of '{structure}', so no memory of it.")
        return places[key]


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
