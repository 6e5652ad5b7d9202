"""The library's SQLite file: schema, connection, transactions, and what its errors mean.

A rollback journal with ``synchronous=EXTRA``, not a write-ahead log: a reader needs no side file,
so a library opens on read-only media, and a commit also survives a power loss. Readers and the one
writer exclude each other for the milliseconds of a commit; everything slow happens outside.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from recallseg.engines.errors import (
    InputError,
    LibraryCorruptError,
    LibraryError,
    LibraryLockedError,
    LibraryNotFoundError,
    LibraryVersionError,
    LibraryWriteError,
)
from recallseg.engines.machine_fault import (
    SQLITE_BUSY,
    SQLITE_CANNOT_OPEN,
    SQLITE_CORRUPT,
    SQLITE_FULL,
    SQLITE_INTERRUPT,
    SQLITE_IO,
    SQLITE_READ_ONLY,
    sqlite_code,
)
from recallseg.runtime.forked import Opener, OwnLock
from recallseg.runtime.library.catalog_file import Hold, check_schema, hold_catalog_file
from recallseg.runtime.library.storage import NOT_GIVEN, advice, unreadable, writing

__all__ = ["FORMAT_VERSION", "MOST_BYTES_OF_VALUE", "Database"]

FORMAT_VERSION = 3
"""Newest format read. 1: memories in fp16. 2: they may be int8. 3: exemplars may be retired (their
annotations' ``present`` is 2 more), and there are the tables of ``_SCHEMA_3``. A library carries
the lowest that can hold it, so that older programs open what they understand."""
APPLICATION_ID = 0x52534547  # "RSEG"
_ERROR_NAME = "sqlite_errorname"  # from Python 3.11 on
BUSY_SECONDS = 30.0
"""How long to wait for another process's commit or read, both of milliseconds."""
MOST_BYTES_OF_VALUE = 2**26
"""No text or embedding of ours comes near; SQLite itself would take a gigabyte."""
_STEPS, _STEPS_PER_BYTE, _STEPS_PER_LOOK = 2_000_000, 4, 100_000
"""How much work one statement may be. A crafted file can hold more rows than atoms, by pages that
are each other's children; a statement over an honest one takes less than a step per byte."""

_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
-- One row. revision counts commits that change exemplars; generation counts re-encodings of all.
CREATE TABLE state (revision INTEGER NOT NULL, generation INTEGER NOT NULL,
                    exemplars INTEGER NOT NULL, digest_sum TEXT NOT NULL);
CREATE TABLE exemplars (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE,
                        content TEXT NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL,
                        created TEXT NOT NULL, source BLOB, digest BLOB NOT NULL);
CREATE TABLE structures (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
                         present INTEGER NOT NULL, absent INTEGER NOT NULL);
CREATE TABLE annotations (structure INTEGER NOT NULL, present INTEGER NOT NULL,
                          exemplar INTEGER NOT NULL,
                          PRIMARY KEY (structure, present, exemplar)) WITHOUT ROWID;
CREATE INDEX annotations_by_exemplar ON annotations (exemplar);
CREATE TABLE tags (exemplar INTEGER NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
                   PRIMARY KEY (exemplar, name)) WITHOUT ROWID;
CREATE INDEX tags_by_value ON tags (name, value, exemplar);
CREATE TABLE encodings (generation INTEGER NOT NULL, exemplar INTEGER NOT NULL,
                        embedding BLOB NOT NULL, digest BLOB NOT NULL,
                        UNIQUE (generation, exemplar));
CREATE TABLE memories (generation INTEGER NOT NULL, exemplar INTEGER NOT NULL,
                       structure INTEGER NOT NULL, shard INTEGER NOT NULL, slot INTEGER NOT NULL,
                       digest BLOB NOT NULL,
                       PRIMARY KEY (generation, exemplar, structure)) WITHOUT ROWID;
CREATE TABLE shards (id INTEGER PRIMARY KEY AUTOINCREMENT, generation INTEGER NOT NULL,
                     slots INTEGER NOT NULL);
CREATE TABLE removals (revision INTEGER NOT NULL, exemplar INTEGER NOT NULL,
                       PRIMARY KEY (revision, exemplar)) WITHOUT ROWID;
CREATE TABLE indexes (structure INTEGER NOT NULL, present INTEGER NOT NULL,
                      revision INTEGER NOT NULL, last INTEGER NOT NULL,
                      count INTEGER NOT NULL, file TEXT NOT NULL, bytes INTEGER NOT NULL,
                      quick BLOB NOT NULL, digest BLOB NOT NULL,
                      PRIMARY KEY (structure, present)) WITHOUT ROWID;
"""

_SCHEMA_3 = """
-- Images of exemplars up to number last name this structure so, in their files.
CREATE TABLE former_names (name TEXT NOT NULL, last INTEGER NOT NULL, structure INTEGER NOT NULL,
                           PRIMARY KEY (name, last)) WITHOUT ROWID;
-- What a head is fitted on: which exemplars belong together, and memory attention's logits.
CREATE TABLE groups (exemplar INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE kept_logits (exemplar INTEGER PRIMARY KEY, about TEXT NOT NULL, data BLOB NOT NULL,
                          digest BLOB NOT NULL);
CREATE TABLE heads (id INTEGER PRIMARY KEY, about TEXT NOT NULL, data BLOB NOT NULL,
                    digest BLOB NOT NULL);
"""
"""What a library gets when it first needs it; see :meth:`Database.upgrade`."""


def _close(connection: sqlite3.Connection, hold: Hold, opener: Opener) -> None:
    """Close a connection, but not from a process that was forked while it may have been at work."""
    if not opener.elsewhere:
        connection.close()
        hold.give_back()


class Database:
    """One connection. May be shared between threads: each statement or transaction takes a lock."""

    def __init__(self, path: Path, hold: Hold, mode: str, writable: bool) -> None:
        try:
            connection = _connect(path, mode)
        except BaseException:
            hold.give_back()
            raise
        self.path = path
        self.writable = writable
        self._connection, self._hold = connection, hold
        self._opener = Opener(f"the library in {path.parent}")
        self._lock = OwnLock(self._opener)
        self._effort = _Effort(hold)
        connection.set_progress_handler(self._effort.look, _STEPS_PER_LOOK)
        self._close = weakref.finalize(self, _close, connection, hold, self._opener)

    @classmethod
    def create(
        cls, path: Path, fill: Iterable[tuple[str, Sequence[Any]]], version: int
    ) -> Database:
        """Make the file with its schema and the rows of ``fill``, in one transaction."""
        with writing(path):
            hold = hold_catalog_file(path, create=True)
        database = cls(path, hold, "rw", True)
        try:
            database.execute("PRAGMA page_size=8192")
            database._prepare()
            with database.transaction():
                database._run(_SCHEMA)
                for statement, values in fill:
                    database.execute(statement, values)
                database.execute(f"PRAGMA application_id={APPLICATION_ID}")
                database.execute(f"PRAGMA user_version={version}")
        except BaseException:
            database.close()
            raise
        return database

    @classmethod
    def open(cls, path: Path, writable: bool) -> Database:
        """Open the file.

        Raises
        ------
        LibraryNotFoundError
            If there is no library, or its creation was interrupted.
        LibraryVersionError
            If the format is newer.
        LibraryCorruptError
            If it is no SQLite file, another program's, or asks SQLite for what ours never does.
        """
        # Undoing a commit that was cut off takes write permission: readers ask for it if they can.
        may_write = os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
        hold = None
        try:
            hold = hold_catalog_file(path)
            empty = not hold.bytes
        except (FileNotFoundError, NotADirectoryError):
            raise _no_library(path) from None
        except OSError as error:
            if hold is not None:
                hold.give_back()
            raise _cannot_open(path, error) from error
        if empty:
            hold.give_back()
            raise _no_library(path)
        if writable and not may_write:
            hold.give_back()
            raise LibraryWriteError(
                f"{path.parent} cannot be written by this user. Open it for reading, grant write "
                "permission, or copy it to a folder that can be written."
            )
        database = cls(path, hold, "rw" if may_write else "ro", writable)
        try:
            database._distrust()
            with database.snapshot():
                application = database.value("PRAGMA application_id")
                version = database.value("PRAGMA user_version")
                objects = database.execute("SELECT type, name, tbl_name, sql FROM sqlite_master")
            if application == 0 and version == 0 and not objects:
                raise LibraryNotFoundError(
                    f"the library in {path.parent} was never finished. Make it again with "
                    "'recallseg library create'."
                )
            if application != APPLICATION_ID:
                raise LibraryCorruptError(f"{path} is not a RecallSeg library's catalog.")
            if version > FORMAT_VERSION:
                raise LibraryVersionError(
                    f"the library in {path.parent} has format {version}; this RecallSeg reads up "
                    f"to {FORMAT_VERSION}. Update RecallSeg."
                )
            check_schema(path, objects, _SCHEMA + (_SCHEMA_3 if version >= 3 else ""))
            database._prepare()
        except BaseException:
            database.close()
            raise
        return database

    @property
    def commits(self) -> tuple[int, int]:
        """What differs after any commit, by others or by this one, even if it raised; very fast."""
        return int(self.value("PRAGMA data_version")), self._connection.total_changes

    @property
    def bytes(self) -> int:
        """Size of the file."""
        try:
            return self._hold.bytes
        except OSError as error:
            raise unreadable(f"the catalog {self.path}", error, "Restore a backup.") from error

    @property
    def format_version(self) -> int:
        """The format that the file has now."""
        return int(self.value("PRAGMA user_version"))

    def upgrade(self) -> None:
        """Bring the file to the newest format, within a transaction; harmless when repeated."""
        if self.format_version < FORMAT_VERSION:
            self._run(_SCHEMA_3)
            self.execute(f"PRAGMA user_version={FORMAT_VERSION}")

    def copy(self, path: Path) -> None:
        """Copy the file as it is committed now, in one piece, to a new one; others wait or not."""
        with writing(path):
            hold = hold_catalog_file(path, create=True)
        try:
            with closing(_connect(path, "rw")) as made, self._lock, self._explained():
                self._check_open()
                try:
                    self._connection.backup(made)
                except sqlite3.OperationalError as error:
                    code, reads = sqlite_code(error), "READ" in getattr(error, _ERROR_NAME, "")
                    if code != SQLITE_FULL and (code != SQLITE_IO or reads):
                        raise
                    raise _cannot_write(path, error) from error
        finally:
            hold.give_back()

    @staticmethod
    def vacuum(path: Path) -> None:
        """Write a file that nobody has open anew, so that nothing deleted is left in it."""
        try:
            with closing(sqlite3.connect(path, isolation_level=None)) as connection:
                connection.execute("VACUUM")
        except sqlite3.Error as error:
            raise LibraryWriteError(f"{path} cannot be written anew: {error}.") from error

    def _run(self, statements: str) -> None:
        for statement in statements.split(";\n"):
            if statement.strip():
                self.execute(statement)

    def close(self) -> None:
        """Close the connection; harmless when called again, and in a forked process."""
        if self._opener.elsewhere:
            return
        with self._lock:
            self._close()

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return self._close.alive

    def execute(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        """Run one statement and return all its rows."""
        reads = statement.startswith("SELECT")
        with self._lock, self._explained(writes=self.writable and not reads):
            self._check_open()
            self._effort.steps = 0
            return self._connection.execute(statement, values).fetchall()

    def execute_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement for each row of values."""
        with self._lock, self._explained():
            self._connection.executemany(statement, rows)

    def value(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """Return the first column of the first row; LibraryCorruptError when there is none."""
        rows = self.execute(statement, values)
        if not rows:
            raise LibraryCorruptError(
                f"{self.path} lacks a row that every library has ({statement})."
            )
        return rows[0][0]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing: commit when the block ends, roll back when it raises."""
        with self._lock:
            self._check_open()
            self.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.execute("COMMIT")
            except BaseException:  # all may be committed, and its folder's sync have failed
                if self._connection.in_transaction:
                    self._connection.rollback()
                raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let every statement of the block see one state of the file."""
        with self._lock:
            self._check_open()
            if self._in_transaction():
                yield
                return
            self.execute("BEGIN")
            try:
                yield
            finally:
                if self._in_transaction():
                    self._connection.rollback()

    def _in_transaction(self) -> bool:
        return self._connection.in_transaction

    def _check_open(self) -> None:
        if not self.is_open:
            raise LibraryError(f"the library in {self.path.parent} has been closed. Open it again.")

    def _distrust(self) -> None:
        """Have SQLite do nothing that a schema asks for, and check what it reads."""
        self.execute("PRAGMA trusted_schema=OFF")
        self.execute("PRAGMA cell_size_check=ON")
        self.execute("PRAGMA mmap_size=0")
        if sys.version_info >= (3, 11):  # earlier, only what the file holds is the limit
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_BYTES_OF_VALUE)
            self._connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)

    def _prepare(self) -> None:
        if self.writable:
            self.execute("PRAGMA journal_mode=DELETE")
            self.execute("PRAGMA synchronous=EXTRA")
            self.execute("PRAGMA secure_delete=ON")  # a removed patient's embedding must not linger
        else:
            self.execute("PRAGMA query_only=ON")

    @contextmanager
    def _explained(self, *, writes: bool = True) -> Iterator[None]:
        """Translate SQLite's errors: what the machine lacks is no damage.

        ``writes`` is whether an error of the disk is one of writing: SQLite's code for both is one,
        where Python tells a code at all.
        """
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # a mistake in this package
        except UnicodeEncodeError as error:  # in what was asked for, a key, say
            raise InputError(
                f"{ascii(error.object)[:80]} is no text: it has half a character, which JSON can "
                "write and nothing else. Mend what made it."
            ) from error
        except sqlite3.OperationalError as error:
            raise self._operational(error, writes) from error
        except (sqlite3.DatabaseError, OverflowError) as error:
            if fault := self._not_given(error):
                raise self._unread(os.strerror(fault.errno or 0)) from fault
            raise self._corrupt(error) from error

    def _not_given(self, error: Exception) -> OSError | None:
        """Return the disk's error, where it is that which SQLite calls a damaged page."""
        if not isinstance(error, sqlite3.Error) or sqlite_code(error) != SQLITE_CORRUPT:
            return None
        try:
            self._hold.read_through()
            self._effort.steps = 0
            whole = self._connection.execute("PRAGMA integrity_check(1)").fetchall() == [("ok",)]
        except OSError as found:
            return found
        except sqlite3.Error:
            return None
        return OSError(errno.EIO, os.strerror(errno.EIO)) if whole else None  # it has passed

    def _operational(self, error: sqlite3.OperationalError, writes: bool) -> LibraryError:
        code = sqlite_code(error)
        if code == SQLITE_BUSY:
            return LibraryLockedError(
                f"{self.path} stayed locked for {BUSY_SECONDS:.0f} s by another process. Try again."
            )
        if code in (SQLITE_FULL, SQLITE_READ_ONLY) or (code == SQLITE_IO and writes):
            return _cannot_write(self.path, error)
        if code == SQLITE_IO:
            return self._unread(str(error))
        if code == SQLITE_INTERRUPT:
            return self._corrupt("it holds more rows than a file of its size can")
        if code == SQLITE_CANNOT_OPEN:
            return _cannot_open(self.path, error)
        return self._corrupt(error)

    def _unread(self, why: str) -> LibraryError:
        return LibraryError(f"the catalog {self.path} cannot be read: {why}. {NOT_GIVEN}")

    def _corrupt(self, error: Exception | str) -> LibraryCorruptError:
        return LibraryCorruptError(
            f"the catalog {self.path} is damaged: {error}. Restore it from a backup; sources and "
            "memories beside it may be intact."
        )


class _Effort:
    """Stops a statement that takes more steps than a file of this size can need."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self.steps = 0

    def look(self) -> int:
        """Return 1 to stop; called by SQLite every ``_STEPS_PER_LOOK`` steps."""
        self.steps += _STEPS_PER_LOOK
        try:
            return self.steps > _STEPS + _STEPS_PER_BYTE * self._hold.bytes
        except OSError:  # the disk does not say now: an error here would be taken for too many
            return False


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        return sqlite3.connect(
            uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
    except sqlite3.OperationalError as error:
        raise _cannot_open(path, error) from error


def _no_library(path: Path) -> LibraryNotFoundError:
    return LibraryNotFoundError(
        f"there is no library in {path.parent}: {path.name} is missing or empty. Make one "
        "with 'recallseg library create'."
    )


def _cannot_write(path: Path, error: Exception) -> LibraryWriteError:
    return LibraryWriteError(
        f"cannot write {path}: {error}. Free some disk space or check the permissions. What was "
        "stored before is unharmed."
    )


def _cannot_open(path: Path, error: Exception) -> LibraryError:
    """Return the error for a file that cannot be opened; where SQLite is silent, ask the system."""
    if not isinstance(error, OSError):
        try:
            os.close(os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC))  # may be one too many
            Hold(path).give_back()
        except OSError as found:
            error = found
    if isinstance(error, OSError):
        hint = advice(error) or "Check the folder's permissions."
        return LibraryWriteError(f"cannot open {path}: {error.strerror or error}. {hint}")
    return LibraryWriteError(
        f"cannot open {path}: {error}. If its last write was interrupted, open it once where it "
        "can be written."
    )
