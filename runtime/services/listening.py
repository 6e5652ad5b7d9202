"""Connections: listening, accepting, and reading and writing within bounds of time."""

from __future__ import annotations

import errno
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from recallseg.engines.errors import InputError, OutputError

__all__ = [
    "Acceptor",
    "ClosedError",
    "addresses_of",
    "connect",
    "keep_alive",
    "listen",
    "receive_into",
    "send_all",
]


class ClosedError(Exception):
    """The other side is silent or gone, or what it says cannot be followed any more."""


def addresses_of(host: str, port: int = 0) -> list[tuple[int, int, Any]]:
    """Return family, kind and address of all that a host is called, for TCP.

    Raises
    ------
    InputError
        If there is none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # the latter of what no name can be
        why = getattr(error, "strerror", None) or error
        raise InputError(f"there is no address '{host}': {why}.") from error
    return [(family, kind, address) for family, kind, _, _, address in found]


def listen(host: str, port: int, setting: str) -> socket.socket:
    """Return a TCP socket that listens.

    Parameters
    ----------
    setting : what to change if the port is taken, e.g. ``--port``.

    Raises
    ------
    InputError
        If there is no such address.
    OutputError
        If the port is taken or may not be used.
    """
    family, kind, address = addresses_of(host, port)[0]
    try:
        made = socket.socket(family, kind)
    except OSError as error:
        raise InputError(f"there is no address '{host}': {error.strerror}.") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise OutputError(
            f"the server cannot listen on {host}:{port}: {error.strerror}. Choose another "
            f"{setting}, or stop what uses it."
        ) from error
    return made


def keep_alive(link: socket.socket) -> None:
    """Send small messages at once, and find out when the other side has gone."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Acceptor:
    """Accepts connections, and serves each in a thread of its own.

    Parameters
    ----------
    most : connections at once.
    serve : is given each connection; it is closed when that returns.
    refuse : is given what is more than that.
    """

    def __init__(
        self,
        server: socket.socket,
        most: int,
        serve: Callable[[socket.socket], None],
        refuse: Callable[[socket.socket], None],
    ) -> None:
        self._server, self._most = server, most
        self._serve, self._refuse = serve, refuse
        self._open: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._accept, name="accept", daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.getsockname()[1])

    def __len__(self) -> int:
        return len(self._open)

    def start(self) -> None:
        """Begin to accept."""
        self._thread.start()

    def alive(self) -> bool:
        """Whether it accepts."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Accept no more; what is open goes on."""
        self._stopping.set()
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._server.close()

    def join(self, seconds: float) -> None:
        """Wait for what is open, as long as that; then cut it off."""
        until = monotonic() + seconds
        with self._lock:
            threads = [*self._open]
        for thread in threads:
            thread.join(max(0.0, until - monotonic()))
        with self._lock:
            left = [*self._open.items()]
        for thread, link in left:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            thread.join(1)

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                link, _ = self._server.accept()
            except OSError:
                self._stopping.wait(0.1)  # too many open files, say: it passes
                continue
            if not self._begin(link):
                with link, suppress(OSError):
                    link.settimeout(1.0)
                    self._refuse(link)

    def _begin(self, link: socket.socket) -> bool:
        """Serve a connection in a thread; False where there are, or the system has, too many."""
        with self._lock:
            if len(self._open) >= self._most:
                return False
            thread = threading.Thread(target=self._run, args=(link,), daemon=True)
            self._open[thread] = link
            try:
                thread.start()
            except (RuntimeError, MemoryError):  # "can't start new thread"
                del self._open[thread]
                return False
            return True

    def _run(self, link: socket.socket) -> None:
        try:
            with link, suppress(OSError):
                keep_alive(link)
                self._serve(link)
        finally:
            with self._lock:
                self._open.pop(threading.current_thread(), None)


def connect(host: str, port: int, seconds: float) -> socket.socket:
    """Return a connection; OSError if there is none within so many seconds."""
    try:
        link = socket.create_connection((host, port), seconds)
    except UnicodeError as error:  # what no name can be
        raise OSError(errno.EADDRNOTAVAIL, f"there is no address '{host}': {error}") from error
    try:
        keep_alive(link)
    except BaseException:
        link.close()
        raise
    return link


def receive_into(link: socket.socket, buffer: bytearray, at: int, until: float) -> None:
    """Fill a buffer from ``at`` on.

    Parameters
    ----------
    until : by ``time.monotonic``.

    Raises
    ------
    ClosedError
        If it is not full by then, or the stream ends; without a text if that is its proper end.
    """
    view = memoryview(buffer)
    while at < len(buffer):
        left = until - monotonic()
        if left <= 0:
            raise ClosedError("nothing more came in time")
        link.settimeout(left)
        try:
            got = link.recv_into(view[at:])
        except TimeoutError:
            continue
        except OSError as error:
            raise ClosedError("the connection broke") from error
        if not got:
            raise ClosedError("the stream ended" if at else "")
        at += got


def send_all(link: socket.socket, raw: bytes | bytearray, seconds: float) -> None:
    """Send all of it; TimeoutError if the other side takes nothing for so long."""
    poll = select.poll()  # the socket's own timeout is the reader's
    poll.register(link, select.POLLOUT)
    view = memoryview(raw)
    while view:
        if not poll.poll(seconds * 1e3):
            raise TimeoutError
        with suppress(BlockingIOError):
            view = view[link.send(view[: 2**20], socket.MSG_DONTWAIT) :]
