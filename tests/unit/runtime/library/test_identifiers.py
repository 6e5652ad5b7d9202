"""Keys that say nothing, values that are hashed, and the table that resolves both."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_library import HashEncoder, add, create, draw, embedding
from support.ungiven import ungiven

from recallseg.engines.errors import (
    InputError,
    LibraryCorruptError,
    LibraryError,
    LibraryWriteError,
)
from recallseg.runtime.library import Library
from recallseg.runtime.library.calibrations import PREFIX
from recallseg.runtime.library.database import Database
from recallseg.runtime.library.heads import Heads
from recallseg.runtime.library.identifiers import is_hashed
from recallseg.runtime.library.identifiers_file import IDENTIFIERS
from recallseg.runtime.library.identifying import identifies, is_random_key, random_key

UID = "1.2.840.113619.2.55.3.604688119"


def reopen(library: Library) -> Library:
    library.close()
    return Library.open(library.path, mode="write", encoder=HashEncoder())


def grep(library: Library, text: str) -> list[str]:
    """Return the library's files in which a text stands, all but the table."""
    return [
        str(path)
        for path in library.path.rglob("*")
        if path.is_file() and path.name != IDENTIFIERS and text.encode() in path.read_bytes()
    ]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return create(tmp_path / "library")


def test_random_keys_are_told_from_others() -> None:
    keys = {random_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(is_random_key(key) for key in keys)
    assert not any(is_random_key(key) for key in ("0" * 32, "MR-3", ""))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PatientID", "4711", True),
        ("patient", "x", True),
        ("OtherPatientIDs", "x", True),
        ("ReferringPhysicianName", "x", True),
        ("AccessionNumber", "x", True),
        ("StudyInstanceUID", "x", True),
        ("study_uid", "x", True),
        ("caseid", "x", True),
        ("MRN", "12", True),
        ("date-of-birth", "1970", True),
        ("scanner", UID, True),
        ("note", "Mueller^Anna", True),
        ("modality", "MR", False),
        ("PatientSex", "F", False),
        ("patient_age", "070Y", False),
        ("ProtocolName", "t1", False),
        ("body_part", "BRAIN", False),
        ("fluid", "yes", False),
        ("software", "5.1.7.0", False),
        ("spacing_mm", "0.7x0.7", False),
        ("split", "train", False),
    ],
)
def test_what_identifies(name: str, value: str, expected: bool) -> None:
    assert identifies(name, value) is expected


def test_names_and_values_are_in_the_table_alone(library: Library) -> None:
    tags = {"patient": "Mueller-4711", "modality": "MR"}
    key = add(library, 1, tags=tags, name="/archive/Mueller/scan.png")
    other = add(library, 2, tags={"patient": "Mueller-4711"})
    third = add(library, 3, tags={"patient": "Schmidt-1"})
    assert is_random_key(key)
    library = reopen(library)
    stored = library[key].tags
    assert is_hashed(stored["patient"])
    assert stored["modality"] == "MR"
    assert stored["patient"] == library[other].tags["patient"] != library[third].tags["patient"]
    assert not grep(library, "Mueller")
    table = library.path / IDENTIFIERS
    assert stat.S_IMODE(table.stat().st_mode) == 0o600
    known = library.whois(key)
    assert (known.key, known.name) == (key, "/archive/Mueller/scan.png")
    assert known.tags == {"patient": "Mueller-4711"}
    assert not library.whois(add(library, 4))
    with pytest.raises(InputError, match="there is no exemplar"):
        library.whois("nobody")
    # Equal values of two kinds, or of two libraries, tell nothing of each other.
    again = create(library.path.with_name("other"))
    add(again, 1, tags=tags, key="a")
    assert again["a"].tags["patient"] != stored["patient"]
    assert library.verify().ok


def test_filters_are_hashed_alike(library: Library) -> None:
    for n in range(4):
        add(library, n, tags={"patient": f"p{n % 2}"}, key=str(n))
    for patient in ("p1", library["1"].tags["patient"]):  # by what it is, and by its hash
        assert library.count("nucleus", tags={"patient": patient}) == 2
        found = library.search(embedding(0), "nucleus", 4, tags={"patient": patient})
        assert {match.key for match in found} == {"1", "3"}
    library.retag("1", {**library["1"].tags, "view": "axial"})  # what is hashed stays
    assert library.whois("1").tags == {"patient": "p1"}
    library.retag("1", {"patient": "p0"})
    assert library.whois("1").tags == {"patient": "p0"}
    assert library.count("nucleus", tags={"patient": "p0"}) == 3
    library.retag("1", None)
    assert not library.whois("1")
    assert b"p1" in (library.path / IDENTIFIERS).read_bytes()  # of exemplar 3
    library.remove("3")
    assert b"p1" not in (library.path / IDENTIFIERS).read_bytes()


def test_a_copy_without_the_table_works_and_learns_nothing_wrong(library: Library) -> None:
    add(library, 1, tags={"patient": "p1"}, key="a")
    hashed = library["a"].tags["patient"]
    library.close()
    (library.path / IDENTIFIERS).unlink()
    library = reopen(library)
    assert library.count("nucleus", tags={"patient": hashed}) == 1
    with pytest.raises(InputError, match=r"is not here: copies are made without it"):
        library.count("nucleus", tags={"patient": "p1"})
    with pytest.raises(InputError, match=r"is not here"):
        add(library, 2, tags={"patient": "p1"})
    assert len(library) == 1
    key = add(library, 2, tags={"modality": "MR"}, name="mine")  # what needs no hash is welcome
    assert library.whois(key).name == "mine"
    with pytest.raises(InputError, match="is another library's"):
        add(library, 3, tags={"patient": "p1"})


def test_a_library_without_identifying_tags_says_so(library: Library) -> None:
    add(library, 1)
    with pytest.raises(InputError, match=r"no exemplar of the library .* identifies somebody"):
        library.count("nucleus", tags={"patient": "p1"})
    assert not (library.path / IDENTIFIERS).exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_table_that_others_read_is_refused(library: Library, mode: int) -> None:
    key = add(library, 1, name="Mueller")
    library = reopen(library)
    (library.path / IDENTIFIERS).chmod(mode)
    with pytest.raises(LibraryError, match="chmod 600"):
        library.whois(key)
    with pytest.raises(LibraryError, match="chmod 600"):
        add(library, 2, name="Schmidt")
    assert len(library) == 1
    (library.path / IDENTIFIERS).chmod(0o600)
    assert library.whois(key).name == "Mueller"


def test_a_link_in_the_place_of_the_table_is_not_followed(library: Library, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (library.path / IDENTIFIERS).symlink_to(tmp_path / "mine")
    with pytest.raises(LibraryError):
        add(library, 1, name="Mueller")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "damage", [b"no json\n", b'{"format_version":2,"secret":"00"}\n', b"[]\n", b'{"key":1}\n']
)
def test_a_damaged_table_says_so(library: Library, damage: bytes) -> None:
    key = add(library, 1, name="Mueller")
    library = reopen(library)
    table = library.path / IDENTIFIERS
    table.write_bytes(damage + table.read_bytes())
    with pytest.raises(LibraryCorruptError, match="is damaged"):
        library.whois(key)
    assert library.search(embedding(1), "nucleus", 1)[0].key == key


def test_what_was_never_committed_is_forgotten(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = add(library, 1, name="Mueller")
    library = reopen(library)
    table = library.path / IDENTIFIERS

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("cut off")

    with monkeypatch.context() as patched:
        patched.setattr(library._store.catalog, "add", fail)
        with pytest.raises(RuntimeError):
            add(library, 2, name="Schmidt")
    assert b"Schmidt" not in table.read_bytes()
    library.close()
    with table.open("ab") as file:  # a process that died between the table and the commit
        file.write(b'{"key":"gone","name":"Schmidt"}\n{"key":"half","na')
    library = Library.open(library.path, mode="write", encoder=HashEncoder())
    assert b"Schmidt" not in table.read_bytes()
    assert b"half" not in table.read_bytes()
    assert library.whois(key).name == "Mueller"
    other = add(library, 3, name="Meier")
    library = reopen(library)
    assert [library.whois(each).name for each in (key, other)] == ["Mueller", "Meier"]


def test_no_name_stays_as_the_disk_did_not_give_the_table(library: Library) -> None:
    key = add(library, 1, name="Mueller")
    table = library.path / IDENTIFIERS
    with ungiven(table), pytest.raises(LibraryError, match=f"{table} cannot be read: Input/output"):
        library.remove(key)
    assert key in library
    library.remove(key)
    assert b"Mueller" not in table.read_bytes()


def test_a_change_of_tags_that_was_cut_off_is_not_told(library: Library) -> None:
    add(library, 1, tags={"patient": "Mueller"}, key="a", name="scan")
    table = library.path / IDENTIFIERS
    library.close()
    with table.open("ab") as file:  # told, never committed
        file.write(b'{"key":"a","name":"scan","tags":{"patient":"Schmidt"}}\n')
    assert Library.open(library.path).whois("a").tags == {"patient": "Mueller"}


def _merge_other(library: Library) -> None:
    with create(library.path.with_name("other")) as other:
        add(other, 3, key="b", name="Meier")
        library.merge(other)


CHANGES: dict[str, Callable[[Library], object]] = {
    "add": lambda library: add(library, 3, key="b", name="Meier"),
    "merge": _merge_other,
    "retag": lambda library: library.retag("a", {"patient": "Meier"}),
    "group": lambda library: Heads(library._store).set_group("a", "Meier"),
    "anonymise": Library.anonymise,
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("committed", [True, False])
def test_names_follow_what_is_committed_whatever_was_raised(
    library: Library, monkeypatch: pytest.MonkeyPatch, what: str, committed: bool
) -> None:
    # The journal is deleted, which is the commit, and the folder cannot be synced; or neither.
    add(library, 1, tags={"patient": "Mueller"}, key="a", name="scan")
    real = Database.execute

    def execute(database: Database, statement: str, *values: Any) -> list[Any]:
        if statement == "COMMIT" and database.path.parent == library.path:
            if committed:
                real(database, statement, *values)
            raise LibraryWriteError("disk I/O error")
        return real(database, statement, *values)

    with monkeypatch.context() as patched:
        patched.setattr(Database, "execute", execute)
        with pytest.raises(LibraryWriteError, match="disk I/O error"):
            CHANGES[what](library)
    library.refresh()
    known = {one.key: library.whois(one.key) for one in library}
    names = [identity.name for identity in known.values()]
    again = reopen(library)
    assert {one.key: again.whois(one.key) for one in again} == known
    assert names == (["scan", "Meier"] if committed and what in ("add", "merge") else ["scan"])
    [first, *_] = known.values()
    [key, *_] = known
    assert first.tags["patient"] == ("Meier" if committed and what == "retag" else "Mueller")
    assert first.group == ("Meier" if committed and what == "group" else "")
    if what == "anonymise":
        assert again.whois("a").key == (key if committed else "a")
        assert is_random_key(key) is committed
    assert again.verify().ok


def test_many_are_told_in_one_go(library: Library) -> None:
    pictures = [draw(n) for n in range(5)]
    items = [
        {"image": image, "masks": {"nucleus": mask}, "name": f"file {n}"}
        for n, (image, mask) in enumerate(pictures)
    ]
    keys = library.add_many(items)  # type: ignore[arg-type]
    assert [library.whois(key).name for key in keys] == [f"file {n}" for n in range(5)]
    image = np.full((8, 8), 3, np.uint8)
    with pytest.raises(InputError, match=r"items\[1\]: it is items\[0\] again"):
        library.add_many([{"image": image, "masks": {"nucleus": image > 0}}] * 2)
    with pytest.raises(InputError, match=r"items\[0\]: .*already has an exemplar"):
        library.add_many(items[2:3])  # type: ignore[arg-type]


def test_the_owner_alone_reads_a_shared_library_s_table(library: Library) -> None:
    os.chmod(library.path, 0o775)
    add(library, 1, name="Mueller")
    assert stat.S_IMODE((library.path / IDENTIFIERS).stat().st_mode) == 0o600


@pytest.mark.parametrize(("part", "mode"), [("", 0o770), ("", 0o707), ("library.sqlite", 0o666)])
def test_a_library_that_others_may_change_is_warned_of(
    library: Library, part: str, mode: int
) -> None:
    library.close()
    os.chmod(library.path, 0o755)
    os.chmod(library.path / part, mode)
    with pytest.warns(RuntimeWarning, match=r"others may write .*chmod go-w"):
        Library.open(library.path).close()
    os.chmod(library.path / part, 0o700)
    Library.open(library.path).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser gives files away")
def test_a_library_of_another_user_is_warned_of(library: Library) -> None:
    library.close()
    os.chown(library.path, 4711, 4711)
    with pytest.warns(RuntimeWarning, match="belongs to user 4711"):
        Library.open(library.path).close()


def test_a_calibration_that_cannot_be_read_may_name_a_patient(library: Library) -> None:
    add(library, 1)
    name = f"{PREFIX}{'a' * 64} nucleus"
    library._store.catalog.set_note(name, f'{{"tags": {{"PatientID": "{UID}"}}')  # cut off
    assert grep(library, UID)
    assert library.anonymise().removed == ("nucleus",)
    library.close()
    assert not grep(library, UID)
