"""What a node keeps: objects as files, and in SQLite what was decided, made and sent.

::

    STATE/node.sqlite            objects, series, jobs, deliveries, promises of commitment
    STATE/incoming/              objects while they arrive
    STATE/received/SERIES/       objects, INSTANCE.DIGEST.dcm
    STATE/work/                  what a job is made of while it runs: links
    STATE/answers/JOB/           answers, fixed before anything is sent

A file is the truth and its row an index: an object is promised (0000) when its file is on the disk,
and a row that a power loss took is made again from the file's name. Answers are written as one
folder that appears whole; only then do their deliveries get rows. So whatever is killed at whatever
moment, at most something is done twice with the same bytes.

Names of files are marks (keyed hashes), never UIDs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from recallseg.engines.durable import make_folder, sync_folder
from recallseg.engines.errors import InputError, LibraryLockedError, OutputError
from recallseg.runtime.library.storage import WriterLock
from recallseg.runtime.services.logs import Marks

__all__ = [
    "Answer",
    "Delivery",
    "Job",
    "NodeStore",
    "Promise",
    "SeriesRow",
    "naming_the_state",
    "object_file",
]

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
_DIGITS = 32  # of a digest, in names of files
_FILE = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{32})\.dcm")
REMEMBERED_S = 90 * 86400.0
"""A late object is told from a whole series for so long after that was removed."""
LISTED = ("unmatched", "incomplete", "unreadable")
"""States of a series from which nothing is made until somebody mends something."""


class SeriesRow(NamedTuple):
    """A series: its mark, what jobs were made for, its state and why, when that was."""

    series: str
    decided: str
    state: str
    note: str
    changed: float


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


class NodeStore:
    """Everything in a node's state folder. One node writes it; others may look and mend.

    Parameters
    ----------
    folder : made if it is not there.
    running : whether this is the node itself, which alone takes in and removes files.
    clock : seconds since 1970.

    Raises
    ------
    InputError
        If another node runs in the folder, or a newer RecallSeg wrote it, or there is none.
    OutputError
        If the disk does not let it be read or written.
    """

    def __init__(
        self, folder: Path, *, running: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        if not running and not (folder / "node.sqlite").is_file():
            raise InputError(f"{folder} is no state of a node: there is no node.sqlite.")
        self.folder, self.clock = folder, clock
        self._lock = threading.RLock()
        self._closing = ExitStack()
        with naming_the_state(folder):
            self._open(running)

    def _open(self, running: bool) -> None:
        folder = self.folder
        self.incoming, self.received = folder / "incoming", folder / "received"
        self.work, self.answers = folder / "work", folder / "answers"
        if running:
            for place in (folder, self.incoming, self.received, self.work, self.answers):
                make_folder(place, mode=0o700)  # patients' images
            try:
                self._closing.callback(WriterLock(folder / "node.lock").release)
            except LibraryLockedError as error:
                raise InputError(
                    f"another node runs in {folder}. Stop it, or give this one a state of its own."
                ) from error
        self._used = 0
        try:
            self.marks = Marks(folder / "marks.key")
            self._database = sqlite3.connect(
                folder / "node.sqlite", timeout=30.0, isolation_level=None, check_same_thread=False
            )
            self._closing.callback(self._database.close)
            self._prepare(running)
            if running:
                self._recover()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files. Harmless if repeated."""
        self._closing.close()

    def __enter__(self) -> NodeStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Objects

    @property
    def used_bytes(self) -> int:
        """Bytes of objects and answers."""
        return self._used

    def free_bytes(self) -> int:
        """Bytes that the disk has left."""
        return shutil.disk_usage(self.folder).free

    def put(
        self, spool: Path, series: str, instance: str, digest: str, sender: str, called: str
    ) -> Literal["new", "same", "replaced"]:
        """Take an object that lies in ``incoming``, durably, and return what it was.

        Parameters
        ----------
        spool : a whole file, already on the disk.
        series, instance : their marks.
        digest : SHA-256 of the data set, hex.
        """
        folder, digest = self.received / series, digest[:_DIGITS]
        with self._lock:
            row = self._one(
                "SELECT digest, bytes, present FROM objects WHERE series=? AND instance=?",
                (series, instance),
            )
            if row is not None and row[2] and row[0] == digest:
                sync_folder(folder)  # who sent it first may not have been told yet
                return "same"
            size = spool.stat().st_size
            make_folder(folder, mode=0o700)
            file = folder / object_file(instance, digest)
            os.replace(spool, file)
            try:
                self._run(
                    "INSERT INTO objects VALUES (?,?,?,?,?,?,?,1,0) ON CONFLICT (series, instance) "
                    "DO UPDATE SET digest=excluded.digest, bytes=excluded.bytes, "
                    "sender=excluded.sender, called=excluded.called, received=excluded.received, "
                    "present=1",
                    (series, instance, digest, size, sender, called, self.clock()),
                )
            except sqlite3.Error:
                file.unlink(missing_ok=True)  # a full disk: it is refused, so it is not here
                raise
            self._used += size
        sync_folder(folder)  # others need not wait for the disk
        if row is None or not row[2]:
            return "new"
        (folder / object_file(instance, row[0])).unlink(missing_ok=True)
        self._used -= row[1]
        return "replaced"

    def content(self, series: str) -> tuple[str, bool]:
        """Return the digest of a series' content, and whether all of it is still here."""
        rows = self._all(
            "SELECT instance, digest, present FROM objects WHERE series=? ORDER BY instance",
            (series,),
        )
        made = hashlib.sha256("\n".join(f"{i} {d}" for i, d, _ in rows).encode()).hexdigest()
        return made, all(present for _, _, present in rows)

    def files(self, series: str) -> list[Path]:
        """Return the files of a series that are here."""
        rows = self._all(
            "SELECT instance, digest FROM objects WHERE series=? AND present ORDER BY instance",
            (series,),
        )
        return [self.received / series / object_file(i, d) for i, d in rows]

    def senders(self, series: str) -> tuple[tuple[str, ...], str]:
        """Return the AE titles that sent a series, and the one that the last of them called."""
        rows = self._all(
            "SELECT sender, called FROM objects WHERE series=? ORDER BY received", (series,)
        )
        return tuple(dict.fromkeys(s for s, _ in rows)), rows[-1][1] if rows else ""

    def holds(self, instance: str) -> bool:
        """Whether an object is here, on the disk."""
        rows = self._all(
            "SELECT series, digest FROM objects WHERE instance=? AND present", (instance,)
        )
        return any((self.received / s / object_file(instance, d)).is_file() for s, d in rows)

    def is_answer(self, sop_instance: str) -> bool:
        """Whether an object is one of this node's own answers, which an archive may send on."""
        found = self._one("SELECT 1 FROM deliveries WHERE sop_instance=? LIMIT 1", (sop_instance,))
        return found is not None

    def keep(self, instance: str, until: float) -> None:
        """Keep an object until a time, whatever else says that it may go."""
        self._run(
            "UPDATE objects SET keep_until=max(keep_until,?) WHERE instance=?", (until, instance)
        )

    @contextmanager
    def linked(self, job: Job) -> Iterator[Path | None]:
        """Yield a folder with the files of a job's content; None if the series has changed."""
        folder = self.work / str(job.id)
        shutil.rmtree(folder, ignore_errors=True)
        with self._lock:
            content, whole = self.content(job.series)
            if content == job.content and whole:
                folder.mkdir(mode=0o700)
                for file in self.files(job.series):
                    os.link(file, folder / file.name)
        try:
            yield folder if content == job.content and whole else None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # Series and jobs

    def undecided(self) -> list[str]:
        """Return the series whose content is not what jobs were made for, or to decide again."""
        known = dict(self._all("SELECT series, decided FROM series WHERE state != 'again'"))
        rows = self._all("SELECT DISTINCT series FROM objects WHERE present")
        return [s for (s,) in rows if known.get(s) != self.content(s)[0]]

    def asked_again(self) -> list[str]:
        """Return the series that somebody asked to decide again."""
        return [s for (s,) in self._all("SELECT series FROM series WHERE state='again'")]

    def decided(self, series: str) -> str:
        """Return the content that jobs were made for; empty if none was, or it is asked again."""
        row = self._one("SELECT decided, state FROM series WHERE series=?", (series,))
        return "" if row is None or row[1] == "again" else str(row[0])

    def decide(
        self, series: str, content: str, rules: Sequence[str], state: str, note: str
    ) -> None:
        """Note what is to be done about a series' content, in one step."""
        now = self.clock()
        with self._transaction():
            self._run(
                "INSERT OR REPLACE INTO series VALUES (?,?,?,?,?)",
                (series, content, state, note, now),
            )
            self._run(
                "UPDATE jobs SET state='superseded' WHERE series=? AND content!=? AND "
                "state='waiting'",
                (series, content),
            )
            for rule in rules:
                self._run(
                    "INSERT INTO jobs (series, content, rule, state, made) VALUES (?,?,?,?,?) "
                    "ON CONFLICT DO UPDATE SET state='waiting', next_at=0 "
                    "WHERE state='superseded'",
                    (series, content, rule, "waiting", now),
                )

    def next_job(self) -> Job | None:
        """Return the job that is due first."""
        row = self._one(
            "SELECT id, series, content, rule, attempts FROM jobs WHERE state='waiting' AND "
            "next_at<=? ORDER BY next_at, id LIMIT 1",
            (self.clock(),),
        )
        return None if row is None else Job(*row)

    def finish_job(
        self, job: Job, answers: Iterable[Answer], destinations: Iterable[str], note: str = ""
    ) -> None:
        """Note that a job's answers are on the disk, and let them be sent; in one step."""
        now, answers, size = self.clock(), list(answers), _bytes_in(self.answers / str(job.id))
        with self._transaction():
            for destination in destinations:
                for answer in answers:
                    self._run(
                        "INSERT OR IGNORE INTO deliveries (job, file, sop_class, sop_instance, "
                        "destination, state, first_at) VALUES (?,?,?,?,?,'waiting',?)",
                        (job.id, *answer, destination, now),
                    )
            self._run("UPDATE jobs SET state='made', note=? WHERE id=?", (note, job.id))
            self._used += size

    def drop_job(self, job: Job, state: Literal["superseded", "failed"], note: str = "") -> None:
        """Note that nothing comes of a job."""
        self._run("UPDATE jobs SET state=?, note=? WHERE id=?", (state, note, job.id))

    def put_off_job(self, job: Job, until: float, note: str) -> None:
        """Try a job again later."""
        self._run(
            "UPDATE jobs SET attempts=attempts+1, next_at=?, note=? WHERE id=?",
            (until, note, job.id),
        )

    # Deliveries

    def due(self, destination: str, most: int = 64) -> list[Delivery]:
        """Return what can be sent to a destination now, oldest first."""
        rows = self._all(
            "SELECT id, job, file, sop_class, sop_instance, destination, attempts, first_at FROM "
            "deliveries WHERE destination=? AND state='waiting' AND next_at<=? ORDER BY id LIMIT ?",
            (destination, self.clock(), most),
        )
        return [Delivery(*row) for row in rows]

    def file_of(self, delivery: Delivery) -> Path:
        """Return where an answer lies."""
        return self.answers / str(delivery.job) / delivery.file

    def delivered(self, delivery: Delivery, *, commit: bool, note: str = "") -> None:
        """Note that a destination has taken an answer, and whether it has yet to commit to it."""
        state = "stored" if commit else "done"
        self._run(
            "UPDATE deliveries SET state=?, note=?, next_at=0 WHERE id=?",
            (state, note, delivery.id),
        )

    def put_off(self, delivery: Delivery, until: float, note: str, *, give_up: bool) -> None:
        """Try a delivery again later, or not until somebody says so."""
        self._run(
            "UPDATE deliveries SET attempts=attempts+1, next_at=?, note=?, state=?, "
            "transaction_uid='' WHERE id=?",
            (until, note, "failed" if give_up else "waiting", delivery.id),
        )

    def give_up_unknown(self, known: Sequence[str]) -> int:
        """Give up what is on its way to destinations that there are not any more."""
        marks = ",".join("?" * len(known))
        return self._run(
            "UPDATE deliveries SET state='failed', note='there is no destination of this name any "  # noqa: S608
            "more' WHERE state IN ('waiting','stored','committing') AND destination NOT IN "
            f"({marks})",
            tuple(known),
        )

    def to_commit(self, destination: str, most: int = 64) -> list[Delivery]:
        """Return what a destination has taken, and has not been asked to commit to."""
        rows = self._all(
            "SELECT id, job, file, sop_class, sop_instance, destination, attempts, first_at FROM "
            "deliveries WHERE destination=? AND state='stored' AND next_at<=? ORDER BY id LIMIT ?",
            (destination, self.clock(), most),
        )
        return [Delivery(*row) for row in rows]

    def ask_commitment(self, deliveries: Iterable[Delivery], uid: str, until: float) -> None:
        """Note, before it is sent, the transaction in which commitment is asked for."""
        with self._transaction():
            for each in deliveries:
                self._run(
                    "UPDATE deliveries SET state='committing', transaction_uid=?, next_at=? "
                    "WHERE id=?",
                    (uid, until, each.id),
                )

    def put_off_commitment(self, uid: str, until: float, note: str) -> None:
        """Ask for a commitment again later."""
        self._run(
            "UPDATE deliveries SET state='stored', transaction_uid='', attempts=attempts+1, "
            "next_at=?, note=? WHERE transaction_uid=? AND state='committing'",
            (until, note, uid),
        )

    def committing(self, uid: str) -> list[Delivery]:
        """Return what a transaction is about; nothing if it is not known, or over."""
        rows = self._all(
            "SELECT id, job, file, sop_class, sop_instance, destination, attempts, first_at FROM "
            "deliveries WHERE transaction_uid=? AND state='committing'",
            (uid,),
        )
        return [Delivery(*row) for row in rows]

    def overdue_commitments(self, destination: str) -> list[Delivery]:
        """Return what was to be committed by now and is not."""
        rows = self._all(
            "SELECT id, job, file, sop_class, sop_instance, destination, attempts, first_at FROM "
            "deliveries WHERE destination=? AND state='committing' AND next_at<=?",
            (destination, self.clock()),
        )
        return [Delivery(*row) for row in rows]

    def bound_waits(self, most_s: float, commit_s: float) -> None:
        """Shorten waits that a clock which was set back has made longer than they can be."""
        now = self.clock()
        for table in ("jobs", "deliveries", "promises"):
            self._run(
                f"UPDATE {table} SET next_at=? WHERE state='waiting' AND next_at>?",  # noqa: S608
                (now, now + 2 * most_s),
            )
        self._run(
            "UPDATE deliveries SET next_at=? WHERE state='committing' AND next_at>?",
            (now + commit_s, now + 2 * commit_s),
        )

    # Promises of commitment

    def promise(self, uid: str, sender: str, report: str, *, failed: bool) -> None:
        """Note a report that a sender waits for."""
        self._run(
            "INSERT OR IGNORE INTO promises (transaction_uid, sender, report, failed, state, "
            "first_at) VALUES (?,?,?,?,'waiting',?)",
            (uid, sender, report, failed, self.clock()),
        )

    def due_promises(self) -> list[Promise]:
        """Return the reports that can be sent now."""
        rows = self._all(
            "SELECT id, transaction_uid, sender, report, failed, attempts, first_at FROM promises "
            "WHERE state='waiting' AND next_at<=? ORDER BY id LIMIT 64",
            (self.clock(),),
        )
        return [Promise(*row) for row in rows]

    def settle_promise(self, promise: Promise, state: str, until: float = 0.0) -> None:
        """Note that a report was sent (``done``), is tried again (``waiting``), or is given up."""
        self._run(
            "UPDATE promises SET state=?, attempts=attempts+1, next_at=? WHERE id=?",
            (state, until, promise.id),
        )

    # What people see and mend

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many series, jobs, deliveries and promises are in each state."""
        return {
            table: dict(self._all(f"SELECT state, count(*) FROM {table} GROUP BY state"))  # noqa: S608
            for table in ("series", "jobs", "deliveries", "promises")
        }

    def troubles(self) -> list[dict[str, Any]]:
        """Return what somebody has to look at, with reasons; oldest first."""
        found: list[dict[str, Any]] = []
        marks = ",".join("?" * len(LISTED))
        for series, state, note, changed in self._all(
            f"SELECT series, state, note, changed FROM series WHERE state IN ({marks})",  # noqa: S608
            LISTED,
        ):
            found.append({"series": series, "state": state, "why": note, "since": changed})
        for series, rule, state, note, made in self._all(
            "SELECT series, rule, state, note, made FROM jobs WHERE state='failed' OR "
            "(state IN ('waiting','made') AND note!='')"
        ):
            state = "not segmented" if state == "failed" else f"segmentation {state}"
            found.append(
                {"series": series, "rule": rule, "state": state, "why": note, "since": made}
            )
        for series, destination, state, attempts, note, first in self._all(
            "SELECT j.series, d.destination, d.state, d.attempts, d.note, d.first_at FROM "
            "deliveries d JOIN jobs j ON j.id=d.job WHERE d.state='failed' OR "
            "(d.state!='done' AND d.attempts>0)"
        ):
            found.append(
                {
                    "series": series,
                    "destination": destination,
                    "state": "not sent" if state == "failed" else f"delivery {state}",
                    "attempts": attempts,
                    "why": note,
                    "since": first,
                }
            )
        return sorted(found, key=lambda each: float(each["since"]))

    def retry(self, series: str | None = None) -> int:
        """Try again what failed or waits, of one series or all; return how many things that is."""
        chosen, values = ("", ()) if series is None else (" AND series=?", (series,))
        of_job = f" AND job IN (SELECT id FROM jobs WHERE 1{chosen})"  # noqa: S608
        marks = ",".join("?" * len(LISTED))
        with self._transaction():
            return sum(
                self._run(statement, given)
                for statement, given in (
                    (
                        f"UPDATE series SET state='again' WHERE state IN ({marks}){chosen}",  # noqa: S608
                        (*LISTED, *values),
                    ),
                    (
                        "UPDATE jobs SET state='waiting', next_at=0 WHERE (state='failed' OR "  # noqa: S608
                        f"state='waiting' AND next_at>0){chosen}",
                        values,
                    ),
                    (
                        "UPDATE deliveries SET state='waiting', next_at=0, first_at=? WHERE "  # noqa: S608
                        f"(state='failed' OR state='waiting' AND next_at>0){of_job}",
                        (self.clock(), *values),
                    ),
                )
            )

    def remove(self, series: str) -> int:
        """Forget a series with all that was made of it; return how many objects that were.

        Raises
        ------
        InputError
            If there is none, or its answers are still on their way.
        """
        with self._transaction():
            count = self._one("SELECT count(*) FROM objects WHERE series=?", (series,))
            if count is None or not count[0]:
                raise InputError(f"there is no series {series}. 'node quarantine' lists them.")
            way = self._one(
                "SELECT count(*) FROM deliveries WHERE state NOT IN ('done','failed') AND job IN "
                "(SELECT id FROM jobs WHERE series=?)",
                (series,),
            )
            if way is not None and way[0]:
                raise InputError(f"answers of series {series} are still on their way: wait.")
            jobs = [i for (i,) in self._all("SELECT id FROM jobs WHERE series=?", (series,))]
            self._run(
                "DELETE FROM deliveries WHERE job IN (SELECT id FROM jobs WHERE series=?)",
                (series,),
            )
            for table in ("jobs", "series", "objects"):
                self._run(f"DELETE FROM {table} WHERE series=?", (series,))  # noqa: S608
        shutil.rmtree(self.received / series, ignore_errors=True)
        for job in jobs:
            shutil.rmtree(self.answers / str(job), ignore_errors=True)
        return int(count[0])

    def sweep(self, keep_s: float, *, to_bytes: int | None = None) -> int:
        """Remove objects and answers of series that are done; return the bytes that it gave.

        Parameters
        ----------
        keep_s : of those that were done longer ago.
        to_bytes : only until no more than so many are used, oldest first.
        """
        now, given = self.clock(), 0
        objects = self._one("SELECT coalesce(sum(bytes), 0) FROM objects WHERE present")[0]
        self._used = objects + _bytes_in(self.answers)
        rows = self._all(
            "SELECT series FROM series s WHERE state='decided' AND changed<=? "
            "AND EXISTS (SELECT 1 FROM objects o WHERE o.series=s.series AND o.present) "
            "AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.series=s.series AND "
            "j.state IN ('waiting','failed')) "
            "AND NOT EXISTS (SELECT 1 FROM deliveries d JOIN jobs j ON j.id=d.job WHERE "
            "j.series=s.series AND d.state!='done') "
            "AND NOT EXISTS (SELECT 1 FROM objects o WHERE o.series=s.series AND o.keep_until>?) "
            "ORDER BY changed",
            (now - keep_s, now),
        )
        for (series,) in rows:
            if to_bytes is not None and self._used <= to_bytes:
                break
            with self._lock:
                if self.content(series)[0] != self.decided(series):
                    continue  # something new has come
                jobs = [i for (i,) in self._all("SELECT id FROM jobs WHERE series=?", (series,))]
                size = sum(_bytes_in(self.answers / str(job)) for job in jobs)
                size += _bytes_in(self.received / series)
                self._run("UPDATE objects SET present=0 WHERE series=?", (series,))
                shutil.rmtree(self.received / series, ignore_errors=True)
                for job in jobs:
                    shutil.rmtree(self.answers / str(job), ignore_errors=True)
                self._used -= size
                given += size
        self._forget(now - REMEMBERED_S)
        return given

    def _forget(self, before: float) -> None:
        """Remove the rows of what was done, and swept, long ago: the database is bounded too."""
        with self._transaction():
            old = self._all(
                "SELECT series FROM series s WHERE state='decided' AND changed<? AND NOT EXISTS "
                "(SELECT 1 FROM objects o WHERE o.series=s.series AND o.present) AND NOT EXISTS "
                "(SELECT 1 FROM deliveries d JOIN jobs j ON j.id=d.job WHERE j.series=s.series "
                "AND d.state!='done') LIMIT 1000",
                (before,),
            )
            for row in old:
                self._run(
                    "DELETE FROM deliveries WHERE job IN (SELECT id FROM jobs WHERE series=?)", row
                )
                for table in ("jobs", "series", "objects"):
                    self._run(f"DELETE FROM {table} WHERE series=?", row)  # noqa: S608
            self._run("DELETE FROM promises WHERE state!='waiting' AND first_at<?", (before,))

    # The database

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

    def _recover(self) -> None:
        """Bring rows in step with files, and remove what was begun by a process that died."""
        for place in (self.incoming, self.work):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(mode=0o700, exist_ok=True)
        known = {
            (s, i): (d, present)
            for s, i, d, present in self._all(
                "SELECT series, instance, digest, present FROM objects"
            )
        }
        here: dict[tuple[str, str], os.DirEntry[str]] = {}
        for folder in os.scandir(self.received):
            for entry in os.scandir(folder) if folder.is_dir() else ():
                found = _FILE.fullmatch(entry.name)
                if found is None:
                    continue
                key = (folder.name, found[1])
                other = here.setdefault(key, entry)
                if other is not entry:  # replaced, and killed before the former was removed
                    older, newer = sorted((other, entry), key=lambda e: e.stat().st_mtime_ns)
                    Path(older.path).unlink()
                    here[key] = newer
        with self._transaction():
            for (series, instance), entry in here.items():
                digest, status = entry.name.split(".")[1], entry.stat()
                self._used += status.st_size
                if known.get((series, instance)) != (digest, 1):
                    sender, called = _ae_titles(Path(entry.path))
                    self._run(
                        "INSERT OR REPLACE INTO objects VALUES (?,?,?,?,?,?,?,1,0)",
                        (
                            *(series, instance, digest, status.st_size),
                            *(sender, called, status.st_mtime),
                        ),
                    )
            for series, instance in known.keys() - here.keys():
                self._run(
                    "UPDATE objects SET present=0 WHERE series=? AND instance=?", (series, instance)
                )
        self._used += _bytes_in(self.answers)

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


def object_file(instance: str, digest: str) -> str:
    """Return the name of an object's file: its mark, and the beginning of its data's digest."""
    return f"{instance}.{digest[:_DIGITS]}.dcm"


def _bytes_in(folder: Path) -> int:
    """Return the bytes of all files in a folder; what goes away meanwhile does not count."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(place, name)).st_size
    return size


def _ae_titles(file: Path) -> tuple[str, str]:
    """Return who sent a file and whom it called, as its meta information says."""
    from pydicom.filereader import read_file_meta_info

    meta = read_file_meta_info(file)
    return (
        str(meta.get("SourceApplicationEntityTitle", "") or ""),
        str(meta.get("ReceivingApplicationEntityTitle", "") or ""),
    )
