"""A library knows how each of its memories was made, and says so where it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_library import HashEncoder, StubBundle, add, create, embedding

from recallseg import Bundle, Library, __version__
from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library.encoding import Origin
from recallseg.runtime.library.origins import Origins, origins_note

FP32 = Origin("somewhere", "fp32", {"embed": "1" * 64}, "0.1.0")
INT8 = Origin("somewhere", "int8", {"embed": "2" * 64}, "0.1.0")


def opened(path: Path, origin: Origin | None) -> Library:
    return Library.open(path, mode="write", encoder=HashEncoder(origin=origin))


def test_every_exemplar_says_how_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "library"
    create(path).close()
    for number, origin in enumerate([FP32, FP32, None, FP32, INT8]):  # None: an older program
        with opened(path, origin) as library:
            add(library, number, key=str(number))
    reader = Library.open(path)
    assert reader.origins == ((FP32, 3), (INT8, 1), (None, 1))
    found = reader.recall(embedding(0), ["nucleus"], 1)
    assert found.origins == reader.origins
    digest = reader.digest
    with opened(path, INT8) as library:
        library.remove(next(e.key for e in library))
        assert library.origins == reader.origins == ((FP32, 2), (INT8, 1), (None, 1))
        library.rebuild(StubBundle(), encoder=HashEncoder(origin=INT8))
        assert library.origins == ((INT8, 4),)
        add(library, 0, key="0")
        assert library.origins == ((INT8, 5),)
    assert Library.open(path).digest == digest  # what was annotated, as ever


def test_a_library_of_an_older_program_is_unrecorded_and_can_be_added_to(tmp_path: Path) -> None:
    library = create(tmp_path / "library")  # this encoder says nothing of itself
    add(library, 1)
    assert library.origins == ((None, 1),)
    assert library._store.catalog.note(origins_note(1)) is None  # as older programs know it
    library.close()
    with opened(library.path, FP32) as again:
        add(again, 2)
        assert again.origins == ((FP32, 1), (None, 1))


def test_an_interrupted_rebuild_leaves_no_wrong_origin(tmp_path: Path) -> None:
    library = create(tmp_path / "library", encoder=HashEncoder(origin=FP32))
    for number in range(3):
        add(library, number)

    class Fails(HashEncoder):
        def encode(self, image, masks):  # type: ignore[no-untyped-def]
            if library._store.catalog.count_not_encoded(2) == 1:
                raise RuntimeError("the power is gone")
            return super().encode(image, masks)

    with pytest.raises(RuntimeError):
        library.rebuild(StubBundle(), encoder=Fails(origin=INT8))
    assert library.origins == ((FP32, 3),)
    library.rebuild(StubBundle(), encoder=HashEncoder(origin=INT8, salt="other"))
    assert library.origins == ((INT8, 3),)


def test_libraries_of_two_precisions_differ(tmp_path: Path) -> None:
    from support.pictures import disc

    pair = disc(0.5)
    origins = []
    for precision in ("fp32", "int8"):
        with Library.create(tmp_path / precision, "demo", precision=precision) as library:
            library.add(pair.image, pair.masks, key="one")
            [(origin, count)] = library.origins
            assert (origin.engine, origin.precision, count) == ("onnxruntime-cpu", precision, 1)
            assert origin.version == __version__
            origins.append(origin)
    bundle = Bundle.open("demo")
    assert origins[0].graphs == {
        graph: bundle.graph_digest(graph, variant, "fp32")
        for graph, variant in (
            ("embed", "ort-cpu"),
            ("encode", "ort-cpu"),
            ("memorize", "portable"),
        )
    }
    assert origins[0].graphs != origins[1].graphs


@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from([FP32, INT8, None])), max_size=12))
def test_spans_say_what_was_put_in(steps: list[tuple[int, Origin | None]]) -> None:
    origins, number, put = Origins(), 0, {}
    for gap, origin in steps:
        number += gap
        put[number] = origin
        if origin is not None:
            origins = origins.with_one(number, origin)
    origins = Origins.from_text(origins.to_text())
    assert {n: origins.of(n) for n in range(number + 2)} == {
        n: put.get(n) for n in range(number + 2)
    }


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        "[]",
        '{"origins": []}',
        '{"origins": [1], "spans": []}',
        '{"origins": [], "spans": [[1, 2, 0]]}',
        json.dumps({"origins": [FP32.to_json()], "spans": [[1, 5, 0], [5, 6, 0]]}),
        json.dumps({"origins": [FP32.to_json()], "spans": [[3, 2, 0]]}),
        json.dumps({"origins": [FP32.to_json()], "spans": [[1, 2.5, 0]]}),
        json.dumps({"origins": [FP32.to_json()], "spans": [[True, 2, 0]]}),
        json.dumps({"origins": [{**FP32.to_json(), "graphs": {"embed": 1}}], "spans": []}),
    ],
)
def test_a_damaged_record_is_told(text: str) -> None:
    with pytest.raises(LibraryCorruptError, match="is damaged"):
        Origins.from_text(text)
