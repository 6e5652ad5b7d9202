"""An archive is segmented: found, given to workers, and accounted for, whatever is lost meanwhile.

An output is done when its record is there, which is written last; names come from the input alone.
So whoever dies at whatever moment, the same call goes on where that one was, and what two workers
do by accident they do alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from recallseg.engines import defaults
from recallseg.engines.device_engine import DeviceEngine
from recallseg.engines.durable import make_folder
from recallseg.engines.errors import (
    EngineRunError,
    InputError,
    LibraryLockedError,
    OutputError,
)
from recallseg.engines.onnxruntime_cpu import usable_cores
from recallseg.engines.registry import engine_class
from recallseg.runtime.checks import check_count, check_number
from recallseg.runtime.json_text import printable
from recallseg.runtime.library.storage import WriterLock
from recallseg.runtime.services.archive.crews import Crew, Lost, Processes
from recallseg.runtime.services.archive.journal import Journal, Task
from recallseg.runtime.services.archive.progress import Archived, Progress
from recallseg.runtime.services.archive.sources import Source, list_sources
from recallseg.runtime.services.archive.summary import check_summary, write_summary
from recallseg.runtime.services.archive.worker import (
    AuditFiles,
    Done,
    Failed,
    Looked,
    Opened,
    Setup,
)
from recallseg.runtime.volumes.outputs import VolumeSettings

__all__ = ["SUMMARY", "segment_archive"]

LOCK = ".recallseg-archive.lock"
SUMMARY = "summary.parquet"
_LOOK_S = 1.0
"""Between two looks at whether to stop, and two commits of the journal."""
_AHEAD = 16  # inputs that should wait for each worker, before another source is looked into
_REMEMBERED = 5000  # inputs that the rate is taken from
_SWEEPS = 3
_THREADS = 4  # of a worker on a CPU, if nothing is said


def segment_archive(
    library: str | Path,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    volumes: VolumeSettings | None = None,
    kind: str | None = None,
    audit: AuditFiles | None = None,
    ray: str | None = None,
    workers: int | None = None,
    attempts: int = 3,
    deadline_s: float = 3600.0,
    retry: bool = False,
    summary: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
    **asking: Any,
) -> Archived:
    """Segment everything in an archive, each image once, and write what became of each.

    Call it again to go on, after whatever ended it: what is done stays, what was set aside is not
    tried again unless it changed.

    Parameters
    ----------
    library : its folder; with Ray, the same on every machine.
    inputs : see :func:`recallseg.runtime.services.archive.sources.list_sources`.
    output : folder for outputs, named as those of ``watch``: by the identity of their input.
    volumes, kind : as :func:`recallseg.runtime.services.items.segment_item` and
        :func:`recallseg.runtime.formats.finding.find_inputs` take them.
    audit : log in which every segmentation is recorded.
    ray : address of a cluster, or ``local`` for Ray on this machine; None for processes without
        Ray.
    workers : processes or actors, each with a model of its own. None: on this machine one for four
        cores, or one if the engine runs on a GPU; with Ray as many as the cluster holds, more when
        machines join.
    attempts : how often an input is begun that ends its worker, or fails in a way that may pass.
    deadline_s : seconds after which a worker that is not done is ended: an attempt.
    retry : try again what was set aside.
    summary : table that is written at the end, see
        :func:`recallseg.runtime.services.archive.summary.write_summary`; None for
        ``summary.parquet`` in ``output``.
    progress : is told how far it is, about every second.
    stop : asked about every second; True ends it. What is in work then is done anew by the next
        call.
    asking : how to segment: keyword arguments of :class:`recallseg.Segmenter`. ``threads`` are of
        each worker.

    Raises
    ------
    InputError
        For wrong settings, an input that is not there, or an ``output`` that another call writes or
        that holds outputs of other settings; before anything is segmented.
    OutputError
        If outputs cannot be written.
    EngineUnavailableError
        If Ray, fsspec or pyarrow is needed and not installed.
    EngineRunError
        If workers die whenever they start.
    LibraryError, BundleError, EngineError, AuditError, OSError
        What concerns all inputs ends it; what was done stays done.
    """
    begin = time.monotonic()
    output = Path(output).absolute()
    check_count(attempts, "attempts", 1)
    check_number(deadline_s, "deadline_s", 1, " s")
    if workers is not None:
        check_count(workers, "workers", 1)
    table = output / SUMMARY if summary is None else Path(summary).absolute()
    check_summary(table)
    _check_inputs(inputs, output)
    setup = Setup(
        Path(library).absolute(), output, asking, volumes or VolumeSettings(), kind, audit
    )
    make_folder(output)
    with ExitStack() as held:
        try:
            held.callback(WriterLock(output / LOCK).release)
        except LibraryLockedError as error:
            raise InputError(
                f"another process already segments an archive into {printable(output)}. Wait for "
                "it, or choose another folder."
            ) from error
        journal = held.enter_context(closing(Journal(output)))
        with closing(_crew(setup, ray, workers, deadline_s)) as crew:
            run = _Run(crew, journal, output, list_sources(inputs), attempts, progress, stop)
            if retry:
                journal.retry()
            told = run.work()
        aside = dict(islice(_reasons(journal), 100))
        rows = write_summary(table, journal, run.structures)
        seconds = time.monotonic() - begin
        return Archived(told, run.complete, aside, rows, table, seconds, run.provenance)


def _reasons(journal: Journal) -> Iterator[tuple[str, str]]:
    yield from journal.aside()
    yield from journal.passed(refused=True)


def _check_inputs(inputs: Sequence[str | Path], output: Path) -> None:
    """See before the work whether what was named is there."""
    if not inputs:
        raise InputError("nothing was named to segment.")
    for each in inputs:
        first = next(list_sources([each]), None)
        if first is not None and first.trouble and first.named == str(each):
            raise InputError(first.trouble)
        folder = Path(str(each))
        if folder.is_dir():
            here, there = folder.resolve(), output.resolve()
            if here.is_relative_to(there) or there.is_relative_to(here):
                raise InputError(
                    f"{printable(folder)} and {printable(output)} lie in each other, so results "
                    "would be taken for images. Choose two folders apart."
                )


def _crew(setup: Setup, ray: str | None, workers: int | None, deadline_s: float) -> Crew:
    on_gpu = issubclass(engine_class(setup.asking.get("engine") or defaults.ENGINE), DeviceEngine)
    if ray is not None:
        from recallseg.runtime.services.archive.actors import Actors

        return Actors(setup, ray, workers, on_gpu, deadline_s)
    cores = usable_cores()
    threads = setup.asking.get("threads")
    if workers is None:
        workers = 1 if on_gpu else max(1, cores // (threads or _THREADS))
    return Processes(setup.with_threads(threads or max(1, cores // workers)), workers, deadline_s)


class _Run:
    """One call: what is looked for, given and heard."""

    def __init__(
        self,
        crew: Crew,
        journal: Journal,
        output: Path,
        sources: Iterator[Source],
        attempts: int,
        progress: Callable[[Progress], None],
        stop: Callable[[], bool],
    ) -> None:
        self._crew = crew
        self._journal = journal
        self._output = output
        self._sources = sources
        self._left: Source | None = None  # the next one
        self._again: deque[Source] = deque()  # whose worker was lost
        self._looks: dict[Source, int] = {}  # that are in work: attempts
        self._busy: set[int] = set()
        self._attempts = attempts
        self._tell = progress
        self._stop = stop
        self._ended: deque[float] = deque(maxlen=_REMEMBERED)
        self._counts = {"before": 0, "refused": 0, "passed_over": 0}
        self._waiting = self._done = self._aside = 0
        self._notice = ""
        self.structures: tuple[str, ...] = ()
        self.provenance = ""
        self.complete = False

    def work(self) -> Progress:
        """Do everything, or until it is told to stop; return how far that was."""
        self._next_source()
        sweeps = 0
        try:
            while not self._stop():
                self._give()
                if not self._busy and not self._looks and self._is_empty():
                    gone = self._journal.sweep(self._output)
                    if not gone:
                        self.complete = True
                        break
                    self._waiting += gone
                    self._done -= gone
                    sweeps += 1
                    if sweeps > _SWEEPS:
                        raise OutputError(
                            f"outputs in {printable(self._output)} vanish after they were written. "
                            "See what removes them."
                        )
                    continue
                for event in self._crew.wait(_LOOK_S):
                    self._hear(event.order, event.answer)
                self._journal.commit()
                self._tell(self._progress())
        finally:
            for number in self._busy:  # stopped, not failed
                self._journal.give_back(number)
        if self.complete:
            self._journal.forget_missing()
            if not self._done and not self._aside and not self._counts["refused"]:
                raise InputError("there is no image in what was named; nothing was written.")
        told = self._progress()
        self._tell(told)
        return told

    def _progress(self) -> Progress:
        """Return how far it is."""
        rate = 0.0
        if len(self._ended) > 1:
            rate = (len(self._ended) - 1) / max(1e-9, time.monotonic() - self._ended[0])
        left = self._waiting + len(self._busy)
        return Progress(
            left + self._done + self._aside,
            self._done,
            set_aside=self._aside,
            **self._counts,
            looking=self._left is not None or bool(self._looks or self._again),
            workers=self._crew.size,
            per_second=rate,
            end=datetime.now() + timedelta(seconds=left / rate) if rate and left else None,
            notice=self._notice,
        )

    def _is_empty(self) -> bool:
        return self._left is None and not self._again and not self._waiting

    def _next_source(self) -> None:
        self._left = next(self._sources, None)

    def _give(self) -> None:
        """Give every idle worker something, as long as there is anything."""
        while self._crew.idle:
            order = self._look() if self._waiting < _AHEAD * self._crew.size else None
            if order is not None:
                self._crew.give(order)
                continue
            task = self._journal.begin(self._busy) if self._waiting else None
            if task is None:
                return
            self._waiting -= 1
            self._busy.add(task.number)
            self._crew.give(task)

    def _look(self) -> Source | None:
        """Return a source to be looked into here; what is fetched becomes an input by itself."""
        while self._again or self._left is not None:
            if self._again:
                return self._again.popleft()
            source = self._left
            assert source is not None
            self._next_source()
            if source.trouble:
                self._refuse(source.named, source.trouble)
            elif source.remote:
                self._count(self._journal.add_source(source))
                if self._waiting >= _AHEAD * self._crew.size:
                    return None
            elif source not in self._looks:
                self._looks[source] = 0
                return source
        return None

    def _hear(self, order: Source | Task | None, answer: Any) -> None:
        if isinstance(answer, Failed) and answer.all:
            raise answer.error or EngineRunError(answer.why)
        if isinstance(answer, Opened):
            self._accept(answer)
        elif isinstance(order, Source):
            self._looked(order, answer)
        elif isinstance(order, Task):
            self._segmented(order, answer)

    def _accept(self, opened: Opened) -> None:
        """Take a worker whose results are those of all others."""
        if not self.provenance:
            self._journal.agree(opened.provenance)
            self.provenance, self.structures = opened.provenance, opened.structures
            self._notice = opened.notice
            self._ended.append(time.monotonic())
        if opened.provenance != self.provenance:
            raise InputError(
                f"the worker {opened.where} would give other results than the first one: library, "
                f"bundle or version differ there (provenance {opened.provenance[:12]}, not "
                f"{self.provenance[:12]}). Give all machines the same."
            )

    def _looked(self, source: Source, answer: Any) -> None:
        if isinstance(answer, Looked):
            found = answer.found
            if found.incomplete and self._looks[source] + 1 < self._attempts:
                self._looks[source] += 1
                self._again.append(source)
                return
            del self._looks[source]
            self._count(self._journal.add(source, found.items))
            self._counts["passed_over"] += self._journal.pass_over(
                (str(each.path), each.reason)
                for each in found.passed
                if each not in found.not_given
            )
            for each in found.not_given:
                self._refuse(str(each.path), each.reason)
            return
        blamed = not isinstance(answer, Lost) or answer.blamed
        self._looks[source] += blamed
        again = isinstance(answer, Lost) or answer.again
        if again and self._looks[source] < self._attempts:
            self._again.append(source)
        else:
            del self._looks[source]
            self._refuse(source.named, answer.why)

    def _segmented(self, task: Task, answer: Any) -> None:
        self._busy.discard(task.number)
        if isinstance(answer, Done):
            self._journal.done(task.number, answer.rows)
            self._counts["passed_over"] += self._journal.pass_over(answer.passed)
            for named, why in answer.failed:
                self._journal.refuse(named, why)
            self._counts["refused"] += len(answer.failed)
            self._done += 1
            if answer.fresh:
                self._ended.append(time.monotonic())
            else:
                self._counts["before"] += 1
            return
        again = isinstance(answer, Lost) or answer.again
        if isinstance(answer, Lost) and not answer.blamed:
            self._journal.give_back(task.number)
        elif not again or task.attempts + 1 >= self._attempts:
            times = f" ({task.attempts + 1} attempts)" if again else ""
            self._journal.set_aside(task.number, answer.why + times)
            self._aside += 1
            return
        self._waiting += 1

    def _refuse(self, named: str, why: str) -> None:
        self._journal.refuse(named, why)
        self._counts["refused"] += 1

    def _count(self, added: Any) -> None:
        self._waiting += added.waiting
        self._aside += added.aside
        self._counts["refused"] += added.refused
