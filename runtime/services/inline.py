"""What services that speak with a scanner or a viewer have in common: a port, metrics, health.

Each connection is served in a thread of its own.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from recallseg.engines.errors import InputError
from recallseg.runtime.services.listening import Acceptor, listen
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics, serve_metrics
from recallseg.runtime.services.sections import Listening
from recallseg.runtime.services.settings import Configuration

__all__ = ["InlineService"]

Settings = TypeVar("Settings", bound=Listening)


class InlineService(ABC, Generic[Settings]):
    """A service whose connections are served each in a thread; it begins to when it is started.

    Parameters
    ----------
    name : of the service and of its section.
    settings : that section.

    Attributes
    ----------
    port : where it listens.

    Raises
    ------
    InputError
        If the section is missing, or a rule names a file that cannot be used.
    OutputError
        If it cannot listen, on its port or that of its metrics.
    AuditError
    """

    def __init__(self, name: str, configuration: Configuration, settings: Settings | None) -> None:
        if settings is None:
            raise InputError(
                f"this service needs a section [{name}] in its configuration. "
                f"'recallseg config example {name}' prints one."
            )
        self._settings: Settings = settings
        self._log = ServiceLog(name)
        for rule in configuration.rules:
            rule.volumes.settings()  # what is wrong is told now
        self._audit = None if configuration.audit is None else configuration.audit.open()
        self.metrics = Metrics(name)
        self._acceptor = Acceptor(
            listen(settings.host, settings.port, f"{name}.port"),
            settings.most_clients,
            self._serve,
            self._refuse,
        )
        self.port = self._acceptor.port
        try:
            self._server = serve_metrics(self.metrics, configuration.metrics)
        except BaseException:
            self._acceptor.close()
            raise
        self.metrics.alive_while("accept", self._acceptor.alive)

    def alive(self) -> bool:
        """Whether all of it still runs."""
        return not self.metrics.dead()

    @abstractmethod
    def _serve(self, link: socket.socket) -> None:
        """Serve a connection, which is closed when this returns."""

    def _refuse(self, link: socket.socket) -> None:
        """Turn away a connection, because there are too many."""
        self.metrics.refused("clients")
        self._log.warning("a connection is refused: there are too many")

    def _close(self) -> None:
        """Serve no metrics any more, which is the last thing to do."""
        if self._server is not None:
            self._server.close()
