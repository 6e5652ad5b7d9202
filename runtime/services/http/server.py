"""The server as a service: bound, started in a thread of its own, stopped within a bound."""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from recallseg.engines.errors import OutputError
from recallseg.runtime.services.certificates import load_certificates
from recallseg.runtime.services.http.guard import Guard
from recallseg.runtime.services.http.limits import Limits
from recallseg.runtime.services.listening import addresses_of, listen

__all__ = ["AnnotationServer", "is_loopback"]

HEADER_BYTES = 64 << 10
HEADER_S = 10.0
"""For the first request of a connection to be said in full."""
_START_S = 30.0


class _Patient(H11Protocol):
    """Uvicorn's protocol, which would wait for ever for a first request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEADER_S, self._end_if_silent)

    def _end_if_silent(self) -> None:
        said: Any = self.cycle  # None until a request was said; its type does not tell
        if said is None and not self.transport.is_closing():
            self.transport.close()


class AnnotationServer:
    """Serves an application over HTTP, or HTTPS with a certificate.

    Parameters
    ----------
    application : from :func:`recallseg.runtime.services.http.application.make_application`.
    host, port : where; port 0 lets the system choose.
    certificate, key : PEM files, for HTTPS; the key may be in the certificate's file.

    Attributes
    ----------
    port : where it listens.
    url : its address.

    Raises
    ------
    OutputError
        If the port is taken or may not be used.
    InputError
        If the certificate cannot be used.
    """

    def __init__(
        self,
        application: Guard,
        host: str = "127.0.0.1",
        port: int = 1527,
        *,
        limits: Limits | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        limits = limits or Limits()
        if certificate is not None:
            load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key)
        self._socket = listen(host, port, "--port")
        self._socket.setblocking(False)
        self.port = int(self._socket.getsockname()[1])
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'http' if certificate is None else 'https'}://{shown}:{self.port}"
        self._application, self._failure = application, ""
        config = uvicorn.Config(
            self._noticed,
            interface="asgi3",
            http=_Patient,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.connections,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_keep_alive=30,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        self._config = config
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="serve", daemon=True)

    def start(self) -> None:
        """Begin to serve; return when ready."""
        self._thread.start()
        end = monotonic() + _START_S
        while not self._server.started:
            if not self._thread.is_alive() or monotonic() > end:
                why = self._failure or f"it was not ready within {_START_S:g} s"
                raise OutputError(f"the server on {self.url} did not start: {why}.")
            sleep(0.01)

    def alive(self) -> bool:
        """Whether it still serves."""
        return self._thread.is_alive()

    def stop(self, seconds: float = 10.0) -> None:
        """Take no more connections, finish what is begun, and return; harmless if repeated."""
        if self._thread.ident is None:
            self._socket.close()
            return
        self._config.timeout_graceful_shutdown = max(1, int(seconds))
        self._server.should_exit = True
        self._thread.join(seconds + 1)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(1)
        self._socket.close()  # uvicorn does so only for what has started

    async def _noticed(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer; of what keeps the application from starting uvicorn says nothing to a caller."""
        try:
            await self._application(scope, receive, send)
        except Exception as error:
            if scope["type"] == "lifespan":
                self._failure = f"{type(error).__name__}: {error}"
            raise

    def _run(self) -> None:
        with suppress(SystemExit):  # of an application that cannot start: start() says why
            asyncio.run(self._server.serve(sockets=[self._socket]))

    def __enter__(self) -> AnnotationServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def is_loopback(host: str) -> bool:
    """Whether an address, or all addresses of a name, can be reached from this machine only."""
    import ipaddress

    return all(
        ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
        for _, _, address in addresses_of(host)
    )
