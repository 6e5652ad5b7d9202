"""A crew of actors on a cluster of Ray: one model each, on whichever machine has room.

Machines may go and come. What an actor did that was lost with its machine is done by another; what
it did that ended it is an attempt of that input.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from recallseg.engines.errors import EngineRunError, EngineUnavailableError
from recallseg.engines.imports import import_ray
from recallseg.runtime.services.archive.crews import MOST_STARTS, Event, Lost
from recallseg.runtime.services.archive.worker import Failed, Opened, Order, Setup, Worker

__all__ = ["LOCAL", "Actors"]

LOCAL = "local"
_THREADS = 4  # cores of an actor on a CPU, if nothing is said and every machine has them
_GROW_S = 10.0
"""Between two looks at how many actors the cluster has room for."""
_KNOCK_S = 10.0
_STORE_BYTES = 100 * 2**20  # what goes between actors is small


class Actor(Worker):
    """A worker that says on which machine it runs."""

    def open(self, node: str = "") -> Opened | Failed:
        """See :meth:`Worker.open`."""
        ray = import_ray()
        return super().open(str(ray.get_runtime_context().get_node_id()))


@dataclass
class _Member:
    actor: Any
    ref: Any  # of what it is asked now; None while it is idle
    node: str = ""
    order: Order | None = None
    doubt: bool = False  # whether the last answer was that it cannot be reached
    since: float = field(default_factory=monotonic)


class Actors:
    """Workers that are actors of Ray.

    Parameters
    ----------
    setup : what they are told.
    address : of a cluster that runs, or ``local`` to start one on this machine, for this crew.
    count : how many; None for as many as there is room for, now and later.
    gpu : whether each takes a GPU.
    deadline_s : seconds after which one that is not done is ended.

    Raises
    ------
    EngineUnavailableError
        If Ray is not installed, or there is no cluster at that address.
    """

    def __init__(
        self, setup: Setup, address: str, count: int | None, gpu: bool, deadline_s: float
    ) -> None:
        self._ray = ray = import_ray()
        self._started = not ray.is_initialized()
        if self._started:
            _connect(ray, address)
        cpus = [each["CPU"] for each in self._machines() if each.get("CPU")]
        threads = setup.asking.get("threads") or int(min([_THREADS, *cpus]) or 1)
        self._needs = {"CPU": float(threads), "GPU": float(gpu)}
        self._setup = ray.put(setup.with_threads(threads))
        self._kind = ray.remote(
            num_cpus=threads, num_gpus=int(gpu), max_restarts=0, max_task_retries=0
        )(Actor)
        self._count = count
        self._deadline_s = deadline_s
        self._members: list[_Member] = []
        self._died_starting = 0
        self._grown = -_GROW_S

    @property
    def size(self) -> int:
        """How many workers there are, or will be."""
        return len(self._members)

    @property
    def idle(self) -> int:
        """How many orders can be given now."""
        return sum(each.ref is None for each in self._members)

    def give(self, order: Order) -> None:
        """Let an idle worker do something."""
        member = next(each for each in self._members if each.ref is None)
        member.order, member.since = order, monotonic()
        member.ref = member.actor.do.remote(order)

    def wait(self, seconds: float) -> Sequence[Event]:
        """Return what has happened; see :meth:`recallseg...crews.Crew.wait`."""
        self._fill()
        asked = {each.ref: each for each in self._members if each.ref is not None}
        events: list[Event] = []
        heard, rest = (
            self._ray.wait([*asked], num_returns=1, timeout=seconds) if asked else ([], [])
        )
        if heard and rest:  # all that is there by now
            more, _ = self._ray.wait(rest, num_returns=len(rest), timeout=0)
            heard += more
        for ref in heard:
            events += self._hear(asked[ref])
        now = monotonic()
        for member in list(self._members):
            if member.order is not None and now - member.since > self._deadline_s:
                why = f"it took more than {self._deadline_s:g} s"
                events.append(Event(member.order, Lost(why, True)))
                self._drop(member)
        return events

    def close(self) -> None:
        """End all workers, and the cluster if it was started here."""
        while self._members:
            self._drop(self._members[0])
        if self._started:
            self._ray.shutdown()

    def _hear(self, member: _Member) -> list[Event]:
        errors = self._ray.exceptions
        ref, member.ref = member.ref, None
        try:
            answer = self._ray.get(ref)
        except errors.ActorUnavailableError:
            # Either it is back soon, and what it did is lost, or it turns out to have ended.
            member.doubt = True
            member.ref = member.actor.open.remote()
            return []
        except errors.RayError as error:
            return self._lose(member, error)
        order, member.order = member.order, None
        if member.doubt:
            member.doubt = False
            return [] if order is None else [Event(order, Lost("it could not be reached", False))]
        if isinstance(answer, Opened):
            member.node, self._died_starting = answer.node, 0
        elif isinstance(answer, Failed) and answer.ends:
            self._drop(member)
        return [Event(order, answer)]

    def _lose(self, member: _Member, error: Exception) -> list[Event]:
        self._drop(member)
        gone = member.node not in self._alive()
        if member.node:
            why = "it ended the actor that segmented it"
            if isinstance(error, self._ray.exceptions.OutOfMemoryError):
                why += ", which needed more memory than its machine has"
            lost = Lost("its machine was lost" if gone else why, not gone)
            return [] if member.order is None else [Event(member.order, lost)]
        self._died_starting += 1
        if self._died_starting >= MOST_STARTS:
            raise EngineRunError(
                f"{MOST_STARTS} actors ended one after the other while they opened the library: "
                f"{error}"
            ) from error
        return []

    def _fill(self) -> None:
        """Make as many actors as are wanted; those without room wait for it."""
        wanted = self._count
        if wanted is None:
            if monotonic() - self._grown < _GROW_S and self._members:
                return
            self._grown = monotonic()
            wanted = max(1, sum(map(self._room, self._machines())))
        while len(self._members) < wanted:
            actor = self._kind.remote(self._setup)
            self._members.append(_Member(actor, actor.open.remote()))

    def _room(self, machine: dict[str, float]) -> int:
        return int(min(machine.get(name, 0) // need for name, need in self._needs.items() if need))

    def _machines(self) -> list[dict[str, float]]:
        return [each["Resources"] for each in self._ray.nodes() if each["Alive"]]

    def _alive(self) -> set[str]:
        return {each["NodeID"] for each in self._ray.nodes() if each["Alive"]}

    def _drop(self, member: _Member) -> None:
        self._members.remove(member)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(member.actor)


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}
    here = threading.current_thread() is threading.main_thread()
    hears = signal.getsignal(signal.SIGTERM)
    try:
        if address == LOCAL:
            # Else Ray makes one and keeps it in the user's home.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            with _no_reports(ray):
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
        else:
            _knock(address)
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise EngineUnavailableError(f"there is no cluster of Ray at {address}: {error}") from error
    finally:
        if here:  # Ray sets one that ends the process
            signal.signal(signal.SIGTERM, hears)


@contextmanager
def _no_reports(ray: Any) -> Iterator[None]:
    """Keep Ray from starting its reporter on this machine.

    Without a dashboard it has nothing else to do, and asks the metadata services of three clouds
    where it runs before it looks whether reports are off (Ray 2.60).
    """
    node = ray._private.node.Node
    start = node.start_api_server
    node.start_api_server = lambda *_, **__: None
    try:
        yield
    finally:
        node.start_api_server = start


def _knock(address: str) -> None:
    """See whether anybody listens, which Ray would try for minutes; OSError if not."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isascii() and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_S).close()
