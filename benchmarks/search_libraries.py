"""Libraries to search in: filled with drawn embeddings, indexed, and kept for the next run.

Building takes minutes and may share the machine; measuring takes seconds and may not. So what is
built stays in its folder, with a note of what it took, and a run that finds it there goes on with
what is missing:

::

    FOLDER/SIZExDIMENSION/
      library/            the catalog and the search index; no images, shards or sources
      built.json          seconds to fill and to index, and the settings of the index
      nearest-QxK.npy     the true neighbours of Q queries, Q x K
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from recallseg.benchmarks.embeddings import draw_library, draw_queries
from recallseg.runtime.library.catalog import Catalog
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.encoding import MemoryLayout
from recallseg.runtime.library.index import graph_settings
from recallseg.runtime.library.records import NewExemplar, Settings
from recallseg.runtime.library.retrieval import Retrieval
from recallseg.runtime.library.shards import Place
from recallseg.runtime.library.store import CATALOG, INDEX
from recallseg.runtime.model.preprocess import Intensity

__all__ = ["STRUCTURE", "SearchLibrary", "Step", "nearest", "prepare"]

STRUCTURE = "structure"
_BLOCK = 1 << 16  # embeddings compared at a time when the true neighbours are sought
_REPORT_EVERY = 20_000

Step = Callable[[str], None]


@dataclass(frozen=True)
class SearchLibrary:
    """A library in ``path``, queries Q x D, and the true neighbours of each, Q x k.

    Exemplar number i is embedding i - 1. ``fill_s`` and ``build_s`` are what it took to make, in
    this run or an earlier one.
    """

    path: Path
    queries: NDArray[np.float32]
    truth: NDArray[np.int64]
    fill_s: float
    build_s: float


@dataclass(frozen=True)
class _Built:
    fill_s: float
    build_s: float | None
    index: dict[str, object]

    @classmethod
    def load(cls, path: Path) -> _Built | None:
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def prepare(
    folder: Path, size: int, k: int, dimension: int, count: int, step: Step
) -> SearchLibrary:
    """Return a library of ``size`` drawn embeddings with ``count`` queries, making what is missing.

    Parameters
    ----------
    folder : where libraries lie.
    k : neighbours of each query.
    step : told what begins.
    """
    place = folder / f"{size}x{dimension}"
    path, note = place / "library", place / "built.json"
    named = f"{size:,} embeddings"
    built = _Built.load(note)
    if built is None:
        shutil.rmtree(place, ignore_errors=True)  # what an interrupted run left
        place.mkdir(parents=True)
        step(f"{named}: draw")
        vectors = draw_library(size, dimension)
        step(f"{named}: fill the catalog")
        start = perf_counter()
        _fill(path, vectors, lambda done: step(f"{named}: fill the catalog, {done:,} done"))
        built = _Built(round(perf_counter() - start, 3), None, {})
        built.save(note)
        del vectors
    if built.build_s is None or built.index != graph_settings():
        step(f"{named}: build the index")
        start = perf_counter()
        _build(path, dimension)
        built = _Built(built.fill_s, round(perf_counter() - start, 3), graph_settings())
        built.save(note)
    queries = draw_queries(count, size, dimension)
    known = place / f"nearest-{count}x{k}.npy"
    if not known.is_file():
        step(f"{named}: find the true neighbours")
        np.save(known, nearest(draw_library(size, dimension), queries, k))
    return SearchLibrary(path, queries, np.load(known), built.fill_s, built.build_s or 0.0)


def nearest(
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
                    memories={STRUCTURE: (Place(1, number - 1), bytes(32))},
                    origin=None,
                )
            )
            if number % _REPORT_EVERY == 0:
                progress(number)


def _build(path: Path, dimension: int) -> None:
    catalog = Catalog(Database.open(path / CATALOG, writable=True))
    with closing(catalog.database):
        Retrieval(catalog, path / INDEX, dimension).rebuild()
