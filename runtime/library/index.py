"""Nearest neighbours of one structure's exemplars: a graph over most, exact search over the rest.

``base`` is a USearch HNSW graph, memory-mapped when it comes from disk; ``tail`` are the embeddings
added since, searched exactly by one matrix product. A small library has only a tail, so its search
is exact. Distances are always computed from the stored float32 embeddings; the graph, which keeps
them in int8, only proposes candidates.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from recallseg.engines.inside import open_inside

__all__ = [
    "EXACT_LIMIT",
    "StructureIndex",
    "Vectors",
    "build_graph",
    "extend_graph",
    "file_digests",
    "graph_settings",
    "open_graph",
]

EXACT_LIMIT = 4096
"""Most embeddings that are searched exactly: 4096 x 384 fp32 take 6 MB, a product some 0.2 ms."""
DTYPE, CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH = "i8", 24, 128, 192
"""``bench retrieval`` (docs/contribute/measurements.md): int8 finds as much in half the bytes."""
OVERSAMPLING = 4
"""Candidates asked of the graph for each one wanted; re-ranked exactly. Two would do for embeddings
that spread; where all are within 0.1 of one another, int8 needs four (recall 0.9996, not 0.99)."""
_ADD_BLOCK = 4096  # embeddings copied at a time when a graph is built, to bound memory
QUICK_BYTES = 1 << 16
QUICK_SAMPLES = 64

Vectors = tuple[NDArray[np.int64], NDArray[np.float32]]
Fetch = Callable[[Sequence[int]], Vectors]


class StructureIndex:
    """Searchable embeddings (unit length, D float32), each with a number.

    Parameters
    ----------
    dimension : D.
    fetch : returns the exact embeddings of given numbers, for re-ranking.
    base : graph over older embeddings, with its highest number in ``last``.
    """

    def __init__(
        self, dimension: int, fetch: Fetch, base: Index | None = None, last: int = 0
    ) -> None:
        self._fetch = fetch
        self._base = base
        self._removed: set[int] = set()
        self._numbers = np.empty(0, np.int64)
        self._vectors = np.empty((0, dimension), np.float32)
        self._tail = 0
        self.last = last

    def __len__(self) -> int:
        return self.base_size + self._tail

    @property
    def base_size(self) -> int:
        """How many embeddings the graph holds, removed ones not counted."""
        return (len(self._base) if self._base is not None else 0) - len(self._removed)

    @property
    def tail(self) -> Vectors:
        """Numbers and embeddings that are searched exactly, as views."""
        return self._numbers[: self._tail], self._vectors[: self._tail]

    @property
    def worn(self) -> bool:
        """Whether search would gain from a new graph: a long tail, or many removed."""
        return self._tail > EXACT_LIMIT or self.many_removed

    @property
    def many_removed(self) -> bool:
        """Whether so much of the graph is left out that it should be built anew."""
        return len(self._removed) > max(EXACT_LIMIT, self.base_size) // 8

    def add(self, numbers: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        """Append embeddings with ascending numbers above ``last``."""
        if not len(numbers):
            return
        need = self._tail + len(numbers)
        if need > len(self._numbers):  # grow by half, so that many adds cost little
            room = max(need, len(self._numbers) * 3 // 2, 64)
            self._numbers = np.resize(self._numbers, room)
            self._vectors = np.concatenate(
                [
                    self._vectors,
                    np.empty((room - len(self._vectors), self._vectors.shape[1]), np.float32),
                ]
            )
        self._numbers[self._tail : need] = numbers
        self._vectors[self._tail : need] = vectors
        self._tail = need
        self.last = int(numbers[-1])

    def remove(self, numbers: Sequence[int]) -> None:
        """Leave out those of ``numbers`` that are here."""
        if not numbers:
            return
        gone = np.array(numbers, np.int64)
        keep = ~np.isin(self._numbers[: self._tail], gone)
        kept = int(keep.sum())
        self._numbers[:kept] = self._numbers[: self._tail][keep]
        self._vectors[:kept] = self._vectors[: self._tail][keep]
        self._tail = kept
        if self._base is not None:
            self._removed.update(int(n) for n in gone if int(n) in self._base)

    def search(
        self, vector: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return numbers and cosine distances of the ``k`` nearest, nearest first.

        Parameters
        ----------
        vector : D float32 of unit length.
        k : at most this many are returned.
        allowed : sorted numbers to choose from; None for all.
        """
        if k <= 0:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        numbers, vectors = self._numbers[: self._tail], self._vectors[: self._tail]
        if allowed is not None:
            chosen = np.isin(numbers, allowed)
            numbers, vectors = numbers[chosen], vectors[chosen]
        found, distances = numbers, np.float32(1) - vectors @ vector
        if self._base is not None:
            older, candidates = self._candidates(self._base, vector, k, allowed)
            found = np.concatenate([found, older])
            distances = np.concatenate([distances, np.float32(1) - candidates @ vector])
        if len(found) > 4 * k:
            nearest = np.argpartition(distances, k)[: k + 1]
            limit = distances[nearest].max()
            nearest = np.flatnonzero(distances <= limit)
            found, distances = found[nearest], distances[nearest]
        order = np.lexsort((found, distances))[:k]  # equal distances: in order of addition
        return found[order], np.clip(distances[order], 0, 2)

    def _candidates(
        self, base: Index, vector: NDArray[np.float32], k: int, allowed: NDArray[np.int64] | None
    ) -> Vectors:
        """Return candidates of the graph with their exact embeddings."""
        size = len(base)
        if allowed is not None and len(allowed) <= EXACT_LIMIT:
            inside = np.asarray(base.contains(allowed.astype(np.uint64)), bool)
            return self._fetch([int(n) for n in allowed[inside] if int(n) not in self._removed])
        wanted = min(size, OVERSAMPLING * k + min(len(self._removed), OVERSAMPLING * k))
        if allowed is not None:
            wanted = min(size, int(wanted * 1.5 * size / len(allowed)) + 1)
        while True:
            keys = base.search(vector, wanted).keys.astype(np.int64)
            good = np.array([int(n) not in self._removed for n in keys], bool)
            if allowed is not None:
                good &= np.isin(keys, allowed)
            if good.sum() >= k or wanted == size:
                return self._fetch(keys[good][: OVERSAMPLING * k].tolist())
            wanted = min(size, wanted * 4)


def graph_settings() -> dict[str, Any]:
    """Return what a graph on disk was built with, as values for JSON."""
    return {"dtype": DTYPE, "connectivity": CONNECTIVITY, "expansion_add": EXPANSION_ADD}


def build_graph(vectors: Vectors) -> Index:
    """Return an HNSW graph over embeddings."""
    graph = Index(
        ndim=vectors[1].shape[1],
        metric="cos",
        expansion_search=EXPANSION_SEARCH,
        **graph_settings(),
    )
    extend_graph(graph, vectors)
    return graph


def extend_graph(graph: Index, vectors: Vectors) -> None:
    """Add embeddings to a graph, one at a time, in an order that is shuffled but always the same.

    Exemplars come volume by volume. Linked in that order, clusters hardly know each other: some
    queries ended in a wrong one and found nothing (recall 0.992 instead of 0.9995 of 100,000).

    Several threads would link them in an order of chance: of graphs of 40 embeddings that two
    threads built, 15 % missed a true neighbour, and no two were alike. One thread takes 1.6 times
    as long, and the same library always recalls the same exemplars.
    """
    numbers, values = vectors
    order = np.random.default_rng(0).permutation(len(numbers))
    for start in range(0, len(order), _ADD_BLOCK):
        chosen = order[start : start + _ADD_BLOCK]
        graph.add(numbers[chosen].astype(np.uint64), values[chosen], threads=1)


def open_graph(path: Path, dimension: int, count: int, *, view: bool) -> Index | None:
    """Memory-map a graph, or load it to add to it; None if the file is no such graph."""
    try:
        graph = Index.restore(
            str(path),
            view=view,
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=EXPANSION_SEARCH,
        )
    except (RuntimeError, ValueError, OSError):  # derived data: the caller builds it anew
        return None
    if graph is None or graph.ndim != dimension or len(graph) != count:
        return None
    return graph


def file_digests(path: Path, whole: bool) -> tuple[bytes, bytes]:
    """Return the SHA-256 of evenly spread samples and, if ``whole``, of all bytes (else empty).

    An index of a million embeddings has most of a gigabyte: reading it all would cost more than
    opening it. Samples of 64 KiB, with the file's start and end, find what copying and disks break.
    """
    with os.fdopen(open_inside(path.parents[1], f"{path.parent.name}/{path.name}"), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        quick = hashlib.sha256(str(size).encode())
        step = max(QUICK_BYTES, (size - QUICK_BYTES) // QUICK_SAMPLES)
        for offset in [*range(0, size, step), max(0, size - QUICK_BYTES)]:
            file.seek(offset)
            quick.update(file.read(QUICK_BYTES))
        if not whole:
            return quick.digest(), b""
        file.seek(0)
        state = hashlib.sha256()
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return quick.digest(), state.digest()
