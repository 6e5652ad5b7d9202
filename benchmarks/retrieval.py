"""``bench retrieval``: search in libraries of many sizes, through the runtime's own library.

The catalog is filled in bulk (see :mod:`recallseg.benchmarks.search_libraries`), everything after
that is what a query meets: opening, the search index, SQLite, exact re-ranking.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.embeddings import DESCRIPTION
from recallseg.benchmarks.facts import head
from recallseg.benchmarks.machine import Watch, describe_conditions
from recallseg.benchmarks.schema import Distribution, Report, RetrievalRun
from recallseg.benchmarks.search_libraries import STRUCTURE, Step, prepare
from recallseg.engines.errors import InputError
from recallseg.runtime.library import Library
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.index import EXACT_LIMIT, graph_settings
from recallseg.runtime.library.retrieval import Retrieval
from recallseg.runtime.library.store import CATALOG, INDEX

__all__ = ["run_retrieval"]

OPENINGS = 5
WARM_UP = 50


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
    folder : where libraries are kept, about 3 KB an embedding, and found by the next run. None for
        a temporary place.
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
        with TemporaryDirectory(prefix="recallseg-bench-") as temporary:
            place = folder or Path(temporary)
            runs.append(_measure(place, size, k, dimension, queries, step))
    conditions |= watch.stop()
    return Report(
        kind="retrieval",
        **head(conditions),
        settings={"sizes": list(sizes), "k": k, "dimension": dimension, "queries": queries,
                  "embeddings_are": DESCRIPTION, "index": graph_settings()},
        retrieval=tuple(runs),
    )  # fmt: skip


def _measure(
    folder: Path, size: int, k: int, dimension: int, count: int, step: Step
) -> RetrievalRun:
    made = prepare(folder, size, k, dimension, count, step)
    path, queries = made.path, made.queries
    step(f"{size:,} embeddings: open and search")
    _drop_from_cache(path)
    cold = _open(path, queries[0], k)
    openings = [_open(path, queries[0], k) for _ in range(OPENINGS)]
    recall, search = _search(path, queries, k, made.truth)
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
        fill_s=made.fill_s,
        build_s=made.build_s,
        open_s=round(median(openings), 4),
        open_cold_s=round(cold, 4) if hasattr(os, "posix_fadvise") else None,
    )


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
        answers = []
        for query in queries:
            start = perf_counter()
            answers.append(library.search(query, STRUCTURE, k))
            spent.append((perf_counter() - start) * 1e3)
    catalog = Catalog(Database.open(path / CATALOG, writable=False))
    with closing(catalog.database):
        for found, wanted in zip(answers, truth.tolist(), strict=True):
            numbers = {catalog.number(match.key) for match in found}
            hits += len(numbers & {place + 1 for place in wanted})
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
