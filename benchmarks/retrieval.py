"""``bench retrieval``: search in libraries of many sizes, through the runtime's own library.

The catalog is filled in bulk (embeddings only: there are no images, shards or sources), everything
after that is what a query meets: opening, the search index, SQLite, exact re-ranking.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.embeddings import DESCRIPTION, draw_library, draw_queries
from recallseg.benchmarks.facts import busy_remarks
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.schema import Distribution, Report, RetrievalRun
from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.encoding import MemoryLayout
from recallseg.runtime.library.index import EXACT_LIMIT
from recallseg.runtime.library.reading import CATALOG, INDEX
from recallseg.runtime.library.records import NewExemplar, Settings
from recallseg.runtime.library.retrieval import Retrieval
from recallseg.runtime.library.shards import Place
from recallseg.runtime.machine import describe_machine, package_versions
from recallseg.runtime.preprocess import Intensity

__all__ = ["run_retrieval"]

STRUCTURE = "structure"
OPENINGS = 5
WARM_UP = 50
_BLOCK = 1 << 16  # embeddings compared at a time when the true neighbours are sought
_REPORT_EVERY = 20_000

Step = Callable[[str], None]


def run_retrieval(
    sizes: Sequence[int],
    *,
    k: int = 16,
    dimension: int = 384,
    queries: int = 1000,
    folder: Path | None = None,
    step: Step = lambda what: None,
) -> Report:
    """Measure search at every size.

    Parameters
    ----------
    sizes : embeddings in the library.
    k : neighbours asked for; ``dimension`` of the embeddings.
    queries : for recall and for latency.
    folder : where temporary libraries go: about 3 KB an embedding. None for the system's place.
    step : told what begins.

    Raises
    ------
    InputError
        If a size is less than k, or there are no queries.
    """
    if not sizes or min(sizes) < k or queries < 1:
        raise InputError(
            f"sizes must be at least k = {k} and queries at least 1, got {list(sizes)}, {queries}."
        )
    conditions, watch = describe_conditions(), Watch()
    runs = []
    for size in sizes:
        with TemporaryDirectory(prefix="recallseg-bench-", dir=folder) as place:
            runs.append(_measure(Path(place) / "library", size, k, dimension, queries, step))
    conditions |= watch.stop()
    return Report(
        kind="retrieval",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=describe_machine(),
        conditions=conditions,
        versions=package_versions(),
        settings={"sizes": list(sizes), "k": k, "dimension": dimension, "queries": queries,
                  "embeddings_are": DESCRIPTION},
        retrieval=tuple(runs),
        remarks=busy_remarks(conditions),
    )  # fmt: skip


def _measure(path: Path, size: int, k: int, dimension: int, count: int, step: Step) -> RetrievalRun:
    step(f"{size:,} embeddings: draw")
    vectors = draw_library(size, dimension)
    queries = draw_queries(count, size, dimension)
    step(f"{size:,} embeddings: fill the catalog")
    start = perf_counter()
    _fill(path, vectors, lambda done: step(f"{size:,} embeddings: fill the catalog, {done:,} done"))
    fill_s = perf_counter() - start
    step(f"{size:,} embeddings: find the true neighbours")
    truth = _nearest(vectors, queries, k)
    del vectors
    step(f"{size:,} embeddings: build the index")
    start = perf_counter()
    _build(path, dimension)
    build_s = perf_counter() - start
    step(f"{size:,} embeddings: open and search")
    _drop_from_cache(path)
    cold = _open(path, queries[0], k)
    openings = [_open(path, queries[0], k) for _ in range(OPENINGS)]
    recall, search = _search(path, queries, k, truth)
    return RetrievalRun(
        size=size,
        dimension=dimension,
        k=k,
        method="exact" if size <= EXACT_LIMIT else "graph",
        queries=count,
        recall=round(recall, 5),
        search=Distribution.of(search),
        index=Distribution.of(_search_index(path, queries, k, dimension)),
        index_bytes=sum(file.stat().st_size for file in (path / INDEX).glob("*")),
        catalog_bytes=(path / CATALOG).stat().st_size,
        fill_s=round(fill_s, 3),
        build_s=round(build_s, 3),
        open_s=round(median(openings), 4),
        open_cold_s=round(cold, 4) if hasattr(os, "posix_fadvise") else None,
    )


def _fill(path: Path, vectors: NDArray[np.float32], progress: Callable[[int], None]) -> None:
    """Make a library's catalog with one exemplar for each embedding."""
    path.mkdir()
    settings = Settings(
        identity=hashlib.sha256(b"no bundle").hexdigest(),
        bundle_name="none",
        bundle_path="none",
        embedding_dim=vectors.shape[1],
        layout=MemoryLayout(1, 1, 1),
        intensity=Intensity().to_json(),
        keep_sources=False,
        shard_bytes=1 << 20,
    )
    catalog = Catalog.create(path / CATALOG, settings)
    with closing(catalog.database):
        # Nobody else looks at this file and a crash costs nothing: wait for no disk.
        catalog.database.execute("PRAGMA journal_mode=MEMORY")
        catalog.database.execute("PRAGMA synchronous=OFF")
        for number, vector in enumerate(vectors, start=1):
            content = hashlib.sha256(vector.tobytes()).hexdigest()
            catalog.add(
                NewExemplar(
                    number=number,
                    key=content[:32],
                    content=content,
                    height=1,
                    width=1,
                    created="2000-01-01T00:00:00+00:00",
                    source=None,
                    tags={},
                    absent=(),
                    embedding=vector,
                    memories={STRUCTURE: (Place(1, number - 1), b"")},
                )
            )
            if number % _REPORT_EVERY == 0:
                progress(number)


def _build(path: Path, dimension: int) -> None:
    catalog = Catalog(Database.open(path / CATALOG, writable=True))
    with closing(catalog.database):
        Retrieval(catalog, path / INDEX, dimension).rebuild()


def _open(path: Path, query: NDArray[np.float32], k: int) -> float:
    start = perf_counter()
    with Library.open(path) as library:
        library.search(query, STRUCTURE, k)
        return perf_counter() - start


def _search(
    path: Path, queries: NDArray[np.float32], k: int, truth: NDArray[np.int64]
) -> tuple[float, list[float]]:
    """Return recall and milliseconds of ``Library.search``."""
    spent, hits = [], 0
    with Library.open(path) as library:
        for query in queries[:WARM_UP]:
            library.search(query, STRUCTURE, k)
        numbers = {key: i for i, key in enumerate(library.embeddings(STRUCTURE)[0])}
        for query, nearest in zip(queries, truth, strict=True):
            start = perf_counter()
            found = library.search(query, STRUCTURE, k)
            spent.append((perf_counter() - start) * 1e3)
            hits += len({numbers[match.key] for match in found} & set(nearest.tolist()))
    return hits / truth.size, spent


def _search_index(path: Path, queries: NDArray[np.float32], k: int, dimension: int) -> list[float]:
    """Return milliseconds of the index module alone."""
    catalog = Catalog(Database.open(path / CATALOG, writable=False))
    with closing(catalog.database):
        retrieval = Retrieval(catalog, path / INDEX, dimension)
        structure = catalog.structures()[0].id
        retrieval.prepare(structure)
        spent = []
        for query in [*queries[:WARM_UP], *queries]:
            start = perf_counter()
            retrieval.search(query, structure, True, k, {})
            spent.append((perf_counter() - start) * 1e3)
    return spent[WARM_UP if len(queries) >= WARM_UP else len(queries) :]


def _nearest(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int
) -> NDArray[np.int64]:
    """Return the true ``k`` nearest of every query, by exhaustive comparison: queries x k."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    where = np.zeros((len(queries), k), np.int64)
    for start in range(0, len(vectors), _BLOCK):
        similarity = queries @ vectors[start : start + _BLOCK].T
        keep = min(k, similarity.shape[1])
        top = np.argpartition(similarity, -keep, axis=1)[:, -keep:]
        values = np.concatenate([best, np.take_along_axis(similarity, top, axis=1)], axis=1)
        places = np.concatenate([where, top + start], axis=1)
        chosen = np.argpartition(values, -k, axis=1)[:, -k:]
        best = np.take_along_axis(values, chosen, axis=1)
        where = np.take_along_axis(places, chosen, axis=1)
    return where


def _drop_from_cache(path: Path) -> None:
    """Ask the system to forget these files' pages, where it takes such advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
