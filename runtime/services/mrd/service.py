"""MRD as a service: this process passes on, another one segments."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

from recallseg.engines.errors import InputError
from recallseg.runtime.services.listening import Acceptor, listen
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics, serve_metrics
from recallseg.runtime.services.mrd.connection import Conversation
from recallseg.runtime.services.mrd.recording import Recording
from recallseg.runtime.services.mrd.segmenting import SegmentingProcess, Setup
from recallseg.runtime.services.mrd.wire import CLOSING
from recallseg.runtime.services.settings import Configuration

__all__ = ["Mrd"]

READY_S = 120.0
"""Longest that a start waits for libraries and models; images are passed on alone until then."""


class Mrd:
    """An MRD service; see :func:`recallseg.runtime.services.running.run_service`.

    Parameters
    ----------
    configuration : with a section ``mrd``.

    Attributes
    ----------
    port : where it listens.

    Raises
    ------
    InputError
        If the configuration lacks something.
    OutputError
        If it cannot listen, on its port or that of its metrics.
    AuditError
    """

    def __init__(self, configuration: Configuration) -> None:
        settings = configuration.mrd
        if settings is None:
            raise InputError(
                "this service needs a section [mrd] in its configuration. "
                "'recallseg config example mrd' prints one."
            )
        self._settings, self._log = settings, ServiceLog("mrd")
        self._names = tuple(rule.name for rule in configuration.rules)
        for rule in configuration.rules:
            rule.volumes.settings()  # what is wrong is told now
        if configuration.audit is not None:
            configuration.audit.open()
        self.metrics = Metrics("mrd")
        self.segmenting = SegmentingProcess(
            Setup(configuration.rules, settings, configuration.audit, configuration.log)
        )
        self._acceptor = Acceptor(
            listen(settings.host, settings.port, "mrd.port"),
            settings.most_clients,
            self._serve,
            self._refuse,
        )
        self.port = self._acceptor.port
        self._stopping = threading.Event()
        self._links: set[socket.socket] = set()
        try:
            self._server = serve_metrics(self.metrics, configuration.metrics)
        except BaseException:
            self._acceptor.close()
            raise
        self.metrics.ready_when(
            "segmentation", lambda: "" if self.segmenting.ready else "the segmentation to start"
        )
        self.metrics.alive_while("accept", self._acceptor.alive)
        self.metrics.alive_while("segmentation", self.segmenting.alive)

    def start(self) -> None:
        """Begin to serve, and wait until it can answer."""
        self.segmenting.start()
        self._acceptor.start()
        end = time.monotonic() + READY_S
        while not self.segmenting.ready and time.monotonic() < end:
            time.sleep(0.02)
        if not self.segmenting.ready:
            self._log.error("the segmentation is not ready; images are passed on alone")
        self._log.info("listening", port=self.port)

    def alive(self) -> bool:
        """Whether all of it still runs."""
        return not self.metrics.dead()

    def stop(self, seconds: float) -> None:
        """Take nothing more, answer what has come within about so many seconds."""
        self._stopping.set()
        self._acceptor.close()
        for link in list(self._links):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RD)  # as if the sender had no more
        self._acceptor.join(seconds)
        self.segmenting.stop()
        if self._server is not None:
            self._server.close()

    def _serve(self, link: socket.socket) -> None:
        self._links.add(link)
        self.metrics.clients(len(self._acceptor))
        self._log.info("connected", clients=len(self._acceptor))
        try:
            recording = self._recording()
            Conversation(
                link,
                self._settings,
                self._names,
                self.segmenting,
                self.metrics,
                recording,
                self._stopping.is_set,
            ).hold()
        finally:
            self._links.discard(link)
            self.metrics.clients(len(self._acceptor) - 1)
            self._log.info("disconnected")

    def _recording(self) -> Recording | None:
        if self._settings.record is None:
            return None
        try:
            return Recording(self._settings.record)
        except OSError as error:
            self._log.error("nothing is recorded", error=error)
            return None

    def _refuse(self, link: socket.socket) -> None:
        self.metrics.refused("clients")
        self._log.warning("a connection is refused: there are too many")
        link.sendall(CLOSING)
