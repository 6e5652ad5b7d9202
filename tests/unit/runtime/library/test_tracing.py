"""Of which things the exemplars in use are, without reading the whole history again."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_library import create, draw

from recallseg.engines.errors import LibraryCorruptError
from recallseg.runtime.library import Library, tracing
from recallseg.runtime.library.history import Note, history

DETAIL = "item"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return create(tmp_path / "library")


def add(library: Library, *seeds: int, thing: str = "") -> list[str]:
    items = [
        {"image": image, "masks": {"nucleus": mask}, "key": str(n)}
        for n in seeds
        for image, mask in [draw(n)]
    ]
    return library.add_many(items, details={DETAIL: thing} if thing else None)


def by_history(library: Library) -> set[str]:
    """Return what the whole history says."""
    used = {exemplar.key for exemplar in library}
    return {
        change.details[DETAIL]
        for change in history(library._store.catalog)
        if DETAIL in change.details and not used.isdisjoint(change.exemplars)
    }


def test_whatever_happens_it_says_what_the_whole_history_says(library: Library) -> None:
    other = Library.open(library.path)  # as of another process
    traces = [library.trace(DETAIL), other.trace(DETAIL)]
    seen: list[set[str]] = []

    def check() -> None:
        expected = by_history(library)
        seen.append(expected)
        for trace in traces:
            assert trace.look() == expected
        assert other.trace(DETAIL).look() == expected

    check()
    rng = np.random.default_rng(0)
    for n in range(12):
        add(library, n, thing=f"thing {n // 2}" if n % 3 else "")
        check()
    add(library, 20, 21, 22, thing="stack")
    check()
    for step in range(60):
        keys = [one.key for one in library]
        key = str(rng.choice(keys))
        what = int(rng.integers(6))
        if what == 0 and len(keys) > 6:
            library.remove(key)
        elif what == 1 and len(keys) > 6:
            library.retire(key)
        elif what == 2 and library.retired:
            library.reinstate(library.retired[0].key)
        elif what == 3:
            library.replace_mask(key, "nucleus", ~library.source(key)[1]["nucleus"])
        elif what == 4:
            library.retag(key, {"step": str(step)})
        else:
            add(library, 100 + step, thing=f"thing {step % 7}")
        if rng.random() < 0.6:  # or several changes are seen at once
            check()
    library.rename_structure("nucleus", "cell")
    library.anonymise()
    library.compact()
    check()
    library.retire([one.key for one in library])
    check()
    assert seen[-1] == set()
    assert len({frozenset(one) for one in seen}) > 10


def test_what_was_read_is_not_read_again(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(40):
        add(library, n, thing=f"thing {n}")
    trace = library.trace(DETAIL)
    assert len(trace.look()) == 40
    parse, asked = tracing.parse_note, list[str]()

    def counted(text: str) -> Note:
        asked.append(text)
        return parse(text)

    monkeypatch.setattr(tracing, "parse_note", counted)
    assert len(trace.look()) == 40
    assert not asked
    library.retire("3")
    assert len(trace.look()) == 39
    library.remove("4")
    add(library, 50, thing="thing 50")
    assert len(trace.look()) == 39
    assert len(asked) == 3


def test_what_a_program_without_a_history_did_is_seen(library: Library) -> None:
    for n in range(4):
        add(library, n, thing=f"thing {n}")
    trace = library.trace(DETAIL)
    assert len(trace.look()) == 4
    for number in (2, 3):
        with closing(sqlite3.connect(library.path / "library.sqlite")) as older, older:
            older.execute("DELETE FROM exemplars WHERE id = ?", (number,))
            older.execute("UPDATE state SET revision = revision + 1")
        if number == 3:  # and ours after it
            library.retag("3", {"view": "top"})
        assert len(trace.look()) == 5 - number


def test_another_catalog_in_its_place_is_read_anew(library: Library, tmp_path: Path) -> None:
    add(library, 0, thing="first")
    shutil.copy(library.path / "library.sqlite", tmp_path / "earlier.sqlite")
    add(library, 1, thing="second")
    add(library, 2, thing="third")
    trace = library.trace(DETAIL)
    assert trace.look() == {"first", "second", "third"}
    with (
        closing(sqlite3.connect(tmp_path / "earlier.sqlite")) as earlier,
        closing(sqlite3.connect(library.path / "library.sqlite")) as now,
    ):
        earlier.backup(now)
    assert trace.look() == {"first"}
    with closing(sqlite3.connect(library.path / "library.sqlite")) as now, now:
        now.execute("DELETE FROM settings WHERE name LIKE 'at %'")  # as of a release
    assert trace.look() == set()


def test_a_damaged_note_is_told_each_time_and_harms_nothing(library: Library) -> None:
    add(library, 0, thing="first")
    trace = library.trace(DETAIL)
    assert trace.look() == {"first"}
    add(library, 1, thing="second")

    def write(text: Any) -> str:
        with closing(sqlite3.connect(library.path / "library.sqlite")) as now, now:
            newest = "(SELECT max(name) FROM settings WHERE name LIKE 'at %')"
            ((former,),) = now.execute(f"SELECT value FROM settings WHERE name = {newest}")
            now.execute(f"UPDATE settings SET value = ? WHERE name = {newest}", (text,))
            return str(former)

    whole = write("{")
    for _ in range(2):
        with pytest.raises(LibraryCorruptError, match="history is damaged"):
            trace.look()
    write(whole)
    assert trace.look() == {"first", "second"}
