"""What is known of each input: found, done or set aside, how often begun. A file beside outputs.

The outputs are the truth; this is what they cannot say. It is also where inputs wait, so that a
hundred thousand of them need no memory, and where two that would get one name are told apart.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recallseg.engines.errors import InputError, OutputError
from recallseg.engines.reading import read_file, reason
from recallseg.runtime.formats.finding import Item
from recallseg.runtime.json_text import printable
from recallseg.runtime.services.archive.sources import Source

__all__ = ["JOURNAL", "Journal", "Task"]

JOURNAL = ".recallseg-archive.sqlite"
FORMAT_VERSION = 1
ASIDE = 2  # of states: 0 waiting, 1 done
_SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE inputs (id INTEGER PRIMARY KEY, place BLOB NOT NULL UNIQUE, series TEXT NOT NULL,
                     named TEXT NOT NULL, task TEXT NOT NULL, run INTEGER NOT NULL,
                     state INTEGER NOT NULL, attempts INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE INDEX inputs_by_state ON inputs (state, attempts, id);
CREATE INDEX inputs_by_series ON inputs (series);
CREATE INDEX inputs_by_name ON inputs (named);
CREATE TABLE outputs (input INTEGER NOT NULL, place TEXT NOT NULL, row TEXT NOT NULL,
                      PRIMARY KEY (input, place)) WITHOUT ROWID;
CREATE TABLE passed (named TEXT PRIMARY KEY, refused INTEGER NOT NULL, reason TEXT NOT NULL)
                     WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Task:
    """What one worker does in one go.

    Attributes
    ----------
    number : of the input in the journal.
    place : of its outputs, below the folder of all: less their suffix, or of what is fetched a
        folder.
    what : an image of this machine, or a source that has to be fetched.
    attempts : how often it was begun before.
    """

    number: int
    place: Path
    what: Item | Source
    attempts: int


class Journal:
    """Of one folder of outputs; whoever opens it holds that folder's lock.

    What is written is on the disk after :meth:`commit`. What a crash takes is found again.

    Raises
    ------
    InputError
        If what is there is no journal that this version reads.
    OutputError
        If it cannot be written.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / JOURNAL
        try:
            _make_private(self._path)
        except OSError as error:
            why = error.strerror
            raise OutputError(f"{printable(self._path)} cannot be written: {why}.") from error
        try:
            self._base = sqlite3.connect(self._path, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise OutputError(f"{printable(self._path)} cannot be opened: {error}.") from error
        try:
            self._prepare()
        except BaseException:
            self._base.close()
            raise

    def _prepare(self) -> None:
        try:
            self._base.execute("PRAGMA synchronous=FULL")
            (version,) = self._base.execute("PRAGMA user_version").fetchone()
            self._base.execute("BEGIN IMMEDIATE")
            if version == 0:
                for statement in _SCHEMA.split(";"):
                    self._base.execute(statement)
                self._base.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        except sqlite3.OperationalError as error:
            raise OutputError(f"{printable(self._path)} cannot be written: {error}.") from error
        except sqlite3.DatabaseError as error:
            try:
                read_file(self._path)  # SQLite calls damaged what the disk does not give
            except OSError as found:
                why = found.strerror
                raise OutputError(f"{printable(self._path)} cannot be read: {why}.") from found
            raise self._damaged(str(error)) from error
        if version not in (0, FORMAT_VERSION):
            raise InputError(
                f"{printable(self._path)} has format {version}; this RecallSeg reads "
                f"{FORMAT_VERSION}."
            )
        run = self._get("run") or "0"
        if not (run.isascii() and run.isdecimal() and len(run) <= 18):
            raise self._damaged(f"the number of its run is {run[:40]!a}")
        self._run = int(run) + 1
        self._set("run", str(self._run))
        self._all("DELETE FROM passed")
        self.commit()

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"{printable(self._path)} is no journal of an archive, or damaged: {why}. Remove it: "
            "what is done is found by its records."
        )

    def agree(self, provenance: str) -> None:
        """Remember what makes these outputs; InputError if earlier ones were made by another."""
        before = self._get("provenance")
        if before not in (None, provenance):
            raise InputError(
                f"{printable(self._path.parent)} holds outputs of other settings or another state "
                f"of the library (provenance {before[:12]}, now {provenance[:12]}); nothing was "
                "written. Choose another --output."
            )
        self._set("provenance", provenance)
        self.commit()

    def add(self, source: Source, items: Iterable[Item]) -> Added:
        """Note the images of a source: to do, unless they were set aside and have not changed."""
        added = Added()
        for item in items:
            place = Path(source.place) / item.relative
            series = item.name if item.kind == "dicom" and item.series else ""
            one = item.path in item.files
            named = str(item.path) if one else f"{item.path}/ ({item.name})"
            self._add(place, series, named, _item_text(item, place), added)
        return added

    def add_source(self, source: Source) -> Added:
        """Note a source that is fetched when its turn comes."""
        added = Added()
        text = _text({"source": asdict(source)})
        self._add(Path(source.place) / "+".join(source.paths), "", source.named, text, added)
        return added

    def _add(self, place: Path, series: str, named: str, task: str, added: Added) -> None:
        key = str(place).casefold().encode("utf-8", "surrogatepass")
        why = self._conflict(key, series, printable(named))
        if why:
            self._pass(named, why, refused=True)
            added.refused += 1
            return
        known = self._one("SELECT id, task, run, state FROM inputs WHERE place = ?", key)
        if known is not None and known[2] == self._run:
            return  # named twice
        if known is None:
            self._all(
                "INSERT INTO inputs (place, series, named, task, run, state, attempts, reason)"
                " VALUES (?, ?, ?, ?, ?, 0, 0, '')",
                *(key, series, printable(named), task, self._run),
            )
        else:
            number, before, _, state = known
            if before == task and state == ASIDE:
                added.aside += 1
                self._all("UPDATE inputs SET run = ? WHERE id = ?", self._run, number)
                return
            attempts = "attempts" if before == task else "0"
            self._all(
                f"UPDATE inputs SET run = ?, series = ?, named = ?, task = ?, state = 0, "  # noqa: S608
                f"attempts = {attempts}, reason = '' WHERE id = ?",
                *(self._run, series, printable(named), task, number),
            )
        added.waiting += 1

    def _conflict(self, key: bytes, series: str, named: str) -> str:
        """Return why an input must not be segmented beside another one; empty if it may."""
        there = "(run = ? OR state = 1)"
        twice = self._one(
            f"SELECT 1 FROM inputs WHERE named = ? AND place != ? AND {there}",  # noqa: S608
            *(named, key, self._run),
        )
        if twice is not None:
            return "it is segmented under another name already: name it once, and alike each time."
        same = self._one(
            f"SELECT named FROM inputs WHERE series = ? AND series != ''"  # noqa: S608
            f" AND named != ? AND {there}",
            *(series, named, self._run),
        )
        if same is not None:
            return (
                f"{same[0]} holds the same series, or another part of it, and is segmented by "
                "itself: name a folder that holds both."
            )
        taken = self._one(
            "SELECT named FROM inputs WHERE place = ? AND named != ? AND run = ?",
            *(key, named, self._run),
        )
        if taken is not None:
            return f"it would be written where {taken[0]} is: rename one, or name them in a table."
        return ""

    def pass_over(self, passed: Iterable[tuple[str, str]]) -> int:
        """Note names of what is not taken, and why; return how many."""
        count = 0
        for named, why in passed:
            self._pass(named, why)
            count += 1
        return count

    def refuse(self, named: str, why: str) -> None:
        """Note what was named and cannot be segmented."""
        self._pass(named, why, refused=True)

    def retry(self) -> None:
        """Let what was set aside be tried again."""
        self._all("UPDATE inputs SET state = 0, attempts = 0, reason = '' WHERE state = 2")
        self.commit()

    def begin(self, without: Iterable[int]) -> Task | None:
        """Return what is to be done next, and count that it was begun; None if nothing waits.

        What was begun before and not ended comes last: it may be what ends its worker.

        Parameters
        ----------
        without : numbers of those that are in work.
        """
        rows = self._rows(
            "SELECT id, task, attempts FROM inputs WHERE state = 0 AND run = ?"
            " ORDER BY attempts, id",
            self._run,
        )
        busy = {*without}
        for number, text, attempts in rows:
            if number not in busy:
                rows.close()
                self._all("UPDATE inputs SET attempts = attempts + 1 WHERE id = ?", number)
                try:
                    return _task(number, text, attempts)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise self._damaged(f"input {number}: {reason(error)}") from error
        return None

    def give_back(self, number: int) -> None:
        """Note that what was begun was not to blame for its not being ended."""
        self._all("UPDATE inputs SET attempts = max(0, attempts - 1) WHERE id = ?", number)

    def done(self, number: int, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Note the outputs of an input: rows by place."""
        self._all("DELETE FROM outputs WHERE input = ?", number)
        for place, row in rows.items():
            self._all("INSERT INTO outputs VALUES (?, ?, ?)", number, _text(place), _text(row))
        self._all("UPDATE inputs SET state = 1, attempts = 0, reason = '' WHERE id = ?", number)

    def set_aside(self, number: int, why: str) -> None:
        """Note that an input is not tried again, and why."""
        self._all("UPDATE inputs SET state = 2, reason = ? WHERE id = ?", printable(why), number)

    def sweep(self, output: Path) -> int:
        """Let inputs wait again of whose outputs one is gone; return how many.

        Inputs that are not there any more, and whose outputs are gone too, are forgotten.
        """
        gone = {
            number
            for number, _, row, place in self.outputs()
            if not (output / f"{place}.json").is_file()
            or (row["mask"] and not (output / place).with_name(row["mask"]).is_file())
        }
        for number in gone:
            self._all("DELETE FROM inputs WHERE id = ? AND run != ?", number, self._run)
            self._all("UPDATE inputs SET state = 0 WHERE id = ?", number)
        waiting = self._one("SELECT count(*) FROM inputs WHERE state = 0 AND run = ?", self._run)
        return int(waiting[0]) if waiting else 0

    def outputs(self) -> Iterator[tuple[int, str, dict[str, Any], str]]:
        """Yield every output: number and name of its input, row, place."""
        for number, named, row, place in self._rows(
            "SELECT id, named, row, outputs.place FROM inputs JOIN outputs ON input = id"
            " WHERE state = 1 ORDER BY outputs.place"
        ):
            try:
                yield number, str(named), dict(json.loads(row)), str(json.loads(place))
            except (ValueError, TypeError, RecursionError) as error:
                raise self._damaged(f"an output of {str(named)[:80]!a}: {error}") from error

    def aside(self) -> Iterator[tuple[str, str]]:
        """Yield names of inputs that are set aside, and why."""
        yield from self._rows("SELECT named, reason FROM inputs WHERE state = 2 ORDER BY named")

    def passed(self, *, refused: bool) -> Iterator[tuple[str, str]]:
        """Yield what is passed over, or refused for its name or place, and why."""
        yield from self._rows("SELECT named, reason FROM passed WHERE refused = ?", int(refused))

    def forget_missing(self) -> None:
        """Forget what waited or was set aside and is not there any more."""
        self._all("DELETE FROM inputs WHERE run != ? AND state != 1", self._run)

    def commit(self) -> None:
        """Let what was noted survive; OutputError if it cannot be written."""
        self._all("COMMIT")
        self._all("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Commit and close."""
        try:
            self.commit()
        finally:
            self._base.close()

    def _pass(self, named: str, why: str, *, refused: bool = False) -> None:
        self._all(
            "INSERT OR REPLACE INTO passed VALUES (?, ?, ?)",
            *(printable(named), int(refused), printable(why)),
        )

    def _get(self, name: str) -> str | None:
        found = self._one("SELECT value FROM about WHERE name = ?", name)
        return None if found is None else str(found[0])

    def _set(self, name: str, value: str) -> None:
        self._all("INSERT OR REPLACE INTO about VALUES (?, ?)", name, value)

    def _one(self, statement: str, *values: Any) -> tuple[Any, ...] | None:
        return next(self._rows(statement, *values), None)

    def _rows(self, statement: str, *values: Any) -> Generator[tuple[Any, ...], None, None]:
        """Yield rows as they are asked for; OutputError if they cannot be read."""
        try:
            with closing(self._base.execute(statement, values)) as rows:
                yield from rows
        except sqlite3.Error as error:
            raise OutputError(f"{printable(self._path)} cannot be read: {error}.") from error

    def _all(self, statement: str, *values: Any) -> None:
        try:
            self._base.execute(statement, values)
        except sqlite3.Error as error:
            raise OutputError(f"{printable(self._path)} cannot be written: {error}.") from error


@dataclass
class Added:
    """How many images a source had: to do, set aside before, and refused for their names."""

    waiting: int = 0
    aside: int = 0
    refused: int = 0


def _make_private(path: Path) -> None:
    """Let a journal be its owner's alone: it names series by their UIDs, as no output does."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        if os.fstat(descriptor).st_mode & 0o077:  # of an earlier RecallSeg
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False)  # ASCII: bytes of a name that are no UTF-8 come back


def _item_text(item: Item, place: Path) -> str:
    return _text(
        {
            "place": str(place),
            "item": {
                **asdict(item),
                "path": str(item.path),
                "files": [str(file) for file in item.files],
                "relative": str(item.relative),
            },
        }
    )


def _task(number: int, text: str, attempts: int) -> Task:
    value = json.loads(text)
    if "source" in value:
        about = value["source"]
        source = Source(**{**about, "paths": tuple(about["paths"])})
        return Task(number, Path(source.place), source, attempts)
    about = value["item"]
    item = Item(
        **{
            **about,
            "path": Path(about["path"]),
            "files": tuple(map(Path, about["files"])),
            "relative": Path(about["relative"]),
            "signature": tuple(about["signature"]),
        }
    )
    return Task(number, Path(value["place"]), item, attempts)
