"""Notes in the catalog of a stranger's library: they are compared with what we write, every one."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from tracemalloc import get_traced_memory, start, stop

import pytest
from support.fake_library import HashEncoder, StubBundle, add, create

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library import Library

DEEP = "[" * 100_000
AB = "ab" * 32


@pytest.fixture
def library(tmp_path: Path) -> Path:
    with create(tmp_path / "library") as made:
        for number in range(3):
            add(made, number)
        made.store_calibrations(AB, {"nucleus": {}}, next(iter(made)).key)
    return made.path


def noted(library: Path, name: str, value: str) -> None:
    connection = sqlite3.connect(library / "library.sqlite")
    connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))
    connection.commit()
    connection.close()


def rebuilt(library: Library) -> None:
    library.rebuild(bundle=StubBundle(), encoder=HashEncoder(salt="other"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "use"),
    [
        ("at x", "", lambda library: add(library, 9)),
        ("at " + "9" * 5000, "{}", lambda library: add(library, 9)),
        ("at 000000000001", DEEP, Library.history),
        (f"calibration {AB} nucleus", DEEP, lambda library: library.calibrations),
        (f"calibration {AB} nucleus", "[]", lambda library: library.calibrations),
        ("origins 1", DEEP, lambda library: library.origins),
        ("origins 1", '{"origins": 5, "spans": []}', lambda library: library.origins),
        ("rebuild", DEEP, rebuilt),
        ("rebuild", "[]", rebuilt),
        ("rebuild", '{"identity": 5}', rebuilt),
        ("rebuild", json.dumps({"identity": AB, "generation": 1}), rebuilt),
        ("rebuild", json.dumps({"identity": AB, "generation": -1}), rebuilt),
        ("rebuild", json.dumps({"identity": AB, "generation": "2"}), rebuilt),
        ("rebuild", json.dumps({"identity": "another", "generation": 1}), rebuilt),
        ("rebuild", json.dumps({"identity": "another", "generation": 1e300}), rebuilt),
    ],
)
def test_a_note_that_we_did_not_write(
    library: Path, name: str, value: str, use: Callable[[Library], object]
) -> None:
    noted(library, name, value)
    before = (library / "library.sqlite").read_bytes()
    with (
        pytest.raises(LibraryCorruptError),
        Library.open(library, mode="write", encoder=HashEncoder()) as opened,
    ):
        use(opened)
    assert (library / "library.sqlite").read_bytes() == before
    assert len([*Library.open(library)]) == 3


def test_an_unfinished_rebuild_is_taken_up(library: Path) -> None:
    noted(library, "rebuild", json.dumps({"identity": AB, "generation": 7}))
    with Library.open(library, mode="write", encoder=HashEncoder()) as opened:
        rebuilt(opened)
        assert opened.generation == 7
        assert opened.verify().ok


def test_a_table_of_identifiers_takes_as_much_memory_as_it_has(library: Path) -> None:
    with Library.open(library, mode="write", encoder=HashEncoder()) as opened:
        key = add(opened, 7, tags={"PatientID": "4711"})
    with Library.open(library) as opened:
        start()
        assert opened.whois(key).tags == {"PatientID": "4711"}
        peak = get_traced_memory()[1]
        stop()
    assert peak < 2**22
