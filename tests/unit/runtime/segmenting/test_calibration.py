from __future__ import annotations

from time import process_time

import numpy as np
import pytest

from recallseg.runtime.segmenting.calibration import MOST_LEFT_OUT, conformal_upper, nearest_other


def vectors(count: int) -> np.ndarray:
    drawn = np.random.default_rng(3).normal(size=(count, 24)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_the_nearest_other_is_not_the_exemplar_itself() -> None:
    embeddings = vectors(300)
    distances = 1.0 - embeddings.astype(np.float64) @ embeddings.T.astype(np.float64)
    np.fill_diagonal(distances, np.inf)
    alone = np.arange(300)
    assert nearest_other(embeddings, alone) == pytest.approx(distances.min(axis=1), abs=1e-5)


def test_nor_is_it_of_its_group() -> None:
    embeddings = vectors(300)
    groups = np.arange(300) % 7
    distances = 1.0 - embeddings.astype(np.float64) @ embeddings.T.astype(np.float64)
    distances[groups[:, None] == groups] = np.inf
    assert nearest_other(embeddings, groups) == pytest.approx(distances.min(axis=1), abs=1e-5)


def test_a_large_library_costs_no_square() -> None:
    embeddings = vectors(40 * MOST_LEFT_OUT)
    start = process_time()
    found = nearest_other(embeddings, np.arange(len(embeddings)))
    assert process_time() - start < 30  # all pairs would be 40 times as many
    assert len(found) == MOST_LEFT_OUT
    few, many = (
        conformal_upper(found),
        conformal_upper(nearest_other(embeddings[::20], np.arange(2 * MOST_LEFT_OUT))),
    )
    assert few is not None
    assert many is not None
    assert few < many  # more exemplars, nearer neighbours
