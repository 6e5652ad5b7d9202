"""Exemplars out of use and back, and who did what when."""

from __future__ import annotations

import json
import os
import pwd
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from support.fake_library import HashEncoder, StubBundle, add, create, draw, embedding

from recallseg.engines.errors import InputError, LibraryCorruptError, LibraryWriteError
from recallseg.runtime.library import Library
from recallseg.runtime.library import index as index_module
from recallseg.runtime.library import retrieval as retrieval_module


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return create(tmp_path / "library")


def _recalled(library: Library, k: int = 20) -> set[str]:
    return {match.key for match in library.search(embedding(1), "nucleus", k)}


def _version(library: Library) -> int:
    catalog = sqlite3.connect(library.path / "library.sqlite")
    try:
        return int(catalog.execute("PRAGMA user_version").fetchone()[0])
    finally:
        catalog.close()


def test_what_is_retired_is_kept_and_not_recalled(library: Library, tmp_path: Path) -> None:
    reader = Library.open(library.path)
    for n in range(6):
        add(library, n, key=str(n), tags={"even": str(n % 2 == 0)})
    library.add(draw(7)[0], {}, absent=("nucleus",), key="7")
    assert _recalled(reader) == {"0", "1", "2", "3", "4", "5", "7"}  # its indexes are loaded now
    digest, whole = library.digest, library.get("1")
    assert _version(library) == 1
    library.retire(["1", "7"])
    assert _version(library) == 3  # older programs would recall it
    smaller = create(tmp_path / "smaller")
    for n in (0, 2, 3, 4, 5):
        add(smaller, n, key=str(n), tags={"even": str(n % 2 == 0)})
    for one in (library, reader, Library.open(library.path)):
        assert _recalled(one) == {"0", "2", "3", "4", "5"}
        assert [e.key for e in one] == ["0", "2", "3", "4", "5"]
        assert (len(one), one.count("nucleus"), one.count("nucleus", absent=True)) == (5, 5, 0)
        assert one.count("nucleus", tags={"even": "False"}) == 2
        assert "1" in one
        assert one["1"].retired
        assert one["1"].structures == ("nucleus",)
        assert [e.key for e in one.retired] == ["1", "7"]
        assert one.source("1")[0].shape == draw(1)[0].shape
        assert one.digest == smaller.digest
        assert one.verify().problems == ()
        assert sum(count for _, count in one.origins) == 5
    library.reinstate("1")
    library.reinstate(["7"])
    for one in (library, reader, Library.open(library.path)):
        assert _recalled(one) == {"0", "1", "2", "3", "4", "5", "7"}
        assert one.digest == digest
        assert one["1"] == whole
        assert one.retired == ()


def test_it_comes_back_after_everything_that_can_happen_meanwhile(library: Library) -> None:
    for n in range(4):
        add(library, n, key=str(n))
    library.retire("2")
    library.retag("2", {"view": "top"})
    library.remove("0")
    library.compact()
    library.rebuild(StubBundle(identity="cd" * 32), encoder=HashEncoder(salt="other"))
    library.close()
    library = Library.open(library.path, mode="write", encoder=HashEncoder(salt="other"))
    assert [e.key for e in library] == ["1", "3"]
    library.reinstate("2")
    assert [e.key for e in library] == ["1", "2", "3"]
    assert library["2"].tags == {"view": "top"}
    assert library.verify().problems == ()
    library.retire("2")
    library.remove("2")
    assert "2" not in library
    assert library.retired == ()
    assert library.verify().problems == ()


def test_all_or_none_and_nothing_twice(library: Library) -> None:
    for n in range(3):
        add(library, n, key=str(n))
    library.retire("2")
    digest = library.digest
    with pytest.raises(InputError, match="no exemplar 'x'"):
        library.retire(["0", "x"])
    with pytest.raises(InputError, match="'2' is retired already; nothing was changed"):
        library.retire(["0", "2"])
    with pytest.raises(InputError, match="'1' is not retired"):
        library.reinstate(["2", "1"])
    with pytest.raises(InputError, match=r"'2', which is retired\. Reinstate it"):
        add(library, 5, key="2")
    with pytest.raises(InputError, match=r"'2' is retired\. Reinstate it"):
        library.replace_mask("2", "nucleus", draw(2)[1])
    with pytest.raises(LibraryWriteError, match="cannot retire"):
        Library.open(library.path).retire("0")
    assert library.digest == digest
    library.retire([])
    assert [change.what for change in library.history()] == ["add"] * 3 + ["retire"]


@pytest.mark.parametrize("saved", ["before", "between"])
def test_a_graph_on_the_disk_knows_who_is_retired(
    library: Library, monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    monkeypatch.setattr(index_module, "EXACT_LIMIT", 4)
    monkeypatch.setattr(retrieval_module, "EXACT_LIMIT", 4)
    for n in range(40):
        add(library, n, key=str(n))
    if saved == "before":
        library.rebuild_index()
    library.retire(["1", "5"])
    if saved == "between":
        library.rebuild_index()
    reader = Library.open(library.path)
    everything = {str(n) for n in range(40)}
    assert _recalled(reader, 40) == everything - {"1", "5"}
    library.reinstate("5")
    for one in (library, reader, Library.open(library.path)):
        assert _recalled(one, 40) == everything - {"1"}


def test_a_calibration_made_meanwhile_was_made_without_it(library: Library) -> None:
    for n in range(4):
        add(library, n, key=str(n))
    recipe = "ab" * 32
    library.store_calibrations(recipe, {"nucleus": {"a": 1}}, "3")
    library.retire("1")
    library.store_calibrations("cd" * 32, {"nucleus": {"a": 1}}, "3")

    def made_with(one: str) -> int:
        return library.learnt([one], ["nucleus"], {})["nucleus"].made_with

    assert (made_with(recipe), made_with("cd" * 32)) == (3, 3)
    library.reinstate("1")
    add(library, 9)
    assert (made_with(recipe), made_with("cd" * 32)) == (4, 3)
    learnt = library.learnt(["cd" * 32], ["nucleus"], {})["nucleus"]
    assert np.allclose(learnt.embeddings, [embedding(n) for n in (0, 2, 3, 1, 9)], atol=1e-6)


def test_history_says_who_did_what_when(library: Library) -> None:
    me = pwd.getpwuid(os.geteuid()).pw_name
    add(library, 0, key="0")
    library.add_many(
        [{"image": draw(n)[0], "masks": {"nucleus": draw(n)[1]}, "key": str(n)} for n in (1, 2, 3)]
    )
    library.retag("1", {"view": "top"})
    library.replace_mask("2", "nucleus", ~draw(2)[1])
    library.retire(["1", "3"])
    library.remove("0")
    library.store_calibrations("ab" * 32, {"nucleus": {}}, "2")
    library.compact()
    library.rebuild(StubBundle(identity="cd" * 32), encoder=HashEncoder())
    found = Library.open(library.path).history()
    assert [(change.what, change.exemplars, change.erased) for change in found] == [
        ("add", (), 1),
        ("add", ("1", "2", "3"), 0),  # 2 is there, with another mask
        ("retag", ("1",), 0),
        ("replace_mask", ("2",), 0),
        ("retire", ("1", "3"), 0),
        ("remove", (), 1),
        ("calibrate", (), 0),
        ("compact", (), 0),
        ("rebuild", (), 0),
    ]
    assert {change.who for change in found} == {me}
    assert [change.revision for change in found] == sorted(change.revision for change in found)
    assert [change.time for change in found] == sorted(change.time for change in found)
    assert found[3].details == {"structure": "nucleus"}
    assert json.loads(json.dumps(found[1].to_json()))["exemplars"] == ["1", "2", "3"]


def test_what_other_programs_did_is_told_as_such(library: Library) -> None:
    """A program without history wrote before, and once between."""
    for n in range(5):
        add(library, n, key=str(n))
    library.close()
    with sqlite3.connect(library.path / "library.sqlite") as catalog:
        names = [row[0] for row in catalog.execute("SELECT name FROM settings ORDER BY name")]
        notes = [name for name in names if name.startswith("at ")]
        for name in (notes[0], notes[1], notes[3]):
            catalog.execute("DELETE FROM settings WHERE name = ?", (name,))
    catalog.close()
    found = Library.open(library.path).history()
    assert [(change.what, change.exemplars) for change in found] == [
        ("unrecorded", ("0", "1")),
        ("add", ("2",)),
        ("unrecorded", ("3",)),
        ("add", ("4",)),
    ]
    assert [bool(change.who) for change in found] == [False, True, False, True]
    assert all(change.time for change in found)


@pytest.mark.parametrize(
    "damage",
    [
        "no JSON",
        "[]",
        '{"what": "add"}',
        '{"what": "add", "revisions": [0, 1], "time": "2026-01-01T00:00:00+00:00", "who": "x", '
        '"exemplars": [[3, 4], [1, 3]], "details": {}}',
        '{"what": "a\\u0000", "revisions": [0, 1], "time": "2026-01-01T00:00:00+00:00", '
        '"who": "x", "exemplars": [[1, 1]], "details": {}}',
    ],
)
def test_a_damaged_note_is_told_and_stops_no_query(library: Library, damage: str) -> None:
    add(library, 0)
    library.close()
    with sqlite3.connect(library.path / "library.sqlite") as catalog:
        catalog.execute("UPDATE settings SET value = ? WHERE name LIKE 'at %'", (damage,))
    catalog.close()
    opened = Library.open(library.path)
    with pytest.raises(LibraryCorruptError, match="history is damaged"):
        opened.history()
    assert len(_recalled(opened)) == 1
    assert any("history" in problem for problem in opened.verify().problems)


def test_half_retired_is_damage(library: Library) -> None:
    image, mask = draw(0)
    library.add(image, {"nucleus": mask, "wall": ~mask}, key="a")
    library.retire("a")
    library.close()
    with sqlite3.connect(library.path / "library.sqlite") as catalog:
        catalog.execute("UPDATE annotations SET present = 1 WHERE structure = 1")
    catalog.close()
    with pytest.raises(LibraryCorruptError, match="half retired"):
        Library.open(library.path).get("a")
