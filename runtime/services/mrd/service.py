"""MRD as a service: this process passes on, another one segments."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

from recallseg.runtime.services.inline import InlineService
from recallseg.runtime.services.mrd.connection import Conversation
from recallseg.runtime.services.mrd.recording import Recording
from recallseg.runtime.services.mrd.segmenting import SegmentingProcess, Setup
from recallseg.runtime.services.mrd.settings import MrdSettings
from recallseg.runtime.services.mrd.wire import CLOSING
from recallseg.runtime.services.settings import Configuration

__all__ = ["Mrd"]

READY_S = 120.0
"""Longest that a start waits for libraries and models; images are passed on alone until then."""


class Mrd(InlineService[MrdSettings]):
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
        super().__init__("mrd", configuration, configuration.mrd)
        self._names = tuple(rule.name for rule in configuration.rules)
        self.segmenting = SegmentingProcess(
            Setup(configuration.rules, self._settings, configuration.audit, configuration.log)
        )
        self._stopping = threading.Event()
        self._links: set[socket.socket] = set()
        self.metrics.ready_when(
            "segmentation", lambda: "" if self.segmenting.ready else "the segmentation to start"
        )
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

    def stop(self, seconds: float) -> None:
        """Take nothing more, answer what has come within about so many seconds."""
        self._stopping.set()
        self._acceptor.close()
        for link in list(self._links):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RD)  # as if the sender had no more
        self._acceptor.join(seconds)
        self.segmenting.stop()
        self._close()

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
        super()._refuse(link)
        link.sendall(CLOSING)
