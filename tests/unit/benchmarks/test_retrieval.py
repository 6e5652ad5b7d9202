"""``bench retrieval``: the generator, the truth, and both ways of searching."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recallseg.benchmarks.embeddings import SLICES, VOLUMES, draw_library, draw_queries
from recallseg.benchmarks.page import render_page
from recallseg.benchmarks.retrieval import run_retrieval
from recallseg.benchmarks.search_libraries import nearest
from recallseg.engines.errors import InputError
from recallseg.runtime.library import index, retrieval


def test_embeddings_are_clusters_of_clusters() -> None:
    vectors = draw_library(800, 64)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    patient = np.arange(800) // (SLICES * VOLUMES)
    volume = np.arange(800) // SLICES
    same_slice = np.abs(np.subtract.outer(np.arange(800), np.arange(800))) == 1
    within = volume[:, None] == volume[None]
    beside = (patient[:, None] == patient[None]) & ~within
    neighbours = similarity[same_slice & within].mean()
    assert neighbours > similarity[within].mean() > similarity[beside].mean()
    assert similarity[beside].mean() > similarity[patient[:, None] != patient[None]].mean() + 0.1


def test_embeddings_do_not_depend_on_how_many_are_drawn() -> None:
    np.testing.assert_array_equal(draw_library(100, 16), draw_library(300, 16)[:100])
    np.testing.assert_array_equal(draw_queries(10, 300, 16), draw_queries(10, 300, 16))
    assert not np.array_equal(draw_library(100, 16), draw_library(100, 16, seed=1))


def test_known_patients_are_nearer_than_new_ones() -> None:
    best = (draw_queries(40, 2000, 64) @ draw_library(2000, 64).T).max(axis=1)
    assert best[:20].mean() > best[20:].mean() + 0.05


def test_true_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    from recallseg.benchmarks import search_libraries as module

    monkeypatch.setattr(module, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(50, 8)).astype("f4"), rng.normal(size=(5, 8)).astype("f4")
    expected = np.argsort(-(queries @ vectors.T), axis=1)[:, :4]
    np.testing.assert_array_equal(np.sort(nearest(vectors, queries, 4)), np.sort(expected))


def test_exact_and_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from recallseg.benchmarks import retrieval as module

    for holder in (index, retrieval, module):
        monkeypatch.setattr(holder, "EXACT_LIMIT", 200)
    report = run_retrieval([120, 400], k=4, dimension=16, queries=20, folder=tmp_path)
    exact, graph = report.retrieval
    assert (exact.method, graph.method) == ("exact", "graph")
    assert exact.recall == 1.0
    assert graph.recall > 0.9
    assert exact.index_bytes == 0
    assert graph.index_bytes > 400 * 16 * 2
    assert len(graph.search.samples) == len(graph.index.samples) == 20
    assert graph.open_s > 0
    assert "recall" in render_page(report)
    kept = sorted((tmp_path / "400x16").iterdir())
    assert [item.name for item in kept] == ["built.json", "library", "nearest-20x4.npy"]


def test_a_kept_library_is_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for holder in (index, retrieval):
        monkeypatch.setattr(holder, "EXACT_LIMIT", 200)
    (first,) = run_retrieval([400], k=4, dimension=16, queries=20, folder=tmp_path).retrieval
    library = tmp_path / "400x16" / "library"

    def written() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in library.rglob("*.*")}

    before = written()
    (again,) = run_retrieval([400], k=3, dimension=16, queries=9, folder=tmp_path).retrieval
    assert (again.fill_s, again.build_s) == (first.fill_s, first.build_s)
    assert again.recall > 0.9
    assert written() == before
    monkeypatch.setattr(index, "CONNECTIVITY", 8)  # another graph: only that is built anew
    (other,) = run_retrieval([400], k=4, dimension=16, queries=20, folder=tmp_path).retrieval
    assert other.fill_s == first.fill_s
    graphs = {name: at for name, at in written().items() if name.endswith(".usearch")}
    assert graphs
    assert all(before.get(name) != at for name, at in graphs.items())
    (tmp_path / "400x16" / "built.json").unlink()  # interrupted while it was filled
    (anew,) = run_retrieval([400], k=4, dimension=16, queries=20, folder=tmp_path).retrieval
    assert anew.recall > 0.9


def test_sizes_below_k_are_refused() -> None:
    with pytest.raises(InputError, match="at least k = 16"):
        run_retrieval([10])
