"""Search through the graph: on disk, grown, stale, damaged, filtered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.fake_library import HashEncoder, StubBundle, draw

from recallseg.runtime.library import Library
from recallseg.runtime.library import index as index_module
from recallseg.runtime.library import retrieval as retrieval_module
from recallseg.runtime.library.index import StructureIndex, build_graph, file_digests, open_graph

LIMIT = 20


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "EXACT_LIMIT", LIMIT)
    monkeypatch.setattr(retrieval_module, "EXACT_LIMIT", LIMIT)


def add(library: Library, numbers: range) -> None:
    for n in numbers:
        image, mask = draw(n)
        tags = {"half": str(n % 2), "rare": str(n % 10 == 0)}
        library.add(image, {"nucleus": mask}, key=str(n), tags=tags)


def embedding(number: int) -> np.ndarray:
    return HashEncoder().encode(draw(number)[0], {}).embedding


def check(library: Library, numbers: set[int]) -> None:
    query = embedding(999)
    for chosen, tags in (
        (numbers, None),
        ({n for n in numbers if n % 2}, {"half": "1"}),
        ({n for n in numbers if n % 10 == 0}, {"rare": "True"}),
    ):
        k = min(7, len(chosen))
        distances = {str(n): 1 - float(embedding(n) @ query) for n in chosen}
        best = sorted(distances, key=lambda key: distances[key])[:k]
        found = library.search(query, "nucleus", k, tags=tags)
        assert [m.key for m in found] == best
        assert np.allclose([m.distance for m in found], [distances[key] for key in best], atol=1e-5)
    assert len(library.search(query, "nucleus", len(numbers) + 1)) == len(numbers)


def files(library: Library) -> list[Path]:
    return sorted((library.path / "index").glob("*"))


def test_an_index_through_its_life(tmp_path: Path) -> None:
    path = tmp_path / "library"
    library = Library.create(path, StubBundle(), encoder=HashEncoder())  # type: ignore[arg-type]
    reader = Library.open(path)
    add(library, range(LIMIT))
    check(library, set(range(LIMIT)))
    assert not files(library)  # small: exact, nothing to save
    add(library, range(LIMIT, 50))
    check(reader, set(range(50)))  # readers build their own when there is none
    assert not files(library)
    library.close()
    first = files(library)
    assert len(first) == 1
    # Opened again it is mapped, not built: the embeddings are not read.
    with Library.open(path, mode="write", encoder=HashEncoder()) as library:
        check(library, set(range(50)))
        assert files(library) == first
        for n in (3, 10, 49):
            library.remove(str(n))
        add(library, range(50, 60))
        alive = set(range(60)) - {3, 10, 49}
        check(library, alive)
        check(reader, alive)
        assert files(library) == first
        add(library, range(60, 75))
        alive |= set(range(60, 75))
        check(library, alive)
    assert files(library) != first
    assert len(files(library)) == 1
    check(Library.open(path), alive)
    check(reader, alive)
    with Library.open(path, mode="write", encoder=HashEncoder()) as library:
        assert library.verify().indexes == 1
        assert library.verify().ok
        for n in range(20, 45):  # so many that the graph is built anew
            library.remove(str(n))
        check(library, alive - set(range(20, 45)))
        library.rebuild_index()
        check(library, alive - set(range(20, 45)))
    check(reader, alive - set(range(20, 45)))


def test_an_index_that_is_replaced_goes_at_once(tmp_path: Path) -> None:
    with Library.create(tmp_path / "library", StubBundle(), encoder=HashEncoder()) as library:  # type: ignore[arg-type]
        add(library, range(LIMIT + 1))
        check(library, {*range(LIMIT + 1)})
        (first,) = files(library)
        for number in range(4):  # so many that it is built anew
            library.remove(str(number))
        with Library.open(library.path) as reader:
            check(reader, {*range(4, LIMIT + 1)})
        add(library, range(LIMIT + 1, LIMIT + 5))
        check(library, {*range(4, LIMIT + 5)})
        (second,) = files(library)
        assert second != first
        assert library.verify().ok


@pytest.mark.parametrize("harm", ["flip", "cut", "junk", "gone"])
def test_a_damaged_index_costs_only_time(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "library"
    with Library.create(path, StubBundle(), encoder=HashEncoder()) as library:  # type: ignore[arg-type]
        add(library, range(40))
    (file,) = files(library)
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 0xFF
    file.write_bytes({"cut": data[: len(data) // 2], "junk": bytes(len(data))}.get(harm, data))
    if harm == "gone":
        file.unlink()
    reader = Library.open(path)
    (problem,) = reader.verify().problems
    assert "search index" in problem
    check(reader, set(range(40)))
    with Library.open(path, mode="write", encoder=HashEncoder()) as library:
        check(library, set(range(40)))
        assert library.verify().ok


def test_a_graph_of_another_shape_is_not_used(tmp_path: Path) -> None:
    vectors = np.eye(8, dtype=np.float32)
    build_graph((np.arange(8), vectors)).save(str(tmp_path / "graph"))
    assert open_graph(tmp_path / "graph", 8, 8, view=True) is not None
    assert open_graph(tmp_path / "graph", 9, 8, view=True) is None
    assert open_graph(tmp_path / "graph", 8, 7, view=True) is None


def test_a_graph_misses_no_neighbour_and_is_the_same_each_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for trial in range(50):
        vectors = rng.normal(size=(40, 48)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        graph = build_graph((np.arange(40), vectors))
        for query in vectors[:10]:
            nearest = np.argsort(-(vectors @ query))[:7]
            assert set(nearest.tolist()) <= set(graph.search(query, 14).keys.tolist()), trial
        if trial == 0:
            build_graph((np.arange(40), vectors)).save(str(tmp_path / "again"))
            graph.save(str(tmp_path / "first"))
    assert (tmp_path / "first").read_bytes()  # both hold something
    again = open_graph(tmp_path / "again", 48, 40, view=True)
    first = open_graph(tmp_path / "first", 48, 40, view=True)
    assert first is not None
    assert again is not None
    queries = rng.normal(size=(20, 48)).astype(np.float32)
    for query in queries:
        found, expected = (index.search(query, 14).keys.tolist() for index in (again, first))
        assert found == expected


def test_equal_distances_come_in_order_of_addition() -> None:
    index = StructureIndex(4, lambda numbers: (np.empty(0, np.int64), np.empty((0, 4), np.float32)))
    index.add(np.arange(1, 101), np.tile(np.float32([1, 0, 0, 0]), (100, 1)))
    numbers, distances = index.search(np.float32([1, 0, 0, 0]), 3)
    assert numbers.tolist() == [1, 2, 3]
    assert (distances == 0).all()


def test_samples_notice_changes_in_large_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    data = bytearray(1 << 20)
    file.write_bytes(data)
    before = file_digests(file, whole=True)
    assert file_digests(file, whole=False) == (before[0], b"")
    for offset in (0, 1 << 19, (1 << 20) - 1):
        data[offset] ^= 1
        file.write_bytes(data)
        assert file_digests(file, whole=False)[0] != before[0]
        data[offset] ^= 1
