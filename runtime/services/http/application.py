"""All routes in one application, with what is around them: errors as answers, leases that end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from recallseg import __version__
from recallseg.engines.errors import (
    AuditError,
    DeadlineError,
    DeviceMemoryError,
    HostMemoryError,
    InputError,
    LibraryWriteError,
    RecallSegError,
)
from recallseg.engines.machine_fault import machine_fault
from recallseg.runtime.json_text import printable
from recallseg.runtime.services.http import api, nninteractive
from recallseg.runtime.services.http.desk import Desk
from recallseg.runtime.services.http.guard import Guard
from recallseg.runtime.services.http.leases import MOST_AT_ONCE, Leases
from recallseg.runtime.services.http.limits import Budget, Limits, RefusedError
from recallseg.runtime.services.http.seats import Seat
from recallseg.runtime.services.http.worklist import Worklist
from recallseg.runtime.services.logs import ServiceLog
from recallseg.runtime.services.metrics import Metrics

__all__ = ["make_application"]

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": "index.html",
    **{
        f"/{name}": name
        for name in ("style.css", "app.js", "api.js", "canvas.js", "gallery.js", "icon.svg")
    },
}
"""What anybody may have: it holds nothing of anybody."""
SWEEP_S = 5.0
_log = ServiceLog("serve")


def make_application(
    desk: Desk,
    users: Mapping[str, str],
    *,
    limits: Limits | None = None,
    hosts: Collection[str] = (),
    origins: Collection[str] = (),
    target: str | None = None,
    worklist: Worklist | None = None,
) -> Guard:
    """Return the ASGI application of a server.

    Parameters
    ----------
    users : names by token.
    hosts, origins : see :class:`Guard`.
    target : see :func:`recallseg.runtime.services.http.nninteractive.protocol`.
    worklist : images to be annotated; None for none.
    """
    limits = limits or Limits()
    budget = Budget(limits.total_bytes)
    leases = Leases(limits, Seat)
    metrics = Metrics("serve")

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = (
            limits.sessions * MOST_AT_ONCE + 16
        )
        sweeping = asyncio.create_task(_sweep(leases))
        if worklist is not None:
            worklist.start()
        try:
            yield
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping
            await anyio.to_thread.run_sync(leases.close)
            if worklist is not None:
                await anyio.to_thread.run_sync(worklist.close)

    app = FastAPI(
        title="RecallSeg",
        version=__version__,
        description="Propose from a library, correct, accept: see docs/use/annotate.md.",
        lifespan=life,
        docs_url=None,  # pages that load their scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(nninteractive.protocol(desk, leases, limits, budget, target))
    app.include_router(api.routes(desk, leases, limits, budget, worklist))
    for kind, status in _STATUS.items():
        app.exception_handler(kind)(_answering(status))
    app.exception_handler(RefusedError)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(ValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)
    app.exception_handler(ClientDisconnect)(_left)
    app.exception_handler(Exception)(_defect)

    @app.get("/healthz", tags=["server"])
    def healthz() -> dict[str, bool]:
        """Whether the server answers."""
        return {"ok": True}

    @app.get("/metrics", tags=["server"])
    def numbers() -> Response:
        """Numbers for Prometheus, which needs the token too."""
        metrics.clients(len(leases))
        metrics.queue("bytes", budget.taken)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    for path, name in FILES.items():
        app.get(path, include_in_schema=False)(_file(name))

    return Guard(
        app,
        users=users,
        limits=limits,
        budget=budget,
        hosts=hosts,
        origins=origins,
        opened={"/healthz", *FILES},
        uploads={*nninteractive.UPLOADS, *api.UPLOADS},
        metrics=metrics,
    )


async def _sweep(leases: Leases[Seat]) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        await anyio.to_thread.run_sync(leases.sweep)


def _file(name: str) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(PAGE / name)

    return send


_STATUS: dict[type[Exception], int] = {
    RecallSegError: 500,
    InputError: 400,
    LibraryWriteError: 507,
    AuditError: 507,
    HostMemoryError: 503,
    DeviceMemoryError: 503,
    MemoryError: 503,
    DeadlineError: 504,
}


def _answering(status: int) -> Callable[[Request, Any], Awaitable[JSONResponse]]:
    async def answer(_: Request, error: Exception) -> JSONResponse:
        detail = printable(str(error)) or "it needs more memory than there is"
        # A file that the machine does not give is no fault of the request, nor of the server.
        short = status in (_STATUS[InputError], _STATUS[RecallSegError]) and machine_fault(error)
        return JSONResponse({"detail": detail}, 503 if short else status)

    return answer


async def _refused(_: Request, error: Any) -> JSONResponse:
    headers = {} if error.retry_s is None else {"retry-after": str(error.retry_s)}
    return JSONResponse({"detail": printable(str(error))}, error.status, headers)


async def _http(_: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


async def _invalid(_: Request, error: Any) -> JSONResponse:
    """Say what is wrong, and never repeat what was sent: it may be long, or no JSON."""
    said = [
        f"{'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors()
    ]
    return JSONResponse({"detail": printable("; ".join(said[:5]))[:1000]}, 422)


async def _left(_: Request, __: Exception) -> JSONResponse:
    """Answer nobody: who asked has gone."""
    return JSONResponse({"detail": "the request was cut short"}, 400)


async def _defect(_: Request, error: Exception) -> JSONResponse:
    _log.error("defect", error=error)
    return JSONResponse({"detail": f"defect of the server: {type(error).__name__}"}, 500)
