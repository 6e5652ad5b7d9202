"""Who may speak to the server, from where, how much and how long: before anything else runs.

A page of a stranger, open in the browser of somebody who may, must reach nothing: the Host must be
one that this server is known by (a name that is rebound to this machine is not), an Origin must be
its own or one that was allowed, and the token is in a header that no page of others can send.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from contextlib import suppress
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from recallseg.runtime.services.http.limits import Budget, Limits, RefusedError
from recallseg.runtime.services.metrics import Metrics

__all__ = ["Guard", "make_token"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
LINGER_S = 2.0
"""For how long what a client still sends is dropped once it has its answer."""
SMALL = 1 << 20
"""Bytes of a request that brings no pixels; a stroke over a whole slice is one."""
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; base-uri 'none'; "
    "object-src 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_ONCE = ("host", "origin", "authorization", "content-length")
_ALLOWED_HEADERS = "authorization, content-type, x-lease-token, x-meta"


def make_token() -> str:
    """Return a new secret of 256 bits, for a header or a URL's fragment."""
    return secrets.token_urlsafe(32)


class Guard:
    """Lets through what may be let through; everything else gets its answer here.

    Parameters
    ----------
    app : what is guarded.
    users : names by token.
    hosts : names and addresses of this server, without a port, beside the loopback's.
    origins : of other pages that may use it, e.g. ``https://viewer.example``.
    opened : paths that need no token: they hold nothing of anybody.
    uploads : paths that bring pixels, and may bring more.
    metrics : where refusals, by status, and the seconds of each route are counted.
    """

    def __init__(
        self,
        app: App,
        *,
        users: Mapping[str, str],
        limits: Limits,
        budget: Budget,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        opened: Collection[str] = (),
        uploads: Collection[str] = (),
        metrics: Metrics | None = None,
    ) -> None:
        self._app, self._limits, self._budget = app, limits, budget
        self._users = {token.encode(): name for token, name in users.items()}
        self._hosts = {host.lower() for host in (*LOOPBACK, *hosts)}
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._opened, self._uploads = frozenset(opened), frozenset(uploads)
        self._metrics = metrics or Metrics("serve")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
                return
            await send({"type": "websocket.close", "code": 1008})
            return
        names = [name.decode("latin-1") for name, _ in scope["headers"]]
        headers = {
            name: value.decode("latin-1")
            for name, (_, value) in zip(names, scope["headers"], strict=True)
        }
        origin = headers.get("origin")
        body = _Body(headers, receive, send)
        reply = _marked(body.send, origin if self._foreign(origin) else None)
        taken = 0
        try:
            for key in _ONCE:
                if names.count(key) > 1:
                    raise RefusedError(400, f"the header {key} is given twice.")
            self._check_place(headers, str(scope.get("scheme", "http")))
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _answer(reply, None)
                return
            scope.setdefault("state", {})["user"] = self._user(headers, scope["path"])
            most = self._limits.body_bytes if scope["path"] in self._uploads else SMALL
            taken = self._length(headers, most)
            self._budget.take(taken)
        except RefusedError as refused:
            self._metrics.refused(str(refused.status))
            await _answer(reply, refused)
            return
        begin = perf_counter()
        try:
            await self._app(scope, self._bounded(body.receive, most, taken), reply)
        finally:
            self._budget.give(taken)
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.took(route, perf_counter() - begin)

    def _check_place(self, headers: Mapping[str, str], scheme: str) -> None:
        host = headers.get("host", "")
        if _name(host) not in self._hosts:
            raise RefusedError(
                421,
                f"this server is not known as '{host:.80}'. Use the address that it printed at "
                "its start, or allow this name with --allow-host.",
            )
        origin = headers.get("origin")
        if origin is None:
            return
        own = f"{scheme}://{host}".lower()
        if origin.lower() != own and origin.lower() not in self._origins:
            raise RefusedError(
                403,
                f"pages of '{origin:.80}' may not use this server. Allow them with --allow-origin.",
            )

    def _foreign(self, origin: str | None) -> bool:
        return origin is not None and origin.lower() in self._origins

    def _user(self, headers: Mapping[str, str], path: str) -> str:
        """Return who asks; empty for who says nothing and asks for what anybody may have."""
        given = headers.get("authorization")
        if given is None and path in self._opened:
            return ""
        kind, _, token = (given or "").partition(" ")
        user = None
        for known, name in self._users.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, token.strip().encode("latin-1", "replace")):
                user = name
        if user is None or kind.lower() != "bearer":
            raise RefusedError(
                401,
                "this needs the token that the server printed at its start: 'Authorization: "
                "Bearer TOKEN' (the API key of nnInteractive's clients).",
            )
        return user

    @staticmethod
    def _length(headers: Mapping[str, str], most: int) -> int:
        text = headers.get("content-length", "")
        if not text:
            return most if "transfer-encoding" in headers else 0
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            raise RefusedError(400, f"the Content-Length '{text:.40}' is no number.")
        if int(text) > most:
            raise RefusedError(413, f"the request is {int(text)} bytes; {most} are taken here.")
        return int(text)

    def _bounded(self, receive: Receive, most: int, taken: int) -> Receive:
        """Return a ``receive`` that ends when more comes than was said, or it takes too long."""
        got = 0
        whole = taken == 0
        end = asyncio.get_running_loop().time() + self._limits.body_s

        async def bounded() -> Message:
            nonlocal got, whole
            if whole:
                return await receive()
            left = end - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except (asyncio.TimeoutError, TimeoutError):
                raise HTTPException(
                    408, f"the request did not arrive within {self._limits.body_s:g} s."
                ) from None
            got += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if got > min(most, taken):
                raise HTTPException(413, f"the request is larger than {min(most, taken)} bytes.")
            return message

        return bounded


class _Body:
    """What a client sends with a request; the answer ends when all of it came, or after a while.

    A connection that is closed while its client still sends takes the answer with it (RFC 9112,
    9.6): the client would learn nothing of why it was refused.
    """

    def __init__(self, headers: Mapping[str, str], receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        length = headers.get("content-length", "0")
        nothing = "transfer-encoding" not in headers and not length.strip("0")
        # Who waits to be told to go on sends nothing before.
        self._came = nothing or "expect" in headers

    async def receive(self) -> Message:
        message = await self._receive()
        self._came = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last and not self._came:
            await self._send({**message, "more_body": True})
            with suppress(asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(self._drop_rest(), LINGER_S)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def _drop_rest(self) -> None:
        while not self._came:
            await self.receive()


def _name(host: str) -> str:
    """Return a Host header's name, less its port; empty for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return ""
    if parts.hostname is None or parts.path or parts.query or parts.username is not None:
        return ""
    return f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname


def _marked(send: Send, origin: str | None) -> Send:
    """Return a ``send`` that gives each answer the headers that keep browsers in their place."""
    extra = dict(HEADERS)
    if origin is not None:
        extra |= {
            "access-control-allow-origin": origin,
            "access-control-allow-headers": _ALLOWED_HEADERS,
            "access-control-allow-methods": "GET, POST, PATCH, DELETE",
            "access-control-expose-headers": "x-meta, retry-after",
            "cross-origin-resource-policy": "cross-origin",
            "vary": "origin",
        }

    async def marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name for name, _ in message.get("headers", ())}
            message["headers"] = [
                *message.get("headers", ()),
                *(
                    (name.encode(), value.encode())
                    for name, value in extra.items()
                    if name.encode() not in own
                ),
            ]
        await send(message)

    return marked


async def _answer(send: Send, refused: RefusedError | None) -> None:
    headers = [(b"content-type", b"application/json")]
    if refused is not None:
        headers.append((b"connection", b"close"))
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refused.retry_s is not None:
            headers.append((b"retry-after", str(refused.retry_s).encode()))
    status = 204 if refused is None else refused.status
    body = b"" if refused is None else json.dumps({"detail": str(refused)}).encode()
    if refused is not None:
        headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
