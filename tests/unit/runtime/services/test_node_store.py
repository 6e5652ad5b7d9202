"""What a node keeps, when the disk below it does not do what it is asked."""

from __future__ import annotations

import errno
import gc
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pynetdicom")

from recallseg.engines.errors import OutputError
from recallseg.runtime.services.metrics import Metrics
from recallseg.runtime.services.node import store as store_module
from recallseg.runtime.services.node.answering import Decider
from recallseg.runtime.services.node.objects import Spool
from recallseg.runtime.services.node.receiving import Arrivals
from recallseg.runtime.services.node.store import NodeStore


def failing(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["make_folder", "Marks"])
def test_a_state_that_cannot_be_made_is_told_by_its_folder_and_may_be_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, what, failing)
        with pytest.raises(OutputError, match=rf"{tmp_path}.*No space left"):
            NodeStore(tmp_path / "state")
    NodeStore(tmp_path / "state").close()  # nobody holds its lock


def test_a_state_that_is_no_database_is_told_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "node.sqlite").write_bytes(b"something else " * 500)
    with pytest.raises(OutputError, match=rf"{tmp_path}.*not a database"):
        NodeStore(tmp_path, running=False)


class Full:
    """A connection of SQLite whose commits fail: it gives the transaction up, or keeps it open."""

    def __init__(self, real: sqlite3.Connection, gives_up: bool) -> None:
        self.real, self.gives_up, self.left = real, gives_up, 1

    def execute(self, statement: str, *values: Any) -> Any:
        if statement == "COMMIT" and self.left:
            self.left -= 1
            if self.gives_up:
                self.real.rollback()
            raise sqlite3.OperationalError("database or disk is full")
        return self.real.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_commit_that_fails_says_why_and_lets_the_next_one_begin(
    tmp_path: Path, gives_up: bool
) -> None:
    with NodeStore(tmp_path / "state") as store:
        store._database = Full(store._database, gives_up)
        with pytest.raises(sqlite3.OperationalError, match="disk is full"):
            store.decide("series", "content", ["rule"], "decided", "")
        assert store.counts()["jobs"] == {}
        store.decide("series", "content", ["rule"], "decided", "")
        assert store.counts()["jobs"] == {"waiting": 1}


def test_a_series_about_which_nothing_could_be_noted_is_not_forgotten(tmp_path: Path) -> None:
    class Reader:
        def __call__(self, path: Path) -> None:
            """Find no header."""

        def forget(self, files: object) -> None:
            """Know of none."""

    arrivals = Arrivals(0.0)
    with NodeStore(tmp_path / "state") as store:
        decider = Decider(store, arrivals, {}, Reader(), Metrics("node"))  # type: ignore[arg-type]
        for number, series in enumerate(("one", "two")):
            spool = store.incoming / "spool"
            spool.write_bytes(b"an object")
            assert store.put(spool, series, f"{number:032x}", "d" * 64, "MR", "US") == "new"
            arrivals.touch(series)
        store._database = Full(store._database, True)
        with pytest.raises(sqlite3.OperationalError):
            decider.look()
        assert len(arrivals) == 2
        store._database.left = 0
        assert decider.look() == 2


def test_a_spool_that_cannot_be_removed_says_nothing_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asked: it is collected. Warnings are errors here, those of ``__del__`` too."""
    spool = Spool(tmp_path, "1.2", "1.2.3", "1.2.840.10008.1.2", "A", "B", 100)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        del spool
        gc.collect()
