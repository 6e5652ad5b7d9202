"""Who does the work: a crew of workers, of which some may be lost. Here: processes of this machine.

A worker does one thing at a time, so that whatever ends it is known.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, Protocol

from recallseg.engines.child import bound_process, ending, python_command, python_environment
from recallseg.engines.errors import EngineRunError
from recallseg.runtime.services.archive.worker import Answer, Failed, Opened, Order, Setup, Worker

__all__ = ["MOST_STARTS", "Crew", "Event", "Lost", "Processes"]

MOST_STARTS = 5
"""Workers that may die one after the other while they open the library."""


@dataclass(frozen=True)
class Lost:
    """A worker ended while it did something.

    ``blamed``: by what it did, as far as is known; not when its machine went.
    """

    why: str
    blamed: bool


@dataclass(frozen=True)
class Event:
    """What came of an order; None for that of a worker that is ready or cannot start."""

    order: Order | None
    answer: Answer | Lost


class Crew(Protocol):
    """Workers of one kind, wherever they are."""

    @property
    def size(self) -> int:
        """How many workers there are, or will be."""

    @property
    def idle(self) -> int:
        """How many orders can be given now."""

    def give(self, order: Order) -> None:
        """Let an idle worker do something."""

    def wait(self, seconds: float) -> Sequence[Event]:
        """Return what has happened, after at most so many seconds; replace who was lost.

        Raises
        ------
        EngineRunError
            If workers die whenever they start.
        """

    def close(self) -> None:
        """End all workers, whatever they are doing."""


@dataclass
class _Member:
    process: subprocess.Popen[bytes]
    link: Connection[Any, Any]
    ready: bool = False
    order: Order | None = None
    since: float = field(default_factory=monotonic)


class Processes:
    """Workers that are processes of this machine.

    Parameters
    ----------
    setup : what they are told.
    count : how many.
    deadline_s : seconds after which one that is not done is ended.
    """

    def __init__(self, setup: Setup, count: int, deadline_s: float) -> None:
        self._setup = setup
        self._count = count
        self._deadline_s = deadline_s
        self._members: list[_Member] = []
        self._died_starting = 0

    @property
    def size(self) -> int:
        """How many workers there are, or will be."""
        return self._count

    @property
    def idle(self) -> int:
        """How many orders can be given now."""
        return sum(each.ready and each.order is None for each in self._members)

    def give(self, order: Order) -> None:
        """Let an idle worker do something."""
        member = next(each for each in self._members if each.ready and each.order is None)
        member.order, member.since = order, monotonic()
        with suppress(OSError):  # it has ended, which is heard when it is waited for
            member.link.send(order)

    def wait(self, seconds: float) -> Sequence[Event]:
        """Return what has happened; see :meth:`Crew.wait`."""
        while len(self._members) < self._count:
            self._members.append(self._start())
        events = []
        heard = wait([each.link for each in self._members], seconds)
        for member in list(self._members):
            if member.link in heard:
                events += self._hear(member)
            elif monotonic() - member.since > self._deadline_s and (
                member.order is not None or not member.ready
            ):
                events += self._lose(member, f"it took more than {self._deadline_s:g} s")
        return events

    def _hear(self, member: _Member) -> list[Event]:
        try:
            answer: Answer = member.link.recv()
        except (EOFError, OSError):
            status = member.process.wait()
            return self._lose(member, f"it ended the process that segmented it ({ending(status)})")
        order, member.order = member.order, None
        if isinstance(answer, Opened):
            member.ready, self._died_starting = True, 0
        elif isinstance(answer, Failed) and answer.ends:
            self._drop(member)
        return [Event(order, answer)]

    def _lose(self, member: _Member, why: str) -> list[Event]:
        self._drop(member)
        if member.ready:
            return [] if member.order is None else [Event(member.order, Lost(why, True))]
        self._died_starting += 1
        if self._died_starting >= MOST_STARTS:
            raise EngineRunError(
                f"{MOST_STARTS} workers ended one after the other while they opened the library: "
                f"{why.removeprefix('it ended the process that segmented it ')}."
            )
        return []

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        while self._members:
            self._drop(self._members[0])

    def _drop(self, member: _Member) -> None:
        self._members.remove(member)
        member.link.close()
        member.process.kill()
        member.process.wait()

    def _start(self) -> _Member:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(  # noqa: S603  # this Python, this module
                python_command(__name__, str(theirs.fileno()), str(os.getpid())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=python_environment(),
            )
            link: Connection[Any, Any] = Connection(ours.detach())
        with suppress(OSError):  # it has ended, which is heard when it is waited for
            link.send(self._setup)
        return _Member(process, link)


def main() -> None:
    """Do what is asked for, until nobody asks any more; see :class:`Processes`."""
    descriptor, parent = map(int, sys.argv[1:3])
    if not bound_process(parent, None):
        return
    link: Connection[Any, Any] = Connection(descriptor)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        worker = Worker(link.recv())
        link.send(worker.open())
        while True:
            link.send(worker.do(link.recv()))
