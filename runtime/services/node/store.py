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
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from recallseg.engines.durable import make_folder, sync_folder
from recallseg.engines.errors import InputError, LibraryLockedError
from recallseg.engines.reading import walk
from recallseg.runtime.library.storage import WriterLock
from recallseg.runtime.services.logs import Marks
from recallseg.runtime.services.node.database import Answer, Delivery, Job
from recallseg.runtime.services.node.queues import Queues

__all__ = ["NodeStore", "object_file"]

_DIGITS = 32  # of a digest, in names of files
_FILE = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{32})\.dcm")
REMEMBERED_S = 90 * 86400.0
"""A late object is told from a whole series for so long after that was removed."""


class NodeStore(Queues):
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
        super().__init__(folder, running=running, clock=clock)

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
        self.marks = Marks(folder / "marks.key")
        super()._open(running)
        self._used = 0
        if running:
            self._recover()

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

    # What is made of series

    def undecided(self) -> list[str]:
        """Return the series whose content is not what jobs were made for, or to decide again."""
        known = dict(self._all("SELECT series, decided FROM series WHERE state != 'again'"))
        rows = self._all("SELECT DISTINCT series FROM objects WHERE present")
        return [s for (s,) in rows if known.get(s) != self.content(s)[0]]

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

    def file_of(self, delivery: Delivery) -> Path:
        """Return where an answer lies."""
        return self.answers / str(delivery.job) / delivery.file

    # What goes

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

    # After a start

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


def object_file(instance: str, digest: str) -> str:
    """Return the name of an object's file: its mark, and the beginning of its data's digest."""
    return f"{instance}.{digest[:_DIGITS]}.dcm"


def _bytes_in(folder: Path) -> int:
    """Return the bytes of all files in a folder; what goes away meanwhile does not count."""
    size = 0
    for place, _, names in walk(folder):
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
