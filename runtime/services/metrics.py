"""Numbers for Prometheus, and health for whoever keeps a service running, over HTTP.

``/metrics`` in Prometheus' text format; ``/healthz`` 200 while the service's own threads live;
``/readyz`` 200 once it can take work, otherwise 503 with what it waits for. Labels are names from
the configuration and a fixed set of words, so that their number is bounded.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import perf_counter
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from recallseg.engines.errors import RecallSegError
from recallseg.runtime.services.listening import listen
from recallseg.runtime.services.logs import ServiceLog

if TYPE_CHECKING:
    from recallseg.runtime.services.settings import MetricsSettings

__all__ = ["Metrics", "MetricsServer", "serve_metrics"]

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
_REQUEST_S = 10.0


class Metrics:
    """The numbers and the health of one service.

    Parameters
    ----------
    service : its name, a label of every number.
    """

    def __init__(self, service: str) -> None:
        self.registry = CollectorRegistry()
        self._service = service
        self._queue = Gauge(
            "recallseg_queue",
            "Things that wait or are worked on.",
            ("service", "state"),
            registry=self.registry,
        )
        self._stages = Histogram(
            "recallseg_stage_seconds",
            "Seconds that a stage took.",
            ("service", "stage"),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "recallseg_refusals",
            "What was not taken, by reason.",
            ("service", "reason"),
            registry=self.registry,
        )
        self._done = Counter(
            "recallseg_done",
            "What was done, by kind.",
            ("service", "what"),
            registry=self.registry,
        )
        self._clients = Gauge(
            "recallseg_clients", "Open connections.", ("service",), registry=self.registry
        )
        self._waits: dict[str, Callable[[], str]] = {}
        self._lives: dict[str, Callable[[], bool]] = {}

    def queue(self, state: str, count: float) -> None:
        """Set how many things are in a state."""
        self._queue.labels(self._service, state).set(count)

    def refused(self, reason: str) -> None:
        """Count a refusal; ``reason`` is one of a few fixed words."""
        self._refusals.labels(self._service, reason).inc()

    def done(self, what: str, count: int = 1) -> None:
        """Count what was done; ``what`` is one of a few fixed words."""
        self._done.labels(self._service, what).inc(count)

    def clients(self, count: int) -> None:
        """Set how many connections are open."""
        self._clients.labels(self._service).set(count)

    def took(self, stage: str, seconds: float) -> None:
        """Record what a stage took."""
        self._stages.labels(self._service, stage).observe(seconds)

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Record what the block takes, also if it fails."""
        begin = perf_counter()
        try:
            yield
        finally:
            self.took(stage, perf_counter() - begin)

    def ready_when(self, name: str, waits_for: Callable[[], str]) -> None:
        """Add a condition of being ready: a function that says what is waited for, or nothing."""
        self._waits[name] = waits_for

    def alive_while(self, name: str, lives: Callable[[], bool]) -> None:
        """Add a condition of being healthy."""
        self._lives[name] = lives

    def waits(self) -> dict[str, str]:
        """Return what the service waits for, by condition; empty when it is ready."""
        return {name: why for name, ask in self._waits.items() if (why := ask())}

    def dead(self) -> list[str]:
        """Return what does not live and should; empty when it is healthy."""
        return [name for name, lives in self._lives.items() if not lives()]

    def text(self) -> bytes:
        """Return all numbers as Prometheus reads them."""
        return bytes(generate_latest(self.registry))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell the kind of an error; socketserver would print all of it on stderr."""
        ServiceLog("metrics").error("a request was not answered", error=sys.exc_info()[1])


class MetricsServer:
    """Serves :class:`Metrics` over HTTP from threads of its own, until it is closed.

    Raises
    ------
    OutputError
        If the port is taken or may not be used.
    InputError
        If there is no such address.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = _REQUEST_S

            def handle(self) -> None:
                """Answer, if the other side waits for it."""
                with suppress(OSError):  # gone, or too slow
                    super().handle()

            def do_GET(self) -> None:
                """Answer."""
                status, kind, body = _answer(metrics, self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Say nothing: what was asked for is no event."""

        self._server = _Server((host, port), Handler, bind_and_activate=False)
        self._server.socket.close()
        try:
            self._server.socket = listen(host, port, "metrics.port")
        except RecallSegError as error:
            raise type(error)(f"metrics cannot be served: {error}") from error
        self._server.daemon_threads = True
        self.host, self.port = self._server.socket.getsockname()[:2]
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def serve_metrics(metrics: Metrics, wanted: MetricsSettings | None) -> MetricsServer | None:
    """Serve metrics where a configuration wants them; OutputError as :class:`MetricsServer`."""
    return None if wanted is None else MetricsServer(metrics, wanted.host, wanted.port)


def _answer(metrics: Metrics, path: str) -> tuple[int, str, bytes]:
    path = path.partition("?")[0]
    if path == "/metrics":
        return 200, CONTENT_TYPE_LATEST, metrics.text()
    if path == "/healthz":
        dead = metrics.dead()
        return 503 if dead else 200, "application/json", json.dumps({"dead": dead}).encode()
    if path == "/readyz":
        waits = metrics.waits()
        return 503 if waits else 200, "application/json", json.dumps({"waits_for": waits}).encode()
    return 404, "text/plain", b"/metrics /healthz /readyz\n"
