"""What a node has to do: series to decide about, jobs, deliveries, and promises of commitment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from recallseg.runtime.services.node.database import Delivery, Job, NodeDatabase, Promise

__all__ = ["Queues"]

LISTED = ("unmatched", "incomplete", "unreadable")
"""States of a series from which nothing is made until somebody mends something."""


class Queues(NodeDatabase):
    """Rows of what is to be done, and of what came of it."""

    # Series and jobs

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

    def awaits(self, series: str) -> bool:
        """Whether a job of a series has yet to be done."""
        row = self._one("SELECT 1 FROM jobs WHERE series=? AND state='waiting' LIMIT 1", (series,))
        return row is not None

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
        """Shorten waits, and ages, that a clock which was set back has made what they cannot be.

        Parameters
        ----------
        most_s : that anything is put off.
        commit_s : that a report of storage commitment is waited for.
        """
        now = self.clock()
        for state, until, most in (
            ("waiting", now, most_s),
            ("stored", now, most_s),
            ("committing", now + commit_s, commit_s),
        ):
            for table in ("jobs", "deliveries", "promises"):
                self._run(
                    f"UPDATE {table} SET next_at=? WHERE state=? AND next_at>?",  # noqa: S608
                    (until, state, now + 2 * most),
                )
        # What was done in what is now the future would never be old enough to be removed.
        self._run("UPDATE series SET changed=? WHERE changed>?", (now, now))

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
