"""The database of a node's state folder: its tables, and statements one after the other."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from recallseg.engines.errors import InputError, OutputError

__all__ = ["Answer", "Delivery", "Job", "NodeDatabase", "Promise", "naming_the_state"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    series TEXT NOT NULL, instance TEXT NOT NULL, digest TEXT NOT NULL, bytes INTEGER NOT NULL,
    sender TEXT NOT NULL, called TEXT NOT NULL, received REAL NOT NULL, present INTEGER NOT NULL,
    keep_until REAL NOT NULL DEFAULT 0, PRIMARY KEY (series, instance)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS objects_by_instance ON objects (instance);
CREATE TABLE IF NOT EXISTS series (
    series TEXT PRIMARY KEY, decided TEXT NOT NULL, state TEXT NOT NULL, note TEXT NOT NULL,
    changed REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, series TEXT NOT NULL, content TEXT NOT NULL,
    rule TEXT NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
    next_at REAL NOT NULL DEFAULT 0, made REAL NOT NULL, note TEXT NOT NULL DEFAULT '',
    UNIQUE (series, content, rule));
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, next_at);
CREATE TABLE IF NOT EXISTS deliveries (
    id INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL, file TEXT NOT NULL,
    sop_class TEXT NOT NULL, sop_instance TEXT NOT NULL, destination TEXT NOT NULL,
    state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0,
    first_at REAL NOT NULL, note TEXT NOT NULL DEFAULT '', transaction_uid TEXT NOT NULL DEFAULT '',
    UNIQUE (job, file, destination));
CREATE INDEX IF NOT EXISTS deliveries_by_state ON deliveries (destination, state, next_at);
CREATE INDEX IF NOT EXISTS deliveries_by_instance ON deliveries (sop_instance);
CREATE TABLE IF NOT EXISTS promises (
    id INTEGER PRIMARY KEY AUTOINCREMENT, transaction_uid TEXT NOT NULL, sender TEXT NOT NULL,
    report TEXT NOT NULL, failed INTEGER NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0, first_at REAL NOT NULL,
    UNIQUE (transaction_uid, sender));
"""
_VERSION = 1


class Job(NamedTuple):
    """A series' content to be answered by a rule."""

    id: int
    series: str
    content: str
    rule: str
    attempts: int


class Answer(NamedTuple):
    """One file of a job's answers."""

    file: str
    sop_class: str
    sop_instance: str


class Delivery(NamedTuple):
    """An answer on its way to one destination."""

    id: int
    job: int
    file: str
    sop_class: str
    sop_instance: str
    destination: str
    attempts: int
    first_at: float


class Promise(NamedTuple):
    """A report of storage commitment that a sender waits for."""

    id: int
    transaction_uid: str
    sender: str
    report: str
    failed: bool
    attempts: int
    first_at: float


class NodeDatabase:
    """SQLite for several threads, and for several processes, of which one is the node.

    Parameters
    ----------
    folder : of the state.
    running : whether this is the node itself, which makes and changes tables.
    clock : seconds since 1970.

    Raises
    ------
    InputError
        If a newer RecallSeg wrote it.
    OutputError
        If the disk does not let it be read or written.
    """

    def __init__(self, folder: Path, *, running: bool, clock: Callable[[], float]) -> None:
        self.folder, self.clock = folder, clock
        self._lock = threading.RLock()
        self._closing = ExitStack()
        with naming_the_state(folder):
            try:
                self._open(running)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the files. Harmless if repeated."""
        self._closing.close()

    def _open(self, running: bool) -> None:
        """Open what is in the folder; what is to be closed goes on ``_closing``."""
        self._database = sqlite3.connect(
            self.folder / "node.sqlite", timeout=30.0, isolation_level=None, check_same_thread=False
        )
        self._closing.callback(self._database.close)
        self._prepare(running)

    def _prepare(self, running: bool) -> None:
        self._run("PRAGMA busy_timeout=30000")
        (version,) = self._one("PRAGMA user_version") or (0,)
        if version > _VERSION:
            raise InputError(
                f"{self.folder} was written by a newer RecallSeg. Use that, or another state."
            )
        if running:
            self._run("PRAGMA journal_mode=WAL")
            self._run("PRAGMA synchronous=NORMAL")
            with self._transaction():
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        self._run(statement)
                self._run(f"PRAGMA user_version={_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # SQLite itself gives some up
                    self._database.rollback()
                raise

    def _run(self, statement: str, values: Sequence[Any] = ()) -> int:
        with self._lock:
            return self._database.execute(statement, values).rowcount

    def _one(self, statement: str, values: Sequence[Any] = ()) -> Any:
        with self._lock:
            return self._database.execute(statement, values).fetchone()

    def _all(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._database.execute(statement, values).fetchall()


@contextmanager
def naming_the_state(folder: Path) -> Iterator[None]:
    """Explain what the system or SQLite says of a state folder; raises OutputError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise OutputError(
            f"the state of the node in {folder} cannot be read or written: {error}. What was "
            "received is unharmed. Free some space, or look at the disk and its permissions."
        ) from error
