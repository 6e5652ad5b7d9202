"""From a complete series to answers on the disk: rules decide, jobs are done one after the other.

A job's answers, with their UIDs, appear as one folder before any of them is sent. A job that was
killed finds either that folder, and goes on from it, or nothing, and begins anew.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recallseg.engines.durable import replace_folder, write_file
from recallseg.engines.errors import (
    AuditError,
    EngineError,
    InputError,
    LibraryError,
    OutputError,
    RecallSegError,
)
from recallseg.engines.machine_fault import (
    SHORT_OF_MEMORY,
    machine_fault,
)
from recallseg.engines.reading import read_text
from recallseg.runtime.formats.dicom_headers import DicomHeader, NotGiven
from recallseg.runtime.formats.finding import Item, find_in_folder
from recallseg.runtime.formats.volume import Volume
from recallseg.runtime.json_text import json_text, printable
from recallseg.runtime.segmenting.segmenter import Segmenter
from recallseg.runtime.services.audit import AuditLog
from recallseg.runtime.services.decoding import IsolatedDecoder
from recallseg.runtime.services.items import ask_again, volumes_of
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics
from recallseg.runtime.services.node.database import Answer, Job
from recallseg.runtime.services.node.receiving import Arrivals, HeaderReaders
from recallseg.runtime.services.node.settings import RetrySettings
from recallseg.runtime.services.node.store import NodeStore
from recallseg.runtime.services.node.texts import write_capture, write_report
from recallseg.runtime.services.outputs import VOLUME_SUFFIXES, preview_files
from recallseg.runtime.services.patience import MOST_TIMES, Patience
from recallseg.runtime.services.questions import Questions
from recallseg.runtime.services.rules import Arriving, Rule, fitting
from recallseg.runtime.volumes.outputs import segment_to_files

__all__ = ["Answerer", "Decider", "backoff"]

MANIFEST = "answers.json"


def backoff(settings: RetrySettings, attempts: int) -> float:
    """Return the seconds until what failed so often is tried again."""
    return float(min(settings.most_s, settings.first_s * 2.0 ** min(attempts, 30)))


class Decider:
    """Makes jobs of series that are complete."""

    def __init__(
        self,
        store: NodeStore,
        arrivals: Arrivals,
        rules: Mapping[str, Rule],
        readers: HeaderReaders,
        metrics: Metrics,
    ) -> None:
        self._store, self._arrivals, self._rules = store, arrivals, rules
        self._readers, self._metrics = readers, metrics
        self._patience = Patience()
        self._log = ServiceLog("node.decide")

    def look(self) -> int:
        """Decide about every series that is complete; return how many were decided about.

        One about which that cannot be done now, for a file that the disk does not give or a full
        disk under the database, is not forgotten, and keeps no other waiting.
        """
        count, again = 0, self._store.asked_again()
        for series in dict.fromkeys([*again, *self._arrivals.complete()]):
            put_off = self._patience.of(series, None)
            if put_off is None or not put_off.waits:
                try:
                    self._decide(series)
                except Exception as error:
                    fault = machine_fault(error)
                    self._patience.put_off(series, None, type(error).__name__, fault)
                    self._log.error("cannot be decided about now", series=series, error=error)
                else:
                    self._patience.forget(series)
                    count += 1
                    continue
            if series not in again:  # of those the database knows
                self._arrivals.touch(series)
        return count

    def _decide(self, series: str) -> None:
        content, whole = self._store.content(series)
        files = self._store.files(series)
        if whole and not files:
            return  # somebody has deleted it
        if content == self._store.decided(series):
            return  # the same objects again
        rules: tuple[Rule, ...] = ()
        state, note = "decided", ""
        if not whole:
            state = "incomplete"
            note = (
                "objects came late, after the others had been removed, so the series is not whole. "
                "Send all of it again"
            )
        else:
            header = self._readers(files[0])
            if isinstance(header, NotGiven):  # decided as soon as it is given
                raise OSError(header.number, os.strerror(header.number), str(files[0]))
            if isinstance(header, DicomHeader):
                senders, called = self._store.senders(series)
                rules = fitting(
                    self._rules.values(),
                    Arriving(
                        header.modality, header.body_part, header.description, senders, called
                    ),
                )
                if not rules:
                    state = "unmatched"
                    note = (
                        f"no rule fits modality {header.modality!r}, body part "
                        f"{header.body_part!r}, series description {header.description!r} from "
                        f"{', '.join(senders)}. Add one, then: recallseg node retry"
                    )
            else:
                state, note = "unreadable", str(header or "no DICOM")
        if not rules:
            self._readers.forget(files)
        self._store.decide(series, content, [rule.name for rule in rules], state, note)
        self._metrics.done(f"series {state}")
        say = self._log.info if state == "decided" else self._log.warning
        say("series complete", series=series, state=state, rules=[rule.name for rule in rules])


class _StoppedError(Exception):
    """The node stops, so a job is left for the next one."""


class Answerer:
    """Segments what jobs ask for.

    Parameters
    ----------
    made : is called when answers can be sent.
    """

    def __init__(
        self,
        store: NodeStore,
        rules: Mapping[str, Rule],
        questions: Questions,
        readers: HeaderReaders,
        audit: AuditLog | None,
        retry: RetrySettings,
        metrics: Metrics,
        made: Callable[[], None],
    ) -> None:
        self._store, self._rules, self._questions = store, rules, questions
        self._readers, self._audit, self._retry = readers, audit, retry
        self._metrics, self._made = metrics, made
        self._log = ServiceLog("node.answer")
        self.stop = threading.Event()
        """Once set, what is begun is left at the next slice."""
        self.prepared = False
        self._decoder = IsolatedDecoder()
        self._decoder.stop = self.stop.is_set

    def close(self) -> None:
        """End the process that decodes."""
        self._decoder.close()

    def warm_up(self) -> dict[str, RecallSegError]:
        """Open what rules ask, and let it answer once; return what failed, by rule."""
        return self._questions.warm_up(self._rules.values())

    def prepare(self) -> None:
        """Start the process that decodes, from the thread that will ask it: it ends with that."""
        self._decoder.read_header(self._store.folder / "marks.key")
        self.prepared = True

    def do_next(self) -> bool:
        """Do the job that is due; return whether there was one."""
        job = self._store.next_job()
        if job is None:
            return False
        files = self._store.files(job.series)  # before they may go
        try:
            self._do(job)
        except _StoppedError:
            return False
        except (LibraryError, EngineError, AuditError, OSError, MemoryError) as error:
            # Of the node, not of the series: it is tried until it works.
            if isinstance(error, (LibraryError, EngineError)) and job.rule in self._rules:
                self._questions.forget(self._rules[job.rule])
            self._put_off(job, error)
        except (InputError, OutputError) as error:
            if machine_fault(error):
                self._put_off(job, error)
            else:
                self._fail(job, error, printable(error))
        except Exception as error:  # a defect, which must not end the node
            self._fail(job, error, f"defect: {type(error).__name__}: {printable(error)}")
        if not self._store.awaits(job.series):
            self._readers.forget(files)
        return True

    def _fail(self, job: Job, error: BaseException, why: str) -> None:
        self._log.error("not segmented", series=job.series, rule=job.rule, error=error)
        self._metrics.done("not segmented")
        self._store.drop_job(job, "failed", why)

    def _put_off(self, job: Job, error: BaseException) -> None:
        """Let a job wait; one for which memory was short so often may itself need too much."""
        wait = backoff(self._retry, job.attempts)
        if machine_fault(error) == SHORT_OF_MEMORY and job.attempts + 1 >= MOST_TIMES:
            why = printable(error) or "it needs more memory than there is"
            self._fail(job, error, f"{why} ({job.attempts + 1} attempts)")
            return
        self._log.warning("put off", series=job.series, rule=job.rule, error=error, seconds=wait)
        why = printable(error) or type(error).__name__
        self._store.put_off_job(job, self._store.clock() + wait, why)

    def _do(self, job: Job) -> None:
        rule = self._rules.get(job.rule)
        if rule is None:
            raise InputError(f"there is no rule '{job.rule}' any more.")
        folder = self._store.answers / str(job.id)
        if not folder.exists():
            with self._store.linked(job) as files, self._metrics.stage("answer"):
                if files is None:
                    self._store.drop_job(job, "superseded")
                    return
                with replace_folder(folder) as new:
                    self._fill(new, files, rule)
        answers, note = _read(folder)
        if self._store.content(job.series)[0] != job.content:
            shutil.rmtree(folder, ignore_errors=True)  # nothing of it has been sent
            self._store.drop_job(job, "superseded")
            return
        self._store.finish_job(job, answers, rule.destinations, note)
        self._metrics.done("segmented")
        self._log.info(
            "segmented", series=job.series, rule=rule.name, job=job.id, answers=len(answers)
        )
        self._made()

    def _fill(self, folder: Path, files: Path, rule: Rule) -> None:
        """Segment everything in ``files`` into ``folder``."""
        found = find_in_folder(files, links=False, by_folder=False, kind="dicom", read=self._header)
        for each in found.not_given:  # without it the answer would lack a slice, or all of them
            raise InputError(
                f"{printable(each.path.name)} was acknowledged, and {each.reason}"
            ) from OSError(errno.EIO, os.strerror(errno.EIO))
        troubles: list[str] = []
        answers: list[Answer] = []
        with self._questions.ask(rule) as segmenter:
            for number, item in enumerate(found.items):
                try:
                    answers += self._segment(folder / f"{number:04d}", item, rule, segmenter)
                except (InputError, OutputError) as error:
                    if machine_fault(error):
                        raise
                    troubles.append(printable(error).replace(f"{files}/", ""))
        if not found.items:
            troubles = [each.reason for each in found.passed] or ["there is no image"]
        if not answers and troubles:
            raise InputError("; ".join(dict.fromkeys(troubles)))
        text = json_text({"answers": [each._asdict() for each in answers], "troubles": troubles})
        write_file(folder / MANIFEST, text.encode())

    def _header(self, path: Path) -> DicomHeader:
        """Read a header again: without one that was acknowledged the answer would lack a slice."""
        header = self._readers(path)
        if not isinstance(header, DicomHeader):
            why = header.why if isinstance(header, NotGiven) else header
            why = why or "it does not begin as a DICOM file"
            raise InputError(
                f"{printable(path.name)} was acknowledged, and cannot be read now: {why}"
            ) from OSError(errno.EIO, os.strerror(errno.EIO))
        return header

    def _segment(self, base: Path, item: Item, rule: Rule, segmenter: Segmenter) -> list[Answer]:
        handling = rule.volumes
        volumes = volumes_of(
            item, base, handling.time, lambda: self._decoder.count(item, handling.stack)
        )
        if volumes is None:
            raise _StoppedError
        answers = []
        for time_point, target in volumes:
            volume = self._decoder.read(
                item, voi=handling.voi, time=time_point, stack=handling.stack
            )
            if volume is None:
                raise _StoppedError
            assert isinstance(volume, Volume)  # a picture's reader gives one too
            answers += self._write(target, item, volume, rule, segmenter)
        return answers

    def _write(
        self, base: Path, item: Item, volume: Volume, rule: Rule, segmenter: Segmenter
    ) -> list[Answer]:
        def look(_: str) -> None:
            if self.stop.is_set():
                raise _StoppedError

        if volume.frame == "image" and not (rule.preview or rule.report):
            raise InputError(
                "a picture without a place in the patient: no SEG is made of it. Let the rule ask "
                "for a preview or a report"
            )
        begin = time.perf_counter()
        _, record = ask_again(
            segmenter,
            lambda: segment_to_files(
                segmenter,
                volume,
                base,
                rule.volumes.settings(preview=rule.preview),
                kind="dicom",
                source=item.name,
                log=self._audit,
                progress=look,
                extra={"files": len(item.files), "rule": rule.name},
            ),
        )
        self._metrics.took("segment", time.perf_counter() - begin)
        answers = []
        segmentation = base.with_name(base.name + VOLUME_SUFFIXES["dicom"])
        if segmentation.exists():
            answers.append(_answer(segmentation))
        if rule.report:
            report = base.with_name(f"{base.name}.sr.dcm")
            write_report(report, volume, record, rule.name)
            answers.append(_answer(report))
        if rule.preview:
            capture = base.with_name(f"{base.name}.sc.dcm")
            write_capture(capture, volume, preview_files(base)[0])
            answers.append(_answer(capture))
        return answers


def _answer(file: Path) -> Answer:
    from pydicom.filereader import read_file_meta_info

    meta = read_file_meta_info(file)
    return Answer(
        file.name, str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID)
    )


def _read(folder: Path) -> tuple[list[Answer], str]:
    found: Any = json.loads(read_text(folder / MANIFEST))
    return [Answer(**each) for each in found["answers"]], "; ".join(found["troubles"])
