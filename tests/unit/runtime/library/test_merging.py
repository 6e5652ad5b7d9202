"""Another name for a structure, and two libraries that become one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.fake_library import (
    HashEncoder,
    StubBundle,
    add,
    buffers,
    create,
    draw,
    embedding,
)

from recallseg.engines.errors import InputError, LibraryCorruptError, LibraryMismatchError
from recallseg.runtime.library import Library
from recallseg.runtime.library.encoding import Origin
from recallseg.runtime.model.preprocess import Intensity


def _origin(engine: str) -> Origin:
    return Origin(engine, "fp32", {"encode": "ab" * 32}, "0.1.0")


def _state(library: Library) -> list[object]:
    return [[(e.key, e.structures, e.absent, e.tags, e.content) for e in library], library.digest]


# Names


@pytest.mark.parametrize("keep", [True, False])
def test_a_renamed_library_is_what_it_would_be_with_that_name(tmp_path: Path, keep: bool) -> None:
    libraries = []
    for name in ("liver", "hepar"):
        library = create(tmp_path / name, keep_sources=keep)
        for n in range(4):
            image, mask = draw(n)
            shown = {name: mask, "wall": ~mask} if n else {"wall": mask}
            library.add(image, shown, absent=() if n else (name,), key=str(n))
        library.retire("3")
        libraries.append(library)
    old, new = libraries
    old.store_calibrations("ab" * 32, {"liver": {"a": 1}, "wall": {"a": 2}}, "2")
    reader = Library.open(old.path)
    assert reader.search(embedding(1), "liver", 2)
    old.rename_structure("liver", "hepar")
    for library in (old, reader, Library.open(old.path)):
        assert library.structures == ("wall", "hepar")
        assert [e.structures for e in library] == [e.structures for e in new]
        found = library.search(embedding(1), "hepar", 9)
        wanted = new.search(embedding(1), "hepar", 9)
        assert [(m.key, m.absent) for m in found] == [(m.key, m.absent) for m in wanted]
        with pytest.raises(InputError, match="no exemplar is annotated for 'liver'"):
            library.search(embedding(1), "liver", 9)
        assert library.verify().problems == ()
        learnt = library.learnt(["ab" * 32], ["hepar", "wall"], {})
        assert [learnt[name].made_with for name in ("hepar", "wall")] == [2, 3]
        if keep:
            assert _state(library) == _state(new)
            assert [*library.source("1")[1]] == ["hepar", "wall"]
            assert np.array_equal(library.source("3")[1]["hepar"], draw(3)[1])
        else:
            assert library.digest != new.digest
    old.reinstate("3")
    if keep:
        old.replace_mask("1", "hepar", ~draw(1)[1])
        old.rebuild(StubBundle(), encoder=HashEncoder())
        memories, pointers = buffers(1)
        old.gather(old.memories(["2"], "hepar"), memories, pointers)
        anew = HashEncoder().encode(draw(2)[0], {"hepar": draw(2)[1]}).memories["hepar"]
        assert np.array_equal(memories[0], anew.astype(np.float16))
        assert old.verify().problems == ()
    assert old.history()[5].details == {"recipe": "ab" * 32}
    assert old.history()[6].details == {"from": "liver", "to": "hepar"}


def test_names_may_go_round(tmp_path: Path) -> None:
    """The name in a stored file belongs to who had it when that was written."""
    library = create(tmp_path / "library")
    image, mask = draw(0)
    library.add(image, {"a": mask, "b": ~mask}, key="0")
    library.rename_structure("a", "c")
    library.rename_structure("b", "a")
    library.rename_structure("a", "d")  # nothing was stored since
    library.rename_structure("c", "b")
    library.rename_structure("d", "a")  # a and b are exchanged
    library.add(image, {"a": mask, "b": ~mask}, key="1")
    library.rename_structure("a", "new")
    library.rename_structure("b", "a")
    for opened in (library, Library.open(library.path)):
        assert np.array_equal(opened.source("0")[1]["a"], mask)
        assert np.array_equal(opened.source("0")[1]["new"], ~mask)
        assert np.array_equal(opened.source("1")[1]["new"], mask)
        assert np.array_equal(opened.source("1")[1]["a"], ~mask)
        assert opened.verify().problems == ()


def test_names_that_cannot_be_given(tmp_path: Path) -> None:
    library = create(tmp_path / "library")
    image, mask = draw(0)
    library.add(image, {"a": mask, "b": ~mask}, key="0")
    library.add(image, {"gone": mask}, key="1")
    library.retire("1")
    digest = library.digest
    for name, message in (
        ("b", "'b' already"),
        ("a", "'a' already"),
        ("gone", "'gone' already"),
        ("x/y", "name"),
    ):
        with pytest.raises(InputError, match=message):
            library.rename_structure("a", name)
    with pytest.raises(InputError, match="no exemplar is annotated for 'z'"):
        library.rename_structure("z", "y")
    assert library.digest == digest
    library.remove("1")
    with pytest.raises(InputError, match="'gone' any more"):
        library.rename_structure("gone", "y")
    library.rename_structure("a", "gone")  # nobody has it now
    assert library.structures == ("gone", "b")
    source = next((library.path / "sources").rglob("*.npz"))
    source.write_bytes(b"x")
    with pytest.raises(LibraryCorruptError, match="exemplar '0'"):
        library.rename_structure("gone", "a")
    assert library.structures == ("gone", "b")


# Libraries


def test_two_libraries_become_one(tmp_path: Path) -> None:
    one, two, both = (
        create(tmp_path / name, encoder=HashEncoder(origin=_origin("onnxruntime-cpu")))
        for name in ("one", "two", "both")
    )
    for n in range(3):
        add(one, n, key=str(n))
        add(both, n, key=str(n))
    two.add(draw(2)[0], {"nucleos": draw(2)[1]}, key="2")
    two.rename_structure("nucleos", "nucleus")
    for n in (4, 5, 6):
        add(two, n, key=str(n), tags={"n": str(n)})
        add(both, n, key=str(n), tags={"n": str(n)})
    two.add(draw(7)[0], {}, absent=("wall",), key="7")
    both.add(draw(7)[0], {}, absent=("wall",), key="7")
    add(two, 8, key="8")
    two.retire("8")
    seen: list[tuple[int, int]] = []
    report = one.merge(two.path, progress=lambda done, total: seen.append((done, total)))
    assert report.added == ("4", "5", "6", "7")
    assert (report.equal, report.retired, report.encoded) == (("2",), ("8",), ())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert _state(one) == _state(both)
    assert [e.created for e in one][3:] == [two[key].created for key in report.added]
    assert one.search(embedding(5), "nucleus", 4) == both.search(embedding(5), "nucleus", 4)
    assert one.origins == both.origins
    assert one.verify().problems == ()
    assert one.history()[-1].what == "merge"
    assert one.history()[-1].exemplars == report.added
    assert one.history()[-1].details == {"digest": two.digest}
    again = one.merge(two)
    assert (again.added, len(again.equal)) == ((), 5)
    assert len(one.history()) == 4


@pytest.mark.parametrize("other", ["engine", "format"])
def test_memories_that_do_not_fit_are_made_anew(tmp_path: Path, other: str) -> None:
    mine = HashEncoder(origin=_origin("onnxruntime-cpu"))
    theirs = HashEncoder(salt="x", origin=_origin("tensorrt")) if other == "engine" else mine
    one = create(tmp_path / "one", encoder=mine)
    two = create(
        tmp_path / "two", encoder=theirs, memory_format="int8" if other == "format" else "fp16"
    )
    add(two, 1, key="1")
    assert one.merge(two).encoded == ("1",)
    memories, pointers = buffers(1)
    one.gather(one.memories(["1"], "nucleus"), memories, pointers)
    wanted = mine.encode(draw(1)[0], {"nucleus": draw(1)[1]}).memories["nucleus"]
    assert np.array_equal(memories[0], wanted.astype(np.float16))
    assert one.origins == ((mine.origin, 1),)
    # Without the image they are taken as they are, and said to be so; in another form not at all.
    bare = create(tmp_path / "bare", encoder=mine, keep_sources=False)
    from_bare = create(
        tmp_path / "from", encoder=theirs, keep_sources=False, memory_format=two.memory_format
    )
    add(from_bare, 1, key="1")
    if other == "format":
        with pytest.raises(InputError, match=r"without the image, and this library keeps mem.*'1'"):
            bare.merge(from_bare)
    else:
        assert bare.merge(from_bare).encoded == ()
        assert bare.origins == ((theirs.origin, 1),)
    with pytest.raises(InputError, match="without the image, and this library keeps images"):
        one.merge(from_bare) if "1" not in one else create(
            tmp_path / "images", encoder=mine, memory_format=two.memory_format
        ).merge(from_bare)


def test_libraries_that_cannot_be_merged(tmp_path: Path) -> None:
    one = create(tmp_path / "one")
    for n in range(3):
        add(one, n, key=str(n))
    digest = one.digest
    bundle = Library.create(
        tmp_path / "bundle", StubBundle(identity="cd" * 32), encoder=HashEncoder()
    )
    add(bundle, 9)
    window = create(tmp_path / "window", intensity=Intensity("window", 0, 100))
    add(window, 9)
    clash = create(tmp_path / "clash")
    for n in range(4):
        add(clash, n + 5, key=str(n))
    with pytest.raises(LibraryMismatchError, match=r"two bundles cannot be mixed.*rebuild"):
        one.merge(bundle)
    with pytest.raises(LibraryMismatchError, match="scales pixel values"):
        one.merge(window)
    with pytest.raises(InputError, match=r"3 exemplars .*: '0', '1', '2'. Nothing was added"):
        one.merge(clash)
    with pytest.raises(InputError, match="with itself"):
        one.merge(one.path)
    assert (one.digest, len(one.history())) == (digest, 3)


def test_a_damaged_memory_stops_a_merge_and_leaves_nothing(tmp_path: Path) -> None:
    one, two = create(tmp_path / "one"), create(tmp_path / "two", keep_sources=False)
    one = create(tmp_path / "bare", keep_sources=False)
    for n in range(3):
        add(two, n, key=str(n))
    shard = next((two.path / "memories").glob("*.shard"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(LibraryCorruptError, match="memory of 'nucleus' of exemplar '2'"):
        one.merge(two)
    assert len(one) == 0
    assert one.verify().problems == ()
    add(one, 0)


def test_one_patient_of_two_libraries_stays_one(tmp_path: Path) -> None:
    """Each library hashes with a secret of its own."""
    one, two = create(tmp_path / "one"), create(tmp_path / "two")
    add(one, 1, key="1", tags={"PatientID": "4711"})
    add(two, 1, key="1", tags={"PatientID": "4711"})
    add(two, 2, key="2", tags={"PatientID": "4711"})
    assert one["1"].tags != two["1"].tags
    report = one.merge(two)
    assert (report.added, report.equal) == (("2",), ("1",))
    assert one["1"].tags == one["2"].tags
    assert one.whois("2").tags == {"PatientID": "4711"}
    assert one.count("nucleus", tags={"PatientID": "4711"}) == 2
    two.backup(tmp_path / "copy")  # which has no table
    three = create(tmp_path / "three")
    with pytest.raises(InputError, match=r"'1' .* secret of that library \(PatientID\)"):
        three.merge(tmp_path / "copy")
    assert len(three) == 0


def test_groups_of_two_libraries_stay_whole(tmp_path: Path) -> None:
    """What is left out with an exemplar when a head is fitted or a library evaluated."""
    one, two = create(tmp_path / "one"), create(tmp_path / "two")
    for library, numbers in ((one, (1, 2)), (two, (3, 4, 5))):
        for n in numbers:
            image, mask = draw(n)
            library.add(image, {"nucleus": mask}, key=str(n), group=f"patient {n % 2}")
    two.backup(tmp_path / "copy")  # which has no table
    report = one.merge(two)
    assert report.apart == ()
    assert one.grouped("patient 1") == {"1", "3", "5"}
    assert one.grouped("patient 0") == {"2", "4"}
    assert len(set(one.heads.groups().values())) == 2
    assert one.whois("4").group == "patient 0"
    three = create(tmp_path / "three")
    three.add(draw(1)[0], {"nucleus": draw(1)[1]}, key="1", group="patient 1")
    report = three.merge(tmp_path / "copy")
    assert report.apart == ("3", "4", "5")  # and it is said
    groups = three.heads.groups()
    assert len(set(groups.values())) == 3
    numbers = {key: three.number(key) for key in ("3", "4", "5")}
    assert groups[numbers["3"]] == groups[numbers["5"]] != groups[numbers["4"]]


def test_an_image_that_is_there_under_another_key_is_not_added_again(tmp_path: Path) -> None:
    with create(tmp_path / "one") as one, create(tmp_path / "two") as two:
        for library in (one, two):
            add(library, 0)  # under a random key
        again, new = next(iter(two)).key, add(two, 1)
        report = one.merge(two)
        assert (report.added, report.same) == ((new,), (again,))
        assert len(one) == 2
