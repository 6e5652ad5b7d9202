"""The library's promises, with an encoder whose tensors can be computed again."""

from __future__ import annotations

import gc
import json
import os
import sqlite3
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_library import (
    GEOMETRY,
    HashEncoder,
    StubBundle,
    add,
    buffers,
    create,
    draw,
    embedding,
)

from recallseg.engines.errors import (
    EngineRunError,
    InputError,
    LibraryError,
    LibraryMismatchError,
    LibraryWriteError,
)
from recallseg.runtime.library import Library, identifiers_file
from recallseg.runtime.library.encoding import Encoded
from recallseg.runtime.library.exemplar import Match
from recallseg.runtime.model.preprocess import Intensity


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return create(tmp_path / "library")


def test_an_exemplar_comes_back_as_it_was_added(library: Library) -> None:
    image, mask = draw(1, 31, 17)
    colour = np.stack([image, image // 2, image // 3], axis=-1).astype(np.uint16)
    key = library.add(
        colour, {"nucleus": mask, "wall": ~mask}, absent=("cyst",), tags={"view": "top", "a": "b"}
    )
    exemplar = library.get(key)
    assert exemplar.structures == ("nucleus", "wall")
    assert exemplar.absent == ("cyst",)
    assert exemplar.tags == {"a": "b", "view": "top"}
    assert (exemplar.height, exemplar.width) == (31, 17)
    assert library.structures == ("nucleus", "wall")  # nothing shows a cyst
    assert (library.count("cyst"), library.count("cyst", absent=True)) == (0, 1)
    stored, masks = library.source(key)
    assert stored.dtype == np.uint16
    assert np.array_equal(stored, colour)
    assert list(masks) == ["nucleus", "wall"]
    assert np.array_equal(masks["wall"], ~mask)
    expected = HashEncoder().encode(colour, {"nucleus": mask, "wall": ~mask})
    for dtype in (np.float32, np.float16):
        memories, pointers = buffers(1, dtype)
        library.gather(library.memories([key], "wall"), memories, pointers)
        assert np.array_equal(memories[0], expected.memories["wall"].astype(np.float16))
        assert np.array_equal(pointers[0], expected.pointers["wall"])


def test_memories_in_int8_stay_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16, int8"):
        create(tmp_path / "other", memory_format="int4")
    sizes, versions, found = {}, {}, {}
    for name in ("fp16", "int8"):
        library = create(tmp_path / name, memory_format=name)
        key = add(library, 1)
        assert library.memory_format == Library.open(library.path).memory_format == name
        library.rebuild(StubBundle(identity="cd" * 32), encoder=HashEncoder())
        library.compact()
        assert library.memory_format == name
        assert library.verify().ok
        memories, pointers = buffers(1)
        library.gather(library.memories([key], "nucleus"), memories, pointers)
        found[name] = memories
        library.close()
        sizes[name] = sum(file.stat().st_size for file in (library.path / "memories").glob("*"))
        catalog = sqlite3.connect(library.path / "library.sqlite")
        versions[name] = catalog.execute("PRAGMA user_version").fetchone()[0]
        (text,) = catalog.execute("SELECT value FROM settings WHERE name = 'library'").fetchone()
        assert ("format" in json.loads(text)["layout"]) == (name == "int8")
        catalog.close()
    assert versions == {"fp16": 1, "int8": 2}  # older programs open what they understand
    assert sizes["int8"] < sizes["fp16"]
    assert 0 < np.abs(found["int8"] - found["fp16"]).max() < np.abs(found["fp16"]).max() / 250


def test_other_processes_and_later_ones_see_the_same(library: Library) -> None:
    reader = Library.open(library.path)
    keys = [add(library, n) for n in range(3)]
    assert len(reader) == 3
    assert [e.key for e in reader] == keys
    assert keys[1] in reader
    assert reader.search(embedding(1), "nucleus", 1)[0].key == keys[1]
    add(library, 3)
    assert reader.search(embedding(3), "nucleus", 1)[0].distance < 1e-6
    assert reader.digest == library.digest
    library.remove(keys[1])
    assert reader.search(embedding(1), "nucleus", 3)[0].distance > 0.01
    assert reader.refresh() is False
    library.close()
    again = Library.open(library.path, mode="write", encoder=HashEncoder())
    assert again.digest == reader.digest
    assert add(again, 9) in reader


def test_search_puts_absent_ones_between(library: Library) -> None:
    for n in range(12):
        image, mask = draw(n)
        if n % 3:
            library.add(image, {"nucleus": mask}, key=str(n))
        else:
            library.add(image, {}, absent=("nucleus",), key=str(n))
    query = embedding(100)
    distances = {str(n): 1 - float(embedding(n) @ query) for n in range(12)}
    present = sorted((d, key) for key, d in distances.items() if int(key) % 3)[:4]
    absent = [(d, key) for key, d in distances.items() if int(key) % 3 == 0 and d <= present[-1][0]]
    found = library.search(query, "nucleus", 4)
    assert [m.key for m in found] == [key for _, key in sorted(present + absent)]
    assert [m.absent for m in found] == [int(m.key) % 3 == 0 for m in found]
    assert absent  # otherwise this shows nothing
    with pytest.raises(InputError, match="no mask of 'nucleus'"):
        library.memories(["0"], "nucleus")


def test_tags_filter(library: Library) -> None:
    for n in range(10):
        add(library, n, tags={"modality": "MR" if n % 2 else "CT", "view": "a"}, key=str(n))
    found = library.search(embedding(0), "nucleus", 5, tags={"modality": "MR", "view": "a"})
    assert {m.key for m in found} == {"1", "3", "5", "7", "9"}
    assert len(library.search(embedding(0), "nucleus", 6, tags={"modality": "MR"})) == 5
    assert library.search(embedding(0), "nucleus", 6, tags={"modality": "PET"}) == []
    assert library.count("nucleus", tags={"modality": "MR", "view": "a"}) == 5
    assert library.count("nucleus", tags={"modality": "MR", "view": "b"}) == 0
    assert library.count("nucleus", tags={"modality": "MR"}, absent=True) == 0


def test_digest_names_content_not_history(tmp_path: Path) -> None:
    one, two = create(tmp_path / "1"), create(tmp_path / "2")
    empty = one.digest
    for n in (1, 2, 3):
        add(one, n, key=str(n))
    for n in (3, 9, 1, 2):
        add(two, n, key=str(n))
    assert one.digest != two.digest
    two.remove([e.key for e in two][1])
    assert one.digest == two.digest != empty
    for key in [e.key for e in one]:
        one.remove(key)
    assert one.digest == empty
    assert create(tmp_path / "3", intensity=Intensity("range")).digest != empty


def test_calibrations_lie_beside_each_other(library: Library) -> None:
    first = add(library, 1)
    recipes = ["1" * 64, "2" * 64]
    library.store_calibrations(recipes[0], {"nucleus": {"threshold": 0.25}}, first)
    library.store_calibrations(recipes[1], {"nucleus": {"threshold": 0.5}}, first)
    second = add(library, 2)
    reader = Library.open(library.path)
    assert [(one.recipe, one.data["threshold"]) for one in reader.calibrations] == [
        (recipes[0], 0.25),
        (recipes[1], 0.5),
    ]
    learnt = reader.learnt(recipes[:1], ["nucleus"], {})["nucleus"]
    assert (learnt.made_with, len(learnt.embeddings), learnt.others) == (1, 2, True)
    library.remove(first)
    assert reader.learnt(recipes[:1], ["nucleus"], {})["nucleus"].made_with == 0
    library.store_calibrations(recipes[0], {"nucleus": {"threshold": 1}}, second)
    assert reader.learnt(recipes[:1], ["nucleus"], {})["nucleus"].made_with == 1
    with pytest.raises(InputError, match="JSON"):
        library.store_calibrations(recipes[0], {"nucleus": {"x": float("nan")}}, second)
    with pytest.raises(InputError, match="no exemplar"):
        library.store_calibrations(recipes[0], {"nucleus": {}}, first)


def test_embeddings(library: Library) -> None:
    keys = tuple(add(library, n) for n in range(3))
    library.add(draw(7)[0], {}, absent=("nucleus",), key="without")
    found, vectors = library.embeddings("nucleus")
    assert found == keys
    assert np.allclose(vectors, [embedding(n) for n in range(3)], atol=1e-6)
    assert library.embeddings("nucleus", absent=True)[0] == ("without",)


def test_compacting_frees_what_was_removed_and_readers_follow(tmp_path: Path) -> None:
    library = create(tmp_path / "library", shard_bytes=4096 + 3 * 320)
    keys = [add(library, n, key=str(n)) for n in range(8)]
    reader = Library.open(library.path)
    before = reader.search(embedding(5), "nucleus", 2)
    for key in keys[:5]:
        library.remove(key)
    assert library.compact() > 0
    assert len(list((library.path / "memories").iterdir())) == 1
    memories, pointers = buffers(1)
    reader.gather(reader.memories([before[0].key], "nucleus"), memories, pointers)
    assert np.array_equal(
        pointers[0], HashEncoder().encode(draw(5)[0], {"nucleus": draw(5)[1]}).pointers["nucleus"]
    )
    assert library.verify().ok
    assert reader.verify().ok


@pytest.mark.skipif(sys.platform != "linux", reason="what is open is listed in /proc")
def test_what_was_compacted_away_is_not_kept_open(tmp_path: Path) -> None:
    """By who compacts, and by who reads meanwhile: its space would stay taken on the disk."""
    library = create(tmp_path / "library")
    for n in range(4):
        add(library, n, key=str(n))
    reader = Library.open(library.path)

    def kept() -> int:
        listed = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        names = [os.readlink(path) for path in listed if os.path.lexists(path)]
        return sum(str(library.path) in name and name.endswith("(deleted)") for name in names)

    for n in range(4):
        add(library, 10 + n, key="goes")
        for asked in (library, reader):
            held = asked.recall(embedding(0), ["nucleus"], 2)
            asked.gather(asked.memories(["0"], "nucleus"), *buffers(1))
        library.remove("goes")
        library.compact()
        assert held, "what was recalled can still be read"
        del held
        for asked in (library, reader):
            asked.gather(asked.memories(["0"], "nucleus"), *buffers(1))
        gc.collect()
        assert kept() == 0
    reader.close()


def test_rebuild_for_another_bundle(library: Library) -> None:
    for n in range(5):
        add(library, n, key=str(n))
    library.store_calibrations("1" * 64, {"nucleus": {}}, "4")
    digest, reader = library.digest, Library.open(library.path)
    geometry = replace(GEOMETRY, embedding_dim=30, feature_size=2, channels=8)
    other = StubBundle(identity="cd" * 32, name="other", geometry=geometry)
    encoder, told = HashEncoder(geometry, "other"), []

    class Interrupted(HashEncoder):
        calls = 0

        def encode(self, image, masks):  # type: ignore[no-untyped-def]
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return encoder.encode(image, masks)

    with pytest.raises(KeyboardInterrupt):
        library.rebuild(other, encoder=Interrupted())
    assert library.verify().ok
    assert library.bundle_identity == "ab" * 32
    assert reader.search(embedding(2), "nucleus", 1)[0].key == "2"
    library.rebuild(other, encoder=encoder, progress=lambda done, total: told.append((done, total)))
    assert told == [(2, 5), (3, 5), (4, 5), (5, 5)]  # went on where it was interrupted
    assert library.verify().ok
    assert library.digest == digest
    assert [one.current for one in library.calibrations] == [False]
    query = encoder.encode(draw(3)[0], {}).embedding
    assert library.search(query, "nucleus", 1)[0].key == "3"
    with pytest.raises(LibraryMismatchError, match="rebuilt for bundle 'other'"):
        reader.search(embedding(2), "nucleus", 1)
    with pytest.raises(LibraryMismatchError, match=r"'other'.*not with 'stub'"):
        Library.open(library.path, StubBundle())  # type: ignore[arg-type]
    add(library, 11)
    assert Library.open(library.path, other).verify().memories == 6  # type: ignore[arg-type]


def test_without_sources(tmp_path: Path) -> None:
    library = create(tmp_path / "library", keep_sources=False)
    key = add(library, 1)
    assert not (library.path / "sources").exists()
    assert not library.get(key).has_source
    with pytest.raises(InputError, match="did not keep the image"):
        library.source(key)
    with pytest.raises(LibraryError, match="did not keep its images"):
        library.rebuild(StubBundle())  # type: ignore[arg-type]
    assert library.verify().ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"masks": {}}, "needs a mask of at least one structure"),
        (lambda m: {"masks": {"a": m[:-1]}}, r"mask of 'a' has shape 11x9, the image is 12x9"),
        (lambda m: {"masks": {"a": m * 0}}, r"is empty.*absent=\('a',\)"),
        (lambda m: {"masks": {"a": m.astype(float)}}, "boolean"),
        (lambda m: {"masks": {"../a": m}}, "cannot name a structure"),
        (lambda m: {"masks": {"a": m}, "absent": ("a",)}, "only be one of them"),
        (lambda m: {"masks": {"a": m}, "absent": "b"}, "a list of names"),
        (lambda m: {"masks": {"a": m}, "tags": {"x": 3}}, "tag 'x'"),
        (lambda m: {"masks": {"a": m}, "key": "x\n"}, "key must be text"),
        (lambda m: {"masks": {"a": m}, "image": np.full((12, 9), np.nan)}, "NaN"),
    ],
)
def test_bad_exemplars_are_refused_and_change_nothing(library: Library, change, message) -> None:  # type: ignore[no-untyped-def]
    add(library, 1)
    before = library.digest
    image, mask = draw(2)
    with pytest.raises(InputError, match=message):
        library.add(**{"image": image, **change(mask)})
    assert library.digest == before
    assert len(library) == 1
    assert library.verify().ok


def test_the_same_again_is_refused(library: Library) -> None:
    key = add(library, 1)
    with pytest.raises(InputError, match="the same image with the same masks"):
        add(library, 1)
    add(library, 1, key="again")  # under a name of its own it is welcome
    with pytest.raises(InputError, match="already has an exemplar 'again'"):
        add(library, 2, key="again")
    library.remove(key)
    with pytest.raises(InputError, match=r"exemplar 'again' \(the same"):
        add(library, 1)
    library.remove("again")
    assert add(library, 1) != key  # it says nothing, not even of the content


@pytest.mark.parametrize("k", [0, -1, True, 1.5, "4", None])
def test_bad_k(library: Library, k: object) -> None:
    for n in range(3):
        add(library, n)
    with pytest.raises(InputError, match=f"k must be a whole number from 1, got {k!r}"):
        library.search(embedding(0), "nucleus", k)  # type: ignore[arg-type]


def test_k_is_the_most_that_is_recalled(library: Library) -> None:
    for n in range(3):
        add(library, n)
    image, mask = draw(7)
    library.add(image, {"wall": mask}, absent=("nucleus",), key="lacks it")
    library.add(draw(8)[0], {}, absent=("wall",), key="farther")
    found = library.recall(embedding(7), ["nucleus", "wall"], 9).found
    assert sum(not match.absent for match in found["nucleus"].matches) == 3
    assert found["nucleus"].matches[0] == Match(
        "lacks it", found["nucleus"].matches[0].distance, True
    )
    assert found["nucleus"].available == 3
    assert [match.key for match in found["wall"].matches] == ["lacks it"]  # as with k = 1
    without = library.recall(embedding(7), ["wall"], 9, without=["lacks it"]).found["wall"]
    assert [(match.key, match.absent) for match in without.matches] == [("farther", True)]
    assert without.memories == {}


def test_exemplars_that_are_passed_over_are_none_to_choose_from(library: Library) -> None:
    for n in range(4):
        add(library, n, key=str(n))
    found = library.recall(embedding(1), ["nucleus"], 3, without=["1", "3", "unknown"])
    one = found.found["nucleus"]
    assert {match.key for match in one.matches} == {"0", "2"}
    assert one.available == 2
    nothing = library.recall(embedding(1), ["nucleus"], 3, without=["0", "1", "2", "3"])
    assert nothing.found["nucleus"].matches == ()
    assert nothing.found["nucleus"].available == 0


def test_what_was_recalled_can_be_read_whatever_happens_then(tmp_path: Path) -> None:
    library = create(tmp_path / "library", shard_bytes=4096 + 3 * 320)
    keys = [add(library, n, key=str(n)) for n in range(8)]
    reader = Library.open(library.path)
    recalled = reader.recall(embedding(5), ["nucleus"], 8)
    assert recalled.digest == reader.digest
    for key in keys:
        library.remove(key)
    library.compact()
    add(library, 9, key="9")  # where memories lay before, as far as that can be
    library.rebuild(StubBundle(), encoder=HashEncoder())
    assert len(reader) == 1
    memories, pointers = buffers(8)
    reader.gather([*recalled.found["nucleus"].memories.values()], memories, pointers)
    for row, key in enumerate(recalled.found["nucleus"].memories):
        image, mask = draw(int(key))
        wanted = HashEncoder().encode(image, {"nucleus": mask})
        assert np.array_equal(pointers[row], wanted.pointers["nucleus"])


def test_bad_recall(library: Library) -> None:
    key = add(library, 1)
    memories, pointers = buffers(1)
    with pytest.raises(InputError, match=r"no exemplar is annotated for 'wall'.*nucleus"):
        library.search(embedding(1), "wall", 1)
    with pytest.raises(InputError, match="annotated for 'wall'"):
        library.memories([key], "wall")
    with pytest.raises(InputError, match="no exemplar 'nobody'"):
        library.memories(["nobody"], "nucleus")
    found = library.memories([key], "nucleus")
    with pytest.raises(InputError, match="memories_out must be"):
        library.gather(found, memories[:, 1:], pointers)
    with pytest.raises(InputError, match="pointers_out must be"):
        library.gather(found, memories, pointers.astype(np.float64))
    with pytest.raises(InputError, match="length 0"):
        library.search(np.zeros(24, np.float32), "nucleus", 1)
    with pytest.raises(InputError, match="24 numbers"):
        library.search(np.ones(25, np.float32), "nucleus", 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda e: replace(e, embedding=e.embedding * 2), "length 2"),
        (lambda e: replace(e, embedding=e.embedding * np.nan), "not finite"),
        (lambda e: replace(e, memories={}), "no memory"),
        (lambda e: replace(e, memories={"nucleus": e.memories["nucleus"] * 1e6}), "fp16"),
        (lambda e: replace(e, pointers={"nucleus": np.zeros(3, np.float32)}), r"shape \(16,\)"),
    ],
)
def test_an_encoder_that_is_wrong_is_noticed(tmp_path: Path, wrong, message) -> None:  # type: ignore[no-untyped-def]
    class Wrong(HashEncoder):
        def encode(self, image, masks) -> Encoded:  # type: ignore[no-untyped-def]
            return wrong(super().encode(image, masks))  # type: ignore[no-any-return]

    library = create(tmp_path / "library", encoder=Wrong())
    with pytest.raises(EngineRunError, match=message):
        add(library, 1)
    assert len(library) == 0
    assert library.verify().ok


def test_other_tags_are_found_and_the_former_ones_are_not(tmp_path: Path) -> None:
    with create(tmp_path / "library") as library, Library.open(tmp_path / "library") as reader:
        add(library, 1, key="a", tags={"view": "axial"})
        add(library, 2, key="b", tags={"view": "axial"})
        assert reader.count("nucleus", tags={"view": "axial"}) == 2
        library.retag("a", {"view": "sagittal"})
        for each in (library, reader):
            assert [e.key for e in each] == ["a", "b"]
            assert each["a"].tags == {"view": "sagittal"}
            assert each.count("nucleus", tags={"view": "axial"}) == 1
            found = each.search(embedding(1), "nucleus", 2, tags={"view": "sagittal"})
            assert [match.key for match in found] == ["a"]
        assert library.verify().problems == ()
        with create(tmp_path / "other") as other:  # as if it had been added so
            add(other, 1, key="a", tags={"view": "sagittal"})
            add(other, 2, key="b", tags={"view": "axial"})
            assert library.digest == other.digest
        library.retag("a", None)
        assert library["a"].tags == {}
        with pytest.raises(InputError, match="no exemplar 'c'"):
            library.retag("c", {})
        with pytest.raises(InputError, match="must map names"):
            library.retag("a", ["view"])  # type: ignore[arg-type]
        with pytest.raises(InputError, match="no exemplar 'c'"):
            library["c"]
        with pytest.raises(LibraryWriteError, match="open for reading"):
            reader.retag("a", {})


def items_of(*numbers: int) -> list[Any]:
    drawn = [(number, *draw(number)) for number in numbers]
    return [{"image": i, "masks": {"nucleus": m}, "key": f"case {n}"} for n, i, m in drawn]


def test_many_are_what_one_by_one_would_be(library: Library, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with create(tmp_path / "other", shard_bytes=4096 + 2 * 320) as other:
        keys = other.add_many(items_of(1, 2, 3), progress=lambda *done: seen.append(done))
        assert keys == ["case 1", "case 2", "case 3"]
        for number in (1, 2, 3):
            add(library, number, key=f"case {number}")
        assert other.digest == library.digest
        assert other.verify().problems == ()
        assert len(list(other.path.rglob("*.shard"))) > 1  # they went on in a new one
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert library.add_many([]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((3, 4, 4))}, "image"),
        ({"masks": {"nucleus": np.zeros((12, 9), bool)}}, "is empty"),
        ({"key": "case 1"}, r"key 'case 1' of items\[0\]"),
        ({"key": "there"}, "already has an exemplar 'there'"),
        ({"tag": "x"}, "has 'tag'"),
        ({"image": "nowhere.png"}, "there is no file"),
    ],
)
def test_a_bad_one_of_many_is_named_and_nothing_is_encoded(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    encoded: list[object] = []

    class Counting(HashEncoder):
        def encode(self, image: Any, masks: Any) -> Encoded:
            encoded.append(image)
            return super().encode(image, masks)

    with create(tmp_path / "library", encoder=Counting()) as library:
        add(library, 9, key="there")
        items = items_of(1, 2, 3)
        items[1].update(change)
        with pytest.raises(InputError, match=rf"^items\[1\]: .*{message}"):
            library.add_many(items)
        assert [e.key for e in library] == ["there"]
        assert len(encoded) == 1


def test_many_that_are_interrupted_leave_nothing(library: Library) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            assert len(library) == 0
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.add_many(items_of(1, 2, 3), progress=interrupt)
    assert len(library) == 0
    assert not [*library.path.rglob("*.npz*")]
    assert library.add_many(items_of(4, 5)) == ["case 4", "case 5"]
    assert library.verify().problems == ()


def test_images_written_beside_a_catalog_that_waits_are_no_problem(library: Library) -> None:
    with Library.open(library.path) as reader:
        found = []
        library.add_many(
            items_of(1, 2, 3), progress=lambda done, _: found.append(reader.verify().problems)
        )
    assert found == [(), (), ()]


def test_another_mask_is_as_if_it_had_been_added_so(library: Library, tmp_path: Path) -> None:
    image, mask = draw(1)
    library.add(image, {"nucleus": mask, "wall": mask}, absent=("cyst",), tags={"a": "b"}, key="x")
    library.replace_mask("x", "wall", ~mask)
    with create(tmp_path / "other") as other:
        other.add(
            image, {"nucleus": mask, "wall": ~mask}, absent=("cyst",), tags={"a": "b"}, key="x"
        )
        assert library.digest == other.digest
    assert library.verify().problems == ()
    assert len([*library.path.rglob("*.npz")]) == 1
    assert library.count("wall") == 1
    with pytest.raises(InputError, match="no mask of 'cyst'"):
        library.replace_mask("x", "cyst", mask)
    with pytest.raises(InputError, match="is empty"):
        library.replace_mask("x", "wall", np.zeros_like(mask))
    assert library.get("x").structures == ("nucleus", "wall")


def test_what_could_not_be_read_again_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise, which takes more room packed than not; all that is stored comes back."""
    monkeypatch.setenv("RECALLSEG_MAX_BYTES", "64k")
    rng = np.random.default_rng(0)
    library = create(tmp_path / "library")
    for height in range(196, 240, 2):
        image = rng.integers(0, 256, (height, 250), np.uint8)
        masks = {name: rng.random(image.shape) < 0.5 for name in ("nucleus", "cell")}
        if height >= 210:
            with pytest.raises(InputError, match=r"at most 0.0625 MiB .* are read again"):
                library.add(image, masks)
        elif height <= 200:  # between them it is too little to tell
            assert (library.source(library.add(image, masks))[0] == image).all()
    assert len(library) == 3
    large = rng.integers(0, 256, (300, 250), np.uint8)
    items = [*items_of(0), {"image": large, "masks": {"nucleus": large > 9}}]
    before = len(library)
    with pytest.raises(InputError, match=r"items\[1\]: an image of 75000 bytes"):
        library.add_many(items)
    assert len(library) == before
    bare = create(tmp_path / "bare", keep_sources=False)
    bare.add(large, {"nucleus": large > 9})


def test_a_table_of_identifiers_stays_one_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identifiers_file, "MOST_BYTES", 1500)
    library = create(tmp_path / "library")
    add(library, 0, key="0", name="a" * 800)
    with pytest.raises(LibraryWriteError, match="at most 1500 are read again"):
        add(library, 1, key="1", name="b" * 800)
    library.close()
    with Library.open(tmp_path / "library", mode="write", encoder=HashEncoder()) as again:
        assert [one.key for one in again] == ["0"]
        add(again, 2, key="2", name="c")


def test_an_error_of_reading_is_told_as_one(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        in_transaction = False

        def execute(self, *_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")  # as Python 3.10: without a code

    database = library._store.catalog.database
    with monkeypatch.context() as patched:
        patched.setattr(database, "_connection", Broken())
        with pytest.raises(LibraryError, match="cannot be read: disk I/O error") as raised:
            database.execute("SELECT name FROM structures")
        assert not isinstance(raised.value, LibraryWriteError)
        with pytest.raises(LibraryWriteError, match="cannot write"):
            database.execute("DELETE FROM structures")


def test_a_key_with_half_a_character_is_an_input_error(library: Library) -> None:
    """JSON can write it, so that it comes by HTTP."""
    for ask in (library.get, library.source, library.remove, library.whois):
        with pytest.raises(InputError, match=r"'\\ud800' is no text"):
            ask("\ud800")
    with pytest.raises(InputError, match="is no text"):
        library.retire(["\ud800"])
