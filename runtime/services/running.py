"""A service's life: started, told to systemd, stopped by a signal within a bound."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Protocol

from recallseg.runtime.services.logs import ServiceLog, process_fields
from recallseg.runtime.services.memory import FreeMemory

__all__ = ["Service", "notify_systemd", "run_service"]

STOPPED_LATE = 3
"""Exit status of a service that had to be cut off; what it had promised is on the disk."""
_LOOK_S = 0.5


class Service(Protocol):
    """What :func:`run_service` keeps running."""

    def start(self) -> None:
        """Begin to serve; return when ready."""

    def alive(self) -> bool:
        """Whether all of it still runs."""

    def stop(self, seconds: float) -> None:
        """Take nothing more, finish what is begun within about so many seconds, and return."""


def run_service(
    service: Service,
    name: str,
    *,
    stop_s: float = 30.0,
    ready: Callable[[], None] = lambda: None,
    end: Callable[[int], None] = os._exit,
) -> bool:
    """Run a service until SIGTERM or SIGINT, or until it dies; return whether it was stopped.

    systemd is told when it is ready and when it stops, and its watchdog, if it has one, as long as
    the service lives (``Type=notify``). If it has not stopped ``stop_s`` seconds after the signal
    (or at a second signal), the process is ended: services keep what they promised on the disk.

    Parameters
    ----------
    ready : called when it serves.
    end : ends the process at once.
    """
    log, free = ServiceLog(name), FreeMemory()
    stop = threading.Event()
    former = {}

    def cut_off() -> None:
        log.error("not stopped in time, cut off", seconds=stop_s)
        end(STOPPED_LATE)

    bound = threading.Timer(stop_s, cut_off)
    bound.daemon = True

    def hear(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            end(STOPPED_LATE)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        former[number] = signal.signal(number, hear)
    try:
        service.start()
        log.info("ready", **process_fields())
        notify_systemd("READY=1")
        ready()
        while not stop.wait(_LOOK_S) and service.alive():
            notify_systemd("WATCHDOG=1")
            free.give_back()
        if not stop.is_set():
            log.error("a part of the service has ended, so it ends")
        else:
            log.info("stopping", seconds=stop_s)
        notify_systemd("STOPPING=1")
        return stop.is_set()
    finally:
        bound.start()
        try:
            service.stop(stop_s * 0.8)
        finally:
            bound.cancel()
            for number, handler in former.items():
                signal.signal(number, handler)
            log.info("stopped")


def notify_systemd(state: str) -> None:
    """Tell systemd a state (sd_notify), if it wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
        link.connect(address)
        link.sendall(state.encode())
