"""The node as a service: receiver, decider, answerer and senders, each in threads of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from recallseg.engines.errors import InputError
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics, serve_metrics
from recallseg.runtime.services.node.answering import Answerer, Decider
from recallseg.runtime.services.node.commitment import REPORT_MOST_S, Commitments
from recallseg.runtime.services.node.database import Delivery
from recallseg.runtime.services.node.receiving import Arrivals, HeaderReaders, Receiver
from recallseg.runtime.services.node.sending import Sending, sending_to
from recallseg.runtime.services.node.settings import DicomDestination
from recallseg.runtime.services.node.store import NodeStore
from recallseg.runtime.services.questions import Questions
from recallseg.runtime.services.settings import Configuration

__all__ = ["Node"]

_SWEEP_S = 60.0
_LOOK_S = 0.2


class Node:
    """A DICOM node; see :func:`recallseg.runtime.services.running.run_service`.

    Parameters
    ----------
    configuration : with a section ``node`` and a state folder.
    clock : seconds since 1970; another one for tests.

    Attributes
    ----------
    port : where it listens.

    Raises
    ------
    InputError
        If the configuration lacks something, or another node runs with this state.
    OutputError
        If it cannot listen, on its port or that of its metrics.
    AuditError
    """

    def __init__(
        self, configuration: Configuration, *, clock: Callable[[], float] = time.time
    ) -> None:
        settings = configuration.node
        if settings is None or configuration.state is None:
            raise InputError(
                "a node needs a section [node] and a folder 'state' in its configuration. "
                "'recallseg config example node' prints one."
            )
        self._settings, self._log = settings, ServiceLog("node")
        self._rules = {rule.name: rule for rule in configuration.rules}
        for rule in configuration.rules:
            rule.volumes.settings()  # a bad file of codes is told now
        audit = None if configuration.audit is None else configuration.audit.open()
        self.metrics = Metrics("node")
        self._store = NodeStore(configuration.state, clock=clock)
        self._readers = HeaderReaders()
        self._arrivals = Arrivals(settings.quiet_s)
        self._questions = Questions()
        self._sendings: dict[str, Sending] = {
            name: sending_to(
                name, each, settings.ae_title, self._store, settings.retry, self.metrics
            )
            for name, each in settings.destinations.items()
        }
        self._commitments = Commitments(settings, self._store, self.metrics, self._put_off)
        self._decider = Decider(
            self._store, self._arrivals, self._rules, self._readers, self.metrics
        )
        self._answerer = Answerer(
            self._store,
            self._rules,
            self._questions,
            self._readers,
            audit,
            settings.retry,
            self.metrics,
            self._wake_senders,
        )
        self._stop, self._work = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._loop, args=each, name=each[0].__name__, daemon=True)
            for each in ((self._decide, self._arrivals.changed), (self._answer, self._work))
        ]
        self._swept = 0.0
        with ExitStack() as made:
            made.callback(self._store.close)
            self._receiver = Receiver(
                settings,
                self._store,
                self._arrivals,
                self._readers,
                self.metrics,
                self._commitments.handlers(),
            )
            made.callback(self._receiver.stop, 0.0)
            self.port = self._receiver.port
            self._server = serve_metrics(self.metrics, configuration.metrics)
            made.pop_all()
        self._say_health()

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many series, jobs, deliveries and promises are in each state."""
        return self._store.counts()

    def troubles(self) -> list[dict[str, Any]]:
        """Return what somebody has to look at, with reasons; oldest first."""
        return self._store.troubles()

    def sweep(self) -> int:
        """Remove what is done and was kept long enough; return the bytes that it gave.

        The node does so by itself, every minute and when it needs room.
        """
        return self._store.sweep(self._settings.keep_hours * 3600)

    def start(self) -> None:
        """Warm up and begin to serve; what cannot be opened yet is tried again when it is asked."""
        for rule, error in self._answerer.warm_up().items():
            self._log.error("a rule cannot be asked", rule=rule, error=error)
        self._readers.warm_up(self._store.folder / "marks.key")
        if unknown := self._store.give_up_unknown(list(self._sendings)):
            self._log.error("answers for destinations that are not configured", count=unknown)
        for series in self._store.undecided():
            self._arrivals.touch(series)
        for thread in self._threads:
            thread.start()
        for sending in self._sendings.values():
            sending.start()
        self._commitments.start()
        self._receiver.start()
        self._log.info("listening", port=self.port, ae_title=self._settings.ae_title)

    def alive(self) -> bool:
        """Whether all of its threads live."""
        return not self.metrics.dead()

    def stop(self, seconds: float) -> None:
        """Take nothing more, finish what is begun within about so many seconds."""
        until = time.monotonic() + seconds
        self._stop.set()
        self._receiver.stop(seconds / 3)
        self._arrivals.changed.set()
        self._work.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, (until - time.monotonic()) / 2))
        self._answerer.stop.set()  # what is still being segmented is left at the next slice
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        for sending in self._sendings.values():
            sending.stop(max(0.1, until - time.monotonic()))
        self._commitments.stop(max(0.1, until - time.monotonic()))
        self._answerer.close()
        self._readers.close()
        self._questions.close()
        if self._server is not None:
            self._server.close()
        self._store.close()

    def _say_health(self) -> None:
        metrics = self.metrics
        metrics.ready_when("room", lambda: "room on the disk" if self._receiver.full else "")
        metrics.ready_when("start", lambda: "" if self._receiver.alive() else "the node to start")
        metrics.ready_when(
            "decode", lambda: "" if self._answerer.prepared else "the process that decodes"
        )
        metrics.alive_while("receive", self._receiver.alive)
        metrics.alive_while("commit", self._commitments.alive)
        for thread in self._threads:
            metrics.alive_while(thread.name.strip("_"), thread.is_alive)
        for name, sending in self._sendings.items():
            metrics.alive_while(f"send to {name}", sending.alive)

    def _loop(self, do: Callable[[], float], wake: threading.Event) -> None:
        while not self._stop.is_set():
            wake.clear()
            try:
                wait = do()
            except Exception as error:  # a full disk under the database, say: it is tried again
                self._log.error("cannot go on", part=do.__name__.strip("_"), error=error)
                wait = 1.0
            if wait:
                wake.wait(wait)

    def _decide(self) -> float:
        if self._decider.look():
            self._work.set()
        now = time.monotonic()
        if now - self._swept > _SWEEP_S:
            self._swept = now
            self._store.bound_waits(*self._most_waits())
            self.sweep()
        self._count()
        return min(_LOOK_S, self._arrivals.wait_s())

    def _most_waits(self) -> tuple[float, float]:
        """Return how long anything is put off, and a report of commitment waited for."""
        settings = self._settings
        reports = [each.commitment_s for each in settings.destinations.values()
                   if isinstance(each, DicomDestination)]  # fmt: skip
        return max(settings.retry.most_s, REPORT_MOST_S), max(reports, default=0.0)

    def _answer(self) -> float:
        if not self._answerer.prepared:
            self._answerer.prepare()
        return 0.0 if self._answerer.do_next() and not self._stop.is_set() else _LOOK_S

    def _count(self) -> None:
        for table, states in self._store.counts().items():
            for state, count in states.items():
                self.metrics.queue(f"{table} {state}", count)
        self.metrics.queue("series arriving", len(self._arrivals))
        self.metrics.queue("bytes", self._store.used_bytes)

    def _wake_senders(self) -> None:
        for sending in self._sendings.values():
            sending.wake()

    def _put_off(self, delivery: Delivery, said: str) -> None:
        sending: Any = self._sendings.get(delivery.destination)
        if sending is not None:
            sending.put_off(delivery, said)
