"""Groups, kept logits and heads in the catalog: what was stored comes back, or an error."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.fake_library import HashEncoder, StubBundle, add, create, draw

from recallseg.engines.errors import LibraryCorruptError, LibraryWriteError
from recallseg.engines.heads import REFINE, feature_count, graph_digest
from recallseg.runtime.library import Library
from recallseg.runtime.library.choices import Choice, Knot
from recallseg.runtime.library.heads import Head, Units
from recallseg.runtime.library.kept import Kept, Recall

CATALOG = "library.sqlite"
CHOICE = Choice(
    *(0.5, 0.0, 0.7, 0.8, 0.01, 0.2, 4, "", False, (0.7, 0.9)),
    (Knot(0.0, 1.0, 0.9, 1.0), Knot(0.04, 0.8, 0.6, 0.9), Knot(0.16, 0.4, 0.2, 0.7)),
    (Knot(0.2, -0.3, -0.5, -0.1), Knot(0.9, 0.1, 0.0, 0.2)),
    (2.5, 3),
    0.125,
)


def picture(seed: int) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(seed).integers(0, 80, (48, 48)).astype(np.uint8)
    image[seed : seed + 16, 8:30] += 120
    mask = np.zeros((48, 48), bool)
    mask[seed : seed + 16, 8:30] = True
    return image, mask


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    with Library.create(tmp_path / "library", "demo") as made:
        for i in range(4):
            image, mask = picture(i)
            made.add(image, {"bar": mask}, key=f"e{i}", group=f"patient {i // 2}")
        yield made


def units(seed: int, n: int = 1) -> Units:
    draw = np.random.default_rng(seed)
    shapes = [(32, feature_count(n)), (32,), (16, 32), (16,), (n, 16), (n,)]
    return tuple(draw.normal(size=shape).astype(np.float32) for shape in shapes)


def head(library: Library) -> Head:
    numbers = [library.number(f"e{i}") for i in range(4)]
    return Head(
        ("bar",),
        {"bar": CHOICE},
        units(0),
        (units(1), units(2)),
        {number: i // 2 for i, number in enumerate(numbers)},
        {number: i // 2 for i, number in enumerate(numbers)},
        "groups",
        {"k": 4},
        library.generation,
        graph_digest(REFINE),
        "2026-01-01T00:00:00+00:00",
        library.newest,
        len(library),
    )


def change(library: Library, statement: str, *values: object) -> None:
    with sqlite3.connect(library.path / CATALOG) as database:
        database.execute(statement, values)
    database.close()


def test_groups_are_hashed_and_equal_names_stay_equal(library: Library) -> None:
    groups = library.heads.groups()
    assert len(groups) == 4
    assert len(set(groups.values())) == 2
    assert groups[1] == groups[2] != groups[3]
    stored = (library.path / CATALOG).read_bytes()
    assert b"patient 0" not in stored


def test_a_library_without_groups_and_head_keeps_its_format(tmp_path: Path) -> None:
    image, mask = picture(0)
    with Library.create(tmp_path / "plain", "demo") as made:
        made.add(image, {"bar": mask}, key="a")
        assert made.heads.groups() == {}
        assert made.head is None
        assert made._store.catalog.database.format_version == 1
        made.set_group("a", "somebody")
        assert made._store.catalog.database.format_version == 3


def test_a_head_comes_back_as_it_was_stored(library: Library) -> None:
    stored = head(library)
    library.heads.store(stored)
    found = library.head
    assert found is not None
    assert found.used
    assert len(found.digest) == 64
    for before, after in zip(
        (stored.units, *stored.folds), (found.units, *found.folds), strict=True
    ):
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)
    same = ("structures", "choices", "fold_of", "groups", "grouping", "recipe", "created", "of")
    for name in same:
        assert getattr(found, name) == getattr(stored, name)
    library.heads.store(replace(stored, units=units(9)))
    other = library.head
    assert other is not None
    assert other.digest != found.digest


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE heads SET data = zeroblob(length(data))",
        "UPDATE heads SET data = substr(data, 5)",
        "UPDATE heads SET about = replace(about, '0.5', '1.0')",
        "UPDATE heads SET about = 'nothing'",
        "UPDATE heads SET digest = 7",
    ],
)
def test_a_head_that_was_tampered_with_is_refused(library: Library, statement: str) -> None:
    library.heads.store(head(library))
    change(library, statement)
    with pytest.raises(LibraryCorruptError, match="--no-refine"):
        _ = library.head
    assert len(library) == 4  # the library is usable as before
    library.heads.store(head(library))
    assert library.head is not None


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("not finite", lambda h: replace(h, units=(h.units[0] * np.nan, *h.units[1:]))),
        ("numbers", lambda h: replace(h, units=units(0, 2))),
        ("range", lambda h: replace(h, choices={"bar": replace(h.choices["bar"], mix=2.0)})),
        ("grouping", lambda h: replace(h, grouping="guess")),
        ("fold", lambda h: replace(h, fold_of=dict.fromkeys(h.fold_of, 7))),
    ],
)
def test_a_head_with_a_right_digest_and_wrong_content_is_refused(
    library: Library, what: str, spoil: Callable[[Head], Head]
) -> None:
    library.heads.store(spoil(head(library)))
    with pytest.raises(LibraryCorruptError, match=what):
        _ = library.head


def put_head(library: Library, other: Library) -> None:
    """Copy the row of a library's head into another library's catalog."""
    with sqlite3.connect(library.path / CATALOG) as source:
        rows = source.execute("SELECT * FROM heads").fetchall()
    source.close()
    change(other, "INSERT INTO heads VALUES (?, ?, ?, ?)", *rows[0])


def test_a_head_of_another_library_is_refused(library: Library, tmp_path: Path) -> None:
    library.heads.store(head(library))
    with Library.create(tmp_path / "other", "demo") as other:
        for i in range(4):
            image, mask = picture(10 + i)
            other.add(image, {"bar": mask}, key=f"e{i}", group="x")
        put_head(library, other)
        with pytest.raises(LibraryCorruptError, match="another library's"):
            _ = other.head


def test_a_head_goes_with_its_structure_to_another_name(library: Library) -> None:
    library.heads.store(head(library))
    before = library.head
    library.rename_structure("bar", "beam")
    found = library.head
    assert before is not None
    assert found is not None
    assert (found.structures, found.digest) == (("beam",), before.digest)
    assert found.choices["beam"] == CHOICE
    assert library.verify().ok
    library.compact()
    assert library.head is not None


def test_a_head_of_other_masks_of_the_same_images_is_refused(
    library: Library, tmp_path: Path
) -> None:
    library.heads.store(head(library))
    with Library.create(tmp_path / "other", "demo") as other:
        for i in range(4):
            image, mask = picture(i)
            other.add(image, {"bar": ~mask}, key=f"e{i}", group="x")
        put_head(library, other)
        with pytest.raises(LibraryCorruptError, match="another library's"):
            _ = other.head


def test_a_head_of_the_former_format_is_read(library: Library) -> None:
    library.heads.store(head(library))
    about, data = library.heads._read("heads", 1) or ({}, b"")
    exemplars = [[n, library.heads._content(n), *rest] for n, _, *rest in about["exemplars"]]
    library.heads._write("heads", 1, {**about, "format_version": 1, "exemplars": exemplars}, data)
    assert library.head is not None
    library.heads._write("heads", 1, {**about, "format_version": 1}, data)
    with pytest.raises(LibraryCorruptError, match="another library's"):
        _ = library.head


def test_a_head_of_structures_that_are_not_here_is_refused(library: Library) -> None:
    library.heads.store(head(library))
    about, data = library.heads._read("heads", 1) or ({}, b"")
    [[_, *choice]] = about["structures"]
    library.heads._write("heads", 1, {**about, "structures": [[9, *choice]]}, data)
    with pytest.raises(LibraryCorruptError, match="structures that are not here: it is another"):
        _ = library.head


def test_a_head_of_a_newer_recallseg_is_refused(library: Library) -> None:
    library.heads.store(head(library))
    about, data = library.heads._read("heads", 1) or ({}, b"")
    library.heads._write("heads", 1, {**about, "format_version": 99}, data)
    with pytest.raises(LibraryCorruptError, match="format is 99"):
        _ = library.head


def test_a_head_of_the_bundle_before_a_rebuild_is_no_damage(tmp_path: Path) -> None:
    with create(tmp_path / "library") as made:
        for i in range(4):
            image, mask = draw(i)
            made.add(image, {"bar": mask}, key=f"e{i}")
        made.heads.store(head(made))
        made.rebuild(StubBundle(identity="cd" * 32), encoder=HashEncoder())
        found = made.head
        assert found is not None
        assert found.generation < made.generation  # segmenters leave it out and say so
        assert made.verify().ok


def test_kept_logits_come_back_and_go_with_their_exemplar(library: Library) -> None:
    plane = np.linspace(-9, 9, 96 * 96, dtype=np.float32).reshape(96, 96).astype(np.float16)
    plane[0, 0] = np.nan
    apart = Recall({"bar": (2, 3)}, {"bar": 4.5}, {"bar": 0.5}, {"bar": 0.25}, {"bar": plane})
    far = Recall({"bar": ()}, {"bar": -10.0}, {"bar": 0.0}, {"bar": math.nan}, {"bar": plane - 1})
    kept = Kept("a" * 64, 1, apart, apart, far)
    library.heads.keep(1, kept)
    found = library.heads.kept(1)
    assert found is not None
    assert (found.recipe, found.generation) == (kept.recipe, 1)
    for one, other in zip(found.recalls, kept.recalls, strict=True):
        assert (one.recalled, one.scores) == (other.recalled, other.scores)
        assert one.sure == other.sure
        np.testing.assert_equal(one.distances, other.distances)
        np.testing.assert_array_equal(one.logits["bar"], other.logits["bar"])
    older = {"format_version": 1}
    library.heads._write("kept_logits", 1, older, b"")
    assert library.heads.kept(1) is None  # what was kept before says too little
    assert library.verify().ok
    library.heads.keep(1, kept)
    change(library, "UPDATE kept_logits SET data = zeroblob(9)")
    assert library.heads.kept(1) is None  # damaged: made anew by whoever fits
    library.remove("e0")
    assert library.heads.kept(1) is None
    assert 1 not in library.heads.groups()
    assert library._store.catalog.database.value("SELECT count(*) FROM kept_logits") == 0


def test_a_library_open_for_reading_stores_no_head(library: Library) -> None:
    stored = head(library)
    with Library.open(library.path) as reader, pytest.raises(LibraryWriteError, match="reading"):
        reader.heads.store(stored)


def test_a_full_disk_leaves_the_head_before(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    library.heads.store(head(library))
    before = library.head
    database = library._store.catalog.database
    database.execute("PRAGMA max_page_count = 1")  # SQLite's own "database or disk is full"
    large = replace(head(library), folds=tuple(units(i) for i in range(60)))
    with pytest.raises(LibraryWriteError, match="full"):
        library.heads.store(large)
    database.execute("PRAGMA max_page_count = 1073741823")
    after = library.head
    assert before is not None
    assert after is not None
    assert after.digest == before.digest


def test_an_empty_group_is_none(tmp_path: Path) -> None:
    with create(tmp_path / "empty group") as library:
        for number in range(3):
            add(library, number, key=str(number), group="a patient" if number else "")
            library.set_group(str(number), "")
        assert library.heads.groups() == {}
        library.set_group("1", "x\x1b")
        assert library.whois("1").group == "x\\x1b"
        assert library.grouped("x\\x1b") == library.grouped("x\x1b") == {"1"}
